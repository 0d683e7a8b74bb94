//! TLS on the connections to Postgres.

use std::{
    fs::{self, Permissions},
    net::{IpAddr, SocketAddr},
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown},
    process::Stdio,
    time::Duration,
};

use diesel::sql_types::Bool;
use diesel_async::{RunQueryDsl as _, SimpleAsyncConnection as _};
use milepost::{
    db::{
        Database,
        embedded::{Embedded, EmbeddedSettings},
        notifier::{Notification, Notifier},
    },
    error::Error,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
    process::Command,
    sync::mpsc,
    time::Instant,
};
use uuid::Uuid;

use crate::support::{
    AT_ONCE, Authority, ServerProcess, TemporaryDir, TestDatabase, TestServer, TlsFiles, complete, database,
    step, within_timeout,
};

/// A Postgres that accepts TCP connections over TLS alone. Its Unix socket is not
/// encrypted.
struct Postgres {
    embedded: Embedded,
    address: IpAddr,
    files: TlsFiles,
    _dir: TemporaryDir,
}

impl Postgres {
    async fn start() -> Self {
        // A random loopback address, on which no other process listens.
        let random = Uuid::new_v4().into_bytes();
        let address = IpAddr::from([127, 100 + random[0] % 100, random[1], 1 + random[2] % 200]);
        let dir = TemporaryDir::new();
        let rules = dir.path().join("rules.conf");
        fs::write(
            &rules,
            "local all all trust\nhostssl all scram all scram-sha-256\nhostssl all all all trust\n",
        )
        .unwrap();
        let extra_options = [
            ("fsync", "off"),
            ("listen_addresses", &address.to_string()),
            ("hba_file", rules.to_str().unwrap()),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .to_vec();
        let settings = EmbeddedSettings { data_dir: dir.path().to_owned(), extra_options };
        let embedded = Embedded::start(settings).await.unwrap();

        let authority = Authority::new();
        let files = TlsFiles::new(&authority);
        let pair = authority.server(&[&address.to_string()]);
        let data = dir.path().join("cluster/data");
        let owner = fs::metadata(&data).unwrap();
        for (name, content) in [("server.crt", pair.certificate.as_str()), ("server.key", &pair.key)] {
            let path = data.join(name);
            fs::write(&path, content).unwrap();
            fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
            chown(&path, Some(owner.uid()), Some(owner.gid())).unwrap();
        }
        let postgres = Self { embedded, address, files, _dir: dir };
        let mut admin = postgres.open(&postgres.embedded.database_url(), None).await.unwrap();
        admin.batch_execute("ALTER SYSTEM SET ssl = on").await.unwrap();
        admin.batch_execute("SELECT pg_reload_conf()").await.unwrap();
        within_timeout("Postgres to offer TLS", async {
            while postgres.open(&postgres.url("sslmode=require"), Some("ca.pem")).await.is_err() {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        })
        .await;
        postgres
    }

    fn url(&self, parameters: &str) -> String {
        format!("postgresql://milepost@{}/milepost?{parameters}", self.address)
    }

    fn database(&self, url: &str, ca: Option<&str>) -> Database {
        database(url, ca.map(|ca| self.files.path(ca)).as_deref())
    }

    async fn open(&self, url: &str, ca: Option<&str>) -> Result<milepost::db::OwnConnection, Error> {
        self.database(url, ca).connect().await
    }

    /// Whether a connection to this URL is encrypted; the error if it fails.
    async fn encrypts(&self, url: &str, ca: Option<&str>) -> Result<bool, String> {
        let connection = self.open(url, ca).await;
        let mut connection = connection.map_err(|error| milepost::cli::one_line(&error))?;
        let sql = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
        let row: Encrypted = diesel::sql_query(sql).get_result(&mut connection).await.unwrap();
        Ok(row.ssl)
    }
}

#[derive(diesel::QueryableByName)]
struct Encrypted {
    #[diesel(sql_type = Bool)]
    ssl: bool,
}

#[tokio::test(flavor = "multi_thread")]
async fn sslmode_require_or_a_ca_verifies_the_certificate_and_prefer_encrypts() {
    let postgres = Postgres::start().await;
    postgres.files.write("foreign.pem", &Authority::new().pem());
    for (parameters, ca) in [
        ("sslmode=require", Some("ca.pem")),
        ("sslmode=prefer", Some("ca.pem")),
        ("", Some("ca.pem")),
        ("sslmode=prefer", None),
        ("", None),
    ] {
        let encrypts = postgres.encrypts(&postgres.url(parameters), ca).await;
        assert_eq!(encrypts, Ok(true), "{parameters} {ca:?}");
    }
    let elsewhere = format!(
        "postgresql://milepost@elsewhere.example/milepost?hostaddr={}&sslmode=require",
        postgres.address
    );
    for (url, ca, expected) in [
        (&postgres.url("sslmode=require"), None, "certificate"),
        (&postgres.url("sslmode=require"), Some("foreign.pem"), "certificate"),
        (&postgres.url(""), Some("foreign.pem"), "certificate"),
        (&elsewhere, Some("ca.pem"), "certificate"),
        (&postgres.url("sslmode=require"), Some("missing.pem"), "missing.pem"),
        (&postgres.url("sslmode=disable"), Some("ca.pem"), "sslmode=disable"),
        (&postgres.url("sslmode=disable"), None, "pg_hba.conf"),
    ] {
        let error = postgres.encrypts(url, ca).await.unwrap_err();
        assert!(error.contains(expected), "{expected:?} is not in {error}");
    }
    let socket = format!("{}?sslmode=require", postgres.embedded.database_url());
    assert_eq!(postgres.encrypts(&socket, None).await, Ok(false));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_tls_parameters_of_libpq_are_understood() {
    let postgres = Postgres::start().await;
    let foreign = postgres.files.write("foreign.pem", &Authority::new().pem());
    let (ca, foreign) = (postgres.files.path("ca.pem").display().to_string(), foreign.display().to_string());
    for mode in ["verify-full", "verify-ca", "require", "prefer"] {
        let url = |ca| postgres.url(&format!("sslmode={mode}&sslrootcert={ca}"));
        assert_eq!(postgres.encrypts(&url(&ca), None).await, Ok(true), "{mode}");
        let error = postgres.encrypts(&url(&foreign), None).await.unwrap_err();
        assert!(error.contains("certificate"), "{mode}: {error}");
        let error = postgres.encrypts(&url(&ca), Some("ca.pem")).await.unwrap_err();
        assert!(error.contains("sslrootcert") && error.contains("--database-ca"), "{mode}: {error}");
    }
    let system = postgres.url("sslmode=verify-full&sslrootcert=system");
    let error = postgres.encrypts(&system, None).await.unwrap_err();
    assert!(error.contains("certificate"), "{error}");

    let mut admin = postgres.open(&postgres.embedded.database_url(), None).await.unwrap();
    admin.batch_execute("CREATE ROLE scram LOGIN PASSWORD 'right'").await.unwrap();
    let url = |user: &str| {
        let url = postgres.url(&format!("sslrootcert={ca}&channel_binding=require"));
        url.replace("//milepost@", &format!("//{user}@"))
    };
    assert_eq!(postgres.encrypts(&url("scram:right"), None).await, Ok(true));
    // Postgres trusts this role, and so it proves nothing about the connection.
    for (user, words) in [
        ("milepost", "channel_binding=require"),
        ("scram:secret", "password authentication failed"),
        ("scram", "password missing"),
    ] {
        let started = Instant::now();
        let refusal = ServerProcess::refused_on(&url(user)).await;
        assert!(started.elapsed() < AT_ONCE, "the server did not exit at once");
        let address = format!("{}:5432: ", postgres.address);
        assert!(refusal.contains(&address) && refusal.contains(words), "{refusal}");
        assert!(refusal.lines().count() == 1 && !refusal.contains("secret"), "{refusal}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_startup_message_is_sent_to_a_server_that_refuses_required_tls() {
    let files = TlsFiles::new(&Authority::new());
    let ca = files.path("ca.pem");
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address: SocketAddr = listener.local_addr().unwrap();
    for (parameters, ca, sent) in
        [("sslmode=require", Some(ca.as_path()), false), ("", Some(ca.as_path()), false), ("", None, true)]
    {
        let url = format!("postgresql://milepost@{address}/milepost?{parameters}");
        let database = database(&url, ca);
        let connecting = tokio::spawn(async move { database.connect().await.map(drop) });
        let (mut stream, _) = within_timeout("a connection", listener.accept()).await.unwrap();
        // The SSLRequest has 8 bytes; `N` refuses TLS.
        stream.read_exact(&mut [0; 8]).await.unwrap();
        stream.write_all(b"N").await.unwrap();
        let read = within_timeout("what follows", stream.read(&mut [0; 8])).await;
        assert_eq!(read.is_ok_and(|bytes| bytes > 0), sent, "{parameters} {ca:?}");
        drop(stream);
        assert!(connecting.await.unwrap().is_err());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn notifications_are_received_over_tls() {
    let postgres = Postgres::start().await;
    let url = postgres.url("sslmode=require");
    let (received, mut notifications) = mpsc::unbounded_channel();
    let listening = postgres.database(&url, Some("ca.pem"));
    let listener = Notifier::start(listening);
    listener.listen(move |notification| {
        let _closed = received.send(notification);
    });
    let sender = Notifier::start(postgres.database(&url, Some("ca.pem")));
    // A listener takes every kind as received once it listens, since it may have
    // missed some.
    for notification in [Notification::Log, Notification::Credentials] {
        assert_eq!(within_timeout("the start of LISTEN", notifications.recv()).await, Some(notification));
    }
    for notification in [Notification::Credentials, Notification::Log] {
        sender.notify(notification);
        assert_eq!(within_timeout("the notification", notifications.recv()).await, Some(notification));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_is_migrated_and_served_by_two_replicas_over_tls_alone() {
    let postgres = Postgres::start().await;
    let (url, ca) = (postgres.url("sslmode=require"), postgres.files.path("ca.pem"));
    // The authority comes from a setting, then from the system's certificates.
    for (variable, expected) in [("MILEPOST_DATABASE_CA", "applied"), ("SSL_CERT_FILE", "nothing to do")] {
        let migrate = Command::new(env!("CARGO_BIN_EXE_milepost"))
            .arg("migrate")
            .env("DATABASE_URL", &url)
            .env_remove("SSL_CERT_DIR")
            .env(variable, &ca)
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output();
        let migrated = within_timeout("the migration", migrate).await.unwrap();
        assert!(migrated.status.success(), "{variable}: {migrated:?}");
        assert!(String::from_utf8(migrated.stdout).unwrap().contains(expected), "{variable}");
    }

    let server = TestServer::on(TestDatabase::at(url, ca)).await;
    let replica = server.replica().await;
    let (mut provider, customer, job) = server.job(&[("load", 1)]).await;
    let mut watch = replica.same(&customer).watch(&job).await;
    watch.caught_up().await;
    provider.append(&job, [step("load"), complete()]).await;
    assert_eq!(watch.read_to_end().await.events.len(), 2);

    let mut admin = postgres.open(&postgres.embedded.database_url(), None).await.unwrap();
    let sql = "SELECT bool_and(ssl) AS ssl FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) \
               WHERE client_addr IS NOT NULL";
    let row: Encrypted = diesel::sql_query(sql).get_result(&mut admin).await.unwrap();
    assert!(row.ssl);
}
