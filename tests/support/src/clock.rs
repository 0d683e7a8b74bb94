//! The clock of a process, which libfaketime moves.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// A clock with an offset that can be changed while the process runs.
#[derive(Debug)]
pub struct Clock {
    library: PathBuf,
    file: PathBuf,
}

impl Clock {
    /// A clock without offset, which is kept in a file of this directory; none without
    /// libfaketime.
    pub fn if_installed(dir: &Path) -> Option<Self> {
        let library = fs::read_dir("/usr/lib").unwrap().flatten();
        let library = library.map(|entry| entry.path().join("faketime/libfaketimeMT.so.1"));
        let library =
            library.chain(["/usr/lib/faketime/libfaketimeMT.so.1".into()]).find(|path| path.exists())?;
        let clock = Self { library, file: dir.join("clock") };
        clock.set(0);
        Some(clock)
    }

    /// Sets by how many seconds the clock is ahead of the real one.
    pub fn set(&self, seconds: i64) {
        let new = self.file.with_extension("new");
        fs::write(&new, format!("{seconds:+}\n")).unwrap();
        fs::rename(new, &self.file).unwrap();
    }

    /// The environment of a process with this clock.
    pub fn variables(&self) -> [(&'static str, &str); 4] {
        [
            ("LD_PRELOAD", self.library.to_str().unwrap()),
            ("FAKETIME_TIMESTAMP_FILE", self.file.to_str().unwrap()),
            // Timeouts use the monotonic clock, which stays real.
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
            // How often the offset is read again, in seconds.
            ("FAKETIME_CACHE_DURATION", "1"),
        ]
    }
}
