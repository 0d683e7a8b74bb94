//! The Postgres that both replicas use, with durable settings, and the faults that
//! strike Postgres itself: it is killed, stopped, restarted, or its disk is filled.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use milepost::db::{
    embedded::{Embedded, EmbeddedSettings},
    migrations,
};
use tokio::process::Command;
use tokio_postgres::{Client, NoTls};

use crate::{
    context::{is_running, send_signal, within},
    temporary::TemporaryDir,
};

const DATABASE: &str = "milepost";
/// Few, so that the fault injector can use them up.
pub const MAX_CONNECTIONS: usize = 40;

pub struct Postgres {
    settings: EmbeddedSettings,
    embedded: Option<Embedded>,
    url: String,
    disk: Option<PathBuf>,
    disk_size_mib: u64,
}

impl Postgres {
    /// Starts and migrates Postgres, on a small tmpfs of its own where this process
    /// may mount one.
    pub async fn start(dir: &TemporaryDir, seconds: u64) -> Self {
        let path = dir.path().join("disk");
        fs::create_dir(&path).unwrap();
        let disk_size_mib = 384 + 4 * seconds;
        let options = format!("size={disk_size_mib}m,mode=0755");
        let arguments = ["-t", "tmpfs", "-o", &options, "milepost-faults"];
        let mount = Command::new("mount").args(arguments).arg(&path).output().await;
        let mounted = mount.is_ok_and(|output| output.status.success());
        let options = [
            // The checker reads what survives a crash, so commits must be durable.
            ("fsync", "on"),
            ("full_page_writes", "on"),
            // Each server sets it to `on` for its own sessions.
            ("synchronous_commit", "off"),
            ("max_wal_size", "64MB"),
            ("min_wal_size", "32MB"),
            ("checkpoint_timeout", "30s"),
        ];
        let mut extra_options: Vec<(String, String)> =
            options.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        extra_options.push(("max_connections".to_owned(), MAX_CONNECTIONS.to_string()));
        let settings = EmbeddedSettings { data_dir: path.clone(), extra_options };
        let embedded = Embedded::start(settings.clone()).await.unwrap();
        let url = embedded.url(DATABASE);
        migrations::migrate(&url, None).await.unwrap();
        Self { settings, embedded: Some(embedded), url, disk: mounted.then_some(path), disk_size_mib }
    }

    /// Path of the socket that Postgres listens on.
    pub fn socket(&self) -> PathBuf {
        self.settings.data_dir.join("cluster/run/.s.PGSQL.5432")
    }

    pub fn has_own_disk(&self) -> bool {
        self.disk.is_some()
    }

    /// Connects directly, not through a proxy.
    pub async fn try_connect(&self) -> Result<Client, tokio_postgres::Error> {
        let (client, connection) = tokio_postgres::connect(&self.url, NoTls).await?;
        // Calls of the client report the connection's error.
        tokio::spawn(connection);
        Ok(client)
    }

    pub async fn connect(&self) -> Client {
        self.try_connect().await.unwrap()
    }

    /// Returns once Postgres executes a query.
    pub async fn wait_until_ready(&self) {
        within(Duration::from_secs(30), "Postgres to execute a query", async {
            while !self.is_ready().await {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await;
    }

    async fn is_ready(&self) -> bool {
        match self.try_connect().await {
            Ok(client) => client.simple_query("SELECT 1").await.is_ok(),
            Err(_) => false,
        }
    }

    /// Sends SIGKILL to the postmaster and its children; returns once none of them
    /// runs.
    pub async fn kill(&self) {
        let pid = self.postmaster().expect("postmaster.pid exists");
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
        let children: Vec<&str> = children.split_whitespace().collect();
        send_signal("KILL", &pid).await;
        for child in &children {
            // A child that has exited already makes `kill` fail.
            let _ = Command::new("kill").args(["-s", "KILL", child]).output().await;
        }
        within(Duration::from_secs(20), "the killed Postgres to exit", async {
            while is_running(&pid) || children.iter().any(|child| is_running(child)) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
    }

    /// Stops Postgres by a fast shutdown.
    pub async fn stop(&self) {
        self.embedded.as_ref().expect("Postgres was started").stop().await.unwrap();
    }

    /// Starts Postgres on the same data if it does not run.
    pub async fn start_again(&mut self) {
        drop(self.embedded.take());
        self.embedded = Some(Embedded::start(self.settings.clone()).await.unwrap());
    }

    /// Whether the postmaster runs.
    pub fn is_running(&self) -> bool {
        self.postmaster().is_some_and(|pid| is_running(&pid))
    }

    /// Process id of the postmaster.
    fn postmaster(&self) -> Option<String> {
        let file = fs::read_to_string(self.settings.data_dir.join("cluster/data/postmaster.pid")).ok()?;
        file.lines().next().map(str::to_owned)
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
