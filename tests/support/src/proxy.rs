//! A proxy between a server and Postgres, or between clients and a server, which can cut,
//! refuse, delay, hold and drop what passes.

use std::{
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, copy, sink, split},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    sync::watch,
    time::sleep,
};
use tokio_postgres::config::Host;

use crate::{own_address, url};

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
    /// Forwards what clients send, and no answers until the mode changes.
    HoldAnswers,
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
    /// The URL of the database or server through this proxy.
    pub url: String,
    mode: watch::Sender<Mode>,
    /// Counts the cuts.
    cuts: watch::Sender<u32>,
    /// To which new connections lead.
    target: watch::Sender<Address>,
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
        Self::start(Address::Tcp(address), Listener::Tcp(listener), Address::postgres(dir), url)
    }

    /// Starts a proxy between clients and the server at this address.
    pub async fn to_server(server: SocketAddr) -> Self {
        // No other process gets the port while the proxy refuses connections.
        let address = own_address("127.0.0.1");
        let (url, address) = (format!("http://{address}"), Address::Tcp(address));
        let listener = address.bind().await;
        Self::start(address, listener, Address::Tcp(server), url)
    }

    /// Starts a proxy on a socket in a new directory to the socket in another directory.
    pub fn at(dir: &Path, postgres: &Path) -> Self {
        fs::create_dir(dir).unwrap();
        let socket = socket_in(dir);
        let listener = Listener::Unix(UnixListener::bind(&socket).unwrap());
        let target = Address::postgres(postgres);
        Self::start(Address::Unix(socket), listener, target, url(&[dir], "milepost"))
    }

    fn start(address: Address, listener: Listener, target: Address, url: String) -> Self {
        let (mode, cuts) = (watch::Sender::new(Mode::Pass), watch::Sender::new(0));
        let target = watch::Sender::new(target);
        let route = Route { modes: mode.subscribe(), cuts: cuts.subscribe(), target: target.subscribe() };
        tokio::spawn(route.run(address, listener));
        Self { url, mode, cuts, target }
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
        self.target.send_replace(Address::postgres(postgres));
    }
}

fn socket_in(dir: &Path) -> PathBuf {
    dir.join(".s.PGSQL.5432")
}

#[derive(Clone, Debug)]
enum Address {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl Address {
    /// The Postgres whose socket is in this directory.
    fn postgres(dir: &Path) -> Self {
        Self::Unix(socket_in(dir))
    }

    async fn connect(&self) -> io::Result<Box<dyn Stream>> {
        let stream: Box<dyn Stream> = match self {
            Self::Tcp(address) => Box::new(TcpStream::connect(address).await?),
            Self::Unix(path) => Box::new(UnixStream::connect(path).await?),
        };
        Ok(stream)
    }

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
    target: watch::Receiver<Address>,
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
        let (target, mut closing) = (self.target.borrow().clone(), self.modes.clone());
        tokio::select! {
            () = forward(client, target, self.modes) => {}
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
async fn forward(client: Box<dyn Stream>, target: Address, modes: watch::Receiver<Mode>) {
    // Without a target the client's connection is closed by being dropped.
    let Ok(target) = target.connect().await else { return };
    let ((mut from_client, mut to_client), (from_target, to_target)) = (split(client), split(target));
    let mut discarding = modes.clone();
    tokio::select! {
        biased;
        discards = discarding.wait_for(|mode| *mode == Mode::Discard) => if discards.is_err() { return },
        () = pump(&mut from_client, to_target, modes.clone(), &[Mode::Hold]) => return,
        () = pump(from_target, &mut to_client, modes.clone(), &[Mode::Hold, Mode::HoldAnswers]) => return,
    }
    // The target has lost its connection and ends the session; the client is told nothing.
    let _ = copy(&mut from_client, &mut sink()).await;
}

async fn pump(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut modes: watch::Receiver<Mode>,
    holding: &[Mode],
) {
    let mut buffer = vec![0; 32 * 1024];
    while let Ok(read @ 1..) = from.read(&mut buffer).await {
        let mode = *modes.borrow();
        match mode {
            Mode::Delay(delay) => sleep(delay).await,
            Mode::Jitter(most) => sleep(most.mul_f64(fastrand::f64())).await,
            _ => {}
        }
        let passed = modes.wait_for(|mode| !holding.contains(mode)).await.is_ok();
        if !passed || to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
}
