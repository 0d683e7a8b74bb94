//! pgbouncer in session mode, which is put between a server and Postgres for a while.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use tokio::{net::UnixStream, process::Child};

use crate::{
    context::within,
    installed::{make_postgres_dir, postgres_command},
};

/// A pgbouncer that runs until this is dropped.
pub struct Pooler {
    /// The directory of its socket.
    pub dir: PathBuf,
    child: Child,
}

impl Pooler {
    /// Starts a pgbouncer for the Postgres whose socket is in a directory.
    pub async fn start(dir: PathBuf, postgres: &Path) -> Self {
        let _ = fs::remove_dir_all(&dir);
        make_postgres_dir(&dir);
        let file = dir.join("pgbouncer.ini");
        let ini = format!(
            "[databases]\n* = host={} user=milepost\n\n[pgbouncer]\nlisten_port = 5432\nunix_socket_dir = {}\n\
             auth_type = any\npool_mode = session\ndefault_pool_size = 400\n",
            postgres.display(),
            dir.display(),
        );
        fs::write(&file, ini).unwrap();
        let log = File::create(dir.join("log")).unwrap();
        // Debian has it in a directory for administrators.
        let mut pgbouncer = postgres_command(Path::new("env"));
        let path = format!("PATH={}:/usr/sbin", std::env::var("PATH").unwrap());
        pgbouncer.arg(path).arg("pgbouncer").arg(&file).kill_on_drop(true);
        pgbouncer.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let child = pgbouncer.spawn().unwrap();
        within(Duration::from_secs(60), "pgbouncer (Debian: apt-get install pgbouncer)", async {
            while UnixStream::connect(dir.join(".s.PGSQL.5432")).await.is_err() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await;
        Self { dir, child }
    }

    pub async fn stop(mut self) {
        self.child.kill().await.unwrap();
    }
}
