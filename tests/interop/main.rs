//! Clients in other languages: grpcurl as the tour uses it, and the Python of
//! `examples/python`.
//!
//! `cargo test --test interop` needs Debian's python3-venv, and grpcurl, or Go to install it.

#![allow(clippy::unwrap_used, reason = "a test fails by a panic")]

mod exports;
mod rolling;

use std::{
    env,
    ffi::OsString,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Output, Stdio},
};

use milepost_testing::{
    Authority, ServerProcess, TestServer, TlsFiles, User, blocks, info,
    installed::{python_with, succeed},
    within_timeout,
};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader, Lines},
    process::{Child, ChildStdout, Command},
    sync::OnceCell,
};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
const GRPCURL: &str = "github.com/fullstorydev/grpcurl/cmd/grpcurl@v1.9.3";

async fn output(command: &mut Command) -> Output {
    command.kill_on_drop(true).stdin(Stdio::null());
    within_timeout("the end of grpcurl", command.output()).await.unwrap()
}

/// A PATH with grpcurl. If neither PATH nor the default directory of `go install` has
/// grpcurl, it is installed below `target`.
async fn path_with_grpcurl() -> String {
    let go_bin = Path::new(env!("CARGO_TARGET_TMPDIR")).join("go");
    let path = format!(
        "{}:{}/go/bin:{}",
        env::var("PATH").unwrap_or_default(),
        env::var("HOME").unwrap_or_default(),
        go_bin.display()
    );
    let found = async || Command::new("grpcurl").env("PATH", &path).arg("-version").output().await.is_ok();
    if !found().await {
        let mut go = Command::new("go");
        // If Go is missing, the assertion below fails.
        let _installed = go.args(["install", GRPCURL]).env("GOBIN", &go_bin).output().await;
        assert!(found().await, "grpcurl is missing: install Go, then go install {GRPCURL}");
    }
    path
}

#[tokio::test(flavor = "multi_thread")]
async fn the_tour_of_the_readme_and_docs_runs_from_sign_up_to_the_provider_in_python() {
    let server = TestServer::start().await;
    let provider = r#"MILEPOST_API_KEY=$KEY "$PYTHON" "$PROVIDER_PY" --pause-s 0 --provider-job-id scan-3 \
        --customer-id "$(field id <<< "$CUSTOMER")""#;
    let script = [blocks("README.md", "sh"), blocks("docs/tour.md", "sh")].concat().concat() + provider;
    let milepost = Path::new(env!("CARGO_BIN_EXE_milepost")).parent().unwrap();
    let mut bash = Command::new("bash");
    bash.args(["-euo", "pipefail", "-c", &script])
        .env("PATH", format!("{}:{}", milepost.display(), path_with_grpcurl().await))
        .env("PYTHON", python().await)
        .env("PYTHONPATH", python_path())
        .env("PROVIDER_PY", examples().join("provider.py"))
        .env("MILEPOST_SERVER", server.address.to_string());
    let stdout = succeed(&mut bash).await;

    // Once by the customer in the README, once by the watch token in docs/tour.md.
    assert_eq!(stdout.matches("complete at 100 %").count(), 2, "{stdout}");
    // The event is sent twice more, the second time after the request to stop.
    assert_eq!(stdout.matches("\"existed\": true").count(), 2, "{stdout}");
    for service in ["AuthService", "ConfigurationService", "JobService", "EventService"] {
        assert!(stdout.contains(&format!("milepost.v1.{service}")), "{stdout}");
    }
    let caught_up = stdout.find("\"caughtUp\"").expect("the watch caught up");
    let complete = stdout.rfind("EVENT_KIND_COMPLETE").expect("the watch received `complete`");
    let end = stdout.rfind("WATCH_END_REASON_JOB_CLOSED").expect("the watch ended with the job");
    assert!(caught_up < end && complete < end, "{stdout}");
    let jobs = server
        .database
        .texts("SELECT status || ' ' || last_sequence AS text FROM job_states ORDER BY job_id")
        .await;
    assert_eq!(jobs, ["complete 4", "complete 5", "complete 12"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn grpcurl_connects_only_with_the_ca_certificate_of_the_server() {
    let authority = Authority::new();
    let files = TlsFiles::new(&authority);
    let server = TestServer::with_tls(&files.server(), &authority).await;
    let path = path_with_grpcurl().await;
    let grpcurl = || {
        let mut command = Command::new("grpcurl");
        command.env("PATH", &path);
        command
    };
    let address = server.address.to_string();
    let listed = succeed(grpcurl().arg("-cacert").arg(files.path("ca.pem")).args([&address, "list"])).await;
    assert!(listed.contains("milepost.v1.EventService"), "{listed}");
    let foreign = files.write("foreign.pem", &Authority::new().pem());
    let refused = output(grpcurl().arg("-cacert").arg(foreign).args([&address, "list"])).await;
    assert!(!refused.status.success());
    let unencrypted = output(grpcurl().args(["-plaintext", "-max-time", "5", &address, "list"])).await;
    assert!(!unencrypted.status.success());
}

/// A Python with the packages that `examples/python` needs, except for the client. It is installed below
/// `target`, once for each version of `requirements.txt`.
async fn python() -> PathBuf {
    static PYTHON: OnceCell<PathBuf> = OnceCell::const_new();
    PYTHON.get_or_init(make_python).await.clone()
}

async fn make_python() -> PathBuf {
    let venv = Path::new(env!("CARGO_TARGET_TMPDIR")).join("python");
    let requirements = fs::read_to_string(examples().join("requirements.txt")).unwrap();
    // The client is found by PYTHONPATH, so that the installation need not follow its changes.
    let packages =
        requirements.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with(['#', '.']));
    python_with("python3", &packages.collect::<Vec<_>>(), &venv).await
}

fn examples() -> PathBuf {
    Path::new(ROOT).join("examples/python")
}

fn python_path() -> OsString {
    env::join_paths([examples(), Path::new(ROOT).join("clients/python/src")]).unwrap()
}

/// A command that runs a Python script with the API key of this user.
async fn script(address: SocketAddr, user: &User, path: PathBuf) -> Command {
    let mut command = Command::new(python().await);
    command
        .arg(path)
        .env("PYTHONPATH", python_path())
        .env("PYTHONIOENCODING", "utf-8")
        .env("MILEPOST_SERVER", address.to_string())
        .env("MILEPOST_API_KEY", &user.key_secret);
    command
}

/// A process whose output is read line by line.
struct Running {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Running {
    fn start(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).kill_on_drop(true).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { child, lines }
    }

    async fn line(&mut self) -> Option<String> {
        within_timeout("a line", self.lines.next_line()).await.unwrap()
    }

    async fn next_line(&mut self) -> String {
        self.line().await.expect("the process is still running")
    }

    async fn read_to_end(&mut self) -> Vec<String> {
        let mut lines = Vec::new();
        while let Some(line) = self.line().await {
            lines.push(line);
        }
        lines
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_python_provider_is_watched_by_a_python_watcher() {
    let server = TestServer::start().await;
    let replica = server.replica().await;
    let (provider, customer) = (server.provider().await, server.customer().await);
    let run = async || {
        let mut command = script(server.address, &provider, examples().join("provider.py")).await;
        command.args(["--provider-job-id", "scan-1", "--customer-id", &customer.id, "--pause-s", "0"]);
        succeed(&mut command).await
    };
    let stdout = run().await;
    let job_id = stdout.lines().find_map(|line| line.strip_prefix("job ")).expect("the job's id").to_owned();

    // Another replica replays the events after the job is complete.
    let mut watcher = script(replica.address, &customer, examples().join("watcher.py")).await;
    let replay = succeed(watcher.args(["--job-id", &job_id])).await;
    for part in ["[", "0 %", "Load the slice", "Calibrate", "Segment", "Measure", "report", "bone 11.3"] {
        assert!(replay.contains(part), "{part:?} in\n{replay}");
    }
    let percents: Vec<u32> =
        replay.lines().filter_map(|line| line.split_once(" %")?.0.rsplit(' ').next()?.parse().ok()).collect();
    assert!(percents.is_sorted() && percents.last() == Some(&100), "{percents:?}\n{replay}");
    assert_eq!(replay.lines().last(), Some("complete"));

    assert!(run().await.contains("was done before"));
    let sequences = server.database.texts("SELECT last_sequence::text AS text FROM job_states").await;
    assert_eq!(sequences, [(replay.lines().filter(|line| line.starts_with('[')).count()).to_string()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_python_provider_and_a_python_watcher_go_on_after_kill_9_of_the_server() {
    let mut server = ServerProcess::start().await;
    let (provider, customer) = (server.provider().await, server.customer().await);
    let mut provides = script(server.address, &provider, examples().join("provider.py")).await;
    provides.args(["--provider-job-id", "scan-1", "--customer-id", &customer.id, "--pause-s", "0.3"]);
    let mut provides = Running::start(provides);
    let job_id = provides.next_line().await.strip_prefix("job ").expect("the job's id").to_owned();
    let mut watches = script(server.address, &customer, examples().join("watcher.py")).await;
    watches.args(["--job-id", &job_id]);
    let mut watches = Running::start(watches);
    let mut watched = Vec::new();
    while !watched.iter().any(|line: &String| line.starts_with('[')) {
        watched.push(watches.next_line().await);
    }
    server.kill().await;
    server.restart().await;
    watched.extend(watches.read_to_end().await);
    assert!(provides.child.wait().await.unwrap().success());

    let sequences: Vec<i64> = watched
        .iter()
        .filter_map(|line| {
            line.strip_prefix('[')?.split_once(" %")?.1.split_whitespace().next()?.parse().ok()
        })
        .collect();
    let stored = server.database().texts("SELECT last_sequence::text AS text FROM job_states").await;
    assert_eq!(sequences, (1..=stored[0].parse().unwrap()).collect::<Vec<_>>(), "{watched:?}");
    assert_eq!(watched.last().map(String::as_str), Some("complete"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_python_watcher_follows_a_job_live_and_exits_with_1_if_it_is_cancelled() {
    let server = TestServer::start().await;
    let (mut provider, customer, job) = server.job(&[("load", 1)]).await;
    let mut watcher = script(server.address, &customer, examples().join("watcher.py")).await;
    watcher.args(["--job-id", &job.id]);
    let mut watcher = Running::start(watcher);

    assert_eq!(watcher.next_line().await, "--- live ---");
    provider.append(&job, [info("hello")]).await;
    assert!(watcher.next_line().await.contains("hello"));
    provider.close(&job).await.unwrap();
    assert!(watcher.next_line().await.contains("close"));
    assert_eq!(watcher.next_line().await, "cancelled");
    assert_eq!(watcher.child.wait().await.unwrap().code(), Some(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_python_client_receives_the_error_details_of_500_invalid_events() {
    let server = TestServer::start().await;
    let (mut provider, _, job) = server.job(&[("load", 1)]).await;
    let path = Path::new(ROOT).join("tests/interop/invalid_events.py");
    let mut command = script(server.address, &provider, path).await;
    let stdout = succeed(command.arg(&job.id)).await;
    assert!(stdout.starts_with("INVALID_ARGUMENT FIELD_INVALID"), "{stdout}");
    assert!(stdout.contains("events[0].name"), "{stdout}");
    assert_eq!(provider.get(&job).await.last_sequence, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_python_client_appends_events_that_it_compresses() {
    let server = TestServer::start().await;
    let (mut provider, _, job) = server.job(&[]).await;
    let path = Path::new(ROOT).join("tests/interop/compressed.py");
    let stdout = succeed(script(server.address, &provider, path).await.arg(&job.id)).await;
    assert_eq!(stdout, "appended\n".repeat(3));
    let names: Vec<String> = provider.list(&job).await.into_iter().map(|event| event.name).collect();
    assert_eq!(names, ["compressed"; 4]);
}
