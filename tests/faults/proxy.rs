//! A proxy between one replica and Postgres, on Unix sockets. It can cut, refuse and
//! delay connections and hold their bytes back.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        UnixListener, UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

/// What the proxy does with the bytes that it receives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    Free,
    /// Each read is delayed by a random time up to this, so that bytes of one
    /// connection overtake those of another.
    Delayed(Duration),
    /// No byte is forwarded until the flow changes.
    Held,
}

pub struct Proxy {
    dir: PathBuf,
    /// The directory of the socket to which new connections lead.
    postgres: watch::Sender<PathBuf>,
    flow: watch::Sender<Flow>,
    /// Cancelled to cut all connections.
    open: CancellationToken,
    accepting: Option<AbortOnDropHandle<()>>,
}

impl Proxy {
    /// Listens on a socket in a new directory and forwards to Postgres's socket in another
    /// directory.
    pub fn start(dir: PathBuf, postgres: &Path) -> Self {
        fs::create_dir(&dir).unwrap();
        let (flow, postgres) = (watch::Sender::new(Flow::Free), watch::Sender::new(postgres.to_owned()));
        let mut proxy = Self { dir, postgres, flow, open: CancellationToken::new(), accepting: None };
        proxy.accept();
        proxy
    }

    /// The directory of the socket that this listens on.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Leads new connections to the socket in another directory; open ones stay.
    pub fn lead_to(&self, postgres: &Path) {
        self.postgres.send_replace(postgres.to_owned());
    }

    pub fn set_flow(&self, flow: Flow) {
        self.flow.send_replace(flow);
    }

    /// Closes every connection and drops the bytes not yet forwarded.
    pub fn cut(&mut self) {
        self.open.cancel();
        self.open = CancellationToken::new();
        if self.accepting.is_some() {
            self.accept();
        }
    }

    /// Refuses new connections until [`Self::accept`]; open ones stay.
    pub fn refuse(&mut self) {
        self.accepting = None;
        fs::remove_file(self.socket()).unwrap();
    }

    /// Accepts new connections.
    pub fn accept(&mut self) {
        self.accepting = None;
        let _ = fs::remove_file(self.socket());
        let listener = UnixListener::bind(self.socket()).unwrap();
        let (postgres, flow, open) = (self.postgres.subscribe(), self.flow.subscribe(), self.open.clone());
        let accept = async move {
            while let Ok((server, _)) = listener.accept().await {
                let (open, postgres) = (open.clone(), socket_in(&postgres.borrow()));
                tokio::spawn(open.run_until_cancelled_owned(forward(server, postgres, flow.clone())));
            }
        };
        self.accepting = Some(AbortOnDropHandle::new(tokio::spawn(accept)));
    }

    fn socket(&self) -> PathBuf {
        socket_in(&self.dir)
    }
}

fn socket_in(dir: &Path) -> PathBuf {
    dir.join(".s.PGSQL.5432")
}

/// Forwards bytes both ways until either side closes.
async fn forward(server: UnixStream, postgres: PathBuf, flow: watch::Receiver<Flow>) {
    // Without Postgres the server's connection is closed by being dropped.
    let Ok(postgres) = UnixStream::connect(postgres).await else { return };
    let ((server_in, server_out), (postgres_in, postgres_out)) = (server.into_split(), postgres.into_split());
    tokio::select! {
        () = copy(server_in, postgres_out, flow.clone()) => {}
        () = copy(postgres_in, server_out, flow) => {}
    }
}

async fn copy(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut flow: watch::Receiver<Flow>) {
    let mut buffer = vec![0; 32 * 1024];
    while let Ok(read @ 1..) = from.read(&mut buffer).await {
        let now = *flow.borrow();
        if let Flow::Delayed(max) = now {
            tokio::time::sleep(max.mul_f64(fastrand::f64())).await;
        }
        if flow.wait_for(|flow| *flow != Flow::Held).await.is_err() {
            return;
        }
        if to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
}
