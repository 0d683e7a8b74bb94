//! What each user has in flight on this server, and how fast: calls, events, and the bytes of
//! messages that are not answered yet.
//!
//! | setting | beyond it a unary call is | beyond it a publish stream is |
//! |---|---|---|
//! | `--calls-per-second` | refused | refused when it is opened |
//! | `--calls-in-flight` | refused | not counted: streams have a limit of their own |
//! | `--events-per-second` | refused | read more slowly |
//! | `--bytes-in-flight-mib` | refused | read more slowly |
//! | `--total-bytes-in-flight-mib` | refused | read more slowly, in turns by user |

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use crate::{
    config::TenantSettings,
    error::{Error, Result},
    limits::{MESSAGE_BYTES, MESSAGE_CHARGE_BYTES},
    models::caller::Tenant,
    turns::{Acquire, Permits, Turns},
};

/// What a rate allows at once, and how long a tenant must be idle to be forgotten.
const BURST: Duration = Duration::from_secs(1);
/// When a user with too much in flight should try again.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// Most summaries that are made at once for all tenants together.
const SUMMARIES: usize = 1_000;
const MIB: usize = 1024 * 1024;

/// What the tenants of this server use.
#[derive(Clone, Debug)]
pub struct Tenants {
    settings: TenantSettings,
    active: Arc<Mutex<Active>>,
    bytes: Turns<Tenant>,
    /// One for each tenant.
    summaries: Turns<Tenant>,
}

#[derive(Debug)]
struct Active {
    tenants: HashMap<Tenant, Use>,
    /// When the tenants that are idle were last forgotten.
    swept_at: Instant,
}

#[derive(Debug, Default)]
struct Use {
    calls: Rate,
    events: Rate,
    calls_in_flight: usize,
}

/// A token bucket that holds what comes in [`BURST`]: the time at which it is full, none if
/// that is long ago.
#[derive(Clone, Copy, Debug, Default)]
struct Rate(Option<Instant>);

/// A unary call that is counted until this is dropped.
#[derive(Debug)]
pub struct OpenCall {
    tenant: Tenant,
    active: Arc<Mutex<Active>>,
}

/// The bytes in flight that one message takes. They are free when the last clone is dropped.
#[derive(Clone, Debug)]
pub struct HeldBytes(#[expect(dead_code, reason = "it is held until it is dropped")] Arc<Permits<Tenant>>);

/// What the messages of one call hold that were read and not taken yet, in their order.
#[derive(Clone, Debug, Default)]
pub struct HeldMessages(Arc<Mutex<VecDeque<HeldBytes>>>);

impl Rate {
    /// When this many more would leave the bucket full again.
    fn after(self, now: Instant, count: usize, per_second: u32) -> Instant {
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        let takes = Duration::from_secs(1) * count / per_second.max(1);
        self.0.map_or(now, |full_at| full_at.max(now)) + takes
    }

    /// Takes `count` now, or says how long until there are that many.
    fn take(&mut self, now: Instant, count: usize, per_second: u32) -> Result<(), Duration> {
        let full_at = self.after(now, count, per_second);
        let missing = full_at.saturating_duration_since(now).saturating_sub(BURST);
        if missing.is_zero() {
            self.0 = Some(full_at);
            Ok(())
        } else {
            Err(missing)
        }
    }

    /// Takes `count` in any case; returns how long to wait until there would have been that
    /// many.
    fn reserve(&mut self, now: Instant, count: usize, per_second: u32) -> Duration {
        let full_at = self.after(now, count, per_second);
        self.0 = Some(full_at);
        full_at.saturating_duration_since(now).saturating_sub(BURST)
    }

    fn is_full(self, now: Instant) -> bool {
        self.0.is_none_or(|full_at| full_at <= now)
    }
}

impl Active {
    fn of(&mut self, tenant: Tenant, now: Instant) -> &mut Use {
        if now.saturating_duration_since(self.swept_at) > BURST {
            self.swept_at = now;
            self.tenants.retain(|_, used| {
                used.calls_in_flight > 0 || !used.calls.is_full(now) || !used.events.is_full(now)
            });
        }
        self.tenants.entry(tenant).or_default()
    }
}

impl Tenants {
    pub(crate) fn new(settings: TenantSettings) -> Self {
        let TenantSettings { bytes_in_flight_mib, total_bytes_in_flight_mib, .. } = settings;
        let active = Active { tenants: HashMap::new(), swept_at: Instant::now() };
        Self {
            settings,
            active: Arc::new(Mutex::new(active)),
            bytes: Turns::new(total_bytes_in_flight_mib * MIB, bytes_in_flight_mib * MIB),
            summaries: Turns::new(SUMMARIES, 1),
        }
    }

    /// Counts a unary call until the returned value is dropped. [`Error::RateExceeded`] or
    /// [`Error::Overloaded`] beyond the settings.
    pub fn open_call(&self, tenant: Tenant) -> Result<OpenCall> {
        let now = Instant::now();
        let mut active = self.active.lock();
        let used = active.of(tenant, now);
        self.count_call(used, now)?;
        if used.calls_in_flight >= self.settings.calls_in_flight {
            return Err(Error::Overloaded { what: "calls of one user", retry_after: RETRY_AFTER });
        }
        used.calls_in_flight += 1;
        drop(active);
        Ok(OpenCall { tenant, active: Arc::clone(&self.active) })
    }

    /// Counts the opening of a stream. [`Error::RateExceeded`] beyond the setting.
    pub fn open_stream(&self, tenant: Tenant) -> Result<()> {
        let now = Instant::now();
        self.count_call(self.active.lock().of(tenant, now), now)
    }

    fn count_call(&self, used: &mut Use, now: Instant) -> Result<()> {
        let taken = used.calls.take(now, 1, self.settings.calls_per_second);
        taken.map_err(|retry_after| Error::RateExceeded { what: "calls a second of one user", retry_after })
    }

    /// Counts events to append. [`Error::RateExceeded`] beyond the setting.
    pub fn count_events(&self, tenant: Tenant, events: usize) -> Result<()> {
        let now = Instant::now();
        let taken =
            self.active.lock().of(tenant, now).events.take(now, events, self.settings.events_per_second);
        taken.map_err(|retry_after| Error::RateExceeded { what: "events a second of one user", retry_after })
    }

    /// Counts events of a publish stream; returns how long the stream must wait with them.
    pub fn pace_events(&self, tenant: Tenant, events: usize) -> Duration {
        let now = Instant::now();
        self.active.lock().of(tenant, now).events.reserve(now, events, self.settings.events_per_second)
    }

    /// Takes the bytes in flight for a message of this encoded length;
    /// [`Error::Overloaded`] if there are not that many left.
    pub fn hold(&self, tenant: Tenant, message_bytes: usize) -> Result<HeldBytes> {
        self.try_hold(tenant, charge(message_bytes))
            .ok_or(Error::Overloaded { what: "bytes of messages of one user", retry_after: RETRY_AFTER })
    }

    /// Takes the bytes in flight for an answer that is larger than what its request holds.
    pub fn hold_answer(&self, tenant: Tenant, bytes: usize) -> Result<HeldBytes> {
        self.try_hold(tenant, bytes)
            .ok_or(Error::Overloaded { what: "bytes of answers of one user", retry_after: RETRY_AFTER })
    }

    fn try_hold(&self, tenant: Tenant, bytes: usize) -> Option<HeldBytes> {
        let bytes = bytes.min(self.bytes.most_of_key());
        self.bytes.try_acquire_many(tenant, bytes).map(HeldBytes::from)
    }

    /// Counts a summary until the returned value is dropped; [`Error::Overloaded`] while another
    /// one of the tenant is made.
    pub fn open_summary(&self, tenant: Tenant) -> Result<Permits<Tenant>> {
        let what = "summaries of one user";
        self.summaries.try_acquire_many(tenant, 1).ok_or(Error::Overloaded { what, retry_after: RETRY_AFTER })
    }

    /// As [`Self::hold`], but waits for them, in turns with other tenants.
    pub fn wait_to_hold(&self, tenant: Tenant, message_bytes: usize) -> Acquire<Tenant> {
        self.bytes.acquire_many(tenant, charge(message_bytes))
    }
}

/// What a message takes of the bytes in flight: a small one takes more memory than it has
/// bytes.
fn charge(message_bytes: usize) -> usize {
    message_bytes.clamp(MESSAGE_CHARGE_BYTES, MESSAGE_BYTES)
}

impl Drop for OpenCall {
    fn drop(&mut self) {
        if let Some(used) = self.active.lock().tenants.get_mut(&self.tenant) {
            used.calls_in_flight -= 1;
        }
    }
}

impl From<Permits<Tenant>> for HeldBytes {
    fn from(permits: Permits<Tenant>) -> Self {
        Self(Arc::new(permits))
    }
}

impl HeldMessages {
    /// To be called for each message before it is read.
    pub fn push(&self, held: HeldBytes) {
        self.0.lock().push_back(held);
    }

    /// What the next message holds, to be called for each one that was read.
    pub fn pop(&self) -> Option<HeldBytes> {
        self.0.lock().pop_front()
    }

    /// What the only message of a unary call holds, which the call goes on to hold too.
    pub fn first(&self) -> Option<HeldBytes> {
        self.0.lock().front().cloned()
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    const SETTINGS: TenantSettings = TenantSettings {
        calls_per_second: 10,
        calls_in_flight: 3,
        events_per_second: 1_000,
        bytes_in_flight_mib: 2,
        total_bytes_in_flight_mib: 3,
    };

    fn tenant() -> Tenant {
        Tenant::of_user(Uuid::now_v7())
    }

    #[test]
    fn a_rate_allows_a_second_at_once_and_says_when_the_next_is_allowed() {
        let (mut rate, start) = (Rate::default(), Instant::now());
        assert!(rate.is_full(start));
        for _ in 0..10 {
            assert_eq!(rate.take(start, 1, 10), Ok(()));
        }
        assert_eq!(rate.take(start, 1, 10), Err(Duration::from_millis(100)));
        assert_eq!(rate.take(start, 5, 10), Err(Duration::from_millis(500)));
        let later = start + Duration::from_millis(100);
        assert_eq!(rate.take(later, 1, 10), Ok(()));
        assert!(rate.take(later, 1, 10).is_err() && !rate.is_full(later));
        assert!(rate.is_full(later + BURST));
        // No more than a second's worth is saved up.
        let much_later = later + Duration::from_secs(60);
        assert_eq!(rate.take(much_later, 10, 10), Ok(()));
        assert!(rate.take(much_later, 1, 10).is_err());
    }

    #[test]
    fn a_reservation_waits_until_the_rate_allows_it() {
        let (mut rate, now) = (Rate::default(), Instant::now());
        assert_eq!(rate.reserve(now, 10, 10), Duration::ZERO);
        assert_eq!(rate.reserve(now, 5, 10), Duration::from_millis(500));
        assert_eq!(rate.reserve(now, 5, 10), Duration::from_secs(1));
    }

    #[test]
    fn calls_are_counted_by_tenant_until_they_end() {
        let tenants = Tenants::new(SETTINGS);
        let (busy, other) = (tenant(), tenant());
        let calls: Vec<OpenCall> =
            (0..3).map(|_| tenants.open_call(busy).expect("within the limit")).collect();
        let refused = tenants.open_call(busy);
        assert!(matches!(refused, Err(Error::Overloaded { .. })), "{refused:?}");
        assert!(tenants.open_call(other).is_ok());
        drop(calls);
        for _ in 0..6 {
            assert!(tenants.open_call(busy).is_ok());
        }
        let refused = tenants.open_call(busy);
        assert!(matches!(refused, Err(Error::RateExceeded { .. })), "{refused:?}");
        assert!(tenants.open_stream(busy).is_err() && tenants.open_stream(other).is_ok());
    }

    #[test]
    fn tenants_that_are_idle_are_forgotten() {
        let tenants = Tenants::new(SETTINGS);
        let open = tenants.open_call(tenant()).expect("within the limit");
        tenants.count_events(tenant(), 10).expect("within the limit");
        let mut active = tenants.active.lock();
        assert_eq!(active.tenants.len(), 2);
        let later = Instant::now() + 2 * BURST;
        active.of(tenant(), later);
        assert_eq!(active.tenants.len(), 2, "the open call, and the new tenant");
        drop(active);
        drop(open);
        let mut active = tenants.active.lock();
        active.of(tenant(), later + 2 * BURST);
        assert_eq!(active.tenants.len(), 1);
    }

    #[test]
    fn bytes_are_held_by_tenant_and_in_all() {
        let tenants = Tenants::new(SETTINGS);
        let (first, second) = (tenant(), tenant());
        let held: Vec<_> = (0..2).map(|_| tenants.hold(first, MIB).expect("room")).collect();
        assert!(tenants.hold(first, 0).is_err(), "the tenant has none left");
        let other = tenants.hold(second, MIB).expect("room");
        assert!(tenants.hold(second, 0).is_err(), "the server has none left");
        let copy = other.clone();
        drop(other);
        assert!(tenants.hold(second, 0).is_err(), "a clone still holds them");
        drop((copy, held));
        // A small message counts as a larger one.
        let most = 2 * MIB / MESSAGE_CHARGE_BYTES;
        let small: Vec<_> = (0..most).map(|_| tenants.hold(first, 1).expect("room")).collect();
        assert!(tenants.hold(first, 1).is_err());
        drop(small);
    }
}
