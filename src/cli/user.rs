//! `milepost user`: operators create, change, disable and enable users, directly in the
//! database.

use std::{
    io::{self, IsTerminal as _, Read as _},
    path::PathBuf,
    process::ExitCode,
};

use clap::{Args, Subcommand, ValueEnum};
use futures_util::{FutureExt as _, future::BoxFuture};

use super::{clean, database::OpenDatabase, print_line};
use crate::{
    auth::Passwords,
    config::{BcryptSettings, DatabaseSource},
    db::{Database, Transaction, Unconditional, migrations},
    error::{BoxError, Result, check_text},
    models::{
        caller::UserRole,
        email::{Email, EmailKey},
        user::{NewUser, User as UserRow},
    },
    secret::{Password, PasswordHash},
};

/// Longest password file that is read, in bytes.
const PASSWORD_FILE_BYTES: u64 = 4096;

/// Creates users, sets their passwords, and disables and enables them.
#[derive(Args, Clone, Debug)]
pub(super) struct User {
    #[command(subcommand)]
    command: Command,
}

#[derive(Clone, Debug, Subcommand)]
enum Command {
    /// Create a user; prints the user's id and e-mail
    Create {
        /// Role of the user, which cannot be changed later
        #[arg(long, value_enum)]
        role: Role,
        /// First name of the user, optional
        #[arg(long, default_value = "", value_parser = name)]
        first_name: String,
        /// Last name of the user, optional
        #[arg(long, default_value = "", value_parser = name)]
        last_name: String,
        #[command(flatten)]
        password: PasswordSource,
        #[command(flatten)]
        user: TargetUser,
    },
    /// Set a user's password, which ends the user's sessions; API keys stay valid
    SetPassword {
        #[command(flatten)]
        password: PasswordSource,
        #[command(flatten)]
        user: TargetUser,
    },
    /// Disable a user: end the user's sessions, API keys and watch tokens, and refuse log-ins from then on
    Disable {
        #[command(flatten)]
        user: TargetUser,
    },
    /// Let a disabled user log in again; earlier sessions, API keys and watch tokens stay ended
    Enable {
        #[command(flatten)]
        user: TargetUser,
    },
}

/// The user to change, and the database.
#[derive(Args, Clone, Debug)]
struct TargetUser {
    /// E-mail address of the user
    email: String,

    #[command(flatten)]
    database: DatabaseSource,
}

/// A file or stdin, never an argument: all users of the machine can read the
/// arguments of a process.
#[derive(Args, Clone, Debug)]
struct PasswordSource {
    /// File that contains the password; without it, a terminal is asked twice, or stdin is read
    #[arg(long, value_name = "FILE")]
    password_file: Option<PathBuf>,

    #[command(flatten)]
    bcrypt: BcryptSettings,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Role {
    /// A user for whom providers run jobs
    Customer,
    /// A user who runs jobs and appends their events
    Provider,
}

impl User {
    pub(super) async fn run(self) -> Result<ExitCode, BoxError> {
        let (user, outcome) = match self.command {
            Command::Create { role, first_name, last_name, password, user } => {
                let role = match role {
                    Role::Customer => UserRole::Customer,
                    Role::Provider => UserRole::Provider,
                };
                let email =
                    Email::new(user.email.clone()).map_err(|violation| format!("the e-mail {violation}"))?;
                let password_hash = password.hash().await?;
                let new = NewUser { role, email, password_hash, first_name, last_name };
                (user.change(move |tx| async move { new.create(tx).await }.boxed()).await?, "created")
            }
            Command::SetPassword { password, user } => {
                let hash = password.hash().await?;
                let email = EmailKey::of(&user.email);
                let changed = user
                    .change(move |tx| async move { UserRow::set_password(tx, &email, &hash).await }.boxed())
                    .await?;
                let outcome = match changed.disabled_at {
                    None => "has a new password",
                    Some(_) => {
                        "has a new password and stays disabled: `milepost user enable` lets the user log in"
                    }
                };
                (changed, outcome)
            }
            Command::Disable { user } => {
                let email = EmailKey::of(&user.email);
                (
                    user.change(move |tx| async move { UserRow::disable(tx, &email).await }.boxed()).await?,
                    "disabled",
                )
            }
            Command::Enable { user } => {
                let email = EmailKey::of(&user.email);
                let enabled = user.change(move |tx| async move { UserRow::enable(tx, &email).await }.boxed());
                let (user, was_disabled) = enabled.await?;
                (user, if was_disabled { "enabled" } else { "is not disabled: nothing was changed" })
            }
        };
        print_line(&format!("{} {} {outcome}", user.id, clean(&user.email)))?;
        Ok(ExitCode::SUCCESS)
    }
}

impl TargetUser {
    /// Runs `change` on the database, once its schema is known to fit this binary.
    async fn change<T: Send + 'static>(
        &self,
        change: impl for<'a> FnOnce(&'a mut Transaction<'_>) -> BoxFuture<'a, Result<T>> + Send + 'static,
    ) -> Result<T, BoxError> {
        let open = OpenDatabase::to_use(&self.database).await?;
        let changed = async {
            if open.embedded.is_some() {
                migrations::migrate(open.url.reveal(), None).await?;
            }
            let database = Database::new(open.url.clone(), self.database.settings.clone())?;
            migrations::check(&database, true).await?;
            Ok(database.write(Unconditional, change).await?)
        };
        let changed = changed.await;
        open.close().await?;
        changed
    }
}

impl PasswordSource {
    async fn hash(&self) -> Result<PasswordHash, BoxError> {
        Ok(Passwords::new(self.bcrypt.bcrypt_cost, 1).hash(self.password()?).await?)
    }

    fn password(&self) -> Result<Password, BoxError> {
        let mut text = String::new();
        let stdin = io::stdin();
        match &self.password_file {
            Some(path) => {
                let file = std::fs::File::open(path)
                    .map_err(|error| format!("cannot read the password from {}: {error}", path.display()))?;
                file.take(PASSWORD_FILE_BYTES).read_to_string(&mut text)?;
            }
            None if stdin.is_terminal() => {
                return ask_twice(|prompt| {
                    eprint!("{prompt}");
                    console::Term::stderr().read_secure_line()
                });
            }
            None => {
                stdin.take(PASSWORD_FILE_BYTES).read_to_string(&mut text)?;
            }
        }
        // Without its final line break.
        let line = text.strip_suffix('\n').unwrap_or(&text);
        valid(line.strip_suffix('\r').unwrap_or(line).to_owned())
    }
}

/// Asks for a password that is not shown, by a function that shows a prompt and reads a line.
fn ask_twice(mut ask: impl FnMut(&str) -> io::Result<String>) -> Result<Password, BoxError> {
    let password = valid(ask("Password: ")?)?;
    if ask("The same password again: ")?.as_bytes() != password.as_bytes() {
        return Err("the two passwords differ: nothing was changed".into());
    }
    Ok(password)
}

fn valid(password: String) -> Result<Password, BoxError> {
    Password::new(password).map_err(|violation| format!("the password {violation}").into())
}

/// Parses a name of a user.
fn name(text: &str) -> Result<String, String> {
    check_text(text).map(|()| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The result of [`ask_twice`] with these answers, as text, and how often it asked.
    fn asked(answers: &[&str]) -> (Result<Vec<u8>, String>, usize) {
        let mut given = answers.iter();
        let asked = ask_twice(|_| {
            given.next().map(|line| (*line).to_owned()).ok_or(io::ErrorKind::UnexpectedEof.into())
        });
        let asked = asked.map(|password| password.as_bytes().to_vec()).map_err(|error| error.to_string());
        (asked, answers.len() - given.len())
    }

    #[test]
    fn a_name_of_a_user_keeps_to_the_rule_of_every_text() {
        assert_eq!(name("Ada"), Ok("Ada".to_owned()));
        for bad in ["a\0b", &"x".repeat(257)] {
            assert!(name(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_terminal_is_asked_twice_for_a_password_unless_the_first_answer_is_invalid() {
        assert_eq!(asked(&["long enough", "long enough"]), (Ok(b"long enough".to_vec()), 2));
        let differ = "the two passwords differ: nothing was changed";
        assert_eq!(asked(&["long enough", "long enougg"]), (Err(differ.to_owned()), 2));
        let short = "the password must have 8 to 71 bytes in UTF-8";
        assert_eq!(asked(&["short", "short"]), (Err(short.to_owned()), 1));
    }
}
