//! The Postgres that both servers use: one primary, and for a replication fault a standby
//! that takes its place. Both are on one disk, which can be filled, and have one clock.

use std::{
    fs,
    ops::{Deref, DerefMut},
    path::{Path, PathBuf},
};

use milepost_testing::{Clock, Replication, TemporaryDir};
use tokio::process::Command;

/// Few, so that the fault injector can use them up.
pub const MAX_CONNECTIONS: usize = 40;

pub struct Postgres {
    replication: Replication,
    clock: Option<Clock>,
    disk: Option<PathBuf>,
    disk_size_mib: u64,
}

impl Deref for Postgres {
    type Target = Replication;

    fn deref(&self) -> &Replication {
        &self.replication
    }
}

impl DerefMut for Postgres {
    fn deref_mut(&mut self) -> &mut Replication {
        &mut self.replication
    }
}

impl Postgres {
    /// Starts and migrates Postgres, on a small tmpfs of its own where this process
    /// may mount one.
    pub async fn start(dir: &TemporaryDir, seconds: u64) -> Self {
        let path = dir.path().join("disk");
        fs::create_dir(&path).unwrap();
        let disk_size_mib = 2_048 + 8 * seconds;
        let options = format!("size={disk_size_mib}m,mode=0755");
        let arguments = ["-t", "tmpfs", "-o", &options, "milepost-faults"];
        let mount = Command::new("mount").args(arguments).arg(&path).output().await;
        let mounted = mount.is_ok_and(|output| output.status.success());
        // Beside the disk, so that the clock can be moved while the disk is full.
        let clock_dir = dir.path().join("database-clock");
        fs::create_dir(&clock_dir).unwrap();
        let clock = Clock::if_installed(&clock_dir);
        let settings: [(&str, &str); 8] = [
            // The checker reads what survives a crash, so commits must be durable.
            ("fsync", "on"),
            ("full_page_writes", "on"),
            // Each server sets it to `on` for its own sessions.
            ("synchronous_commit", "off"),
            ("max_connections", &MAX_CONNECTIONS.to_string()),
            ("max_wal_size", "64MB"),
            ("min_wal_size", "32MB"),
            // A standby starts to stream some seconds after the copy that it begins with.
            ("wal_keep_size", "256MB"),
            ("checkpoint_timeout", "30s"),
        ];
        let variables: Vec<_> = clock.iter().flat_map(Clock::variables).collect();
        let replication = Replication::start_primary(&path, &settings, &variables).await;
        let disk = mounted.then_some(path);
        Self { replication, clock, disk, disk_size_mib }
    }

    pub fn has_own_disk(&self) -> bool {
        self.disk.is_some()
    }

    pub fn has_own_clock(&self) -> bool {
        self.clock.is_some()
    }

    /// Starts the primary on the same data.
    pub async fn start_again(&mut self) {
        self.primary_mut().start();
        self.primary().wait_until_ready().await;
    }

    /// Sets by how many seconds Postgres's clock is ahead of the real one.
    pub fn move_clock(&self, seconds: i64) {
        self.clock.as_ref().expect("Postgres has a clock of its own").set(seconds);
    }

    /// Fills the disk: shrinks the tmpfs to the size of its files.
    pub async fn fill_disk(&self) {
        loop {
            let used_kib = used_kib(self.disk()).await;
            // Fails if files have grown meanwhile.
            if self.remount(&format!("{used_kib}k")).await {
                return;
            }
        }
    }

    /// How much of the disk is used, as text.
    pub async fn disk_usage(&self) -> String {
        let Some(disk) = &self.disk else { return "Postgres has no disk of its own".to_owned() };
        format!("{} of {} MiB of disk used", used_kib(disk).await / 1024, self.disk_size_mib)
    }

    pub async fn free_disk(&self) {
        assert!(
            self.remount(&format!("{}m", self.disk_size_mib)).await,
            "remounting the disk at its full size failed"
        );
    }

    /// Whether the tmpfs could be given this size.
    async fn remount(&self, size: &str) -> bool {
        let options = format!("remount,size={size}");
        let mount = Command::new("mount").args(["-o", &options]).arg(self.disk()).output().await;
        mount.unwrap().status.success()
    }

    fn disk(&self) -> &Path {
        self.disk.as_deref().expect("Postgres has a disk of its own")
    }
}

async fn used_kib(disk: &Path) -> u64 {
    let output = Command::new("df").args(["--output=used", "-k"]).arg(disk).output().await.unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().last().unwrap().trim().parse().unwrap()
}
