//! `milepost user`: operators list, create, change, disable and enable users, directly in the
//! database.

use std::{
    io::{self, IsTerminal as _, Read as _},
    path::PathBuf,
    process::ExitCode,
};

use clap::{Args, Subcommand, ValueEnum};
use futures_util::{FutureExt as _, future::BoxFuture};

use super::{
    clean,
    database::OpenDatabase,
    exit::WrongInput,
    output::{List, Output, Row, json, time},
    print_line,
};
use crate::{
    auth::Passwords,
    config::{BcryptSettings, DatabaseSource},
    db::{Database, Payer, Transaction, Unconditional, migrations, read},
    error::{BoxError, Result, check_text},
    models::{
        caller::UserRole,
        email::{Email, EmailKey},
        user::{NewUser, User as UserRow},
    },
    pb,
    proto_enums::timestamp,
    secret::{Password, PasswordHash},
};

/// Longest password file that is read, in bytes.
const PASSWORD_FILE_BYTES: u64 = 4096;

/// Lists and creates users, sets their passwords, and disables and enables them.
#[derive(Args, Clone, Debug)]
pub(super) struct User {
    #[command(subcommand)]
    command: Command,
}

#[derive(Clone, Debug, Subcommand)]
enum Command {
    /// List the users, oldest first
    List {
        /// Only users with this role
        #[arg(long, value_enum)]
        role: Option<Role>,
        /// Only disabled users
        #[arg(long)]
        disabled: bool,
        /// Most users to list [default: all]
        #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
        limit: Option<u32>,
        #[command(flatten)]
        output: Output,
        #[command(flatten)]
        database: DatabaseSource,
    },
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
    output: Output,

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

impl From<Role> for UserRole {
    fn from(role: Role) -> Self {
        match role {
            Role::Customer => Self::Customer,
            Role::Provider => Self::Provider,
        }
    }
}

impl User {
    pub(super) async fn run(self) -> Result<ExitCode, BoxError> {
        match self.command {
            Command::List { role, disabled, limit, output, database } => {
                let columns = ["ID", "ROLE", "CREATED", "DISABLED", "E-MAIL", "NAME"];
                let list = output.list_by(&columns, row, user_json);
                let role = role.map(UserRole::from);
                with_database(&database, async |database| {
                    print_all(list, database, role, disabled, limit).await
                })
                .await?;
            }
            Command::Create { role, first_name, last_name, password, user } => {
                let email = Email::new(user.email.clone())
                    .map_err(|violation| WrongInput(format!("the e-mail {violation}")))?;
                let password_hash = password.hash().await?;
                let new = NewUser { role: role.into(), email, password_hash, first_name, last_name };
                let created = user.change(move |tx| async move { new.create(tx).await }.boxed()).await?;
                user.print(&created, "created")?;
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
                user.print(&changed, outcome)?;
            }
            Command::Disable { user } => {
                let email = EmailKey::of(&user.email);
                let disabled =
                    user.change(move |tx| async move { UserRow::disable(tx, &email).await }.boxed());
                user.print(&disabled.await?, "disabled")?;
            }
            Command::Enable { user } => {
                let email = EmailKey::of(&user.email);
                let enabled = user.change(move |tx| async move { UserRow::enable(tx, &email).await }.boxed());
                let (enabled, was_disabled) = enabled.await?;
                user.print(
                    &enabled,
                    if was_disabled { "enabled" } else { "is not disabled: nothing was changed" },
                )?;
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl TargetUser {
    async fn change<T: Send + 'static>(
        &self,
        change: impl for<'a> FnOnce(&'a mut Transaction<'_>) -> BoxFuture<'a, Result<T>> + Send + 'static,
    ) -> Result<T, BoxError> {
        with_database(&self.database, async |database| Ok(database.write(Unconditional, change).await?)).await
    }

    fn print(&self, user: &UserRow, outcome: &str) -> Result<(), BoxError> {
        let line = match self.output.is_json() {
            true => user_json(user)?,
            false => format!("{} {} {outcome}", user.id, clean(&user.email)),
        };
        Ok(print_line(&line)?)
    }
}

/// Runs `work` on the database, once its schema is known to fit this binary.
async fn with_database<T>(
    source: &DatabaseSource,
    work: impl AsyncFnOnce(&Database) -> Result<T, BoxError>,
) -> Result<T, BoxError> {
    let open = OpenDatabase::to_use(source).await?;
    let done = async {
        if open.embedded.is_some() {
            migrations::migrate(open.url.reveal(), None).await?;
        }
        let database = Database::new(open.url.clone(), source.settings.clone())?;
        migrations::check(&database, true).await?;
        work(&database).await
    };
    let done = done.await;
    open.close().await?;
    done
}

async fn print_all(
    list: List<UserRow>,
    database: &Database,
    role: Option<UserRole>,
    disabled: bool,
    limit: Option<u32>,
) -> Result<(), BoxError> {
    let page = async |size: i32, token: String| {
        let (after, size) = (token.parse().ok(), i64::from(size));
        let users = read!(database, Payer::Server, |conn| UserRow::list(conn, role, disabled, after, size))?;
        let more = users.last().filter(|_| i64::try_from(users.len()) == Ok(size));
        let next = more.map_or_else(String::new, |user| user.id.to_string());
        Ok((users, next))
    };
    list.print_pages(limit, page).await
}

fn row(user: &UserRow) -> Row {
    vec![
        user.id.to_string(),
        user.role.label().to_owned(),
        time(Some(timestamp(user.created_at))),
        time(user.disabled_at.map(timestamp)),
        user.email.clone(),
        format!("{} {}", user.first_name, user.last_name).trim().to_owned(),
    ]
}

/// The message of the API, and what only operators see of a user.
fn user_json(user: &UserRow) -> Result<String, BoxError> {
    let disabled_at = user.disabled_at.map(|at| time(Some(timestamp(at))));
    let more = disabled_at.as_deref().map(|at| ("disabledAt", at));
    json(&pb::User::from(user.clone()), more.as_slice())
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
                    .map_err(|error| format!("cannot read the password from {}: {error}", path.display()))
                    .map_err(WrongInput)?;
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
        return Err(WrongInput("the two passwords differ: nothing was changed".to_owned()).into());
    }
    Ok(password)
}

fn valid(password: String) -> Result<Password, BoxError> {
    Password::new(password).map_err(|violation| WrongInput(format!("the password {violation}")).into())
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
