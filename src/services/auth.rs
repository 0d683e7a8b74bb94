//! AuthService: users, their sessions and API keys, and watch tokens.

mod accounts;
mod keys;
mod usage;
mod watch_tokens;

use std::time::Instant;

use diesel_async::AsyncPgConnection;
use futures_util::FutureExt as _;
use tonic::{Request, Response};

use self::{
    accounts::{email_and_password, passwords, session_message},
    keys::new_key,
    usage::usage_message,
};
use super::{Answer, App, credential_of, jobs::job_key, page::PageRequest, parse};
use crate::{
    auth::{Auth, Revocation},
    db::{Transaction, read},
    error::{Error, Result, Violations},
    limits::{KEY_OVERLAP, WATCH_TOKEN_LIFETIME},
    models::{
        api_key::{ApiKey, RotatedKey},
        caller::{Caller, CredentialId, KeyScope, Subject},
        customer_code::CustomerCode,
        session::Session,
        usage::Usage,
        user::User,
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
        let (email, password) = email_and_password(request.into_inner())?;
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
            .database
            .write(credential, move |tx| {
                tx.after_commit(move || auth.revoke(revocation));
                Session::end(tx, account, origin).boxed()
            })
            .await?;
        Ok(Response::new(pb::LogOutResponse {}))
    }

    async fn get_current_user(
        &self,
        request: Request<pb::GetCurrentUserRequest>,
    ) -> Answer<pb::GetCurrentUserResponse> {
        let credential = credential_of(&request)?;
        let caller = credential.caller();
        let (user, credential) = read!(self.0.database, caller.tenant(), |conn| current_user(conn, caller))?;
        Ok(Response::new(pb::GetCurrentUserResponse { user, credential: Some(credential) }))
    }

    async fn update_current_user(
        &self,
        request: Request<pb::UpdateCurrentUserRequest>,
    ) -> Answer<pb::UpdateCurrentUserResponse> {
        let credential = credential_of(&request)?;
        let account = credential.caller().account()?;
        let names = request.into_inner().try_into()?;
        let database = &self.0.database;
        let user = database.write(credential, move |tx| User::rename(tx, account, names).boxed()).await?;
        Ok(Response::new(pb::UpdateCurrentUserResponse { user: Some(user.into()) }))
    }

    async fn change_password(
        &self,
        request: Request<pb::ChangePasswordRequest>,
    ) -> Answer<pb::ChangePasswordResponse> {
        let credential = credential_of(&request)?;
        credential.caller().account()?;
        let origin = self.0.origin(&request, &credential);
        let (current, new) = passwords(request.into_inner())?;
        let (ended, keys) = self.0.auth.change_password(credential, current, new, origin).await?;
        Ok(Response::new(pb::ChangePasswordResponse {
            ended_sessions: i32::try_from(ended).unwrap_or(i32::MAX),
            valid_api_keys: i32::try_from(keys).unwrap_or(i32::MAX),
        }))
    }

    async fn renew_customer_code(
        &self,
        request: Request<pb::RenewCustomerCodeRequest>,
    ) -> Answer<pb::RenewCustomerCodeResponse> {
        let credential = credential_of(&request)?;
        let customer = credential.caller().customer_account()?;
        let origin = self.0.origin(&request, &credential);
        let code = CustomerCode::generate()?;
        let renewed = self.0.database.write(credential, move |tx| {
            async move { User::renew_customer_code(tx, customer, code, &origin).await }.boxed()
        });
        Ok(Response::new(pb::RenewCustomerCodeResponse { user: Some(renewed.await?.into()) }))
    }

    async fn create_api_key(
        &self,
        request: Request<pb::CreateApiKeyRequest>,
    ) -> Answer<pb::CreateApiKeyResponse> {
        let credential = credential_of(&request)?;
        let manager = credential.caller().key_manager()?;
        let origin = self.0.origin(&request, &credential);
        let secret = Secret::generate(SecretKind::ApiKey)?;
        let new = new_key(request.into_inner(), &manager, &secret)?;
        let quotas = self.0.quotas;
        let created = self.0.database.write(credential, move |tx| {
            async move { new.create(tx, manager, origin, &quotas).await }.boxed()
        });
        let key = created.await?;
        Ok(Response::new(pb::CreateApiKeyResponse { api_key: Some(key.into()), secret: secret.reveal() }))
    }

    async fn list_api_keys(
        &self,
        request: Request<pb::ListApiKeysRequest>,
    ) -> Answer<pb::ListApiKeysResponse> {
        let credential = credential_of(&request)?;
        let manager = credential.caller().key_manager()?;
        let mut request = request.into_inner();
        let page = Violations::check(|v| PageRequest::take(v, manager.user_id(), &mut request))?;
        let mut keys = read!(self.0.database, manager.tenant(), |conn| ApiKey::list(
            conn,
            &manager,
            page.after,
            page.limit()
        ))?;
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
        let id = Violations::check(|v| parse::uuid(v, "api_key_id", &request.get_ref().api_key_id))?;
        let auth = self.0.auth.clone();
        let key = self
            .0
            .database
            .write(credential, move |tx| {
                async move {
                    let expired = ApiKey::expire(tx, &manager, id, &origin).await;
                    revoke(tx, auth, CredentialId::ApiKey(id), expired)
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
        let pb::RotateApiKeyRequest { api_key_id, overlap } = request.into_inner();
        let (id, overlap) = Violations::check(|v| {
            (parse::uuid(v, "api_key_id", &api_key_id), parse::duration(v, "overlap", overlap, KEY_OVERLAP))
        })?;
        let secret = Secret::generate(SecretKind::ApiKey)?;
        let (key_hash, key_prefix) = (secret.hash(), secret.display_prefix().to_owned());
        let rotated = RotatedKey { id, key_hash, key_prefix, overlap };
        let (auth, quotas) = (self.0.auth.clone(), self.0.quotas);
        let (new, old, _) = self
            .0
            .database
            .write(credential, move |tx| {
                async move {
                    let (began, old) = (Instant::now(), CredentialId::ApiKey(id));
                    let rotated = ApiKey::rotate(tx, &manager, rotated, &origin, &quotas).await;
                    let Ok((.., left)) = rotated else { return revoke(tx, auth, old, rotated) };
                    tx.after_commit(move || auth.revoke_after(old, left.saturating_sub(began.elapsed())));
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
        let pb::CreateWatchTokenRequest { job, note, lifetime } = request.into_inner();
        let (job, note, lifetime) = Violations::check(|v| {
            let job = job_key!(v, job, create_watch_token_request);
            let note = parse::text(v, "note", note);
            (job, note, parse::duration(v, "lifetime", lifetime, WATCH_TOKEN_LIFETIME))
        })?;
        let job_id = self.0.log.jobs.find(provider.into(), &job).await?.id;
        let secret = Secret::generate(SecretKind::WatchToken)?;
        let secret_prefix = secret.display_prefix().to_owned();
        let new = NewWatchToken { job_id, secret_hash: secret.hash(), secret_prefix, note, lifetime };
        let quotas = self.0.quotas;
        let created = self.0.database.write(credential, move |tx| {
            async move { new.create(tx, provider, origin, &quotas).await }.boxed()
        });
        let token = created.await?;
        let watch_token = Some(token.into());
        Ok(Response::new(pb::CreateWatchTokenResponse { watch_token, secret: secret.reveal() }))
    }

    async fn list_watch_tokens(
        &self,
        request: Request<pb::ListWatchTokensRequest>,
    ) -> Answer<pb::ListWatchTokensResponse> {
        let credential = credential_of(&request)?;
        let provider = credential.caller().provider(KeyScope::Append)?;
        let mut request = request.into_inner();
        let (page, job) = Violations::check(|v| {
            let page = PageRequest::take(v, provider.id(), &mut request);
            (page, job_key!(v, request.job, list_watch_tokens_request))
        })?;
        let job_id = self.0.log.jobs.find(provider.into(), &job).await?.id;
        let mut tokens = read!(self.0.database, provider.tenant(), |conn| {
            WatchToken::list(conn, provider, job_id, page.after, page.limit())
        })?;
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
        let id = Violations::check(|v| parse::uuid(v, "watch_token_id", &request.get_ref().watch_token_id))?;
        let auth = self.0.auth.clone();
        let token = self
            .0
            .database
            .write(credential, move |tx| {
                async move {
                    let expired = WatchToken::expire(tx, provider, id, &origin).await;
                    revoke(tx, auth, CredentialId::WatchToken(id), expired)
                }
                .boxed()
            })
            .await?;
        Ok(Response::new(pb::ExpireWatchTokenResponse { watch_token: Some(token.into()) }))
    }

    async fn get_usage(&self, request: Request<pb::GetUsageRequest>) -> Answer<pb::GetUsageResponse> {
        let credential = credential_of(&request)?;
        let viewer = credential.caller().user_viewer()?;
        let usage = read!(self.0.database, viewer.tenant(), |conn| Usage::of(conn, viewer))?;
        Ok(Response::new(usage_message(usage, &self.0.quotas, self.0.auth.settings())))
    }
}

/// Ends a credential on this server: after the commit that expires it, or now if it had
/// expired before, since the call that expired it may have failed before it ended the
/// credential here.
fn revoke<T>(tx: &mut Transaction<'_>, auth: Auth, id: CredentialId, expired: Result<T>) -> Result<T> {
    let revoke = move || auth.revoke(Revocation::Credential(id));
    match expired {
        Ok(_) => tx.after_commit(revoke),
        Err(Error::ApiKeyAlreadyExpired(_) | Error::WatchTokenAlreadyExpired(_)) => revoke(),
        Err(_) => {}
    }
    expired
}

/// The caller's user, if it is one, and its credential.
async fn current_user(
    conn: &mut AsyncPgConnection,
    caller: &Caller,
) -> Result<(Option<pb::User>, pb::get_current_user_response::Credential)> {
    use pb::get_current_user_response::Credential;
    let user = match caller.subject() {
        Subject::User { .. } => Some(User::of_caller(conn, caller).await?.into()),
        Subject::Job(_) => None,
    };
    let credential = match caller.credential() {
        CredentialId::Session(_) => {
            let session = Session::of_account(conn, caller.account()?).await?;
            Credential::Session(session_message(String::new(), &session))
        }
        CredentialId::ApiKey(_) => Credential::ApiKey(ApiKey::of_caller(conn, caller).await?.into()),
        CredentialId::WatchToken(_) => {
            Credential::WatchToken(WatchToken::of_caller(conn, caller).await?.into())
        }
    };
    Ok((user, credential))
}
