//! Customer codes: who sees one, what it does, its renewal, and the throttle of guesses.

use std::time::Duration;

use milepost_client::pb::{self, ErrorReason, create_job_request::Customer};
use tonic::{Code, Status};
use uuid::Uuid;

use crate::support::{PASSWORD, TestServer, User, assert_refused, assert_violations, sign_up_request};

const UNKNOWN: &str = "0000000000";

#[track_caller]
fn assert_unknown(answer: Result<impl std::fmt::Debug, Status>, code: &str) {
    let refusal = assert_refused(answer, Code::NotFound, ErrorReason::ResourceNotFound);
    let resource = refusal.details.resource_info().unwrap();
    assert_eq!(
        (resource.resource_type.as_str(), resource.resource_name.as_str()),
        ("milepost.v1.User", code)
    );
}

/// How long the provider has to wait.
#[track_caller]
fn assert_throttled(answer: Result<impl std::fmt::Debug, Status>) -> Duration {
    let refusal = assert_refused(answer, Code::ResourceExhausted, ErrorReason::Overloaded);
    let quota = &refusal.details.quota_failure().unwrap().violations[0];
    assert_eq!(quota.subject, "unknown customer codes of one provider");
    refusal.details.retry_info().unwrap().retry_delay.unwrap()
}

/// Creates a job for the customer of this code, which the server may refuse.
async fn create(provider: &mut User, code: &str) -> Result<pb::Job, Status> {
    let customer = Some(Customer::CustomerCode(code.to_owned()));
    let request = pb::CreateJobRequest {
        provider_job_id: Uuid::now_v7().to_string(),
        customer,
        configuration_tag: "analysis".to_owned(),
        ..Default::default()
    };
    Ok(provider.jobs.create_job(request).await?.into_inner().job.unwrap())
}

async fn renew(customer: &User) -> String {
    let mut auth = customer.session.auth.clone();
    let renewed = auth.renew_customer_code(pb::RenewCustomerCodeRequest {}).await.unwrap().into_inner();
    renewed.user.unwrap().customer_code
}

#[tokio::test(flavor = "multi_thread")]
async fn a_customer_has_a_code_from_sign_up_on_by_which_a_provider_creates_jobs() {
    let server = TestServer::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("load", 1)]).await;
    let code = customer.customer_code().await;
    assert_eq!(
        (code.len(), customer.session.current_user().await.unwrap().user.unwrap().customer_code),
        (10, code.clone())
    );
    assert_eq!(provider.customer_code().await, "", "a provider has none");
    let mut anonymous = server.anonymous().auth;
    let log_in = pb::LogInRequest { email: customer.email.clone(), password: PASSWORD.to_owned() };
    let logged_in = anonymous.log_in(log_in).await.unwrap().into_inner().user.unwrap();
    let signed_up = anonymous.sign_up(sign_up_request("new@example.com")).await.unwrap().into_inner();
    assert_eq!((logged_in.customer_code, signed_up.user.unwrap().customer_code.len()), (code.clone(), 10));

    let typed = format!("{}-{}", &code[..5], &code[5..]).to_lowercase();
    for given in [&code, &typed] {
        let job = create(&mut provider, given).await.unwrap();
        assert_eq!(job.customer.unwrap().id, customer.id);
    }

    let malformed = create(&mut provider, "0123456").await;
    assert_violations(malformed, &["customer_code"]);
    let nobody = pb::CreateJobRequest { customer: None, ..provider.new_job(&customer) };
    assert_violations(provider.jobs.create_job(nobody).await, &["customer"]);
    assert_eq!(server.count("log_in_attempts WHERE succeeded_at IS NULL AND failures > 0").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_renewal_only_the_new_code_is_known_on_every_server() {
    let server = TestServer::start().await;
    let replica = server.replica().await;
    let (mut provider, mut customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("load", 1)]).await;
    let mut elsewhere = replica.same(&provider);
    let old = customer.customer_code().await;
    let job = create(&mut elsewhere, &old).await.unwrap();
    let new = renew(&customer).await;
    assert_ne!(new, old);
    assert_eq!(customer.customer_code().await, new);
    for provider in [&mut provider, &mut elsewhere] {
        assert_unknown(create(provider, &old).await, &old);
        assert_eq!(create(provider, &new).await.unwrap().customer.unwrap().id, customer.id);
    }
    assert_eq!(customer.get(&job).await.id, job.id, "the job of the old code stays");

    let refused = provider.session.auth.renew_customer_code(pb::RenewCustomerCodeRequest {}).await;
    let refusal = assert_refused(refused, Code::PermissionDenied, ErrorReason::RoleRequired);
    assert_eq!(refusal.details.error_info().unwrap().metadata["role"], "CUSTOMER");
    let refused = customer.auth.renew_customer_code(pb::RenewCustomerCodeRequest {}).await;
    assert_refused(refused, Code::PermissionDenied, ErrorReason::SessionRequired);
    assert_eq!(customer.customer_code().await, new);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_create_job_compares_the_customer_that_the_code_names() {
    let server = TestServer::start().await;
    let (mut provider, customer, other) =
        (server.provider().await, server.customer().await, server.customer().await);
    provider.configuration(&[("load", 1)]).await;
    let code = customer.customer_code().await;
    let by_code = provider.new_job_by_code(&customer, &code);
    let first = provider.jobs.create_job(by_code.clone()).await.unwrap().into_inner();
    assert!(!first.existed);
    let named = |customer| pb::CreateJobRequest { customer: Some(customer), ..by_code.clone() };
    let by_id = named(Customer::CustomerId(customer.id.clone()));
    let new = renew(&customer).await;
    for request in [by_id, named(Customer::CustomerCode(new))] {
        let again = provider.jobs.create_job(request).await.unwrap().into_inner();
        assert!(again.existed && again.job == first.job);
    }
    for wrong in [other.customer_code().await, UNKNOWN.to_owned()] {
        let differs = provider.jobs.create_job(named(Customer::CustomerCode(wrong))).await;
        let refusal = assert_refused(differs, Code::AlreadyExists, ErrorReason::JobDiffers);
        assert_eq!(refusal.fields, ["customer_code"]);
    }
    assert_eq!(server.count("jobs").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_codes_of_one_provider_are_throttled_on_every_server_whatever_succeeds_between() {
    let server = TestServer::start().await;
    let replica = server.replica().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    let (mut other, disabled) = (server.provider().await, server.customer().await);
    provider.configuration(&[("load", 1)]).await;
    other.configuration(&[("load", 1)]).await;
    let mut elsewhere = replica.same(&provider);
    let (code, code_of_disabled) = (customer.customer_code().await, disabled.customer_code().await);
    let disable = format!("UPDATE users SET disabled_at = now() WHERE id = '{}'", disabled.id);
    server.database.execute(&disable).await;
    for n in 0..50 {
        assert_unknown(create(&mut provider, UNKNOWN).await, UNKNOWN);
        assert_unknown(create(&mut elsewhere, &code_of_disabled).await, &code_of_disabled);
        if n % 10 == 0 {
            create(&mut provider, &code).await.unwrap();
        }
    }
    server.database.block_log_ins_for(30).await;
    for provider in [&mut provider, &mut elsewhere] {
        for given in [UNKNOWN, &code] {
            let wait = assert_throttled(create(provider, given).await);
            assert!(wait > Duration::from_secs(10) && wait <= Duration::from_secs(30), "{wait:?}");
        }
    }
    provider.job(&customer).await;
    create(&mut other, &code).await.unwrap();

    // When the block is over, codes are looked up again, and one more unknown code blocks.
    let end_of_block =
        "UPDATE log_in_attempts SET blocked_until = clock_timestamp() WHERE blocked_until IS NOT NULL";
    server.database.execute(end_of_block).await;
    create(&mut provider, &code).await.unwrap();
    assert_unknown(create(&mut provider, UNKNOWN).await, UNKNOWN);
    server.database.block_log_ins_for(30).await;
    assert_throttled(create(&mut provider, &code).await);
}
