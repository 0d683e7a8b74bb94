//! Keeps received events in memory once.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use milepost_client::pb;

/// Keeps one copy of each event however often it is received, to save memory.
/// Copies of one event whose content differs are kept apart.
#[derive(Default)]
pub struct EventInterner(Mutex<HashMap<JobSequence, Vec<Arc<pb::Event>>>>);

/// A job's id and a sequence in its log.
type JobSequence = (String, i64);

impl EventInterner {
    pub fn intern(&self, event: pb::Event) -> Arc<pb::Event> {
        let mut all = self.0.lock().unwrap();
        let known = all.entry((event.job_id.clone(), event.sequence)).or_default();
        if let Some(same) = known.iter().find(|known| ***known == event) {
            return Arc::clone(same);
        }
        let event = Arc::new(event);
        known.push(Arc::clone(&event));
        event
    }
}
