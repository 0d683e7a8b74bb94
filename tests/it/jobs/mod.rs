//! Job configurations and jobs: ConfigurationService, JobService, and what AppendEvents accepts.

mod cancellation;
mod configurations;
mod customer_codes;
mod estimates;
mod idempotency;
mod job_service;
mod labels;
mod progress;
mod silence;
mod summaries;
mod validation;
