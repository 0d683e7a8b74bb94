//! Requests about accounts and passwords, and the messages for users and sessions.

use crate::{
    auth::NewAccount,
    error::{Error, Result, Violations, quoted},
    models::{
        caller::UserRole,
        session::Session,
        user::{Email, Names, User},
    },
    pb,
    proto_enums::{ProtoEnum as _, timestamp},
    secret::Password,
    services::parse,
};

/// Most paths of an update mask. Two are valid; the others are reported as violations.
const MASK_PATHS: usize = 64;

impl TryFrom<pb::SignUpRequest> for NewAccount {
    type Error = Error;

    fn try_from(request: pb::SignUpRequest) -> Result<Self> {
        let mut violations = Violations::default();
        let role = UserRole::from_proto(request.role);
        if role.is_none() {
            violations.add("role", "must be USER_ROLE_CUSTOMER or USER_ROLE_PROVIDER");
        }
        let email = Email::new(request.email).map_err(|error| violations.add("email", error)).ok();
        let password =
            Password::new(request.password).map_err(|error| violations.add("password", error)).ok();
        let first_name = parse::text(&mut violations, "first_name", request.first_name);
        let last_name = parse::text(&mut violations, "last_name", request.last_name);
        match (role, email, password) {
            (Some(role), Some(email), Some(password)) => {
                violations.or(Self { role, email, password, first_name, last_name })
            }
            _ => Err(Error::Invalid(violations)),
        }
    }
}

/// The content of a `LogInRequest`. The password is none if its format is not permitted;
/// it is then refused like any wrong password, after the same work.
pub(super) struct EmailAndPassword {
    pub(super) email: String,
    pub(super) password: Option<Password>,
}

impl TryFrom<pb::LogInRequest> for EmailAndPassword {
    type Error = Error;

    /// Only the limits of every text are violations. All other malformed e-mails and
    /// passwords are answered as wrong ones, so that the answer reveals nothing.
    fn try_from(request: pb::LogInRequest) -> Result<Self> {
        let mut violations = Violations::default();
        let email = parse::text(&mut violations, "email", request.email);
        secret_text(&mut violations, "password", &request.password);
        violations.or(Self { email, password: Password::new(request.password).ok() })
    }
}

pub(super) struct NewPassword {
    pub(super) current: Option<Password>,
    pub(super) new: Password,
}

impl TryFrom<pb::ChangePasswordRequest> for NewPassword {
    type Error = Error;

    fn try_from(request: pb::ChangePasswordRequest) -> Result<Self> {
        let mut violations = Violations::default();
        secret_text(&mut violations, "current_password", &request.current_password);
        match Password::new(request.new_password) {
            Ok(new) => violations.or(Self { current: Password::new(request.current_password).ok(), new }),
            Err(description) => {
                violations.add("new_password", description);
                Err(Error::Invalid(violations))
            }
        }
    }
}

/// As [`parse::text`], without the value in the description.
fn secret_text(violations: &mut Violations, field: &str, value: &str) {
    let mut unquoted = Violations::default();
    parse::text(&mut unquoted, field, value.to_owned());
    if !unquoted.is_empty() {
        violations.add(field, "must have at most 256 characters and no NUL");
    }
}

impl TryFrom<pb::UpdateCurrentUserRequest> for Names {
    type Error = Error;

    fn try_from(request: pb::UpdateCurrentUserRequest) -> Result<Self> {
        let mut violations = Violations::default();
        let user = request.user.unwrap_or_else(|| {
            violations.add("user", "must be given");
            pb::User::default()
        });
        let mut paths = request.update_mask.unwrap_or_default().paths;
        if paths.len() > MASK_PATHS {
            violations.add("update_mask", format!("must have at most {MASK_PATHS} paths"));
            paths.truncate(MASK_PATHS);
        }
        for path in paths.iter().filter(|path| !matches!(path.as_str(), "first_name" | "last_name")) {
            let description = format!("{} is neither first_name nor last_name", quoted(path));
            violations.add("update_mask", description);
        }
        let in_mask = |name: &str| paths.is_empty() || paths.iter().any(|path| path == name);
        let mut name = |path: &str, field: &str, value: String| {
            in_mask(path).then(|| parse::text(&mut violations, field, value))
        };
        let first_name = name("first_name", "user.first_name", user.first_name);
        let last_name = name("last_name", "user.last_name", user.last_name);
        violations.or(Self { first_name, last_name })
    }
}

impl From<User> for pb::User {
    fn from(user: User) -> Self {
        Self {
            id: user.id.to_string(),
            role: user.role.to_proto(),
            email: user.email,
            first_name: user.first_name,
            last_name: user.last_name,
            created_at: Some(timestamp(user.created_at)),
            updated_at: Some(timestamp(user.updated_at)),
        }
    }
}

/// `secret` is empty except in the answer that creates the session.
pub(super) fn session_message(secret: String, session: &Session) -> pb::Session {
    let expires_at = Some(timestamp(session.expires_at));
    pb::Session { id: session.id.to_string(), secret, expires_at }
}
