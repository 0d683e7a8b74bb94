//! Holds, by which a side of a job keeps retention from its events.

use diesel::prelude::*;
use diesel_async::RunQueryDsl;

use super::Job;
use crate::{
    db::Transaction,
    error::{Error, Resource, Result},
    models::{
        audit_entry::{AuditAct, AuditEntry, Origin},
        caller::{Holder, Visibility},
        job_identity::JobIdentity,
    },
    schema::jobs,
};

impl Job {
    /// Sets or lifts the holder's hold of a job, which the holder sees. Returns whether the hold
    /// was as wanted before. Fails with [`Error::NotFound`], or with [`Error::EventsRemoved`] to
    /// hold a job whose events retention removes.
    pub(crate) async fn hold(
        tx: &mut Transaction<'_>,
        holder: Holder,
        job: &JobIdentity,
        held: bool,
        origin: Origin,
    ) -> Result<bool> {
        let columns = (jobs::held_by_provider, jobs::held_by_customer, jobs::events_removed);
        // The removal of the job's events locks the row as well.
        let row = jobs::table.find(job.id).select(columns).for_no_key_update();
        let row: Option<(bool, bool, bool)> = row.first(tx).await.optional()?;
        let (by_provider, by_customer, removed) =
            row.ok_or_else(|| Error::not_found(Resource::Job, &job.id))?;
        let (before, after) = match holder.viewer().visibility() {
            Visibility::Provider(_) => (by_provider, (held, by_customer)),
            Visibility::Customer(_) | Visibility::Job(_) => (by_customer, (by_provider, held)),
        };
        if before == held {
            return Ok(true);
        }
        if removed {
            return Err(Error::EventsRemoved(job.id));
        }
        let columns = (jobs::held_by_provider.eq(after.0), jobs::held_by_customer.eq(after.1));
        diesel::update(jobs::table.find(job.id)).set(columns).execute(tx).await?;
        let act = if held { AuditAct::JobHeld } else { AuditAct::JobReleased };
        let user_id = Some(holder.viewer().id());
        AuditEntry { user_id, job_id: Some(job.id), ..origin.entry(act) }.insert(tx).await?;
        Ok(false)
    }
}
