//! What lies between a server and its Postgres: a socket that cuts, refuses,
//! delays and holds back.

use std::{fs, path::PathBuf, time::Duration};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        UnixListener, UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

/// What happens to bytes on their way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    Free,
    /// Each time by another while up to this, so that what was sent on one
    /// connection overtakes what was sent on another.
    Delayed(Duration),
    /// Nothing passes; what came goes on its way when it is free again.
    Held,
}

pub struct Proxy {
    dir: PathBuf,
    postgres: PathBuf,
    flow: watch::Sender<Flow>,
    /// Cancelled to cut all connections.
    open: CancellationToken,
    accepting: Option<AbortOnDropHandle<()>>,
}

impl Proxy {
    /// A socket in a new folder that leads to that of Postgres.
    pub fn start(dir: PathBuf, postgres: PathBuf) -> Self {
        fs::create_dir(&dir).unwrap();
        let flow = watch::Sender::new(Flow::Free);
        let mut proxy = Self { dir, postgres, flow, open: CancellationToken::new(), accepting: None };
        proxy.accept();
        proxy
    }

    pub fn database_url(&self) -> String {
        format!("postgresql://milepost@{}/milepost", self.dir.display().to_string().replace('/', "%2F"))
    }

    pub fn set_flow(&self, flow: Flow) {
        self.flow.send_replace(flow);
    }

    /// Ends every connection, with what is on its way.
    pub fn cut(&mut self) {
        self.open.cancel();
        self.open = CancellationToken::new();
        if self.accepting.is_some() {
            self.accept();
        }
    }

    /// No new connection is made from now on.
    pub fn refuse(&mut self) {
        self.accepting = None;
        fs::remove_file(self.socket()).unwrap();
    }

    /// They are made again.
    pub fn accept(&mut self) {
        self.accepting = None;
        let _ = fs::remove_file(self.socket());
        let listener = UnixListener::bind(self.socket()).unwrap();
        let (postgres, flow, open) = (self.postgres.clone(), self.flow.subscribe(), self.open.clone());
        let accept = async move {
            while let Ok((near, _)) = listener.accept().await {
                let open = open.clone();
                tokio::spawn(open.run_until_cancelled_owned(join(near, postgres.clone(), flow.clone())));
            }
        };
        self.accepting = Some(AbortOnDropHandle::new(tokio::spawn(accept)));
    }

    fn socket(&self) -> PathBuf {
        self.dir.join(".s.PGSQL.5432")
    }
}

/// Carries bytes both ways until either side is gone.
async fn join(near: UnixStream, postgres: PathBuf, flow: watch::Receiver<Flow>) {
    // Nobody there: the near side is closed.
    let Ok(far) = UnixStream::connect(postgres).await else { return };
    let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
    tokio::select! {
        () = carry(near_in, far_out, flow.clone()) => {}
        () = carry(far_in, near_out, flow) => {}
    }
}

async fn carry(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut flow: watch::Receiver<Flow>) {
    let mut buffer = vec![0; 32 * 1024];
    while let Ok(read @ 1..) = from.read(&mut buffer).await {
        let now = *flow.borrow();
        if let Flow::Delayed(longest) = now {
            tokio::time::sleep(longest.mul_f64(fastrand::f64())).await;
        }
        if flow.wait_for(|flow| *flow != Flow::Held).await.is_err() {
            return;
        }
        if to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
}
