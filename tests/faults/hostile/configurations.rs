//! Configurations of 200 steps with 64 metadata names each.

use futures_util::future::join_all;
use milepost_client::{
    Service,
    pb::{
        self, configuration_service_client::ConfigurationServiceClient, get_job_configuration_request::Key,
    },
};
use tonic::Code;
use uuid::Uuid;

use super::{Hostile, requests};

const TAG: &str = "large";
const PAUSE_MS: u64 = 3_000;
/// Calls of GetJobConfiguration in flight: more than one user may have.
const AT_ONCE: usize = 80;
const AT_ONCE_PAUSE_MS: u64 = 4_000;

/// Registers one large configuration after the other until the quota is used up, and creates
/// jobs of them with one event each, which the other server must be able to read.
pub async fn register_and_use(mut hostile: Hostile) {
    let user = hostile.context.hostile.clone();
    let client = hostile.context.client(hostile.replica, &user).configurations.clone();
    let mut versions: Vec<String> = Vec::new();
    while !hostile.is_finishing() {
        let version = format!("{}.{}.0", hostile.replica, versions.len());
        let request = requests::large_configuration(TAG, &version);
        match hostile.call(client.clone().register_job_configuration(request)).await {
            Ok(_) => versions.push(version),
            // The quota is used up.
            Err(Code::ResourceExhausted) => {}
            Err(_) => hostile.pause(200).await,
        }
        if !versions.is_empty() {
            let version = versions[hostile.random.usize(..versions.len())].clone();
            let id = Uuid::now_v7().to_string();
            let job = create_job(&hostile, &id, &version).await;
            if job == Err(Code::NotFound) {
                // A failover has lost the configuration.
                versions.clear();
            } else {
                let request = pb::AppendEventsRequest {
                    job: Some(pb::append_events_request::Job::ProviderJobId(id)),
                    expected_sequence: None,
                    events: vec![requests::event()],
                };
                let _answer = hostile.append(request).await;
            }
        }
        hostile.pause(PAUSE_MS).await;
    }
}

async fn create_job(hostile: &Hostile, id: &str, version: &str) -> Result<(), Code> {
    let request = pb::CreateJobRequest {
        provider_job_id: id.to_owned(),
        customer: Some(pb::create_job_request::Customer::CustomerId(hostile.context.revoked_from.id.clone())),
        configuration_tag: TAG.to_owned(),
        configuration_version: version.to_owned(),
        provider_job_name: String::new(),
        ..Default::default()
    };
    hostile.call(hostile.client.jobs.clone().create_job(request)).await.map(drop)
}

/// Asks for a large configuration, many times at once.
pub async fn get_at_once(mut hostile: Hostile) {
    let user = hostile.context.hostile.clone();
    let client = hostile.context.client(hostile.replica, &user).configurations.clone();
    while !hostile.is_finishing() {
        let request = requests::large_configuration("wanted", "1.0.0");
        let registered = hostile.call(client.clone().register_job_configuration(request)).await;
        let Ok(registered) = registered else {
            hostile.pause(200).await;
            continue;
        };
        let id = registered.job_configuration.expect("the response has a configuration").id;
        let request = pb::GetJobConfigurationRequest { key: Some(Key::Id(id)), version: String::new() };
        while !hostile.is_finishing() {
            let answers =
                join_all((0..AT_ONCE).map(|_| get(&hostile, client.clone(), request.clone()))).await;
            hostile.pause(AT_ONCE_PAUSE_MS).await;
            if answers.contains(&Err(Code::NotFound)) {
                break;
            }
        }
    }
}

async fn get(
    hostile: &Hostile,
    mut client: ConfigurationServiceClient<Service>,
    request: pb::GetJobConfigurationRequest,
) -> Result<(), Code> {
    hostile.call(client.get_job_configuration(request)).await.map(drop)
}
