//! AuthService: users, their sessions and API keys, and watch tokens.

mod accounts;
mod keys;
mod watch_tokens;

use std::time::Instant;

use futures_util::FutureExt as _;
use tonic::{Request, Response};

use self::{
    accounts::{EmailAndPassword, NewPassword, session_message},
    keys::{KeyTerms, key_page, rotation},
    watch_tokens::{TokenTerms, token_id, token_page},
};
use super::{Answer, App, credential_of, parse};
use crate::{
    auth::{Auth, Revocation},
    db::Transaction,
    error::{Error, Violations},
    models::{
        api_key::{ApiKey, NewApiKey},
        caller::{CredentialId, KeyScope, Subject},
        session::Session,
        user::{Names, User},
        watch_token::{NewWatchToken, WatchToken},
    },
    pb,
    secret::{Secret, SecretKind},
};

#[derive(Clone, Debug)]
pub struct AuthApi(pub App);

#[tonic::async_trait]
impl pb::auth_service_server::AuthService for AuthApi {
    async fn sign_up(&self, request: Request<pb::SignUpRequest>) -> Answer<pb::SignUpResponse> {
        let auth = &self.0.auth;
        if !auth.settings().sign_up_open {
            return Err(Error::SignUpClosed.into());
        }
        let origin = self.0.anonymous_origin(&request);
        let signed_up = auth.sign_up(request.into_inner().try_into()?, origin).await?;
        let session = Some(session_message(signed_up.secret.reveal(), &signed_up.session));
        Ok(Response::new(pb::SignUpResponse { user: Some(signed_up.user.into()), session }))
    }

    async fn log_in(&self, request: Request<pb::LogInRequest>) -> Answer<pb::LogInResponse> {
        let origin = self.0.anonymous_origin(&request);
        let EmailAndPassword { email, password } = request.into_inner().try_into()?;
        let logged_in = self.0.auth.log_in(email, password, origin).await?;
        let session = Some(session_message(logged_in.secret.reveal(), &logged_in.session));
        Ok(Response::new(pb::LogInResponse { user: Some(logged_in.user.into()), session }))
    }

    async fn log_out(&self, request: Request<pb::LogOutRequest>) -> Answer<pb::LogOutResponse> {
        let credential = credential_of(&request)?;
        let account = credential.caller().account()?;
        let origin = self.0.origin(&request, &credential);
        let revocation = Revocation::Credential(credential.caller().credential());
        let auth = self.0.auth.clone();
        self.0
            .write(credential, move |tx| {
                tx.after_commit(move || auth.revoke(revocation));
                async move { Session::end(tx, account, &origin).await }.boxed()
            })
            .await?;
        Ok(Response::new(pb::LogOutResponse {}))
    }

    async fn get_current_user(
        &self,
        request: Request<pb::GetCurrentUserRequest>,
    ) -> Answer<pb::GetCurrentUserResponse> {
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
    ) -> Answer<pb::UpdateCurrentUserResponse> {
        let credential = credential_of(&request)?;
        let account = credential.caller().account()?;
        let names: Names = request.into_inner().try_into()?;
        let user = self
            .0
            .write(credential, move |tx| async move { User::rename(tx, account, &names).await }.boxed())
            .await?;
        Ok(Response::new(pb::UpdateCurrentUserResponse { user: Some(user.into()) }))
    }

    async fn change_password(
        &self,
        request: Request<pb::ChangePasswordRequest>,
    ) -> Answer<pb::ChangePasswordResponse> {
        let credential = credential_of(&request)?;
        credential.caller().account()?;
        let origin = self.0.origin(&request, &credential);
        let NewPassword { current, new } = request.into_inner().try_into()?;
        let (ended, keys) = self.0.auth.change_password(credential, current, new, origin).await?;
        Ok(Response::new(pb::ChangePasswordResponse {
            ended_sessions: i32::try_from(ended).unwrap_or(i32::MAX),
            valid_api_keys: i32::try_from(keys).unwrap_or(i32::MAX),
        }))
    }

    async fn create_api_key(
        &self,
        request: Request<pb::CreateApiKeyRequest>,
    ) -> Answer<pb::CreateApiKeyResponse> {
        let credential = credential_of(&request)?;
        let manager = credential.caller().key_manager()?;
        let origin = self.0.origin(&request, &credential);
        let KeyTerms { note, expires_at, scopes } = KeyTerms::parse(request.into_inner(), &manager)?;
        let secret = Secret::generate(SecretKind::ApiKey)?;
        let key_prefix = secret.display_prefix().to_owned();
        let key = NewApiKey { key_hash: secret.hash(), key_prefix, note, scopes, expires_at };
        let key = self
            .0
            .write(credential, move |tx| async move { key.create(tx, &manager, &origin).await }.boxed())
            .await?;
        let api_key = Some(key.into());
        Ok(Response::new(pb::CreateApiKeyResponse { api_key, secret: secret.reveal() }))
    }

    async fn list_api_keys(
        &self,
        request: Request<pb::ListApiKeysRequest>,
    ) -> Answer<pb::ListApiKeysResponse> {
        let credential = credential_of(&request)?;
        let manager = credential.caller().key_manager()?;
        let page = key_page(request.into_inner(), &manager)?;
        let mut conn = self.0.database.get().await?;
        let mut keys = ApiKey::list(&mut conn, &manager, page.after, page.limit()).await?;
        let next_page_token = page.cut(&mut keys, ApiKey::cursor);
        // The largest page of the largest keys is 0.6 MiB.
        let api_keys = keys.into_iter().map(Into::into).collect();
        Ok(Response::new(pb::ListApiKeysResponse { api_keys, next_page_token }))
    }

    async fn expire_api_key(
        &self,
        request: Request<pb::ExpireApiKeyRequest>,
    ) -> Answer<pb::ExpireApiKeyResponse> {
        let credential = credential_of(&request)?;
        let manager = credential.caller().key_manager()?;
        let origin = self.0.origin(&request, &credential);
        let mut violations = Violations::default();
        let id = parse::uuid(&mut violations, "api_key_id", &request.into_inner().api_key_id);
        let id = violations.or(id)?;
        let auth = self.0.auth.clone();
        let key = self
            .0
            .write(credential, move |tx| {
                async move {
                    let expired = ApiKey::expire(tx, &manager, id, &origin).await;
                    let before = matches!(expired, Err(Error::ApiKeyAlreadyExpired(_)));
                    revoke(tx, auth, CredentialId::ApiKey(id), expired.is_ok(), before);
                    expired
                }
                .boxed()
            })
            .await?;
        Ok(Response::new(pb::ExpireApiKeyResponse { api_key: Some(key.into()) }))
    }

    async fn rotate_api_key(
        &self,
        request: Request<pb::RotateApiKeyRequest>,
    ) -> Answer<pb::RotateApiKeyResponse> {
        let credential = credential_of(&request)?;
        let manager = credential.caller().key_manager()?;
        let origin = self.0.origin(&request, &credential);
        let (id, overlap) = rotation(request.get_ref())?;
        let secret = Secret::generate(SecretKind::ApiKey)?;
        let (hash, prefix) = (secret.hash(), secret.display_prefix().to_owned());
        let auth = self.0.auth.clone();
        let (new, old, _) = self
            .0
            .write(credential, move |tx| {
                async move {
                    let (began, old) = (Instant::now(), CredentialId::ApiKey(id));
                    let rotated = ApiKey::rotate(tx, &manager, id, hash, prefix, overlap, &origin).await;
                    match &rotated {
                        Ok((_, _, left)) => {
                            let left = *left;
                            tx.after_commit(move || {
                                auth.revoke_after(old, left.saturating_sub(began.elapsed()))
                            });
                        }
                        Err(Error::ApiKeyAlreadyExpired(_)) => revoke(tx, auth, old, false, true),
                        Err(_) => {}
                    }
                    rotated
                }
                .boxed()
            })
            .await?;
        let (api_key, old_api_key) = (Some(new.into()), Some(old.into()));
        Ok(Response::new(pb::RotateApiKeyResponse { api_key, secret: secret.reveal(), old_api_key }))
    }

    async fn create_watch_token(
        &self,
        request: Request<pb::CreateWatchTokenRequest>,
    ) -> Answer<pb::CreateWatchTokenResponse> {
        let credential = credential_of(&request)?;
        let provider = credential.caller().provider(KeyScope::Append)?;
        let origin = self.0.origin(&request, &credential);
        let TokenTerms { job, note, lifetime } = TokenTerms::parse(request.into_inner())?;
        let job_id = self.0.log.jobs.find(provider.into(), &job).await?.id;
        let secret = Secret::generate(SecretKind::WatchToken)?;
        let secret_prefix = secret.display_prefix().to_owned();
        let token = NewWatchToken { job_id, secret_hash: secret.hash(), secret_prefix, note, lifetime };
        let token = self
            .0
            .write(credential, move |tx| async move { token.create(tx, provider, &origin).await }.boxed())
            .await?;
        let watch_token = Some(token.into());
        Ok(Response::new(pb::CreateWatchTokenResponse { watch_token, secret: secret.reveal() }))
    }

    async fn list_watch_tokens(
        &self,
        request: Request<pb::ListWatchTokensRequest>,
    ) -> Answer<pb::ListWatchTokensResponse> {
        let credential = credential_of(&request)?;
        let provider = credential.caller().provider(KeyScope::Append)?;
        let (job, page) = token_page(request.into_inner(), provider)?;
        let job_id = self.0.log.jobs.find(provider.into(), &job).await?.id;
        let mut conn = self.0.database.get().await?;
        let mut tokens = WatchToken::list(&mut conn, provider, job_id, page.after, page.limit()).await?;
        let next_page_token = page.cut(&mut tokens, WatchToken::cursor);
        // The largest page of the largest tokens is 0.6 MiB.
        let watch_tokens = tokens.into_iter().map(Into::into).collect();
        Ok(Response::new(pb::ListWatchTokensResponse { watch_tokens, next_page_token }))
    }

    async fn expire_watch_token(
        &self,
        request: Request<pb::ExpireWatchTokenRequest>,
    ) -> Answer<pb::ExpireWatchTokenResponse> {
        let credential = credential_of(&request)?;
        let provider = credential.caller().provider(KeyScope::Append)?;
        let origin = self.0.origin(&request, &credential);
        let id = token_id(request.get_ref())?;
        let auth = self.0.auth.clone();
        let token = self
            .0
            .write(credential, move |tx| {
                async move {
                    let expired = WatchToken::expire(tx, provider, id, &origin).await;
                    let before = matches!(expired, Err(Error::WatchTokenAlreadyExpired(_)));
                    revoke(tx, auth, CredentialId::WatchToken(id), expired.is_ok(), before);
                    expired
                }
                .boxed()
            })
            .await?;
        Ok(Response::new(pb::ExpireWatchTokenResponse { watch_token: Some(token.into()) }))
    }
}

/// Ends a credential on this server: after the commit that expires it, or now if it had
/// expired `before`, since the call that expired it may have failed before it ended the
/// credential here.
fn revoke(tx: &mut Transaction<'_>, auth: Auth, id: CredentialId, expired: bool, before: bool) {
    let revoke = move || auth.revoke(Revocation::Credential(id));
    if expired {
        tx.after_commit(revoke);
    } else if before {
        revoke();
    }
}
