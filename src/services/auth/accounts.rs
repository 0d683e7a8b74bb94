//! Requests about accounts and passwords, and the messages for users and sessions.

use crate::{
    auth::NewAccount,
    error::{Error, Result, Violations, check_text, quoted},
    limits::UPDATE_MASK_PATHS,
    models::{
        caller::UserRole,
        email::{Email, EmailKey},
        session::Session,
        user::{Names, User},
    },
    pb,
    proto_enums::{ProtoEnum as _, timestamp},
    secret::Password,
    services::parse,
};

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

/// Only the limits of every text are violations. All other malformed e-mails and passwords
/// are answered as wrong ones, so that the answer reveals nothing.
pub(super) fn email_and_password(request: pb::LogInRequest) -> Result<(EmailKey, Option<Password>)> {
    let mut violations = Violations::default();
    let email = EmailKey::of(&parse::text(&mut violations, "email", request.email));
    let password = present_password(&mut violations, "password", request.password);
    violations.or((email, password))
}

/// The current password and the new one.
pub(super) fn passwords(request: pb::ChangePasswordRequest) -> Result<(Option<Password>, Password)> {
    let mut violations = Violations::default();
    let current = present_password(&mut violations, "current_password", request.current_password);
    match Password::new(request.new_password) {
        Ok(new) => violations.or((current, new)),
        Err(description) => {
            violations.add("new_password", description);
            Err(Error::Invalid(violations))
        }
    }
}

/// A password to verify, by the rule of [`check_text`], but without the value in the
/// description. None if its format is not permitted: it is then refused like any wrong
/// password, after the same work.
fn present_password(violations: &mut Violations, field: &str, value: String) -> Option<Password> {
    if check_text(&value).is_err() {
        violations.add(field, "must have at most 256 characters and no NUL");
    }
    Password::new(value).ok()
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
        if paths.len() > UPDATE_MASK_PATHS {
            violations.add("update_mask", format!("must have at most {UPDATE_MASK_PATHS} paths"));
            paths.truncate(UPDATE_MASK_PATHS);
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
            customer_code: user.customer_code.unwrap_or_default(),
        }
    }
}

/// `secret` is empty except in the answer that creates the session.
pub(super) fn session_message(secret: String, session: &Session) -> pb::Session {
    pb::Session {
        id: session.id.to_string(),
        secret,
        expires_at: Some(timestamp(session.expires_at)),
        created_at: Some(timestamp(session.created_at)),
        updated_at: Some(timestamp(session.updated_at)),
    }
}
