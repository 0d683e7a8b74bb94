//! `JobService`: jobs, which a provider runs for a customer.

use std::time::Duration;

use diesel_async::AsyncPgConnection;
use futures_util::FutureExt as _;
use tonic::{Request, Response};
use uuid::Uuid;

use super::{
    Answer, App, Peer,
    configurations::optional_version,
    credential_of,
    export::{self, Answers},
    filter::job_filters,
    page::{Page, PageRequest},
    parse, summary,
};
use crate::{
    db::read,
    error::{Error, Resource, Result, Violations, quoted},
    estimate::{Estimate, estimate},
    models::{
        CreationCursor,
        caller::{KeyScope, Viewer},
        customer_code::{CustomerCode, CustomerKey},
        job::{Job, JobFilters, JobKey, JobPage, NewJob, Party},
        job_identity::Configuration,
        step_times::SinceStep,
    },
    pb::{self, job_service_server::JobService},
    progress::{StepState, Steps},
    proto_enums::{ProtoEnum as _, duration, timestamp},
};

#[derive(Clone, Debug)]
pub struct JobApi(pub App);

#[tonic::async_trait]
impl JobService for JobApi {
    async fn create_job(&self, request: Request<pb::CreateJobRequest>) -> Answer<pb::CreateJobResponse> {
        let credential = credential_of(&request)?;
        let provider = credential.caller().provider(KeyScope::Append)?;
        let new = NewJob::try_from(request.into_inner())?;
        let (quotas, customer) = (self.0.quotas, new.customer.to_string());
        let created = self.0.database.write(credential, move |tx| {
            async move { Job::create(tx, provider, new, &quotas).await }.boxed()
        });
        let created = created.await?;
        let (job, existed) = created.ok_or_else(|| Error::not_found(Resource::Customer, &customer))?;
        Ok(Response::new(pb::CreateJobResponse { job: Some(job.into()), existed }))
    }

    async fn get_job(&self, request: Request<pb::GetJobRequest>) -> Answer<pb::GetJobResponse> {
        let credential = credential_of(&request)?;
        let viewer = credential.caller().viewer()?;
        let key = Violations::check(|v| job_key!(v, request.into_inner().job, get_job_request))?;
        let job = read!(self.0.database, viewer.tenant(), |conn| Job::find(conn, viewer, &key))?;
        let configuration = self.0.log.jobs.configuration(viewer.tenant(), job.job_configuration_id).await?;
        let job_configuration = Some(configuration.tree.clone().into());
        let steps = step_states(&configuration, &job.steps);
        Ok(Response::new(pb::GetJobResponse { job: Some(job.into()), job_configuration, steps }))
    }

    async fn list_jobs(&self, request: Request<pb::ListJobsRequest>) -> Answer<pb::ListJobsResponse> {
        let credential = credential_of(&request)?;
        let viewer = credential.caller().user_viewer()?;
        let (filters, asked) = list(viewer, request.into_inner())?;
        let JobPage { jobs, mut next } = read!(self.0.database, viewer.tenant(), |conn| Job::list(
            conn,
            viewer,
            &filters,
            asked.after,
            asked.size
        ))?;
        let mut page = Page::default();
        let mut last = None;
        for job in jobs {
            let cursor = job.cursor();
            if !page.push(job.into()) {
                next = last;
                break;
            }
            last = Some(cursor);
        }
        let next_page_token = asked.next_token(next.as_ref());
        Ok(Response::new(pb::ListJobsResponse { jobs: page.items, next_page_token }))
    }

    async fn close_job(&self, request: Request<pb::CloseJobRequest>) -> Answer<pb::CloseJobResponse> {
        let credential = credential_of(&request)?;
        let provider = credential.caller().provider(KeyScope::Append)?;
        let origin = self.0.origin(&request, &credential);
        let (key, reason) = close(request.into_inner())?;
        let (id, existed) = self.0.log.close(credential, provider, &key, reason, &origin).await?;
        let key = JobKey::Id(id);
        let job = read!(self.0.database, provider.tenant(), |conn| Job::find(conn, provider.into(), &key))?;
        Ok(Response::new(pb::CloseJobResponse { job: Some(job.into()), existed }))
    }

    async fn request_cancellation(
        &self,
        request: Request<pb::RequestCancellationRequest>,
    ) -> Answer<pb::RequestCancellationResponse> {
        let credential = credential_of(&request)?;
        let customer = credential.caller().customer()?;
        let origin = self.0.origin(&request, &credential);
        let pb::RequestCancellationRequest { job_id: id, reason } = request.into_inner();
        let (key, reason) = Violations::check(|v| (job_id(v, &id), parse::text(v, "reason", reason)))?;
        let existed = self.0.log.request_cancellation(credential, customer, &key, reason, &origin).await?;
        let job = read!(self.0.database, customer.tenant(), |conn| Job::find(conn, customer.into(), &key))?;
        Ok(Response::new(pb::RequestCancellationResponse { job: Some(job.into()), existed }))
    }

    async fn hold_job(&self, request: Request<pb::HoldJobRequest>) -> Answer<pb::HoldJobResponse> {
        let credential = credential_of(&request)?;
        let holder = credential.caller().holder()?;
        let origin = self.0.origin(&request, &credential);
        let pb::HoldJobRequest { job, held } = request.into_inner();
        let key = Violations::check(|v| job_key!(v, job, hold_job_request))?;
        let viewer = holder.viewer();
        let job = self.0.log.jobs.find(viewer, &key).await?;
        let key = JobKey::Id(job.id);
        let changed = self.0.database.write(credential, move |tx| {
            async move { Job::hold(tx, holder, &job, held, origin).await }.boxed()
        });
        let existed = changed.await?;
        let job = read!(self.0.database, viewer.tenant(), |conn| Job::find(conn, viewer, &key))?;
        Ok(Response::new(pb::HoldJobResponse { job: Some(job.into()), existed }))
    }

    async fn summarize_jobs(
        &self,
        request: Request<pb::SummarizeJobsRequest>,
    ) -> Answer<pb::SummarizeJobsResponse> {
        let credential = credential_of(&request)?;
        let viewer = credential.caller().user_viewer()?;
        Ok(Response::new(summary::summarize(&self.0, viewer, request.into_inner()).await?))
    }

    type ExportJobsStream = Answers<pb::ExportJobsResponse>;

    async fn export_jobs(&self, request: Request<pb::ExportJobsRequest>) -> Answer<Self::ExportJobsStream> {
        let credential = credential_of(&request)?;
        let viewer = credential.caller().user_viewer()?;
        let reset = Peer::of(&request).reset;
        Ok(Response::new(export::jobs(&self.0, credential, viewer, reset, request.into_inner()).await?))
    }

    async fn estimate_job(
        &self,
        request: Request<pb::EstimateJobRequest>,
    ) -> Answer<pb::EstimateJobResponse> {
        use pb::{NoEstimateReason, estimate_job_response::Outcome};
        let credential = credential_of(&request)?;
        let viewer = credential.caller().viewer()?;
        let key = Violations::check(|v| job_key!(v, request.into_inner().job, estimate_job_request))?;
        let (job, since) = read!(self.0.database, viewer.tenant(), |conn| since_step(conn, viewer, &key))?;
        let SinceStep { now, passed, times } = since;
        let at = |left: Duration| Some(timestamp(now + left));
        let none = |reason: NoEstimateReason| Outcome::NoEstimate(reason.into());
        let (outcome, jobs) = match estimate(times, passed) {
            _ if job.closed_at.is_some() => (none(NoEstimateReason::JobClosed), 0),
            Err(jobs) => (none(NoEstimateReason::TooFewJobs), jobs),
            Ok(Estimate { p50, p90, jobs }) => {
                (Outcome::Estimate(pb::Estimate { p50: at(p50), p90: at(p90) }), jobs)
            }
        };
        let (jobs, estimated_at) = (i32::try_from(jobs).unwrap_or(i32::MAX), Some(timestamp(now)));
        Ok(Response::new(pb::EstimateJobResponse { outcome: Some(outcome), jobs, estimated_at }))
    }
}

/// A job that the viewer may see, and what completed jobs took from where it stands.
async fn since_step(conn: &mut AsyncPgConnection, viewer: Viewer, key: &JobKey) -> Result<(Job, SinceStep)> {
    let job = Job::find(conn, viewer, key).await?;
    let since = SinceStep::read(conn, &job).await?;
    Ok((job, since))
}

impl TryFrom<pb::CreateJobRequest> for NewJob {
    type Error = Error;

    fn try_from(request: pb::CreateJobRequest) -> Result<Self> {
        let mut violations = Violations::default();
        let v = &mut violations;
        let new = Self {
            provider_job_id: parse::key_text(v, "provider_job_id", request.provider_job_id),
            customer: customer(v, request.customer),
            configuration_tag: parse::key_text(v, "configuration_tag", request.configuration_tag),
            configuration_version: optional_version(
                v,
                "configuration_version",
                request.configuration_version,
            )
            .map(|version| version.to_string()),
            provider_job_name: parse::text(v, "provider_job_name", request.provider_job_name),
            max_silence: parse::max_silence(v, request.max_silence),
            labels: parse::labels(v, "labels", request.labels),
        };
        violations.or(new)
    }
}

/// The state of each step, in the order of the configuration.
pub(super) fn step_states(configuration: &Configuration, steps: &Steps) -> Vec<pb::StepState> {
    let states = configuration.steps.iter().enumerate().map(|(position, step)| {
        let (status, percent) = match steps.state(position) {
            StepState::ToCome => (pb::StepStatus::ToCome, 0),
            StepState::UnderWay(percent) => (pb::StepStatus::UnderWay, percent.into()),
            StepState::Done => (pb::StepStatus::Done, 100),
        };
        pb::StepState {
            step_tag: step.tag.clone(),
            step_name: step.name.clone(),
            status: status.into(),
            percent,
        }
    });
    states.collect()
}

fn customer(violations: &mut Violations, given: Option<pb::create_job_request::Customer>) -> CustomerKey {
    use pb::create_job_request::Customer;
    match given {
        Some(Customer::CustomerId(id)) => CustomerKey::Id(parse::uuid(violations, "customer_id", &id)),
        Some(Customer::CustomerCode(code)) => match CustomerCode::parse(&code) {
            Some(code) => CustomerKey::Code(code),
            None => {
                let rule = "must be 10 characters of base32, as in GetCurrentUser of the customer";
                violations.add("customer_code", format!("{} {rule}", quoted(&code)));
                CustomerKey::Id(Uuid::nil())
            }
        },
        None => {
            violations.add("customer", "must be given, as customer_id or customer_code");
            CustomerKey::Id(Uuid::nil())
        }
    }
}

/// The job to close, and the reason.
fn close(request: pb::CloseJobRequest) -> Result<(JobKey, String)> {
    let mut violations = Violations::default();
    let key = job_key!(&mut violations, request.job, close_job_request);
    let reason = parse::text(&mut violations, "reason", request.reason);
    violations.or((key, reason))
}

/// Converts the oneof `job` of a request to a [`JobKey`].
macro_rules! job_key {
    ($violations:expr, $job:expr, $request:ident) => {
        match $job {
            Some($crate::pb::$request::Job::JobId(id)) => $crate::services::jobs::job_id($violations, &id),
            Some($crate::pb::$request::Job::ProviderJobId(id)) => {
                $crate::services::jobs::provider_job_id($violations, id)
            }
            None => $crate::services::jobs::no_job($violations, "job"),
        }
    };
}
pub(super) use job_key;

pub(super) fn job_id(violations: &mut Violations, id: &str) -> JobKey {
    JobKey::Id(parse::uuid(violations, "job_id", id))
}

pub(super) fn provider_job_id(violations: &mut Violations, id: String) -> JobKey {
    JobKey::ProviderJobId(parse::key_text(violations, "provider_job_id", id))
}

/// Adds the violation of an empty oneof `field`.
pub(super) fn no_job(violations: &mut Violations, field: &str) -> JobKey {
    violations.add(field, "must be given");
    JobKey::Id(Uuid::nil())
}

fn list(
    viewer: Viewer,
    mut request: pb::ListJobsRequest,
) -> Result<(JobFilters, PageRequest<CreationCursor>)> {
    let mut violations = Violations::default();
    let v = &mut violations;
    let page = PageRequest::take(v, viewer.id(), &mut request);
    let filters = job_filters(v, request.filter);
    violations.or((filters, page))
}

impl From<Job> for pb::Job {
    fn from(job: Job) -> Self {
        Self {
            id: job.id.to_string(),
            provider: Some(job.provider.into()),
            customer: Some(job.customer.into()),
            provider_job_id: job.provider_job_id,
            provider_job_name: job.provider_job_name,
            job_configuration_id: job.job_configuration_id.to_string(),
            configuration_tag: job.configuration_tag,
            configuration_version: job.configuration_version,
            status: job.status.to_proto(),
            progress: Some(job.progress.into()),
            last_sequence: job.last_sequence,
            closed_at: job.closed_at.map(timestamp),
            created_at: Some(timestamp(job.created_at)),
            updated_at: Some(timestamp(job.updated_at)),
            configuration_name: job.configuration_name,
            max_silence: job.max_silence.map(|silence| duration(silence.length())),
            cancellation_requested_at: job.cancellation_requested_at.map(timestamp),
            labels: job.labels.0,
            held_by_provider: job.held_by_provider,
            held_by_customer: job.held_by_customer,
        }
    }
}

impl From<Party> for pb::Party {
    fn from(party: Party) -> Self {
        let Party { id, first_name, last_name } = party;
        Self { id: id.to_string(), first_name, last_name }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// The fields of the violations.
    pub(in crate::services) fn fields<T>(result: Result<T>) -> Vec<String> {
        match result {
            Err(Error::Invalid(violations)) => violations.iter().map(|v| v.field.clone()).collect(),
            _ => Vec::new(),
        }
    }

    #[test]
    fn all_violations_of_a_new_job_are_listed_in_field_order() {
        let request = pb::CreateJobRequest {
            provider_job_id: String::new(),
            customer: Some(pb::create_job_request::Customer::CustomerId("x".to_owned())),
            configuration_tag: "a\0".to_owned(),
            configuration_version: "1".to_owned(),
            provider_job_name: "x".repeat(100_000),
            max_silence: Some(prost_types::Duration { seconds: 9, nanos: 999_999_999 }),
            labels: [(String::new(), String::new())].into(),
        };
        assert_eq!(
            fields(NewJob::try_from(request)),
            [
                "provider_job_id",
                "customer_id",
                "configuration_tag",
                "configuration_version",
                "provider_job_name",
                "max_silence",
                "labels"
            ]
        );
    }

    #[test]
    fn a_request_to_close_must_name_its_job() {
        let request = pb::CloseJobRequest { job: None, reason: "x".repeat(257) };
        assert_eq!(fields(close(request)), ["job", "reason"]);
    }
}
