//! AuthService: users, their sessions and their API keys.

use chrono::{DateTime, Utc};
use tonic::{Request, Response, Status};
use uuid::Uuid;

use super::{App, page, parse};
use crate::{
    auth::Ending,
    error::{Error, Result, Violations, quoted},
    event_log::wire,
    models::{
        api_key::{ApiKey, NewApiKey},
        caller::{CredentialId, KeyManager, Scope, UserRole},
        session::{NewSession, Session},
        user::{Email, Names, NewUser, User},
    },
    pb,
    secret::{Password, Secret, SecretKind},
};

/// Most scopes of a key: each can stand there once.
const SCOPES: usize = 3;

/// The service.
#[derive(Clone, Debug)]
pub struct AuthApi(pub App);

#[tonic::async_trait]
impl pb::auth_service_server::AuthService for AuthApi {
    async fn sign_up(
        &self,
        request: Request<pb::SignUpRequest>,
    ) -> Result<Response<pb::SignUpResponse>, Status> {
        let App { database, auth, .. } = &self.0;
        if !auth.settings().sign_up_open {
            return Err(Error::SignUpClosed.into());
        }
        let NewAccount { role, email, password, first_name, last_name } = request.into_inner().try_into()?;
        let password_hash = auth.passwords().hash(password).await?;
        let secret = Secret::generate(SecretKind::Session)?;
        let (secret_hash, lifetime) = (secret.hash(), auth.settings().session_lifetime);
        let (user, session) = database
            .detached(async move |mut conn| {
                let user = NewUser { role, email, password_hash, first_name, last_name };
                user.sign_up(&mut conn, secret_hash, lifetime).await
            })
            .await?;
        let session = Some(session_with(secret.reveal(), &session));
        Ok(Response::new(pb::SignUpResponse { user: Some(user.into()), session }))
    }

    async fn log_in(
        &self,
        request: Request<pb::LogInRequest>,
    ) -> Result<Response<pb::LogInResponse>, Status> {
        let App { database, auth, .. } = &self.0;
        let Claim { email, password } = request.into_inner().try_into()?;
        // One way for all who fail: a query, the work of one comparison.
        let found = User::find_by_email(&mut *database.get().await?, &email).await?;
        let hash = found.as_ref().map(|(_, hash)| hash.clone());
        let good = auth.passwords().verify(password, hash).await?;
        let (user, hash) =
            found.filter(|(user, _)| good && user.disabled_at.is_none()).ok_or(Error::LogInFailed)?;
        let secret = Secret::generate(SecretKind::Session)?;
        let session = NewSession {
            user_id: user.id,
            secret_hash: secret.hash(),
            lifetime: auth.settings().session_lifetime,
        };
        let session = database
            .detached(async move |mut conn| session.insert_if_unchanged(&mut conn, &hash).await)
            .await?
            .ok_or(Error::LogInFailed)?;
        let session = Some(session_with(secret.reveal(), &session));
        Ok(Response::new(pb::LogInResponse { user: Some(user.into()), session }))
    }

    async fn log_out(
        &self,
        request: Request<pb::LogOutRequest>,
    ) -> Result<Response<pb::LogOutResponse>, Status> {
        let credential = self.0.authenticate(request.metadata()).await?;
        let account = credential.caller().account()?;
        let (app, ending) = (self.0.clone(), Ending::Credential(credential.caller().credential()));
        self.0
            .database
            .detached(async move |mut conn| {
                Session::end(&mut conn, account).await?;
                app.end(ending);
                Ok(())
            })
            .await?;
        Ok(Response::new(pb::LogOutResponse {}))
    }

    async fn get_current_user(
        &self,
        request: Request<pb::GetCurrentUserRequest>,
    ) -> Result<Response<pb::GetCurrentUserResponse>, Status> {
        use pb::get_current_user_response::Credential;
        let credential = self.0.authenticate(request.metadata()).await?;
        let caller = credential.caller();
        let mut conn = self.0.database.get().await?;
        let user = User::of_caller(&mut conn, caller).await?;
        let credential = match caller.credential() {
            CredentialId::Session(_) => {
                let session = Session::of_account(&mut conn, caller.account()?).await?;
                Credential::Session(session_with(String::new(), &session))
            }
            CredentialId::ApiKey(_) => Credential::ApiKey(ApiKey::of_caller(&mut conn, caller).await?.into()),
        };
        let (user, credential) = (Some(user.into()), Some(credential));
        Ok(Response::new(pb::GetCurrentUserResponse { user, credential }))
    }

    async fn update_current_user(
        &self,
        request: Request<pb::UpdateCurrentUserRequest>,
    ) -> Result<Response<pb::UpdateCurrentUserResponse>, Status> {
        let credential = self.0.authenticate(request.metadata()).await?;
        let account = credential.caller().account()?;
        let names: Names = request.into_inner().try_into()?;
        let mut conn = self.0.database.get().await?;
        let user = User::rename(&mut conn, account, &names).await?;
        Ok(Response::new(pb::UpdateCurrentUserResponse { user: Some(user.into()) }))
    }

    async fn change_password(
        &self,
        request: Request<pb::ChangePasswordRequest>,
    ) -> Result<Response<pb::ChangePasswordResponse>, Status> {
        let App { database, auth, .. } = &self.0;
        let credential = self.0.authenticate(request.metadata()).await?;
        let account = credential.caller().account()?;
        let NewPassword { current, new } = request.into_inner().try_into()?;
        let old = User::password_hash(&mut *database.get().await?, account).await?;
        let wrong = || Error::invalid("current_password", "is not the current password");
        if !auth.passwords().verify(current, Some(old.clone())).await? {
            return Err(wrong().into());
        }
        let new = auth.passwords().hash(new).await?;
        let app = self.0.clone();
        let ending = Ending::OtherSessions { user_id: account.user_id(), kept: account.session_id() };
        let (ended, keys) = database
            .detached(async move |mut conn| {
                let changed = User::change_password(&mut conn, account, &old, &new).await?;
                app.end(ending);
                Ok(changed)
            })
            .await?
            .ok_or_else(wrong)?;
        Ok(Response::new(pb::ChangePasswordResponse {
            ended_sessions: i32::try_from(ended).unwrap_or(i32::MAX),
            valid_api_keys: i32::try_from(keys).unwrap_or(i32::MAX),
        }))
    }

    async fn create_api_key(
        &self,
        request: Request<pb::CreateApiKeyRequest>,
    ) -> Result<Response<pb::CreateApiKeyResponse>, Status> {
        let credential = self.0.authenticate(request.metadata()).await?;
        let manager = credential.caller().key_manager()?;
        let KeyTerms { note, expires_at, scopes } = KeyTerms::parse(request.into_inner(), &manager)?;
        let secret = Secret::generate(SecretKind::ApiKey)?;
        let key_prefix = secret.display_prefix().to_owned();
        let key = NewApiKey { key_hash: secret.hash(), key_prefix, note, scopes, expires_at };
        let key = key.insert(&mut *self.0.database.get().await?, &manager).await?;
        let api_key = Some(key.into());
        Ok(Response::new(pb::CreateApiKeyResponse { api_key, secret: secret.reveal() }))
    }

    async fn list_api_keys(
        &self,
        request: Request<pb::ListApiKeysRequest>,
    ) -> Result<Response<pb::ListApiKeysResponse>, Status> {
        let credential = self.0.authenticate(request.metadata()).await?;
        let manager = credential.caller().key_manager()?;
        let KeyPage { query, after, size } = KeyPage::parse(request.get_ref(), &manager)?;
        let mut conn = self.0.database.get().await?;
        let mut keys = ApiKey::list(&mut conn, &manager, after, size + 1).await?;
        let more = keys.len() > usize::try_from(size).unwrap_or(usize::MAX);
        if more {
            keys.pop();
        }
        let next_page_token =
            keys.last().filter(|_| more).map(|last| KeyPage::token(&query, last)).unwrap_or_default();
        // The largest page of the largest keys is 0.6 MiB.
        let api_keys = keys.into_iter().map(Into::into).collect();
        Ok(Response::new(pb::ListApiKeysResponse { api_keys, next_page_token }))
    }

    async fn expire_api_key(
        &self,
        request: Request<pb::ExpireApiKeyRequest>,
    ) -> Result<Response<pb::ExpireApiKeyResponse>, Status> {
        let credential = self.0.authenticate(request.metadata()).await?;
        let manager = credential.caller().key_manager()?;
        let mut violations = Violations::default();
        let id = parse::uuid(&mut violations, "api_key_id", &request.into_inner().api_key_id);
        let id = violations.or(id)?;
        let app = self.0.clone();
        let key = self
            .0
            .database
            .detached(async move |mut conn| {
                let key = ApiKey::expire(&mut conn, &manager, id).await?;
                app.end(Ending::Credential(CredentialId::ApiKey(id)));
                Ok(key)
            })
            .await?;
        Ok(Response::new(pb::ExpireApiKeyResponse { api_key: Some(key.into()) }))
    }
}

/// Who signs up.
struct NewAccount {
    role: UserRole,
    email: Email,
    password: Password,
    first_name: String,
    last_name: String,
}

impl TryFrom<pb::SignUpRequest> for NewAccount {
    type Error = Error;

    fn try_from(request: pb::SignUpRequest) -> Result<Self> {
        let mut violations = Violations::default();
        let role = match request.role() {
            pb::UserRole::Customer => Some(UserRole::Customer),
            pb::UserRole::Provider => Some(UserRole::Provider),
            pb::UserRole::Unspecified => None,
        };
        if role.is_none() {
            violations.add("role", "must be USER_ROLE_CUSTOMER or USER_ROLE_PROVIDER");
        }
        let email = Email::new(request.email).map_err(|why| violations.add("email", why)).ok();
        let password = Password::new(request.password).map_err(|why| violations.add("password", why)).ok();
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

/// Who claims to be whom. A password that nobody can have is none: it is as
/// wrong as any other, and costs the same work.
struct Claim {
    email: String,
    password: Option<Password>,
}

impl TryFrom<pb::LogInRequest> for Claim {
    type Error = Error;

    /// Only what no text may be is refused for its shape; the answer to all
    /// else that is wrong is one and the same.
    fn try_from(request: pb::LogInRequest) -> Result<Self> {
        let mut violations = Violations::default();
        let email = parse::text(&mut violations, "email", request.email);
        secret_text(&mut violations, "password", &request.password);
        violations.or(Self { email, password: Password::new(request.password).ok() })
    }
}

struct NewPassword {
    current: Option<Password>,
    new: Password,
}

impl TryFrom<pb::ChangePasswordRequest> for NewPassword {
    type Error = Error;

    fn try_from(request: pb::ChangePasswordRequest) -> Result<Self> {
        let mut violations = Violations::default();
        secret_text(&mut violations, "current_password", &request.current_password);
        match Password::new(request.new_password) {
            Ok(new) => violations.or(Self { current: Password::new(request.current_password).ok(), new }),
            Err(why) => {
                violations.add("new_password", why);
                Err(Error::Invalid(violations))
            }
        }
    }
}

/// [`parse::text`] of what must not be quoted.
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
        let paths = request.update_mask.unwrap_or_default().paths;
        if let Some(path) = paths.iter().find(|path| !matches!(path.as_str(), "first_name" | "last_name")) {
            let description = format!("{} is neither first_name nor last_name", quoted(path));
            violations.add("update_mask", description);
        }
        let asked = |name: &str| paths.is_empty() || paths.iter().any(|path| path == name);
        let mut name = |path: &str, field: &str, value: String| {
            asked(path).then(|| parse::text(&mut violations, field, value))
        };
        let first_name = name("first_name", "user.first_name", user.first_name);
        let last_name = name("last_name", "user.last_name", user.last_name);
        violations.or(Self { first_name, last_name })
    }
}

/// What a new key is to be.
struct KeyTerms {
    note: String,
    expires_at: Option<DateTime<Utc>>,
    scopes: Vec<Scope>,
}

impl KeyTerms {
    /// [`Error::ScopeRequired`], before anything else, if the manager lacks a
    /// scope that the key shall have.
    fn parse(request: pb::CreateApiKeyRequest, manager: &KeyManager) -> Result<Self> {
        let mut violations = Violations::default();
        let note = parse::text(&mut violations, "note", request.note);
        let expires_at = parse::timestamp(&mut violations, "expires_at", request.expires_at);
        if expires_at.is_some_and(|at| at <= Utc::now()) {
            violations.add("expires_at", "must be in the future");
        }
        let scopes = scopes(&mut violations, &request.scopes, manager.role());
        if let Some(missing) = scopes.iter().find(|scope| !manager.scopes().contains(scope)) {
            return Err(Error::ScopeRequired(missing.name()));
        }
        violations.or(Self { note, expires_at, scopes })
    }
}

/// The scopes asked for, each once.
fn scopes(violations: &mut Violations, asked: &[i32], role: UserRole) -> Vec<Scope> {
    if asked.is_empty() {
        return match role {
            UserRole::Customer => vec![Scope::Read],
            UserRole::Provider => vec![Scope::Read, Scope::Append],
        };
    }
    if asked.len() > SCOPES {
        violations.add("scopes", format!("must be at most {SCOPES}"));
    }
    let mut scopes = Vec::new();
    for (index, scope) in asked.iter().take(SCOPES).enumerate() {
        let field = format!("scopes[{index}]");
        match pb::ApiKeyScope::try_from(*scope) {
            Ok(pb::ApiKeyScope::Read) => scopes.push(Scope::Read),
            Ok(pb::ApiKeyScope::Manage) => scopes.push(Scope::Manage),
            Ok(pb::ApiKeyScope::Append) if role == UserRole::Provider => scopes.push(Scope::Append),
            Ok(pb::ApiKeyScope::Append) => violations.add(field, "a customer's key cannot have APPEND"),
            Ok(pb::ApiKeyScope::Unspecified) | Err(_) => {
                violations
                    .add(field, "must be API_KEY_SCOPE_READ, API_KEY_SCOPE_APPEND or API_KEY_SCOPE_MANAGE");
            }
        }
    }
    scopes.sort_unstable();
    scopes.dedup();
    scopes
}

/// Which keys are listed.
struct KeyPage {
    query: Vec<u8>,
    after: Option<(DateTime<Utc>, Uuid)>,
    size: i64,
}

impl KeyPage {
    fn parse(request: &pb::ListApiKeysRequest, manager: &KeyManager) -> Result<Self> {
        let mut violations = Violations::default();
        let size = parse::page_size(&mut violations, request.page_size);
        let query = [b"ListApiKeys".as_slice(), manager.user_id().as_bytes()].concat();
        let cursor = page::decode(&mut violations, "page_token", &query, &request.page_token);
        let after = cursor.and_then(|cursor| {
            let after = Self::position(&cursor);
            if after.is_none() {
                violations.add("page_token", "must be a next_page_token of this method");
            }
            after
        });
        violations.or(Self { query, after, size })
    }

    fn token(query: &[u8], last: &ApiKey) -> String {
        let created_at = last.created_at.timestamp_micros().to_be_bytes();
        page::encode(query, &[created_at.as_slice(), last.id.as_bytes()].concat())
    }

    fn position(cursor: &[u8]) -> Option<(DateTime<Utc>, Uuid)> {
        let (created_at, id) = cursor.split_first_chunk()?;
        let created_at = DateTime::from_timestamp_micros(i64::from_be_bytes(*created_at))?;
        Some((created_at, Uuid::from_slice(id).ok()?))
    }
}

impl From<User> for pb::User {
    fn from(user: User) -> Self {
        let role = match user.role {
            UserRole::Customer => pb::UserRole::Customer,
            UserRole::Provider => pb::UserRole::Provider,
        };
        Self {
            id: user.id.to_string(),
            role: role.into(),
            email: user.email,
            first_name: user.first_name,
            last_name: user.last_name,
            created_at: Some(wire::timestamp(user.created_at)),
            updated_at: Some(wire::timestamp(user.updated_at)),
        }
    }
}

/// With its secret, or without.
fn session_with(secret: String, session: &Session) -> pb::Session {
    let expires_at = Some(wire::timestamp(session.expires_at));
    pb::Session { id: session.id.to_string(), secret, expires_at }
}

impl From<ApiKey> for pb::ApiKey {
    fn from(key: ApiKey) -> Self {
        let scopes = key.scopes().map(|scope| match scope {
            Scope::Read => pb::ApiKeyScope::Read.into(),
            Scope::Append => pb::ApiKeyScope::Append.into(),
            Scope::Manage => pb::ApiKeyScope::Manage.into(),
        });
        Self {
            id: key.id.to_string(),
            scopes: scopes.collect(),
            key_prefix: key.key_prefix,
            note: key.note,
            expires_at: key.expires_at.map(wire::timestamp),
            last_used_at: key.last_used_at.map(wire::timestamp),
            created_at: Some(wire::timestamp(key.created_at)),
        }
    }
}
