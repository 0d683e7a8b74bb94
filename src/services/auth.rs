//! AuthService: users, their sessions and API keys, and watch tokens.

mod accounts;
mod keys;
mod watch_tokens;

use std::time::{Duration, Instant};

use tonic::{Request, Response, Status};

use self::{
    accounts::{
        EmailAndPassword, NewAccount, NewPassword, WrongPassword, begin_attempt, record_outcome,
        session_message,
    },
    keys::{KeyTerms, key_page, rotation},
    watch_tokens::{TokenTerms, token_id, token_page},
};
use super::{App, credential_of, parse};
use crate::{
    auth::Ending,
    db::Asker,
    error::{Error, Result, Violations},
    models::{
        api_key::{ApiKey, NewApiKey},
        caller::{CredentialId, KeyScope, Subject},
        log_in_attempt::{LogInClaim, begin_sign_up},
        session::{NewSession, Session},
        user::{Names, NewUser, User},
        watch_token::{NewWatchToken, WatchToken},
    },
    pb,
    secret::{Secret, SecretKind},
};

/// Implementation of `milepost.v1.AuthService`.
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
        let origin = self.0.stranger(&request);
        let NewAccount { role, email, password, first_name, last_name } = request.into_inner().try_into()?;
        begin_sign_up(&mut *database.get_for(Asker::WithPassword).await?, &origin).await?;
        let permit = auth.passwords().stranger().await?;
        let password_hash = auth.passwords().hash_for(permit, password).await?;
        let secret = Secret::generate(SecretKind::Session)?;
        let (secret_hash, lifetime) = (secret.hash(), auth.settings().session_lifetime);
        let (user, session) = database
            .detached(async move |mut conn| {
                let user = NewUser { role, email, password_hash, first_name, last_name };
                user.sign_up(&mut conn, secret_hash, lifetime, &origin).await
            })
            .await?;
        let session = Some(session_message(secret.reveal(), &session));
        Ok(Response::new(pb::SignUpResponse { user: Some(user.into()), session }))
    }

    async fn log_in(
        &self,
        request: Request<pb::LogInRequest>,
    ) -> Result<Response<pb::LogInResponse>, Status> {
        let App { database, auth, .. } = self.0.clone();
        let origin = self.0.stranger(&request);
        let EmailAndPassword { email, password } = request.into_inner().try_into()?;
        let (attempt, permit) =
            begin_attempt(&self.0, Asker::WithPassword, LogInClaim::new(&email, origin)).await?;
        // Every log-in that fails makes as many queries and verifies one hash, so that
        // the time of the answer does not reveal whether the e-mail has a user.
        let log_in = async move {
            let _permit = permit;
            let verification = async {
                let mut user_id = None;
                // A second round, in case another log-in replaces the hash meanwhile.
                for _ in 0..2 {
                    let found =
                        User::find_by_email(&mut *database.get_for(Asker::WithPassword).await?, &email)
                            .await?;
                    let hash = found.as_ref().map(|(_, hash)| hash.clone());
                    user_id = found.as_ref().map(|(user, _)| user.id);
                    let right = auth.passwords().verify(password.clone(), hash).await?;
                    let admitted = right && attempt.may_succeed();
                    let Some((user, hash)) = found.filter(|(user, _)| admitted && user.disabled_at.is_none())
                    else {
                        break;
                    };
                    // The setting of the cost may have changed since the hash was made.
                    let outdated = password.clone().filter(|_| auth.passwords().is_outdated(&hash));
                    let rehashed = match outdated {
                        Some(password) => Some(auth.passwords().hash(password).await?),
                        None => None,
                    };
                    let secret = Secret::generate(SecretKind::Session)?;
                    let (secret_hash, lifetime) = (secret.hash(), auth.settings().session_lifetime);
                    let session = NewSession { user_id: user.id, secret_hash, lifetime };
                    let mut conn = database.get().await?;
                    let Some(session) = session.log_in(&mut conn, &hash, &attempt).await? else { continue };
                    if let Some(new) = rehashed
                        && let Err(error) = User::rehash(&mut conn, user.id, &hash, &new).await
                    {
                        tracing::warn!(cause = ?error, "cannot renew a password hash until the next log-in");
                    }
                    return Ok(Ok((user, session_message(secret.reveal(), &session))));
                }
                Ok(Err(WrongPassword { user_id }))
            };
            let outcome = verification.await;
            record_outcome(&database, Asker::WithPassword, attempt, outcome).await?.ok_or(Error::LogInFailed)
        };
        // The outcome is recorded even if the caller cancels the call.
        let (user, session) = self.0.to_the_end(log_in).await?;
        Ok(Response::new(pb::LogInResponse { user: Some(user.into()), session: Some(session) }))
    }

    async fn log_out(
        &self,
        request: Request<pb::LogOutRequest>,
    ) -> Result<Response<pb::LogOutResponse>, Status> {
        let credential = credential_of(&request)?;
        let account = credential.caller().account()?;
        let origin = self.0.origin(&request, credential.caller());
        let (app, ending) = (self.0.clone(), Ending::Credential(credential.caller().credential()));
        self.0
            .database
            .detached(async move |mut conn| {
                Session::end(&mut conn, account, &origin).await?;
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
        let credential = credential_of(&request)?;
        let caller = credential.caller();
        let mut conn = self.0.database.get().await?;
        let user = match caller.subject() {
            Subject::User { .. } => Some(User::of_caller(&mut conn, caller).await?.into()),
            Subject::Job(_) => None,
        };
        let credential = match caller.credential() {
            CredentialId::Session(_) => {
                let session = Session::of_account(&mut conn, caller.account()?).await?;
                Credential::Session(session_message(String::new(), &session))
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
        let credential = credential_of(&request)?;
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
        let app = self.0.clone();
        let credential = credential_of(&request)?;
        let account = credential.caller().account()?;
        let origin = app.origin(&request, credential.caller());
        let NewPassword { current, new } = request.into_inner().try_into()?;
        // A wrong current password counts as a failed log-in.
        let (email, mut old) = User::password_hash(&mut *app.database.get().await?, account).await?;
        let (attempt, permit) = begin_attempt(&app, Asker::Known, LogInClaim::new(email, origin)).await?;
        let change = async move {
            let _permit = permit;
            let verification = async {
                let passwords = app.auth.passwords();
                // A second round, in case a log-in replaces the hash meanwhile.
                for _ in 0..2 {
                    if !passwords.verify(current.clone(), Some(old.clone())).await? || !attempt.may_succeed()
                    {
                        break;
                    }
                    let new = passwords.hash(new.clone()).await?;
                    let mut conn = app.database.get().await?;
                    let changed = User::change_password(&mut conn, account, &old, &new, &attempt).await?;
                    if let Some(changed) = changed {
                        let kept = account.session_id();
                        app.end(Ending::OtherSessions { user_id: account.user_id(), kept });
                        return Ok(Ok(changed));
                    }
                    (_, old) = User::password_hash(&mut conn, account).await?;
                }
                Ok(Err(WrongPassword { user_id: Some(account.user_id()) }))
            };
            let wrong = || Error::invalid("current_password", "is not the current password");
            let outcome = verification.await;
            record_outcome(&app.database, Asker::Known, attempt, outcome).await?.ok_or_else(wrong)
        };
        let (ended, keys) = self.0.to_the_end(change).await?;
        Ok(Response::new(pb::ChangePasswordResponse {
            ended_sessions: i32::try_from(ended).unwrap_or(i32::MAX),
            valid_api_keys: i32::try_from(keys).unwrap_or(i32::MAX),
        }))
    }

    async fn create_api_key(
        &self,
        request: Request<pb::CreateApiKeyRequest>,
    ) -> Result<Response<pb::CreateApiKeyResponse>, Status> {
        let credential = credential_of(&request)?;
        let manager = credential.caller().key_manager()?;
        let origin = self.0.origin(&request, credential.caller());
        let KeyTerms { note, expires_at, scopes } = KeyTerms::parse(request.into_inner(), &manager)?;
        let secret = Secret::generate(SecretKind::ApiKey)?;
        let key_prefix = secret.display_prefix().to_owned();
        let key = NewApiKey { key_hash: secret.hash(), key_prefix, note, scopes, expires_at };
        let key = self
            .0
            .detached(credential, async move |mut conn| key.create(&mut conn, &manager, &origin).await)
            .await?;
        let api_key = Some(key.into());
        Ok(Response::new(pb::CreateApiKeyResponse { api_key, secret: secret.reveal() }))
    }

    async fn list_api_keys(
        &self,
        request: Request<pb::ListApiKeysRequest>,
    ) -> Result<Response<pb::ListApiKeysResponse>, Status> {
        let credential = credential_of(&request)?;
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
        let credential = credential_of(&request)?;
        let manager = credential.caller().key_manager()?;
        let origin = self.0.origin(&request, credential.caller());
        let mut violations = Violations::default();
        let id = parse::uuid(&mut violations, "api_key_id", &request.into_inner().api_key_id);
        let id = violations.or(id)?;
        let app = self.0.clone();
        let key = self
            .0
            .detached(credential, async move |mut conn| {
                let expired = ApiKey::expire(&mut conn, &manager, id, &origin).await;
                // If the key has expired before, the call that expired it may have
                // failed before it ended the key on this server.
                if let Ok(_) | Err(Error::ApiKeyAlreadyExpired(_)) = expired {
                    app.end(Ending::Credential(CredentialId::ApiKey(id)));
                }
                expired
            })
            .await?;
        Ok(Response::new(pb::ExpireApiKeyResponse { api_key: Some(key.into()) }))
    }

    async fn rotate_api_key(
        &self,
        request: Request<pb::RotateApiKeyRequest>,
    ) -> Result<Response<pb::RotateApiKeyResponse>, Status> {
        let credential = credential_of(&request)?;
        let manager = credential.caller().key_manager()?;
        let origin = self.0.origin(&request, credential.caller());
        let (id, overlap) = rotation(request.get_ref())?;
        let secret = Secret::generate(SecretKind::ApiKey)?;
        let (hash, prefix) = (secret.hash(), secret.display_prefix().to_owned());
        let app = self.0.clone();
        let (new, old, _) = self
            .0
            .detached(credential, async move |mut conn| {
                let (began, old) = (Instant::now(), CredentialId::ApiKey(id));
                let rotated = ApiKey::rotate(&mut conn, &manager, id, hash, prefix, overlap, &origin).await;
                let left = match rotated {
                    Ok((_, _, left)) => left.saturating_sub(began.elapsed()),
                    Err(Error::ApiKeyAlreadyExpired(_)) => Duration::ZERO,
                    Err(_) => return rotated,
                };
                if left.is_zero() {
                    app.end(Ending::Credential(old));
                } else {
                    app.auth.end_after(old, left);
                }
                rotated
            })
            .await?;
        let (api_key, old_api_key) = (Some(new.into()), Some(old.into()));
        Ok(Response::new(pb::RotateApiKeyResponse { api_key, secret: secret.reveal(), old_api_key }))
    }

    async fn create_watch_token(
        &self,
        request: Request<pb::CreateWatchTokenRequest>,
    ) -> Result<Response<pb::CreateWatchTokenResponse>, Status> {
        let credential = credential_of(&request)?;
        let provider = credential.caller().provider(KeyScope::Append)?;
        let origin = self.0.origin(&request, credential.caller());
        let TokenTerms { job, note, lifetime } = TokenTerms::parse(request.into_inner())?;
        let job_id = self.0.log.find_own_job(provider, &job).await?.id;
        let secret = Secret::generate(SecretKind::WatchToken)?;
        let secret_prefix = secret.display_prefix().to_owned();
        let token = NewWatchToken { job_id, secret_hash: secret.hash(), secret_prefix, note, lifetime };
        let token = self
            .0
            .detached(credential, async move |mut conn| token.create(&mut conn, provider, &origin).await)
            .await?;
        let watch_token = Some(token.into());
        Ok(Response::new(pb::CreateWatchTokenResponse { watch_token, secret: secret.reveal() }))
    }

    async fn list_watch_tokens(
        &self,
        request: Request<pb::ListWatchTokensRequest>,
    ) -> Result<Response<pb::ListWatchTokensResponse>, Status> {
        let credential = credential_of(&request)?;
        let provider = credential.caller().provider(KeyScope::Append)?;
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
        let credential = credential_of(&request)?;
        let provider = credential.caller().provider(KeyScope::Append)?;
        let origin = self.0.origin(&request, credential.caller());
        let id = token_id(request.get_ref())?;
        let app = self.0.clone();
        let token = self
            .0
            .detached(credential, async move |mut conn| {
                let expired = WatchToken::expire(&mut conn, provider, id, &origin).await;
                // As in `expire_api_key`.
                if let Ok(_) | Err(Error::WatchTokenAlreadyExpired(_)) = expired {
                    app.end(Ending::Credential(CredentialId::WatchToken(id)));
                }
                expired
            })
            .await?;
        Ok(Response::new(pb::ExpireWatchTokenResponse { watch_token: Some(token.into()) }))
    }
}
