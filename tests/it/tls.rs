//! Encryption: who speaks with whom, certificates that change, and clients that
//! keep still.

use std::{
    fs,
    net::SocketAddr,
    os::unix::fs::symlink,
    path::Path,
    process::{Output, Stdio},
    sync::Arc,
};

use milepost::{
    client::{Client, ClientError},
    config::{ClientTls, TlsConfig},
    pb::{self, ErrorReason},
};
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
use tonic::{Code, Status, transport::ClientTlsConfig};

use crate::support::{
    Authority, Clients, Files, PASSWORD, ServerProcess, TestDatabase, TestServer, assert_refused, complete,
    info, step, within_timeout,
};

/// What somebody without a credential is told by a server that they reach.
async fn asked(clients: &Clients) -> Result<pb::GetCurrentUserResponse, Status> {
    let request = clients.anonymous().auth.get_current_user(pb::GetCurrentUserRequest {}).await;
    request.map(tonic::Response::into_inner)
}

/// Whether a new connection made so reaches the server.
async fn reaches(address: SocketAddr, tls: ClientTlsConfig) -> bool {
    let status = asked(&Clients::over_tls(address, tls)).await.unwrap_err();
    // A connection that is not made is no answer of a server's.
    status.code() == Code::Unauthenticated
}

/// Waits until new connections made so reach the server, or do so no longer.
async fn until(address: SocketAddr, tls: &ClientTlsConfig, reached: bool) {
    within_timeout("other files to be in use", async {
        while reaches(address, tls.clone()).await != reached {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_works_over_tls_and_nothing_without() {
    let authority = Authority::new();
    let files = Files::new(&authority);
    let server = TestServer::encrypted(&files.server(), &authority).await;
    let (mut provider, mut customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("load", 1)]).await;
    let job = provider.job(&customer).await;
    let mut watch = customer.watch(&job).await;
    watch.caught_up().await;
    provider.append(&job, (0..200).map(|n| info(&format!("{n} {}", "x".repeat(200))))).await;
    provider.append(&job, [step("load"), complete()]).await;
    assert_eq!(watch.film().await.events.len(), 202);

    let status = asked(&Clients::of(server.address)).await.unwrap_err();
    assert_ne!(status.code(), Code::Unauthenticated, "{status:?}");
    assert!(Client::connect(&server.address.to_string()).await.is_ok(), "TCP is there");
    let plain = Client::connect(&format!("http://{}", server.address)).await.unwrap();
    let refused = plain.auth().get_current_user(pb::GetCurrentUserRequest {}).await.unwrap_err();
    assert_ne!(refused.code(), Code::Unauthenticated, "{refused:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn our_client_speaks_to_nobody_but_its_server() {
    let authority = Authority::new();
    let files = Files::new(&authority);
    let server = TestServer::encrypted(&files.server(), &authority).await;
    let url = format!("https://{}", server.address);
    let connect = async |server: &str, tls: &ClientTls| Client::connect_with(server, tls).await;

    let client = connect(&url, &files.client()).await.unwrap();
    let answer = client.auth().get_current_user(pb::GetCurrentUserRequest {}).await;
    assert_refused(answer, Code::Unauthenticated, ErrorReason::CredentialInvalid);
    // Whoever names an authority means encryption.
    let client = connect(&server.address.to_string(), &files.client()).await.unwrap();
    let answer = client.auth().get_current_user(pb::GetCurrentUserRequest {}).await;
    assert_refused(answer, Code::Unauthenticated, ErrorReason::CredentialInvalid);

    let foreign = ClientTls {
        tls_ca: Some(files.write("foreign.pem", &Authority::new().pem())),
        ..ClientTls::default()
    };
    let elsewhere = format!("https://localhost:{}", server.address.port());
    for (url, tls) in [(&url, &foreign), (&url, &ClientTls::default()), (&elsewhere, &files.client())] {
        let error = connect(url, tls).await.unwrap_err();
        let told = milepost::cli::one_line(&error);
        assert!(told.contains("certificate"), "{told}");
    }

    let no_file = ClientTls { tls_ca: Some(files.path("missing.pem")), ..ClientTls::default() };
    let no_certificate = ClientTls { tls_ca: Some(files.path("server.key")), ..ClientTls::default() };
    let half = ClientTls { tls_client_cert: Some(files.path("server.pem")), ..files.client() };
    for tls in [no_file, no_certificate, half] {
        let error = connect(&url, &tls).await.unwrap_err();
        assert!(matches!(error, ClientError::Tls(_)), "{error:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_asks_for_certificates_speaks_to_nobody_without_a_good_one() {
    let (authority, clients) = (Authority::new(), Authority::new());
    let files = Files::new(&authority);
    let good = clients.client();
    let server = TestServer::encrypted(&files.asking(&clients), &authority).await;
    let with = |pair: &crate::support::Pair| authority.believer().identity(pair.identity());
    assert!(reaches(server.address, with(&good)).await);
    for (tls, which) in [
        (authority.believer(), "none"),
        (with(&authority.client()), "a foreign one"),
        (with(&clients.server(&["client.example.com"])), "a server's"),
    ] {
        assert!(!reaches(server.address, tls).await, "{which}");
    }

    let tls = ClientTls {
        tls_client_cert: Some(files.write("client.pem", &good.certificate)),
        tls_client_key: Some(files.write("client.key", &good.key)),
        ..files.client()
    };
    let client = Client::connect_with(&format!("https://{}", server.address), &tls).await.unwrap();
    let answer = client.auth().get_current_user(pb::GetCurrentUserRequest {}).await;
    assert_refused(answer, Code::Unauthenticated, ErrorReason::CredentialInvalid);

    // Another authority from now on.
    files.asking(&authority);
    until(server.address, &with(&authority.client()), true).await;
    assert!(!reaches(server.address, with(&good)).await);
}

/// A folder as Kubernetes mounts a secret: a link decides which version is there.
fn mount(dir: &Path, version: &str, authority: &Authority) -> TlsConfig {
    let pair = authority.server(&["127.0.0.1"]);
    fs::create_dir(dir.join(version)).unwrap();
    for (name, content) in [("tls.crt", pair.certificate), ("tls.key", pair.key)] {
        fs::write(dir.join(version).join(name), content).unwrap();
        let _exists = symlink(Path::new("..data").join(name), dir.join(name));
    }
    symlink(version, dir.join("..data_tmp")).unwrap();
    fs::rename(dir.join("..data_tmp"), dir.join("..data")).unwrap();
    TlsConfig { tls_cert: Some(dir.join("tls.crt")), tls_key: Some(dir.join("tls.key")), tls_client_ca: None }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_certificate_is_shown_to_new_connections_and_open_ones_go_on() {
    let (old, new) = (Authority::new(), Authority::new());
    let files = Files::new(&old);
    let server = TestServer::encrypted(&mount(files.dir(), "..v1", &old), &old).await;
    let (mut provider, mut customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("load", 1)]).await;
    let job = provider.job(&customer).await;
    let mut watch = customer.watch(&job).await;
    watch.caught_up().await;
    assert!(!reaches(server.address, new.believer()).await);

    mount(files.dir(), "..v2", &new);
    until(server.address, &new.believer(), true).await;
    assert!(!reaches(server.address, old.believer()).await);
    let mut provider = Clients::over_tls(server.address, new.believer()).same(&provider);
    provider.append(&job, [step("load"), complete()]).await;
    assert_eq!(watch.film().await.events.len(), 2);
}

/// A server's process beyond loopback, by encryption alone.
async fn process(files: &Files) -> (ServerProcess, SocketAddr) {
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
async fn on_sighup_a_pair_that_does_not_match_is_told_and_changes_nothing() {
    let (old, new) = (Authority::new(), Authority::new());
    let files = Files::new(&old);
    let (server, address) = process(&files).await;
    assert!(reaches(address, old.believer()).await);

    let pair = new.server(&["127.0.0.1"]);
    files.write("server.pem", &pair.certificate);
    server.hang_up().await;
    server.logged("the certificate in use stays", 1).await;
    assert!(reaches(address, old.believer()).await);
    files.write("server.pem", "-----BEGIN CERTIFICATE-----\nhalf of a fi");
    server.hang_up().await;
    server.logged("is no PEM file", 1).await;
    assert!(reaches(address, old.believer()).await);

    files.put(&pair);
    server.hang_up().await;
    until(address, &new.believer(), true).await;
    assert!(!reaches(address, old.believer()).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_sighup_is_a_look_of_its_own_whose_outcome_is_told() {
    let authority = Authority::new();
    let files = Files::new(&authority);
    let (server, _) = process(&files).await;
    // The looks that nobody asks for say nothing of what is as it was.
    for times in [1, 2] {
        server.hang_up().await;
        server.logged("the certificate is the one in use already", times).await;
    }
    files.write("server.pem", "");
    for times in [1, 2] {
        server.hang_up().await;
        server.logged("the certificate in use stays", times).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn beyond_loopback_a_server_speaks_without_encryption_only_if_that_is_said_outright() {
    let files = Files::new(&Authority::new());
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
    assert!(!files.path("data").exists(), "nothing was started");

    let database = TestDatabase::migrated().await;
    let settings = [
        ("DATABASE_URL", database.url.as_str()),
        ("MILEPOST_UNSAFE_DATABASE", "true"),
        ("MILEPOST_INSECURE_LISTEN", "true"),
    ];
    let settings = settings.map(|(name, value)| (name, value.to_owned())).to_vec();
    let server = ServerProcess::start_with("0.0.0.0", settings).await;
    let reached = asked(&Clients::of(([127, 0, 0, 1], server.address.port()).into())).await;
    assert_refused(reached, Code::Unauthenticated, ErrorReason::CredentialInvalid);
}

#[tokio::test(flavor = "multi_thread")]
async fn encrypted_a_server_listens_everywhere_and_strangers_may_not_sign_up() {
    let authority = Authority::new();
    let (_server, address) = process(&Files::new(&authority)).await;
    let stranger = Clients::over_tls(address, authority.believer());
    let request = pb::SignUpRequest {
        role: pb::UserRole::Customer.into(),
        email: "stranger@example.com".to_owned(),
        password: PASSWORD.to_owned(),
        ..Default::default()
    };
    let answer = stranger.anonymous().auth.sign_up(request).await;
    assert_refused(answer, Code::PermissionDenied, ErrorReason::SignUpClosed);
}

#[tokio::test(flavor = "multi_thread")]
async fn files_that_do_not_do_are_one_line_at_the_start() {
    let authority = Authority::new();
    let files = Files::new(&authority);
    let (good, key) = (files.path("server.pem"), files.path("server.key"));
    let other = files.write("other.key", &authority.client().key);
    let missing = files.path("missing.pem");
    let empty = files.write("empty.pem", "");
    for (settings, said) in [
        (vec![("CERT", &good)], "--tls-cert needs --tls-key"),
        (vec![("KEY", &key)], "--tls-key needs --tls-cert"),
        (vec![("CLIENT_CA", &good)], "--tls-client-ca needs"),
        (vec![("CERT", &missing), ("KEY", &key)], "missing.pem"),
        (vec![("CERT", &good), ("KEY", &other)], "does not go with"),
        (vec![("CERT", &key), ("KEY", &key)], "holds no certificate"),
        (vec![("CERT", &good), ("KEY", &good)], "holds no private key"),
        (vec![("CERT", &good), ("KEY", &key), ("CLIENT_CA", &empty)], "empty.pem holds no certificate"),
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
        assert!(stderr.contains(said) && stderr.lines().count() == 1, "{said} in {stderr}");
    }
    assert!(!files.path("data").exists(), "nothing was started");
}

/// A connection that has shaken hands.
async fn shaken(address: SocketAddr, authority: &Authority) -> TlsStream<TcpStream> {
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
async fn who_says_nothing_keeps_nobody_waiting_and_is_let_go() {
    let authority = Authority::new();
    let files = Files::new(&authority);
    let server = TestServer::encrypted(&files.server(), &authority).await;
    let mut silent = Vec::new();
    for _ in 0..20 {
        silent.push(TcpStream::connect(server.address).await.unwrap());
    }
    assert!(reaches(server.address, authority.believer()).await);
    for stream in &mut silent {
        let mut nothing = [0];
        let read = within_timeout("the end of a silent connection", stream.read(&mut nothing)).await;
        assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_connections_do_not_keep_a_server_from_its_end() {
    let authority = Authority::new();
    let (mut server, address) = process(&Files::new(&authority)).await;
    let _before = TcpStream::connect(address).await.unwrap();
    let _after = shaken(address, &authority).await;
    assert!(reaches(address, authority.believer()).await);
    server.terminate().await;
    assert_eq!(server.exit().await.code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_watched_in_the_terminal_over_tls_of_a_named_authority_or_the_systems() {
    let authority = Authority::new();
    let files = Files::new(&authority);
    let server = TestServer::encrypted(&files.server(), &authority).await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("load", 1)]).await;
    let job = provider.job(&customer).await;
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
        async move { within_timeout("the watch's end", command.output()).await.unwrap() }
    };
    files.write("foreign.pem", &Authority::new().pem());
    // The second is where a system says that it keeps its own.
    for authority in ["MILEPOST_TLS_CA", "SSL_CERT_FILE"] {
        let watched = watch(authority, "ca.pem").await;
        assert_eq!(watched.status.code(), Some(0), "{authority}: {watched:?}");
        assert!(String::from_utf8(watched.stdout).unwrap().contains("100 %"));
        let refused = watch(authority, "foreign.pem").await;
        assert_eq!(refused.status.code(), Some(1));
        let told = String::from_utf8(refused.stderr).unwrap();
        assert!(told.contains("certificate") && told.lines().count() == 1, "{told}");
    }
}
