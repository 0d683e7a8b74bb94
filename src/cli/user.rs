//! `milepost user`: operators create, change and disable users, directly in the
//! database.

use std::{
    io::{IsTerminal as _, Read as _},
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
    error::{BoxError, Result},
    models::{
        caller::UserRole,
        email::{Email, EmailKey},
        user::{NewUser, User as UserRow},
    },
    secret::{Password, PasswordHash},
};

/// Longest password file that is read, in bytes.
const PASSWORD_FILE_BYTES: u64 = 4096;

/// Creates users, sets their passwords and disables them.
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
        #[arg(long, default_value = "")]
        first_name: String,
        /// Last name of the user, optional
        #[arg(long, default_value = "")]
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
    /// File that contains the password; without it, the password is read from stdin
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
                let email = Email::new(user.email.clone())?;
                let password_hash = password.hash().await?;
                let new = NewUser { role, email, password_hash, first_name, last_name };
                (user.change(move |tx| async move { new.create(tx).await }.boxed()).await?, "created")
            }
            Command::SetPassword { password, user } => {
                let hash = password.hash().await?;
                let email = EmailKey::of(&user.email);
                let changed = user
                    .change(move |tx| async move { UserRow::set_password(tx, &email, &hash).await }.boxed());
                (changed.await?, "has a new password")
            }
            Command::Disable { user } => {
                let email = EmailKey::of(&user.email);
                (
                    user.change(move |tx| async move { UserRow::disable(tx, &email).await }.boxed()).await?,
                    "disabled",
                )
            }
        };
        print_line(&format!("{} {} {outcome}", user.id, clean(&user.email)))?;
        Ok(ExitCode::SUCCESS)
    }
}

impl TargetUser {
    /// Runs `change` on the database, once its schema is known to fit this binary.
    async fn change(
        &self,
        change: impl for<'a> FnOnce(&'a mut Transaction<'_>) -> BoxFuture<'a, Result<UserRow>> + Send + 'static,
    ) -> Result<UserRow, BoxError> {
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
        let password = Password::new(self.read()?)?;
        Ok(Passwords::new(self.bcrypt.bcrypt_cost, 1).hash(password).await?)
    }

    /// Reads the password, without its final line break.
    fn read(&self) -> Result<String, BoxError> {
        let mut text = String::new();
        match &self.password_file {
            Some(path) => {
                let file = std::fs::File::open(path)
                    .map_err(|error| format!("cannot read the password from {}: {error}", path.display()))?;
                file.take(PASSWORD_FILE_BYTES).read_to_string(&mut text)?;
            }
            None => {
                let stdin = std::io::stdin();
                if stdin.is_terminal() {
                    eprint!("Password: ");
                    text = console::Term::stderr().read_secure_line()?;
                } else {
                    stdin.take(PASSWORD_FILE_BYTES).read_to_string(&mut text)?;
                }
            }
        }
        let line = text.strip_suffix('\n').unwrap_or(&text);
        Ok(line.strip_suffix('\r').unwrap_or(line).to_owned())
    }
}
