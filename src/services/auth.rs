//! AuthService: users, their sessions and API keys, and watch tokens.

mod keys;
mod watch_tokens;

use tonic::{Request, Response, Status};

use self::{
    keys::{KeyTerms, key_page, rotation},
    watch_tokens::{TokenTerms, token_id, token_page},
};
use super::{App, parse};
use crate::{
    auth::Ending,
    error::{Error, Result, Violations, quoted},
    event_log::wire,
    models::{
        api_key::{ApiKey, NewApiKey},
        caller::{CredentialId, Scope, Subject, UserRole},
        log_in_attempt::LogInAttempt,
        session::{NewSession, Session},
        user::{Email, Names, NewUser, User},
        watch_token::{NewWatchToken, WatchToken},
    },
    pb,
    secret::{Password, Secret, SecretKind},
};

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
        let address = self.0.address(&request);
        let Claim { email, password } = request.into_inner().try_into()?;
        let attempt = LogInAttempt::new(&email, address);
        // One way for all who fail: two queries, the work of one comparison.
        let found = {
            let mut conn = database.get().await?;
            attempt.begin(&mut conn).await?;
            User::find_by_email(&mut conn, &email).await?
        };
        let hash = found.as_ref().map(|(_, hash)| hash.clone());
        let good = auth.passwords().verify(password.clone(), hash).await?;
        let (user, hash) =
            found.filter(|(user, _)| good && user.disabled_at.is_none()).ok_or(Error::LogInFailed)?;
        let secret = Secret::generate(SecretKind::Session)?;
        let session = NewSession {
            user_id: user.id,
            secret_hash: secret.hash(),
            lifetime: auth.settings().session_lifetime,
        };
        // Today's cost, if it changed since.
        let outdated = password.filter(|_| auth.passwords().is_outdated(&hash));
        let rehashed = match outdated {
            Some(password) => Some(auth.passwords().hash(password).await?),
            None => None,
        };
        let session = database
            .detached(async move |mut conn| {
                let created = session.insert_if_unchanged(&mut conn, &hash).await?;
                if created.is_some() {
                    attempt.finish(&mut conn).await?;
                    if let Some(new) = rehashed {
                        User::rehash(&mut conn, session.user_id, &hash, &new).await?;
                    }
                }
                Ok(created)
            })
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
        let user = match caller.subject() {
            Subject::User { .. } => Some(User::of_caller(&mut conn, caller).await?.into()),
            Subject::Job(_) => None,
        };
        let credential = match caller.credential() {
            CredentialId::Session(_) => {
                let session = Session::of_account(&mut conn, caller.account()?).await?;
                Credential::Session(session_with(String::new(), &session))
            }
            CredentialId::ApiKey(_) => Credential::ApiKey(ApiKey::of_caller(&mut conn, caller).await?.into()),
            CredentialId::WatchToken(_) => {
                Credential::WatchToken(WatchToken::of_caller(&mut conn, caller).await?.into())
            }
        };
        Ok(Response::new(pb::GetCurrentUserResponse { user, credential: Some(credential) }))
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
        let address = self.0.address(&request);
        let NewPassword { current, new } = request.into_inner().try_into()?;
        // A wrong one is a failed log-in.
        let (attempt, old) = {
            let mut conn = database.get().await?;
            let (email, old) = User::password_hash(&mut conn, account).await?;
            let attempt = LogInAttempt::new(&email, address);
            attempt.begin(&mut conn).await?;
            (attempt, old)
        };
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
                attempt.finish(&mut conn).await?;
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
        let page = key_page(request.get_ref(), &manager)?;
        let mut conn = self.0.database.get().await?;
        let mut keys = ApiKey::list(&mut conn, &manager, page.after, page.limit()).await?;
        let next_page_token = page.cut(&mut keys, |key| (key.created_at, key.id));
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

    async fn rotate_api_key(
        &self,
        request: Request<pb::RotateApiKeyRequest>,
    ) -> Result<Response<pb::RotateApiKeyResponse>, Status> {
        let credential = self.0.authenticate(request.metadata()).await?;
        let manager = credential.caller().key_manager()?;
        let (id, overlap) = rotation(request.get_ref())?;
        let secret = Secret::generate(SecretKind::ApiKey)?;
        let (hash, prefix) = (secret.hash(), secret.display_prefix().to_owned());
        let app = self.0.clone();
        let (new, old) = self
            .0
            .database
            .detached(async move |mut conn| {
                let rotated = ApiKey::rotate(&mut conn, &manager, id, hash, prefix, overlap).await?;
                if overlap.is_zero() {
                    app.end(Ending::Credential(CredentialId::ApiKey(id)));
                }
                Ok(rotated)
            })
            .await?;
        let (api_key, old_api_key) = (Some(new.into()), Some(old.into()));
        Ok(Response::new(pb::RotateApiKeyResponse { api_key, secret: secret.reveal(), old_api_key }))
    }

    async fn create_watch_token(
        &self,
        request: Request<pb::CreateWatchTokenRequest>,
    ) -> Result<Response<pb::CreateWatchTokenResponse>, Status> {
        let credential = self.0.authenticate(request.metadata()).await?;
        let provider = credential.caller().provider(Scope::Append)?;
        let TokenTerms { job, note, lifetime } = TokenTerms::parse(request.into_inner())?;
        let job_id = self.0.log.find_own_job(provider, &job).await?.id;
        let secret = Secret::generate(SecretKind::WatchToken)?;
        let secret_prefix = secret.display_prefix().to_owned();
        let token = NewWatchToken { job_id, secret_hash: secret.hash(), secret_prefix, note, lifetime };
        let token = token.insert(&mut *self.0.database.get().await?, provider).await?;
        let watch_token = Some(token.into());
        Ok(Response::new(pb::CreateWatchTokenResponse { watch_token, secret: secret.reveal() }))
    }

    async fn list_watch_tokens(
        &self,
        request: Request<pb::ListWatchTokensRequest>,
    ) -> Result<Response<pb::ListWatchTokensResponse>, Status> {
        let credential = self.0.authenticate(request.metadata()).await?;
        let provider = credential.caller().provider(Scope::Append)?;
        let (job, page) = token_page(request.into_inner(), provider)?;
        let job_id = self.0.log.find_own_job(provider, &job).await?.id;
        let mut conn = self.0.database.get().await?;
        let mut tokens = WatchToken::list(&mut conn, provider, job_id, page.after, page.limit()).await?;
        let next_page_token = page.cut(&mut tokens, |token| (token.created_at, token.id));
        // The largest page of the largest tokens is 0.6 MiB.
        let watch_tokens = tokens.into_iter().map(Into::into).collect();
        Ok(Response::new(pb::ListWatchTokensResponse { watch_tokens, next_page_token }))
    }

    async fn expire_watch_token(
        &self,
        request: Request<pb::ExpireWatchTokenRequest>,
    ) -> Result<Response<pb::ExpireWatchTokenResponse>, Status> {
        let credential = self.0.authenticate(request.metadata()).await?;
        let provider = credential.caller().provider(Scope::Append)?;
        let id = token_id(request.get_ref())?;
        let app = self.0.clone();
        let token = self
            .0
            .database
            .detached(async move |mut conn| {
                let token = WatchToken::expire(&mut conn, provider, id).await?;
                app.end(Ending::Credential(CredentialId::WatchToken(id)));
                Ok(token)
            })
            .await?;
        Ok(Response::new(pb::ExpireWatchTokenResponse { watch_token: Some(token.into()) }))
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
