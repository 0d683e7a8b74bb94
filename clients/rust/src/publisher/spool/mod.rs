//! A spool: what a publisher appends is kept in files until the server has stored it.
//!
//! The folder of a spool has these files. The Python client uses the same format.
//!
//! - `lock` is locked (flock) by the process that has the spool.
//! - `%020d.spool` are the segments, each named by the offset of its first byte in the whole
//!   spool. A segment has whole records.
//! - `delivered` has, in decimal digits, the offset up to which everything is delivered. Wholly
//!   delivered segments are removed.
//! - `rejected/%020d.json` tell what the server refused or what was damaged, each named by the
//!   offset of its record.
//!
//! A record is the length of its payload and the CRC-32 (IEEE) of its payload, each as 4 bytes
//! in little-endian order, and the payload. The first byte of the payload is the kind. The
//! rest is a message: 1 is CreateJobRequest, and 2 is AppendEventsRequest with one event.
//!
//! A process that ends while it writes leaves a torn record at the end, which is cut when the
//! spool is opened.

mod files;
mod follower;
mod record;
mod rejected;
#[cfg(test)]
mod tests;

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::watch;

use self::{files::Files, record::HEADER_BYTES};
pub(super) use self::{
    follower::{Follower, save_delivered},
    record::encode,
};
use super::Refusal;

const MAX_BYTES: u64 = 1024 * 1024 * 1024;
/// The largest message that a server accepts, and the kind before it.
const MAX_PAYLOAD_BYTES: usize = 1024 * 1024 + 1;
const REJECTED: &str = "rejected";

/// The settings of a [`Spool`].
#[derive(Clone, Debug)]
#[must_use]
pub struct SpoolSettings {
    dir: PathBuf,
    fsync: bool,
    max_bytes: u64,
}

impl SpoolSettings {
    /// A spool in this folder, which is created if it does not exist.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into(), fsync: false, max_bytes: MAX_BYTES }
    }

    /// Whether an append returns only when the operating system has written the event to the
    /// disk. Without it, which is the default, events survive the end of the process, but the
    /// last ones may be lost if the machine fails.
    pub fn fsync(mut self, fsync: bool) -> Self {
        self.fsync = fsync;
        self
    }

    /// The most bytes that are not delivered: 1 GiB by default. The files have up to 8 MiB
    /// more.
    pub fn max_bytes(mut self, bytes: u64) -> Self {
        self.max_bytes = bytes;
        self
    }

    /// Opens the spool and locks it. Reads and writes files, but not for long.
    pub fn open(self) -> Result<Spool, SpoolError> {
        let failed = |error| SpoolError::Files { dir: self.dir.clone(), error: Arc::new(error) };
        create_dir(&self.dir.join(REJECTED)).map_err(failed)?;
        let Some(files) = Files::open(&self.dir, self.fsync).map_err(failed)? else {
            return Err(SpoolError::Locked(self.dir));
        };
        let written = watch::Sender::new(files.end());
        Ok(Spool { settings: self, files: Mutex::new(Some(files)), written })
    }
}

/// Creates a folder that other users cannot read.
fn create_dir(dir: &Path) -> io::Result<()> {
    let mut builder = fs::DirBuilder::new();
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.recursive(true).create(dir)
}

/// An open spool, which this process has alone. See
/// [`PublisherBuilder::spool`](super::PublisherBuilder::spool).
#[derive(Debug)]
pub struct Spool {
    settings: SpoolSettings,
    /// None once the spool is closed.
    files: Mutex<Option<Files>>,
    /// The offset of the end.
    written: watch::Sender<u64>,
}

/// Why a spool cannot be used.
#[derive(Clone, Debug, thiserror::Error)]
pub enum SpoolError {
    /// Another process has the spool, or another publisher of this process.
    #[error("the spool {0:?} is in use")]
    Locked(PathBuf),
    /// So much is not delivered that the spool takes nothing more now.
    #[error("the spool {dir:?} is full: {max_bytes} bytes are not delivered")]
    Full {
        /// The folder of the spool.
        dir: PathBuf,
        /// See [`SpoolSettings::max_bytes`].
        max_bytes: u64,
    },
    /// The request has so many bytes that no server accepts it.
    #[error("the request has {0} bytes, and at most 1 MiB is allowed")]
    TooLarge(usize),
    /// The files cannot be read or written, as when the disk is full. Nothing was appended.
    #[error("the spool {dir:?} cannot be read or written: {error}")]
    Files {
        /// The folder of the spool.
        dir: PathBuf,
        /// The cause.
        #[source]
        error: Arc<io::Error>,
    },
    /// The publisher of the spool was closed.
    #[error("the spool is closed")]
    Closed,
}

impl Spool {
    fn dir(&self) -> &Path {
        &self.settings.dir
    }

    /// The offset of the end.
    pub(super) fn written(&self) -> u64 {
        *self.written.borrow()
    }

    /// The offset up to which everything is delivered.
    pub(super) fn delivered(&self) -> u64 {
        self.files().as_ref().map_or(0, Files::delivered)
    }

    /// Appends a record. After an error the spool is as it was before.
    pub(super) fn append(&self, record: &[u8]) -> Result<(), SpoolError> {
        let payload = record.len() - HEADER_BYTES;
        if payload > MAX_PAYLOAD_BYTES {
            return Err(SpoolError::TooLarge(payload - 1));
        }
        let max_bytes = self.settings.max_bytes;
        self.with_files(|files| {
            if files.end() - files.delivered() + record.len() as u64 > max_bytes {
                return Err(SpoolError::Full { dir: self.dir().to_owned(), max_bytes });
            }
            files.append(record).map_err(|error| self.failed(error))?;
            self.written.send_replace(files.end());
            Ok(())
        })
    }

    /// The bytes from an offset to the end of its segment, and the offset of this end. Where
    /// bytes are missing, they are fewer.
    fn read(&self, from: u64) -> Result<(Vec<u8>, u64), SpoolError> {
        let segment = self.with_files(|files| Ok(files.segment_at(from)))?;
        let bytes = segment.read(from).map_err(|error| self.failed(error))?;
        Ok((bytes, segment.end))
    }

    /// Keeps what is delivered over restarts, and removes the segments that are not needed.
    fn save_delivered(&self, delivered: u64) -> Result<(), SpoolError> {
        self.with_files(|files| files.save_delivered(delivered).map_err(|error| self.failed(error)))
    }

    /// Writes a file that tells about a refusal.
    pub(super) fn reject(&self, offset: u64, refusal: &Refusal) -> Result<(), SpoolError> {
        let file = self.dir().join(REJECTED).join(format!("{offset:020}.json"));
        rejected::write(&file, refusal, self.settings.fsync).map_err(|error| self.failed(error))
    }

    /// Unlocks the spool. Nothing can be done with it any more.
    pub(super) fn close(&self, delivered: u64) -> Result<(), SpoolError> {
        match self.files().take() {
            Some(mut files) => files.save_delivered(delivered).map_err(|error| self.failed(error)),
            None => Ok(()),
        }
    }

    fn with_files<T>(&self, work: impl FnOnce(&mut Files) -> Result<T, SpoolError>) -> Result<T, SpoolError> {
        self.files().as_mut().map_or(Err(SpoolError::Closed), work)
    }

    fn files(&self) -> MutexGuard<'_, Option<Files>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self, error: io::Error) -> SpoolError {
        SpoolError::Files { dir: self.dir().to_owned(), error: Arc::new(error) }
    }
}
