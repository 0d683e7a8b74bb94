//! TLS: which clients and servers connect, certificates that are replaced, and clients
//! that stay silent.

use std::{
    fs,
    net::SocketAddr,
    os::unix::fs::symlink,
    path::Path,
    process::{Output, Stdio},
    sync::Arc,
};

use milepost::{
    cli::{connect, one_line},
    config::{ClientTls, TlsSettings},
};
use milepost_client::pb::{self, ErrorReason};
use tokio::{io::AsyncReadExt as _, net::TcpStream, process::Command};
use tokio_rustls::{
    TlsConnector,
    client::TlsStream,
    rustls::{
        ClientConfig, RootCertStore,
        crypto::ring,
        pki_types::{CertificateDer, ServerName, pem::PemObject as _},
    },
};
use tonic::{Code, transport::ClientTlsConfig};

use crate::support::{
    Authority, Clients, PASSWORD, ServerProcess, TestDatabase, TestServer, TlsFiles, assert_refused,
    complete, info, own_address, step, within_timeout,
};

/// Whether a new connection with this configuration reaches the server.
async fn reaches(address: SocketAddr, tls: ClientTlsConfig) -> bool {
    let status = Clients::over_tls(address, tls).anonymous().current_user().await.unwrap_err();
    // Any other code means that there was no connection.
    status.code() == Code::Unauthenticated
}

/// Waits until new connections with this configuration reach the server, or until they no
/// longer do.
async fn wait_until(address: SocketAddr, tls: &ClientTlsConfig, reached: bool) {
    within_timeout("the replaced files to be in use", async {
        while reaches(address, tls.clone()).await != reached {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tls_server_serves_calls_over_tls_and_none_in_plaintext() {
    let authority = Authority::new();
    let files = TlsFiles::new(&authority);
    let server = TestServer::with_tls(&files.server(), &authority).await;
    let (mut provider, mut customer, job) = server.job(&[("load", 1)]).await;
    let mut watch = customer.watch(&job).await;
    watch.caught_up().await;
    provider.append(&job, (0..200).map(|n| info(&format!("{n} {}", "x".repeat(200))))).await;
    provider.append(&job, [step("load"), complete()]).await;
    assert_eq!(watch.read_to_end().await.events.len(), 202);

    let status = Clients::of(server.address).anonymous().current_user().await.unwrap_err();
    assert_ne!(status.code(), Code::Unauthenticated, "{status:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_client_says_what_a_server_speaks_and_what_to_do_if_that_is_not_what_it_expects() {
    let (authority, clients) = (Authority::new(), Authority::new());
    let files = TlsFiles::new(&authority);
    let (encrypted, plain) =
        (TestServer::with_tls(&files.server(), &authority).await, TestServer::start().await);
    let other_files = TlsFiles::new(&authority);
    let closed = TestServer::with_tls(&other_files.server_with_client_ca(&clients), &authority).await;
    let (system, own) = (ClientTls::default(), files.client());
    let https = |address: SocketAddr| format!("https://{address}");
    for (server, tls, words) in [
        (encrypted.address.to_string(), &system, ["speaks TLS", &https(encrypted.address), "--tls-ca"]),
        (
            format!("http://{}", encrypted.address),
            &own,
            ["speaks TLS", &https(encrypted.address), "--tls-ca"],
        ),
        (https(encrypted.address), &system, ["certificate", "unknown authority", "--tls-ca"]),
        (
            format!("https://localhost:{}", encrypted.address.port()),
            &own,
            ["certificate", "other names", "127.0.0.1"],
        ),
        (https(plain.address), &own, ["does not speak TLS", "unencrypted", "http://"]),
        (plain.metrics_address.to_string(), &system, ["not speak HTTP/2", "--listen", "--metrics-listen"]),
        (https(plain.metrics_address), &own, ["does not speak TLS", "unencrypted", "http://"]),
        (own_address("127.0.0.1").to_string(), &system, ["cannot connect", "127.0.0.1", "refused"]),
        (https(closed.address), &own, ["client certificate", "--tls-client-cert", "--tls-client-key"]),
    ] {
        let error = connect(&server, tls).await.unwrap_err();
        let error = one_line(error.as_ref());
        for word in words {
            assert!(error.contains(word), "{server}: {word:?} is not in {error:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_client_connects_only_to_a_server_whose_certificate_it_can_verify() {
    let authority = Authority::new();
    let files = TlsFiles::new(&authority);
    let server = TestServer::with_tls(&files.server(), &authority).await;
    let url = format!("https://{}", server.address);
    let client = connect(&url, &files.client()).await.unwrap();
    let answer = client.auth().get_current_user(pb::GetCurrentUserRequest {}).await;
    assert_refused(answer, Code::Unauthenticated, ErrorReason::CredentialInvalid);
    // A CA implies TLS where the address has no scheme.
    let client = connect(&server.address.to_string(), &files.client()).await.unwrap();
    let answer = client.auth().get_current_user(pb::GetCurrentUserRequest {}).await;
    assert_refused(answer, Code::Unauthenticated, ErrorReason::CredentialInvalid);

    let foreign = ClientTls {
        tls_ca: Some(files.write("foreign.pem", &Authority::new().pem())),
        ..ClientTls::default()
    };
    let other_name = format!("https://localhost:{}", server.address.port());
    for (url, tls) in [(&url, &foreign), (&url, &ClientTls::default()), (&other_name, &files.client())] {
        let error = connect(url, tls).await.unwrap_err();
        let message = one_line(error.as_ref());
        assert!(message.contains("certificate"), "{message}");
    }

    let no_file = ClientTls { tls_ca: Some(files.path("missing.pem")), ..ClientTls::default() };
    let no_certificate = ClientTls { tls_ca: Some(files.path("server.key")), ..ClientTls::default() };
    let half = ClientTls { tls_client_cert: Some(files.path("server.pem")), ..files.client() };
    for (tls, why) in [
        (no_file, "cannot read"),
        (no_certificate, "holds no certificate"),
        (half, "--tls-client-cert and --tls-client-key need each other"),
    ] {
        let error = connect(&url, &tls).await.unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_with_a_client_ca_refuses_connections_without_a_valid_certificate() {
    let (authority, clients) = (Authority::new(), Authority::new());
    let files = TlsFiles::new(&authority);
    let valid = clients.client();
    let server = TestServer::with_tls(&files.server_with_client_ca(&clients), &authority).await;
    let with = |pair: &crate::support::TlsIdentity| authority.client_tls().identity(pair.identity());
    assert!(reaches(server.address, with(&valid)).await);
    for (tls, which) in [
        (authority.client_tls(), "no certificate"),
        (with(&authority.client()), "a certificate of another CA"),
        (with(&clients.server(&["client.example.com"])), "the certificate of a server"),
    ] {
        assert!(!reaches(server.address, tls).await, "{which}");
    }

    let tls = ClientTls {
        tls_client_cert: Some(files.write("client.pem", &valid.certificate)),
        tls_client_key: Some(files.write("client.key", &valid.key)),
        ..files.client()
    };
    let client = connect(&format!("https://{}", server.address), &tls).await.unwrap();
    let answer = client.auth().get_current_user(pb::GetCurrentUserRequest {}).await;
    assert_refused(answer, Code::Unauthenticated, ErrorReason::CredentialInvalid);

    // The server changes to another client CA.
    files.server_with_client_ca(&authority);
    wait_until(server.address, &with(&authority.client()), true).await;
    assert!(!reaches(server.address, with(&valid)).await);
}

/// Fills a directory as Kubernetes mounts a secret: the symbolic link `..data` selects the
/// version.
fn mount(dir: &Path, version: &str, authority: &Authority) -> TlsSettings {
    let pair = authority.server(&["127.0.0.1"]);
    fs::create_dir(dir.join(version)).unwrap();
    for (name, content) in [("tls.crt", pair.certificate), ("tls.key", pair.key)] {
        fs::write(dir.join(version).join(name), content).unwrap();
        let _exists = symlink(Path::new("..data").join(name), dir.join(name));
    }
    symlink(version, dir.join("..data_tmp")).unwrap();
    fs::rename(dir.join("..data_tmp"), dir.join("..data")).unwrap();
    TlsSettings {
        tls_cert: Some(dir.join("tls.crt")),
        tls_key: Some(dir.join("tls.key")),
        tls_client_ca: None,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_certificate_is_used_for_new_connections_and_open_ones_continue() {
    let (old, new) = (Authority::new(), Authority::new());
    let files = TlsFiles::new(&old);
    let server = TestServer::with_tls(&mount(files.dir(), "..v1", &old), &old).await;
    let (provider, mut customer, job) = server.job(&[("load", 1)]).await;
    let mut watch = customer.watch(&job).await;
    watch.caught_up().await;
    assert!(!reaches(server.address, new.client_tls()).await);

    mount(files.dir(), "..v2", &new);
    wait_until(server.address, &new.client_tls(), true).await;
    assert!(!reaches(server.address, old.client_tls()).await);
    let mut provider = Clients::over_tls(server.address, new.client_tls()).same(&provider);
    provider.append(&job, [step("load"), complete()]).await;
    assert_eq!(watch.read_to_end().await.events.len(), 2);
}

/// A server process that listens beyond loopback with TLS and no further flag.
async fn process(files: &TlsFiles) -> (ServerProcess, SocketAddr) {
    let settings = vec![
        ("MILEPOST_TLS_CERT", files.path("server.pem").display().to_string()),
        ("MILEPOST_TLS_KEY", files.path("server.key").display().to_string()),
        ("MILEPOST_DRAIN_DEADLINE_S", "1".to_owned()),
    ];
    let server = ServerProcess::start_with("0.0.0.0", settings).await;
    let address = ([127, 0, 0, 1], server.address.port()).into();
    (server, address)
}

#[tokio::test(flavor = "multi_thread")]
async fn on_sighup_a_certificate_and_a_key_that_do_not_match_are_logged_and_not_used() {
    let (old, new) = (Authority::new(), Authority::new());
    let files = TlsFiles::new(&old);
    let (server, address) = process(&files).await;
    assert!(reaches(address, old.client_tls()).await);

    let pair = new.server(&["127.0.0.1"]);
    files.write("server.pem", &pair.certificate);
    server.hang_up();
    server.logged("the certificate in use stays", 1).await;
    assert!(reaches(address, old.client_tls()).await);
    files.write("server.pem", "-----BEGIN CERTIFICATE-----\nhalf of a fi");
    server.hang_up();
    server.logged("is no PEM file", 1).await;
    assert!(reaches(address, old.client_tls()).await);

    files.replace_server_certificate(&pair);
    server.hang_up();
    wait_until(address, &new.client_tls(), true).await;
    assert!(!reaches(address, old.client_tls()).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_sighup_reads_the_files_and_logs_the_outcome() {
    let authority = Authority::new();
    let files = TlsFiles::new(&authority);
    let (server, _) = process(&files).await;
    // The periodic reads log nothing about unchanged files.
    for times in [1, 2] {
        server.hang_up();
        server.logged("the certificate is the one in use already", times).await;
    }
    files.write("server.pem", "");
    for times in [1, 2] {
        server.hang_up();
        server.logged("the certificate in use stays", times).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plaintext_listener_beyond_loopback_requires_insecure_listen() {
    let files = TlsFiles::new(&Authority::new());
    let serving = Command::new(env!("CARGO_BIN_EXE_milepost"))
        .args(["serve", "--listen", "0.0.0.0:0"])
        .env_remove("DATABASE_URL")
        .env("MILEPOST_DATA_DIR", files.path("data"))
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let Output { status, stderr, .. } = within_timeout("a refusal", serving).await.unwrap();
    let stderr = String::from_utf8(stderr).unwrap();
    assert_eq!(status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("--insecure-listen") && stderr.lines().count() == 1, "{stderr}");
    assert!(!files.path("data").exists(), "the data directory was not created");

    let database = TestDatabase::migrated().await;
    let server = ServerProcess::on_at(&database, "0.0.0.0", &[("MILEPOST_INSECURE_LISTEN", "true")]).await;
    let answer = Clients::of(([127, 0, 0, 1], server.address.port()).into()).anonymous().current_user().await;
    assert_refused(answer, Code::Unauthenticated, ErrorReason::CredentialInvalid);
}

#[tokio::test(flavor = "multi_thread")]
async fn with_tls_a_server_listens_on_any_address_and_sign_up_is_closed() {
    let authority = Authority::new();
    let (_server, address) = process(&TlsFiles::new(&authority)).await;
    let clients = Clients::over_tls(address, authority.client_tls());
    let request = pb::SignUpRequest {
        role: pb::UserRole::Customer.into(),
        email: "new@example.com".to_owned(),
        password: PASSWORD.to_owned(),
        ..Default::default()
    };
    let answer = clients.anonymous().auth.sign_up(request).await;
    assert_refused(answer, Code::PermissionDenied, ErrorReason::SignUpClosed);
}

#[tokio::test(flavor = "multi_thread")]
async fn invalid_tls_files_are_reported_in_one_line_at_the_start() {
    let authority = Authority::new();
    let files = TlsFiles::new(&authority);
    let (cert, key) = (files.path("server.pem"), files.path("server.key"));
    let other = files.write("other.key", &authority.client().key);
    let missing = files.path("missing.pem");
    let empty = files.write("empty.pem", "");
    for (settings, message) in [
        (vec![("CERT", &cert)], "--tls-cert needs --tls-key"),
        (vec![("KEY", &key)], "--tls-key needs --tls-cert"),
        (vec![("CLIENT_CA", &cert)], "--tls-client-ca needs"),
        (vec![("CERT", &missing), ("KEY", &key)], "missing.pem"),
        (vec![("CERT", &cert), ("KEY", &other)], "does not go with"),
        (vec![("CERT", &key), ("KEY", &key)], "holds no certificate"),
        (vec![("CERT", &cert), ("KEY", &cert)], "holds no private key"),
        (vec![("CERT", &cert), ("KEY", &key), ("CLIENT_CA", &empty)], "empty.pem holds no certificate"),
    ] {
        let serving = Command::new(env!("CARGO_BIN_EXE_milepost"))
            .args(["serve", "--listen", "127.0.0.1:0"])
            .env_remove("DATABASE_URL")
            .env("MILEPOST_DATA_DIR", files.path("data"))
            .envs(settings.into_iter().map(|(name, path)| (format!("MILEPOST_TLS_{name}"), path)))
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output();
        let Output { status, stderr, .. } = within_timeout("a refusal", serving).await.unwrap();
        let stderr = String::from_utf8(stderr).unwrap();
        assert_eq!(status.code(), Some(1), "{stderr}");
        assert!(stderr.contains(message) && stderr.lines().count() == 1, "{message} in {stderr}");
    }
    assert!(!files.path("data").exists(), "the data directory was not created");
}

/// A connection after the handshake of TLS and before the preface of HTTP/2.
async fn handshaken(address: SocketAddr, authority: &Authority) -> TlsStream<TcpStream> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(authority.pem().as_bytes()).unwrap()).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let stream = TcpStream::connect(address).await.unwrap();
    let name = ServerName::from(address.ip());
    TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_connections_delay_no_others_and_are_closed() {
    let authority = Authority::new();
    let files = TlsFiles::new(&authority);
    let server = TestServer::with_tls(&files.server(), &authority).await;
    let mut silent = Vec::new();
    for _ in 0..20 {
        silent.push(TcpStream::connect(server.address).await.unwrap());
    }
    assert!(reaches(server.address, authority.client_tls()).await);
    for stream in &mut silent {
        let mut nothing = [0];
        let read = within_timeout("the end of a silent connection", stream.read(&mut nothing)).await;
        assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_connections_do_not_delay_the_exit_of_a_server() {
    let authority = Authority::new();
    let (mut server, address) = process(&TlsFiles::new(&authority)).await;
    let _before = TcpStream::connect(address).await.unwrap();
    let _after = handshaken(address, &authority).await;
    assert!(reaches(address, authority.client_tls()).await);
    server.terminate();
    assert_eq!(server.exit().await.code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn milepost_watch_trusts_the_named_ca_or_the_root_certificates_of_the_system() {
    let authority = Authority::new();
    let files = TlsFiles::new(&authority);
    let server = TestServer::with_tls(&files.server(), &authority).await;
    let (mut provider, customer, job) = server.job(&[("load", 1)]).await;
    provider.append(&job, [step("load"), complete()]).await;
    let watch = |authority: &str, file: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_milepost"));
        command
            .args(["watch", &job.id, "--server", &format!("https://{}", server.address)])
            .env("MILEPOST_API_KEY", &customer.key_secret)
            .env_remove("SSL_CERT_DIR")
            .env(authority, files.path(file))
            .stdin(Stdio::null())
            .kill_on_drop(true);
        async move { within_timeout("the end of milepost watch", command.output()).await.unwrap() }
    };
    files.write("foreign.pem", &Authority::new().pem());
    // SSL_CERT_FILE names the root certificates of the system.
    for authority in ["MILEPOST_TLS_CA", "SSL_CERT_FILE"] {
        let watched = watch(authority, "ca.pem").await;
        assert_eq!(watched.status.code(), Some(0), "{authority}: {watched:?}");
        assert!(String::from_utf8(watched.stdout).unwrap().contains("100 %"));
        let refused = watch(authority, "foreign.pem").await;
        assert_eq!(refused.status.code(), Some(1));
        let stderr = String::from_utf8(refused.stderr).unwrap();
        assert!(stderr.contains("certificate") && stderr.lines().count() == 1, "{stderr}");
    }
}
