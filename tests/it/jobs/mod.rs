//! Job configurations and jobs: ConfigurationService, JobService, and what AppendEvents accepts.

mod configurations;
mod idempotency;
mod job_service;
mod progress;
mod validation;
