//! How many events one query reads, so that neither the query nor what it brings is large.

use std::sync::Arc;

use super::event::LogEvent;

/// Most bytes of events that wait to be sent: a page of larger events is cut, and
/// the next one is read shorter.
pub(super) const PAGE_BYTES: usize = 256 * 1024;

/// Most events of the next page.
#[derive(Clone, Copy, Debug)]
pub(super) struct PageSize(i64);

impl Default for PageSize {
    fn default() -> Self {
        Self(Self::MOST)
    }
}

impl PageSize {
    /// Most events that one page reads.
    pub(super) const MOST: i64 = 200;

    pub(super) fn events(self) -> i64 {
        self.0
    }

    /// Has the next page be shorter, after one that could not be read; false if that page had
    /// a single event.
    pub(super) fn shorten(&mut self) -> bool {
        let longer = self.0 > 1;
        self.0 = (self.0 / 2).max(1);
        longer
    }

    /// Cuts a page of large events, and sets the size of the next page. Whether this page was
    /// cut: at least its first event is left.
    pub(super) fn cut(&mut self, events: &mut Vec<Arc<LogEvent>>) -> bool {
        let mut bytes = 0;
        let fit = events.iter().take_while(|event| {
            let fits = bytes < PAGE_BYTES;
            bytes += event.encoded.len();
            fits
        });
        let fit = fit.count();
        if fit == events.len() {
            self.0 = (self.0 * 2).min(Self::MOST);
            return false;
        }
        events.truncate(fit);
        self.0 = i64::try_from(fit).unwrap_or(Self::MOST).min(Self::MOST);
        true
    }
}
