//! `milepost user`: what operators do to users, straight in the database.

use std::{
    io::{IsTerminal as _, Read as _},
    path::PathBuf,
    process::ExitCode,
};

use clap::{Args, Subcommand, ValueEnum};

use super::{database::OpenDatabase, say};
use crate::{
    auth::Passwords,
    config::{BcryptConfig, DatabaseConfig},
    db::{Connection, Database, migrations},
    error::BoxError,
    models::{
        caller::UserRole,
        user::{Email, NewUser, User as UserRow},
    },
    secret::{Password, PasswordHash},
};

/// Longest password file that is read, in bytes.
const PASSWORD_FILE_BYTES: u64 = 4096;

/// Makes users and takes their access away.
#[derive(Args, Clone, Debug)]
pub(super) struct User {
    #[command(subcommand)]
    command: Command,
}

#[derive(Clone, Debug, Subcommand)]
enum Command {
    /// Make a user
    Create {
        /// What they are, for good
        #[arg(long, value_enum)]
        role: Role,
        /// May be left out
        #[arg(long, default_value = "")]
        first_name: String,
        /// May be left out
        #[arg(long, default_value = "")]
        last_name: String,
        #[command(flatten)]
        password: PasswordSource,
        #[command(flatten)]
        user: Whom,
    },
    /// Give a user another password, which ends their sessions; API keys stay
    SetPassword {
        #[command(flatten)]
        password: PasswordSource,
        #[command(flatten)]
        user: Whom,
    },
    /// End a user's sessions, keys and watch tokens, and let them in no more
    Disable {
        #[command(flatten)]
        user: Whom,
    },
}

/// Which user, in which database.
#[derive(Args, Clone, Debug)]
struct Whom {
    /// The user's e-mail address
    email: String,

    #[command(flatten)]
    database: DatabaseConfig,
}

/// Where the password comes from: never from an argument, which everybody on
/// the machine could read.
#[derive(Args, Clone, Debug)]
struct PasswordSource {
    /// File that holds the password; without it, it is read from stdin
    #[arg(long, value_name = "FILE")]
    password_file: Option<PathBuf>,

    #[command(flatten)]
    bcrypt: BcryptConfig,
}

/// What a user is.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Role {
    /// Somebody whom jobs are run for
    Customer,
    /// Somebody who runs jobs
    Provider,
}

impl User {
    pub(super) async fn run(self) -> Result<ExitCode, BoxError> {
        let (user, done) = match self.command {
            Command::Create { role, first_name, last_name, password, user } => {
                let role = match role {
                    Role::Customer => UserRole::Customer,
                    Role::Provider => UserRole::Provider,
                };
                let email = Email::new(user.email.clone())?;
                let password_hash = password.hash().await?;
                let new = NewUser { role, email, password_hash, first_name, last_name };
                (user.change(async |conn| Ok(new.create(conn).await?)).await?, "created")
            }
            Command::SetPassword { password, user } => {
                let hash = password.hash().await?;
                let email = user.email.clone();
                let changed = user.change(async |conn| Ok(UserRow::set_password(conn, &email, &hash).await?));
                (changed.await?, "has a new password")
            }
            Command::Disable { user } => {
                let email = user.email.clone();
                (user.change(async |conn| Ok(UserRow::disable(conn, &email).await?)).await?, "disabled")
            }
        };
        say(&format!("{} {} {done}", user.id, user.email))?;
        Ok(ExitCode::SUCCESS)
    }
}

impl Whom {
    /// Changes the user in a database whose schema is ours.
    async fn change(
        &self,
        change: impl AsyncFnOnce(&mut Connection) -> Result<UserRow, BoxError>,
    ) -> Result<UserRow, BoxError> {
        let open = OpenDatabase::to_use(&self.database).await?;
        let changed = async {
            if open.embedded.is_some() {
                migrations::migrate(&open.settings.url, None).await?;
            }
            let database = Database::new(open.settings.clone())?;
            migrations::check(&database, true).await?;
            change(&mut database.get().await?).await
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

    /// The password without the line break that ends it.
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
