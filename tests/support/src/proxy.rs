//! A proxy between a server and Postgres, which can cut, refuse, delay, hold and drop
//! what passes.

use std::{
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, copy, sink, split},
    net::{TcpListener, UnixListener, UnixStream},
    sync::watch,
    time::sleep,
};
use tokio_postgres::config::Host;

use crate::url;

/// How the proxy treats connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Forwards bytes both ways.
    Pass,
    /// Forwards bytes after this time.
    Delay(Duration),
    /// Forwards bytes after a random time up to this, so that bytes of one connection
    /// overtake those of another.
    Jitter(Duration),
    /// Forwards no bytes until the mode changes.
    Hold,
    /// Reads bytes and drops them. A connection that is open in this mode stays
    /// silent for good, as after the loss of a machine.
    Discard,
    /// Closes all connections and refuses new ones.
    Refuse,
    /// Closes all connections and answers new ones like a Postgres that is still
    /// starting.
    Starting,
}

impl Mode {
    fn closes(self) -> bool {
        matches!(self, Self::Refuse | Self::Starting)
    }
}

/// The fields of an ErrorResponse in Postgres's protocol: cannot_connect_now.
const STARTING: &[u8] = b"SFATAL\0VFATAL\0C57P03\0Mthe database system is starting up\0\0";

/// A proxy that runs until it is dropped.
#[derive(Debug)]
pub struct Proxy {
    /// The database's URL through this proxy.
    pub url: String,
    mode: watch::Sender<Mode>,
    /// Counts the cuts.
    cuts: watch::Sender<u32>,
    /// The directory of the socket to which new connections lead.
    postgres: watch::Sender<PathBuf>,
}

impl Proxy {
    /// Starts a proxy on TCP to the database of this URL, whose host is a Unix socket.
    pub async fn to(url: &str) -> Self {
        let config: tokio_postgres::Config = url.parse().unwrap();
        let [Host::Unix(dir)] = config.get_hosts() else { panic!("{:?}", config.get_hosts()) };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (user, database) = (config.get_user().unwrap(), config.get_dbname().unwrap());
        let url = format!("postgresql://{user}@{address}/{database}");
        Self::start(Address::Tcp(address), Listener::Tcp(listener), dir, url)
    }

    /// Starts a proxy on a socket in a new directory to the socket in another directory.
    pub fn at(dir: &Path, postgres: &Path) -> Self {
        fs::create_dir(dir).unwrap();
        let socket = socket_in(dir);
        let listener = Listener::Unix(UnixListener::bind(&socket).unwrap());
        Self::start(Address::Unix(socket), listener, postgres, url(&[dir], "milepost"))
    }

    fn start(address: Address, listener: Listener, postgres: &Path, url: String) -> Self {
        let (mode, cuts) = (watch::Sender::new(Mode::Pass), watch::Sender::new(0));
        let postgres = watch::Sender::new(postgres.to_owned());
        let route = Route { modes: mode.subscribe(), cuts: cuts.subscribe(), postgres: postgres.subscribe() };
        tokio::spawn(route.run(address, listener));
        Self { url, mode, cuts, postgres }
    }

    pub fn set(&self, mode: Mode) {
        self.mode.send_replace(mode);
    }

    /// Closes every connection and drops the bytes that are not forwarded yet.
    pub fn cut(&self) {
        self.cuts.send_modify(|cuts| *cuts += 1);
    }

    /// Leads new connections to the socket in another directory; open ones stay.
    pub fn lead_to(&self, postgres: &Path) {
        self.postgres.send_replace(postgres.to_owned());
    }
}

fn socket_in(dir: &Path) -> PathBuf {
    dir.join(".s.PGSQL.5432")
}

enum Address {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl Address {
    async fn bind(&self) -> Listener {
        match self {
            Self::Tcp(address) => Listener::Tcp(TcpListener::bind(address).await.unwrap()),
            Self::Unix(path) => Listener::Unix(UnixListener::bind(path).unwrap()),
        }
    }

    fn remove(&self) {
        if let Self::Unix(path) = self {
            fs::remove_file(path).unwrap();
        }
    }
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

impl Listener {
    async fn accept(&self) -> io::Result<Box<dyn Stream>> {
        let stream: Box<dyn Stream> = match self {
            Self::Tcp(listener) => Box::new(listener.accept().await?.0),
            Self::Unix(listener) => Box::new(listener.accept().await?.0),
        };
        Ok(stream)
    }
}

#[derive(Clone)]
struct Route {
    modes: watch::Receiver<Mode>,
    cuts: watch::Receiver<u32>,
    postgres: watch::Receiver<PathBuf>,
}

impl Route {
    /// Accepts connections until the proxy is dropped.
    async fn run(mut self, address: Address, mut listener: Listener) {
        loop {
            tokio::select! {
                changed = self.modes.changed() => if changed.is_err() { return },
                accepted = listener.accept() => {
                    tokio::spawn(self.clone().serve(accepted.unwrap()));
                }
            }
            if *self.modes.borrow_and_update() == Mode::Refuse {
                drop(listener);
                address.remove();
                if self.modes.wait_for(|mode| *mode != Mode::Refuse).await.is_err() {
                    return;
                }
                listener = address.bind().await;
            }
        }
    }

    /// Forwards one connection until either side, the mode or a cut closes it.
    async fn serve(mut self, client: Box<dyn Stream>) {
        self.cuts.mark_unchanged();
        let mode = *self.modes.borrow_and_update();
        if mode.closes() {
            if mode == Mode::Starting {
                answer_starting(client).await;
            }
            return;
        }
        let (socket, mut closing) = (socket_in(&self.postgres.borrow()), self.modes.clone());
        tokio::select! {
            () = forward(client, socket, self.modes) => {}
            _ = self.cuts.changed() => {}
            _ = closing.wait_for(|mode| mode.closes()) => {}
        }
    }
}

async fn answer_starting(mut client: Box<dyn Stream>) {
    // The client may close the connection at any time.
    let _ = client.read(&mut [0; 8]).await;
    let length = u32::try_from(4 + STARTING.len()).unwrap().to_be_bytes();
    let _ = client.write_all(&[b"E", &length[..], STARTING].concat()).await;
    let _ = client.shutdown().await;
    let _ = copy(&mut client, &mut sink()).await;
}

/// Forwards bytes both ways until either side closes.
async fn forward(client: Box<dyn Stream>, postgres: PathBuf, modes: watch::Receiver<Mode>) {
    // Without Postgres the client's connection is closed by being dropped.
    let Ok(postgres) = UnixStream::connect(postgres).await else { return };
    let ((mut from_client, mut to_client), (from_postgres, to_postgres)) = (split(client), split(postgres));
    let mut discarding = modes.clone();
    tokio::select! {
        biased;
        discards = discarding.wait_for(|mode| *mode == Mode::Discard) => if discards.is_err() { return },
        () = pump(&mut from_client, to_postgres, modes.clone()) => return,
        () = pump(from_postgres, &mut to_client, modes.clone()) => return,
    }
    // Postgres has lost its connection and ends the session; the client is told nothing.
    let _ = copy(&mut from_client, &mut sink()).await;
}

async fn pump(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut modes: watch::Receiver<Mode>,
) {
    let mut buffer = vec![0; 32 * 1024];
    while let Ok(read @ 1..) = from.read(&mut buffer).await {
        let mode = *modes.borrow();
        match mode {
            Mode::Delay(delay) => sleep(delay).await,
            Mode::Jitter(most) => sleep(most.mul_f64(fastrand::f64())).await,
            _ => {}
        }
        let passed = modes.wait_for(|mode| *mode != Mode::Hold).await.is_ok();
        if !passed || to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
}
