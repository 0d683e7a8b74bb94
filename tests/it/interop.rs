//! Clients in other languages: grpcurl as the README uses it, and the Python of
//! `examples/python`.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Output, Stdio},
};

use tokio::{process::Command, sync::OnceCell};

use crate::support::{
    Authority, TestServer, TlsFiles, User, info,
    installed::{python_with, succeed},
    within_timeout,
};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
const GRPCURL: &str = "github.com/fullstorydev/grpcurl/cmd/grpcurl@v1.9.3";

async fn output(command: &mut Command) -> Output {
    command.kill_on_drop(true).stdin(Stdio::null());
    within_timeout("the end of grpcurl", command.output()).await.unwrap()
}

/// The fenced `sh` blocks of a section of the README, in order.
fn shell_of_readme(heading: &str) -> String {
    let readme = fs::read_to_string(Path::new(ROOT).join("README.md")).unwrap();
    let section = readme
        .split("\n## ")
        .find(|section| section.starts_with(heading))
        .expect("the README has this section");
    let blocks = section.split("```sh\n").skip(1);
    blocks.map(|block| block.split("```").next().unwrap()).collect()
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
async fn the_readme_tour_runs_from_sign_up_to_the_end_of_a_watch() {
    let server = TestServer::start().await;
    let script = shell_of_readme("A five-minute tour");
    assert!(script.contains("WatchEvents"), "{script}");
    let mut bash = Command::new("bash");
    bash.args(["-euo", "pipefail", "-c", &script])
        .env("PATH", path_with_grpcurl().await)
        .env("SERVER", server.address.to_string());
    let stdout = succeed(&mut bash).await;

    for service in ["AuthService", "ConfigurationService", "JobService", "EventService"] {
        assert!(stdout.contains(&format!("milepost.v1.{service}")), "{stdout}");
    }
    let caught_up = stdout.find("\"caughtUp\"").expect("the watch caught up");
    let complete = stdout.rfind("EVENT_KIND_COMPLETE").expect("the watch received `complete`");
    let end = stdout.rfind("WATCH_END_REASON_JOB_CLOSED").expect("the watch ended with the job");
    assert!(caught_up < end && complete < end, "{stdout}");
    assert!(stdout.contains("\"percent\": 100"), "{stdout}");
    let status = server.database.texts("SELECT status::text AS text FROM jobs").await;
    assert_eq!(status, ["complete"]);
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

/// A Python with the packages that `examples/python` needs. It is installed below
/// `target`, once for each version of `requirements.txt`.
pub async fn python() -> PathBuf {
    static PYTHON: OnceCell<PathBuf> = OnceCell::const_new();
    PYTHON.get_or_init(make_python).await.clone()
}

async fn make_python() -> PathBuf {
    let (examples, venv) = (examples(), Path::new(env!("CARGO_TARGET_TMPDIR")).join("python"));
    let requirements = fs::read_to_string(examples.join("requirements.txt")).unwrap();
    let packages =
        requirements.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let python = python_with("python3", &packages.collect::<Vec<_>>(), &venv).await;
    let mut generate = Command::new(&python);
    generate.arg(examples.join("generate.py"));
    succeed(&mut generate).await;
    python
}

pub fn examples() -> PathBuf {
    Path::new(ROOT).join("examples/python")
}

/// A command that runs a Python script with the API key of this user.
async fn script(server: &TestServer, user: &User, path: PathBuf) -> Command {
    let mut command = Command::new(python().await);
    command
        .arg(path)
        .env("PYTHONPATH", examples())
        .env("PYTHONIOENCODING", "utf-8")
        .env("MILEPOST_SERVER", server.address.to_string())
        .env("MILEPOST_API_KEY", &user.key_secret);
    command
}

#[tokio::test(flavor = "multi_thread")]
async fn a_python_provider_is_watched_by_a_python_watcher() {
    let server = TestServer::start().await;
    let replica = server.replica().await;
    let (provider, customer) = (server.provider().await, server.customer().await);
    let run = async || {
        let mut command = script(&server, &provider, examples().join("provider.py")).await;
        command.args(["--provider-job-id", "scan-1", "--customer-id", &customer.id]);
        succeed(&mut command).await
    };
    let stdout = run().await;
    let job_id = stdout.lines().find_map(|line| line.strip_prefix("job ")).expect("the job's id").to_owned();

    // Another replica replays the events after the job is complete.
    let mut watcher = script(&replica, &customer, examples().join("watcher.py")).await;
    let replay = succeed(watcher.args(["--job-id", &job_id])).await;
    for part in ["[", "0 %", "Load the slice", "Calibrate", "Segment", "Measure", "report", "bone 11.3"] {
        assert!(replay.contains(part), "{part:?} in\n{replay}");
    }
    let percents: Vec<u32> =
        replay.lines().filter_map(|line| line.split_once(" %")?.0.rsplit(' ').next()?.parse().ok()).collect();
    assert!(percents.is_sorted() && percents.last() == Some(&100), "{percents:?}\n{replay}");
    assert_eq!(replay.lines().last(), Some("complete"));

    assert!(run().await.contains("was done before"));
    let sequences = server.database.texts("SELECT last_sequence::text AS text FROM jobs").await;
    assert_eq!(sequences, [(replay.lines().filter(|line| line.starts_with('[')).count()).to_string()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_python_watcher_follows_a_job_live_and_exits_with_1_if_it_is_cancelled() {
    let server = TestServer::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("load", 1)]).await;
    let job = provider.job(&customer).await;
    let mut watcher = script(&server, &customer, examples().join("watcher.py")).await;
    watcher.args(["--job-id", &job.id]).stdout(Stdio::piped()).kill_on_drop(true);
    let mut watcher = watcher.spawn().unwrap();
    let mut lines = {
        use tokio::io::{AsyncBufReadExt as _, BufReader};
        BufReader::new(watcher.stdout.take().unwrap()).lines()
    };
    let mut next = async || {
        let line = within_timeout("a line of the watcher", lines.next_line()).await;
        line.unwrap().expect("the watcher is still running")
    };

    assert_eq!(next().await, "--- live ---");
    provider.append(&job, [info("hello")]).await;
    assert!(next().await.contains("hello"));
    provider.close(&job).await.unwrap();
    assert!(next().await.contains("close"));
    assert_eq!(next().await, "cancelled");
    assert_eq!(watcher.wait().await.unwrap().code(), Some(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_python_client_receives_the_error_details_of_500_invalid_events() {
    let server = TestServer::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("load", 1)]).await;
    let job = provider.job(&customer).await;
    let path = Path::new(ROOT).join("tests/it/invalid_events.py");
    let mut command = script(&server, &provider, path).await;
    let stdout = succeed(command.arg(&job.id)).await;
    assert!(stdout.starts_with("INVALID_ARGUMENT FIELD_INVALID"), "{stdout}");
    assert!(stdout.contains("events[0].name"), "{stdout}");
    assert_eq!(provider.get(&job).await.last_sequence, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_python_client_appends_events_that_it_compresses() {
    let server = TestServer::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[]).await;
    let job = provider.job(&customer).await;
    let path = Path::new(ROOT).join("tests/it/compressed.py");
    let stdout = succeed(script(&server, &provider, path).await.arg(&job.id)).await;
    assert_eq!(stdout, "appended\n".repeat(3));
    let names: Vec<String> = provider.list(&job).await.into_iter().map(|event| event.name).collect();
    assert_eq!(names, ["compressed"; 4]);
}
