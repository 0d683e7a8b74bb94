//! A proxy between a server and Postgres that a test can close, delay or silence.

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
    /// Forwards bytes both ways.
    Pass,
    /// Forwards bytes both ways and delays each direction by this duration.
    Delay(Duration),
    /// Closes all connections and refuses new ones.
    Refuse,
    /// Reads bytes and drops them. A connection that is open in this mode stays
    /// silent for good, as after the loss of a machine.
    Discard,
    /// Closes all connections and answers new ones like a Postgres that is still
    /// starting.
    Starting,
}

/// A proxy that runs until it is dropped.
#[derive(Debug)]
pub struct Proxy {
    /// The database's URL through this proxy.
    pub url: String,
    mode: watch::Sender<Mode>,
}

/// The fields of an ErrorResponse in Postgres's protocol: cannot_connect_now.
const STARTING: &[u8] = b"SFATAL\0VFATAL\0C57P03\0Mthe database system is starting up\0\0";

impl Proxy {
    /// Starts a proxy to the database of this URL, whose host is a Unix socket.
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
                tokio::spawn(serve(accepted.unwrap().0, socket.clone(), modes.clone()));
            }
        }
    }
}

async fn serve(mut client: TcpStream, socket: PathBuf, mut modes: watch::Receiver<Mode>) {
    let mode = *modes.borrow_and_update();
    match mode {
        Mode::Pass | Mode::Delay(_) => {
            let mut postgres = UnixStream::connect(socket).await.unwrap();
            let forwarding = async {
                if let Mode::Delay(delay) = mode {
                    let ((from_client, to_client), (from_postgres, to_postgres)) =
                        (client.split(), postgres.split());
                    tokio::select! {
                        () = forward(from_client, to_postgres, delay) => {}
                        () = forward(from_postgres, to_client, delay) => {}
                    }
                } else {
                    // Either side may close the connection.
                    let _ = copy_bidirectional(&mut client, &mut postgres).await;
                }
            };
            tokio::select! {
                () = forwarding => return,
                changed = modes.wait_for(|new| *new != mode) => {
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
        Mode::Discard => {}
    }
    let closed = modes.wait_for(|mode| matches!(mode, Mode::Refuse | Mode::Starting));
    let mut discard = sink();
    tokio::select! {
        _ = copy(&mut client, &mut discard) => {}
        _ = closed => {}
    }
}

/// Forwards bytes, each read after a delay, until either side closes.
async fn forward(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin, delay: Duration) {
    let mut buffer = [0; 8 * 1024];
    while let Ok(read @ 1..) = from.read(&mut buffer).await {
        tokio::time::sleep(delay).await;
        if to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
}
