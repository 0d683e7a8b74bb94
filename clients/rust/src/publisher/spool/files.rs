//! The files of a spool: the lock, the segments and `delivered`.

use std::{
    collections::VecDeque,
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    path::{Path, PathBuf},
};

use super::record::{Found, find};

/// A segment that has so many bytes gets no further record.
const SEGMENT_BYTES: u64 = 8 * 1024 * 1024;
const DELIVERED: &str = "delivered";

/// The files of an open spool. All offsets are those in the whole spool.
#[derive(Debug)]
pub(super) struct Files {
    dir: PathBuf,
    fsync: bool,
    /// Its lock is freed when the file is closed.
    _lock: File,
    /// The offset of each segment, in ascending order.
    segments: VecDeque<u64>,
    /// The last segment, open for appending. None if it must be opened, and perhaps cut, before
    /// the next append.
    last: Option<File>,
    end: u64,
    delivered: u64,
}

/// Where to read.
#[derive(Debug)]
pub(super) struct Segment {
    path: PathBuf,
    start: u64,
    pub(super) end: u64,
}

impl Segment {
    /// The bytes from an offset to the end of the segment.
    pub(super) fn read(&self, from: u64) -> io::Result<Vec<u8>> {
        let mut file = File::open(&self.path)?;
        file.seek(SeekFrom::Start(from - self.start))?;
        let mut bytes = Vec::new();
        file.take(self.end - from).read_to_end(&mut bytes)?;
        Ok(bytes)
    }
}

impl Files {
    /// Opens the files of a folder, and cuts a torn record at the end. None if another process
    /// has the lock.
    pub(super) fn open(dir: &Path, fsync: bool) -> io::Result<Option<Self>> {
        let lock = OpenOptions::new().create(true).truncate(false).write(true).open(dir.join("lock"))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(error)) => return Err(error),
        }
        let mut segments = Vec::new();
        for entry in fs::read_dir(dir)? {
            let name = entry?.file_name();
            let offset: Option<u64> =
                name.to_str().and_then(|name| name.strip_suffix(".spool")?.parse().ok());
            segments.extend(offset);
        }
        segments.sort_unstable();
        let first = segments.first().copied().unwrap_or(0);
        // Everything may be delivered again, so that a number that cannot be read is no error.
        let delivered =
            fs::read_to_string(dir.join(DELIVERED)).ok().and_then(|text| text.trim().parse().ok());
        let delivered = delivered.unwrap_or(first).max(first);
        let mut files = Self {
            dir: dir.to_owned(),
            fsync,
            _lock: lock,
            segments: segments.into(),
            last: None,
            end: delivered,
            delivered,
        };
        files.find_end()?;
        Ok(Some(files))
    }

    /// The end is the last one of a record. Behind it, a torn record is cut.
    fn find_end(&mut self) -> io::Result<()> {
        let Some(&start) = self.segments.back() else { return Ok(()) };
        let bytes = fs::read(self.path(start))?;
        let mut end = 0;
        while end < bytes.len() {
            match find(&bytes, end) {
                Found::Record { end: found, .. } | Found::Damaged { end: found } => end = found,
                Found::Torn => break,
            }
        }
        self.end = start + end as u64;
        if self.end < self.delivered {
            // A failure of the machine has taken the end, which was delivered before.
            self.end = self.delivered;
            self.remove_segments(self.segments.len())
        } else {
            self.open_last().map(|_last| ())
        }
    }

    pub(super) fn end(&self) -> u64 {
        self.end
    }

    pub(super) fn delivered(&self) -> u64 {
        self.delivered
    }

    /// Appends a record. After an error the files are as they were before, or are set back to
    /// that by the next append.
    pub(super) fn append(&mut self, record: &[u8]) -> io::Result<()> {
        let fsync = self.fsync;
        let file = self.segment_to_append()?;
        let written = file.write_all(record).and_then(|()| if fsync { file.sync_data() } else { Ok(()) });
        if let Err(error) = written {
            self.last = None;
            let _reopened_later = self.open_last();
            return Err(error);
        }
        self.end += record.len() as u64;
        Ok(())
    }

    fn segment_to_append(&mut self) -> io::Result<&mut File> {
        if self.segments.back().is_some_and(|start| self.end - start < SEGMENT_BYTES) {
            return self.open_last();
        }
        let path = self.path(self.end);
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        // A former attempt may have left bytes.
        file.set_len(0)?;
        if self.fsync && cfg!(unix) {
            File::open(&self.dir)?.sync_all()?;
        }
        self.segments.push_back(self.end);
        Ok(self.last.insert(file))
    }

    /// The last segment, cut to the end.
    fn open_last(&mut self) -> io::Result<&mut File> {
        if self.last.is_none() {
            let start = self.segments.back().copied().unwrap_or(self.end);
            let file = OpenOptions::new().append(true).open(self.path(start))?;
            file.set_len(self.end - start)?;
            self.last = Some(file);
        }
        self.last.as_mut().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// The segment that has this offset, which is before the end.
    pub(super) fn segment_at(&self, offset: u64) -> Segment {
        let next = self.segments.partition_point(|start| *start <= offset);
        let start = self.segments.get(next.wrapping_sub(1)).copied().unwrap_or(offset);
        let end = self.segments.get(next).copied().unwrap_or(self.end);
        Segment { path: self.path(start), start, end }
    }

    /// Removes the segments that are delivered as a whole, except for the last one. A failure
    /// of the machine may bring an older `delivered` back, which is no harm.
    pub(super) fn save_delivered(&mut self, delivered: u64) -> io::Result<()> {
        self.delivered = delivered;
        let new = self.dir.join("delivered.new");
        let saved =
            fs::write(&new, delivered.to_string()).and_then(|()| fs::rename(&new, self.dir.join(DELIVERED)));
        // Also after an error: a full disk needs it most.
        let whole = self.segments.iter().skip(1).take_while(|start| **start <= delivered).count();
        self.remove_segments(whole)?;
        saved
    }

    fn remove_segments(&mut self, count: usize) -> io::Result<()> {
        for _ in 0..count {
            if let Some(&start) = self.segments.front() {
                fs::remove_file(self.path(start))?;
                self.segments.pop_front();
            }
        }
        Ok(())
    }

    fn path(&self, start: u64) -> PathBuf {
        self.dir.join(format!("{start:020}.spool"))
    }
}
