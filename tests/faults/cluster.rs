//! The one durable Postgres: killed, stopped, short of disk, out of
//! connections, and started again.

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
    temporary::TemporaryDir,
    world::{runs, signal, within},
};

const DATABASE: &str = "milepost";
/// Few, so that they can be used up.
pub const MAX_CONNECTIONS: usize = 40;

pub struct Cluster {
    settings: EmbeddedSettings,
    postgres: Option<Embedded>,
    url: String,
    disk: Option<PathBuf>,
    /// Of the disk.
    size_mib: u64,
}

impl Cluster {
    /// On a small disk of its own, where mounting one is permitted.
    pub async fn start(dir: &TemporaryDir, seconds: u64) -> Self {
        let path = dir.path().join("disk");
        fs::create_dir(&path).unwrap();
        let size_mib = 384 + 4 * seconds;
        let options = format!("size={size_mib}m,mode=0755");
        let arguments = ["-t", "tmpfs", "-o", &options, "milepost-faults"];
        let mount = Command::new("mount").args(arguments).arg(&path).output().await;
        let mounted = mount.is_ok_and(|output| output.status.success());
        let options = [
            // What survives a crash is looked at, so nothing here is made fast.
            ("fsync", "on"),
            ("full_page_writes", "on"),
            // Servers set it for themselves.
            ("synchronous_commit", "off"),
            ("max_wal_size", "64MB"),
            ("min_wal_size", "32MB"),
            ("checkpoint_timeout", "30s"),
        ];
        let mut extra_options: Vec<(String, String)> =
            options.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        extra_options.push(("max_connections".to_owned(), MAX_CONNECTIONS.to_string()));
        let settings = EmbeddedSettings { data_dir: path.clone(), extra_options };
        let postgres = Embedded::start(settings.clone()).await.unwrap();
        let url = postgres.url(DATABASE);
        migrations::migrate(&url, None).await.unwrap();
        Self { settings, postgres: Some(postgres), url, disk: mounted.then_some(path), size_mib }
    }

    /// The socket that it listens on.
    pub fn socket(&self) -> PathBuf {
        self.settings.data_dir.join("cluster/run/.s.PGSQL.5432")
    }

    pub fn has_a_disk_of_its_own(&self) -> bool {
        self.disk.is_some()
    }

    /// A connection past the proxies, or why there is none.
    pub async fn try_connect(&self) -> Result<Client, tokio_postgres::Error> {
        let (client, connection) = tokio_postgres::connect(&self.url, NoTls).await?;
        // Its end is seen by whoever uses the client.
        tokio::spawn(connection);
        Ok(client)
    }

    pub async fn connect(&self) -> Client {
        self.try_connect().await.unwrap()
    }

    /// Returns once it answers.
    pub async fn answers(&self) {
        within(Duration::from_secs(30), "Postgres to answer", async {
            while !self.answers_now().await {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await;
    }

    async fn answers_now(&self) -> bool {
        match self.try_connect().await {
            Ok(client) => client.simple_query("SELECT 1").await.is_ok(),
            Err(_) => false,
        }
    }

    /// SIGKILL to all of it at once; returns when nothing of it runs any more.
    pub async fn kill(&self) {
        let pid = self.postmaster().expect("it runs");
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
        let children: Vec<&str> = children.split_whitespace().collect();
        signal("KILL", &pid).await;
        for child in &children {
            // Some are gone already.
            let _ = Command::new("kill").args(["-s", "KILL", child]).output().await;
        }
        within(Duration::from_secs(20), "the end of Postgres", async {
            while runs(&pid) || children.iter().any(|child| runs(child)) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
    }

    /// A fast shutdown.
    pub async fn stop(&self) {
        self.postgres.as_ref().expect("it was started").stop().await.unwrap();
    }

    /// Starts it if it does not run.
    pub async fn start_again(&mut self) {
        drop(self.postgres.take());
        self.postgres = Some(Embedded::start(self.settings.clone()).await.unwrap());
    }

    /// Whether its first process is there.
    pub fn is_running(&self) -> bool {
        self.postmaster().is_some_and(|pid| runs(&pid))
    }

    fn postmaster(&self) -> Option<String> {
        let file = fs::read_to_string(self.settings.data_dir.join("cluster/data/postmaster.pid")).ok()?;
        file.lines().next().map(str::to_owned)
    }

    /// Leaves not a page of room on its disk: it becomes as small as what is on
    /// it.
    pub async fn fill_disk(&self) {
        loop {
            let used_kib = used_kib(self.disk()).await;
            // In between, something may have been written.
            if self.remount(&format!("{used_kib}k")).await {
                return;
            }
        }
    }

    /// What is taken of its disk, in words.
    pub async fn room(&self) -> String {
        let Some(disk) = &self.disk else { return "no disk of its own".to_owned() };
        format!("{} of {} MiB taken", used_kib(disk).await / 1024, self.size_mib)
    }

    pub async fn free_disk(&self) {
        assert!(self.remount(&format!("{}m", self.size_mib)).await, "the disk does not grow again");
    }

    async fn remount(&self, size: &str) -> bool {
        let options = format!("remount,size={size}");
        let mount = Command::new("mount").args(["-o", &options]).arg(self.disk()).output().await;
        mount.unwrap().status.success()
    }

    fn disk(&self) -> &Path {
        self.disk.as_deref().expect("it has a disk of its own")
    }
}

async fn used_kib(disk: &Path) -> u64 {
    let output = Command::new("df").args(["--output=used", "-k"]).arg(disk).output().await.unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().last().unwrap().trim().parse().unwrap()
}
