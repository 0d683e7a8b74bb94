//! A way to the database that can be closed.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, copy, copy_bidirectional, sink},
    net::{TcpListener, TcpStream, UnixStream},
    sync::watch,
};
use tokio_postgres::config::Host;

/// How the proxy treats connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// What is said is passed on.
    Pass,
    /// The same, but it takes so long, each way.
    Far(Duration),
    /// There are none, and no new ones.
    Refuse,
    /// What is said is swallowed. A connection that lived through it is silent
    /// for good, as after the loss of a machine.
    Swallow,
    /// As a Postgres answers that is only just starting; none is left of those
    /// from before.
    Starting,
}

/// A proxy, until it is dropped.
#[derive(Debug)]
pub struct Proxy {
    /// Of the database, through it.
    pub url: String,
    mode: watch::Sender<Mode>,
}

/// ErrorResponse, in Postgres's protocol.
const STARTING: &[u8] = b"SFATAL\0VFATAL\0C57P03\0Mthe database system is starting up\0\0";

impl Proxy {
    /// To the database of that URL, reached by socket.
    pub async fn to(url: &str) -> Self {
        let config: tokio_postgres::Config = url.parse().unwrap();
        let [Host::Unix(dir)] = config.get_hosts() else { panic!("{:?}", config.get_hosts()) };
        let socket = dir.join(".s.PGSQL.5432");
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (user, database) = (config.get_user().unwrap(), config.get_dbname().unwrap());
        let (mode, modes) = watch::channel(Mode::Pass);
        tokio::spawn(run(address, Some(listener), socket, modes));
        Self { url: format!("postgresql://{user}@{address}/{database}"), mode }
    }

    pub fn set(&self, mode: Mode) {
        self.mode.send_replace(mode);
    }
}

async fn run(
    address: SocketAddr,
    mut listener: Option<TcpListener>,
    socket: PathBuf,
    mut modes: watch::Receiver<Mode>,
) {
    loop {
        if *modes.borrow_and_update() == Mode::Refuse {
            listener = None;
            if modes.changed().await.is_err() {
                return;
            }
            continue;
        }
        let listening = match &listener {
            Some(listening) => listening,
            None => listener.insert(TcpListener::bind(address).await.unwrap()),
        };
        tokio::select! {
            changed = modes.changed() => if changed.is_err() { return },
            accepted = listening.accept() => {
                tokio::spawn(pass(accepted.unwrap().0, socket.clone(), modes.clone()));
            }
        }
    }
}

async fn pass(mut client: TcpStream, socket: PathBuf, mut modes: watch::Receiver<Mode>) {
    let mode = *modes.borrow_and_update();
    match mode {
        Mode::Pass | Mode::Far(_) => {
            let mut postgres = UnixStream::connect(socket).await.unwrap();
            let passing = async {
                if let Mode::Far(way) = mode {
                    let ((near_in, near_out), (far_in, far_out)) = (client.split(), postgres.split());
                    tokio::select! {
                        () = carry(near_in, far_out, way) => {}
                        () = carry(far_in, near_out, way) => {}
                    }
                } else {
                    // Either end may break off.
                    let _ = copy_bidirectional(&mut client, &mut postgres).await;
                }
            };
            tokio::select! {
                () = passing => return,
                changed = modes.wait_for(|now| *now != mode) => {
                    if changed.is_err() || matches!(*changed.unwrap(), Mode::Refuse | Mode::Starting) {
                        return;
                    }
                }
            }
        }
        Mode::Starting => {
            let mut startup = [0; 8];
            let _ = client.read(&mut startup).await;
            let length = u32::try_from(4 + STARTING.len()).unwrap().to_be_bytes();
            let _ = client.write_all(&[b"E", &length[..], STARTING].concat()).await;
            let _ = client.shutdown().await;
            let _ = copy(&mut client, &mut sink()).await;
            return;
        }
        Mode::Refuse => return,
        Mode::Swallow => {}
    }
    let closed = modes.wait_for(|mode| matches!(mode, Mode::Refuse | Mode::Starting));
    let mut nowhere = sink();
    tokio::select! {
        _ = copy(&mut client, &mut nowhere) => {}
        _ = closed => {}
    }
}

/// Until either end is gone.
async fn carry(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin, way: Duration) {
    let mut buffer = [0; 8 * 1024];
    while let Ok(read @ 1..) = from.read(&mut buffer).await {
        tokio::time::sleep(way).await;
        if to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
}
