//! The events that each provider appends, counted against the quotas of stored bytes and of
//! events a day.
//!
//! Each committed event is added up in memory and written once a second, outside of the
//! transactions that append; the write returns what all servers have added, which is what a
//! batch is compared with. So appends pay nothing for their quota, and a provider may exceed
//! it by what is appended through each server until that server has written twice. A crash
//! loses the count of the last second.

use std::{
    collections::HashMap,
    error::Error as StdError,
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use futures_util::FutureExt as _;
use parking_lot::Mutex;
use tokio::time::sleep;
use uuid::Uuid;

use crate::{
    config::QuotaSettings,
    db::{Database, Unconditional},
    error::Result,
    models::{
        event::Event,
        usage::{Appended, EventTotal, settle_some},
    },
    quota::{Quota, QuotaUsed},
};

/// How often what was appended is written.
const PERIOD: Duration = Duration::from_secs(1);
/// After how many periods changes of users who add nothing are taken over.
const SETTLE_PERIODS: u32 = 10;
/// Most users of one write.
const USERS: usize = 1_000;
/// How long a provider is remembered who appends nothing and has used up no quota.
const REMEMBERED: Duration = Duration::from_secs(600);

/// Counts appended events by provider, and knows who has used up a quota.
#[derive(Clone, Debug)]
pub(crate) struct EventUsage(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    database: Database,
    quotas: QuotaSettings,
    tallies: Mutex<HashMap<Uuid, Tally>>,
    /// Held while a write is under way: a stop waits for it.
    writing: tokio::sync::Mutex<()>,
}

/// What is known of a provider.
#[derive(Clone, Copy, Debug)]
struct Tally {
    /// What is not written yet.
    added: Appended,
    /// What all servers have added, and this server since; none before the first write.
    total: Option<Total>,
    /// Whether a batch was submitted since the last write, whose answer depends on the total.
    asked: bool,
    used_at: Instant,
}

#[derive(Clone, Copy, Debug)]
struct Total {
    stored_bytes: i64,
    day_events: i64,
    /// When the day ends; the events are those of the day before from then on.
    day_ends: Instant,
}

impl EventUsage {
    /// Starts the task that writes; it ends when the last clone of this is dropped.
    pub(crate) fn start(database: Database, quotas: QuotaSettings) -> Self {
        let (tallies, writing) = Default::default();
        let inner = Arc::new(Inner { database, quotas, tallies, writing });
        inner.database.spawn(write_each_period(Arc::downgrade(&inner)));
        Self(inner)
    }

    /// The quota that the provider has used up, as far as this server knows.
    pub(crate) fn used_up(&self, provider_id: Uuid) -> Option<QuotaUsed> {
        let now = Instant::now();
        let mut tallies = self.0.tallies.lock();
        let tally = tallies.entry(provider_id).or_insert_with(|| Tally::new(now));
        (tally.asked, tally.used_at) = (true, now);
        tally.used_up(&self.0.quotas, now)
    }

    /// Counts committed events, each with its provider. What the server writes counts for
    /// nobody.
    pub(crate) fn appended<'a>(&self, events: impl Iterator<Item = (Uuid, &'a Event)>) {
        let now = Instant::now();
        let mut tallies = self.0.tallies.lock();
        for (provider_id, event) in events.filter(|(_, event)| !event.kind.is_written_by_server()) {
            tallies.entry(provider_id).or_insert_with(|| Tally::new(now)).add(event.bytes());
        }
    }

    /// Writes what is left. To be called when nothing is appended any more.
    pub(crate) async fn write_rest(&self) -> Result<()> {
        self.0.write().await
    }
}

impl Tally {
    fn new(now: Instant) -> Self {
        Self { added: Appended::default(), total: None, asked: false, used_at: now }
    }

    fn add(&mut self, bytes: i64) {
        self.added.events += 1;
        self.added.bytes += bytes;
        if let Some(total) = &mut self.total {
            total.day_events += 1;
            total.stored_bytes += bytes;
        }
    }

    fn used_up(&self, quotas: &QuotaSettings, now: Instant) -> Option<QuotaUsed> {
        let total = self.total?;
        let day_left = total.day_ends.saturating_duration_since(now);
        let day_events = if day_left.is_zero() { 0 } else { total.day_events };
        [
            (quotas.of(Quota::EventsPerDay), day_events, Some(day_left)),
            (quotas.of(Quota::StoredBytes), total.stored_bytes, None),
        ]
        .into_iter()
        .find(|((_, limit), used, _)| used >= limit)
        .map(|((quota, limit), used, retry_after)| QuotaUsed { quota, limit, used, retry_after })
    }

    /// What all servers have added is known now, except what this server has added since.
    fn know(&mut self, total: &EventTotal, now: Instant) {
        self.total = Some(Total {
            stored_bytes: total.stored_bytes + self.added.bytes,
            day_events: total.day_events + self.added.events,
            day_ends: now + total.day_left,
        });
    }
}

impl Inner {
    async fn write(&self) -> Result<()> {
        let _turn = self.writing.lock().await;
        for users in self.due().chunks(USERS) {
            let appended = self.take(users);
            let writing = appended.clone();
            let written = self
                .database
                .write(Unconditional, move |tx| async move { EventTotal::add(tx, &writing).await }.boxed());
            match written.await {
                Ok(totals) => self.know(&totals),
                Err(error) => {
                    // If the commit succeeded and its answer was lost, these count twice.
                    self.give_back(&appended);
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// The providers with something to write or to read. Every server locks their rows in
    /// this order.
    fn due(&self) -> Vec<Uuid> {
        let tallies = self.tallies.lock();
        let due = tallies.iter().filter(|(_, tally)| tally.asked || tally.added.events > 0);
        let mut due: Vec<Uuid> = due.map(|(id, _)| *id).collect();
        due.sort_unstable();
        due
    }

    fn take(&self, users: &[Uuid]) -> Vec<(Uuid, Appended)> {
        let mut tallies = self.tallies.lock();
        let mut take = |id: &Uuid| {
            let tally = tallies.get_mut(id)?;
            tally.asked = false;
            Some((*id, std::mem::take(&mut tally.added)))
        };
        users.iter().filter_map(&mut take).collect()
    }

    fn give_back(&self, appended: &[(Uuid, Appended)]) {
        let now = Instant::now();
        let mut tallies = self.tallies.lock();
        for (id, appended) in appended {
            let tally = tallies.entry(*id).or_insert_with(|| Tally::new(now));
            tally.asked = true;
            tally.added.bytes += appended.bytes;
            tally.added.events += appended.events;
        }
    }

    fn know(&self, totals: &[EventTotal]) {
        let now = Instant::now();
        let mut tallies = self.tallies.lock();
        for total in totals {
            tallies.entry(total.user_id).or_insert_with(|| Tally::new(now)).know(total, now);
        }
    }

    /// Forgets providers that have appended nothing for long. Those that have used up a
    /// quota stay known, since each of them would otherwise have a second of appends.
    fn forget_idle(&self) {
        let now = Instant::now();
        self.tallies.lock().retain(|_, tally| {
            let idle = now.saturating_duration_since(tally.used_at) > REMEMBERED;
            !idle || tally.added.events > 0 || tally.used_up(&self.quotas, now).is_some()
        });
    }

    async fn settle(&self) -> Result<()> {
        while self.database.write(Unconditional, |tx| async move { settle_some(tx).await }.boxed()).await? {}
        Ok(())
    }
}

async fn write_each_period(usage: Weak<Inner>) {
    let mut failing = false;
    for period in (1..SETTLE_PERIODS + 1).cycle() {
        sleep(PERIOD).await;
        let Some(usage) = usage.upgrade() else { return };
        let mut done = usage.write().await;
        if period == SETTLE_PERIODS {
            usage.forget_idle();
            done = done.and(usage.settle().await);
        }
        // Logged once an outage, not at every attempt.
        if let Err(error) = &done
            && !failing
        {
            tracing::warn!(
                error = error as &dyn StdError,
                "cannot write what was appended; the next write has it"
            );
        }
        failing = done.is_err();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUOTAS: QuotaSettings = QuotaSettings {
        configurations_per_user: 1,
        open_jobs_per_user: 1,
        api_keys_per_user: 1,
        sessions_per_user: 1,
        watch_tokens_per_user: 1,
        stored_mib_per_user: 1,
        events_per_user_day: 3,
    };

    fn total(stored_bytes: i64, day_events: i64) -> EventTotal {
        EventTotal { user_id: Uuid::nil(), stored_bytes, day_events, day_left: Duration::from_secs(60) }
    }

    #[test]
    fn a_total_counts_what_was_added_since_it_was_asked_for() {
        let now = Instant::now();
        let mut tally = Tally::new(now);
        tally.add(300);
        assert_eq!(tally.used_up(&QUOTAS, now), None, "nothing is known yet");
        let written = std::mem::take(&mut tally.added);
        tally.add(300);
        tally.know(&total(1_000 + written.bytes, 1 + written.events), now);
        let used = tally.used_up(&QUOTAS, now).expect("one of before, one written and one more");
        assert_eq!((used.quota, used.limit, used.used), (Quota::EventsPerDay, 3, 3));
        assert_eq!(used.retry_after, Some(Duration::from_secs(60)));
        assert_eq!(tally.used_up(&QUOTAS, now + Duration::from_secs(60)), None, "another day");
    }

    #[test]
    fn waiting_does_not_help_when_the_bytes_are_used_up() {
        let now = Instant::now();
        let mut tally = Tally::new(now);
        tally.know(&total(1024 * 1024 - 300, 0), now);
        assert_eq!(tally.used_up(&QUOTAS, now), None);
        tally.add(300);
        let used = tally.used_up(&QUOTAS, now).expect("a quota");
        assert_eq!((used.quota, used.used, used.retry_after), (Quota::StoredBytes, 1024 * 1024, None));
    }
}
