//! The embedded Postgres: in containers, beside processes that have its old process id,
//! and who may connect to it. Most of these tests need root, which uses other users and
//! namespaces.

use std::{
    fs::{self, Permissions},
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown},
    path::{Path, PathBuf},
    process::{Output, Stdio},
};

use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, Command},
};

use crate::support::{
    ServerProcess, TemporaryDir, TestDatabase, info, is_root, own_address,
    processes::{parent, runs, zombies_of},
    within_timeout,
};

/// As in a container without an init: PID 1, and without the capability to look at
/// processes of other users.
const CONTAINER: [&str; 7] =
    ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "setpriv", "--bounding-set=-sys_ptrace"];
const WITHOUT_PTRACE: [&str; 2] = ["setpriv", "--bounding-set=-sys_ptrace"];
const AS_NOBODY: [&str; 4] = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"];
const AS_POSTGRES: [&str; 4] = ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups"];

/// Whether the test cannot run.
fn skipped() -> bool {
    if !is_root() {
        eprintln!("skipped: this test needs root");
    }
    !is_root()
}

/// The exit code and the output of a command line.
async fn output(wrapper: &[&str], arguments: &[&str], data_dir: &Path) -> (Option<i32>, String) {
    let mut command_line = wrapper.iter().chain(arguments);
    let running = Command::new(command_line.next().unwrap())
        .args(command_line)
        .env_remove("DATABASE_URL")
        .env("MILEPOST_DATA_DIR", data_dir)
        .env("MILEPOST_LISTEN", "127.0.0.1:0")
        .env("MILEPOST_LOG_LEVEL", "warn")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let Output { status, stdout, stderr } =
        within_timeout(format!("the end of {arguments:?}"), running).await.unwrap();
    (status.code(), [stdout, stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat())
}

const MILEPOST: &str = env!("CARGO_BIN_EXE_milepost");

#[tokio::test(flavor = "multi_thread")]
async fn as_pid_1_a_server_restarts_a_killed_postgres_and_leaves_no_zombies() {
    if skipped() {
        return;
    }
    let mut server = ServerProcess::start_in(&CONTAINER).await;
    let (mut provider, _, job) = server.job(&[]).await;
    let batch = [info("started")];
    provider.append(&job, batch.clone()).await;
    for _ in 0..2 {
        server.kill_postgres().await;
        server.ready().await;
        assert!(provider.append(&job, batch.clone()).await[0].existed);
    }
    let pid_1 = server.pids()[0];
    within_timeout("PID 1 to wait for all orphans", async {
        while !zombies_of(pid_1).is_empty() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    server.terminate();
    assert_eq!(server.exit().await.code(), Some(0));
}

/// Both lock files of the server's Postgres.
fn lock_files(server: &ServerProcess) -> [PathBuf; 2] {
    ["data/postmaster.pid", "run/.s.PGSQL.5432.lock"].map(|file| server.data_dir().join("cluster").join(file))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_replaces_lock_files_that_name_another_process_or_none() {
    let mut server = ServerProcess::start().await;
    let (mut provider, _, job) = server.job(&[]).await;
    let batch = [info("started")];
    provider.append(&job, batch.clone()).await;
    let owner = fs::metadata(server.data_dir().join("cluster/data")).unwrap();
    let sleeping = || {
        let mut sleep = Command::new("sleep");
        sleep.arg("infinity").uid(owner.uid()).gid(owner.gid()).kill_on_drop(true).spawn().unwrap()
    };
    let mut wrappers = vec![&[][..]];
    if is_root() {
        wrappers.push(&WITHOUT_PTRACE);
    }
    for wrapper in wrappers {
        let other = sleeping();
        let zombie: Child = sleeping();
        let id = |process: &Child| process.id().unwrap();
        let killed = Command::new("kill").args(["-s", "KILL", &id(&zombie).to_string()]).status().await;
        assert!(killed.unwrap().success());
        within_timeout("a zombie", async {
            while runs(id(&zombie)) {
                tokio::task::yield_now().await;
            }
        })
        .await;
        let other_postgres = TestDatabase::postmaster().await;
        for pid in [Some(id(&other)), Some(id(&zombie)), Some(other_postgres), None] {
            server.kill().await;
            server.kill_postgres().await;
            for file in lock_files(&server) {
                let content = fs::read_to_string(&file).unwrap();
                let (_, rest) = content.split_once('\n').unwrap();
                // An empty file is what a full disk leaves.
                fs::write(&file, pid.map(|pid| format!("{pid}\n{rest}")).unwrap_or_default()).unwrap();
            }
            server.restart_in(wrapper).await;
            provider = server.other_clients().same(&provider);
            assert!(provider.append(&job, batch.clone()).await[0].existed);
            assert!(runs(id(&other)) && runs(other_postgres), "a stranger was stopped");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_postgres_left_behind_is_stopped_before_the_next_one_starts() {
    let mut server = ServerProcess::start().await;
    let before = server.postmasters();
    server.kill().await;
    assert_eq!(server.postmasters(), before);
    server.restart().await;
    let after = server.postmasters();
    assert!(after.len() == 1 && after != before && !runs(before[0]), "{before:?}, then {after:?}");
    assert_eq!(parent(after[0]), Some(server.pids()[0]));
}

#[tokio::test(flavor = "multi_thread")]
async fn in_another_container_no_second_postgres_starts_on_the_same_data() {
    if skipped() {
        return;
    }
    let mut server = ServerProcess::start().await;
    let before = server.postmasters();
    server.kill().await;
    let locks = || lock_files(&server).map(|file| fs::read_to_string(file).unwrap());
    let locks_before = locks();
    // The new namespaces hide the process, and the shared memory by which Postgres itself
    // would notice it.
    let wrapper = ["unshare", "--pid", "--ipc", "--fork", "--kill-child", "--mount-proc"];
    let (code, text) = output(&wrapper, &[MILEPOST, "serve"], &server.data_dir()).await;
    assert_eq!((code, text.lines().count()), (Some(1), 1), "{text}");
    assert!(text.contains("still use"), "{text}");
    assert_eq!(server.postmasters(), before);
    assert_eq!(locks(), locks_before);
    server.restart().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_user_postgres_the_user_nobody_may_not_connect_and_root_may() {
    if skipped() {
        return;
    }
    let files = TemporaryDir::new();
    let users = fs::read_to_string("/etc/passwd").unwrap();
    let users: Vec<&str> = users.lines().filter(|line| !line.starts_with("postgres:")).collect();
    let passwd = files.path().join("passwd");
    fs::write(&passwd, users.join("\n") + "\n").unwrap();
    let script = r#"mount --bind "$0" /etc/passwd && exec "$@""#;
    let wrapper = ["unshare", "--mount", "sh", "-c", script, passwd.to_str().unwrap()];
    let server = ServerProcess::start_in(&wrapper).await;
    let cluster = server.data_dir().join("cluster");
    let socket = cluster.join("run");
    let query = ["psql", "-h", socket.to_str().unwrap(), "-U", "milepost", "-c", "SELECT 1", "milepost"];
    // The rules of the cluster itself, which its owner could write, do not count.
    fs::write(cluster.join("data/pg_hba.conf"), "local all all trust\n").unwrap();
    server.kill_postgres().await;
    server.ready().await;

    let (code, text) = output(&AS_NOBODY, &query, &server.data_dir()).await;
    assert!(code != Some(0) && text.contains("Peer authentication failed"), "{text}");
    for command in [&query[..], &[MILEPOST, "migrate"]] {
        let (code, text) = output(&[], command, &server.data_dir()).await;
        assert_eq!(code, Some(0), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_user_that_runs_a_server_and_root_may_use_its_database() {
    if skipped() {
        return;
    }
    let dir = TemporaryDir::new();
    let (code, uid) = output(&[], &["id", "-u", "postgres"], dir.path()).await;
    assert_eq!(code, Some(0), "{uid}");
    let data_dir = dir.path().join("data");
    fs::create_dir(&data_dir).unwrap();
    chown(&data_dir, Some(uid.trim().parse().unwrap()), None).unwrap();
    // The user may not reach the build directory.
    let binary = dir.path().join("milepost");
    fs::copy(MILEPOST, &binary).unwrap();
    let binary = binary.to_str().unwrap();
    let mut server = Command::new(AS_POSTGRES[0])
        .args(&AS_POSTGRES[1..])
        .args([binary, "serve", "--listen", &own_address("127.0.0.1").to_string()])
        .env_remove("DATABASE_URL")
        .env("MILEPOST_DATA_DIR", &data_dir)
        .env("MILEPOST_LOG_LEVEL", "warn")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    dir.guard(server.id().unwrap());
    let mut lines = BufReader::new(server.stdout.take().unwrap()).lines();
    let line = within_timeout("the server to listen", lines.next_line()).await.unwrap();
    assert!(line.is_some_and(|line| line.contains("listens")));
    for wrapper in [&AS_POSTGRES[..], &[]] {
        let (code, text) = output(wrapper, &[binary, "migrate"], &data_dir).await;
        assert_eq!(code, Some(0), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_database_url_is_the_embedded_postgres() {
    let dir = TemporaryDir::new();
    for (flags, variable) in [(&[][..], ""), (&["--database-url", ""], "postgresql://127.0.0.1:1/milepost")] {
        let migrating = Command::new(env!("CARGO_BIN_EXE_milepost"))
            .arg("migrate")
            .args(flags)
            .env("DATABASE_URL", variable)
            .env("MILEPOST_DATA_DIR", dir.path())
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output();
        let migrated = within_timeout("the end of milepost migrate", migrating).await.unwrap();
        assert!(migrated.status.success(), "{migrated:?}");
    }
    assert!(dir.path().join("cluster/data").is_dir());
}

#[tokio::test(flavor = "multi_thread")]
async fn as_root_an_error_names_the_directory_that_postgres_cannot_enter_and_the_remedy() {
    if skipped() {
        return;
    }
    let dir = TemporaryDir::new();
    let closed = dir.path().join("closed");
    fs::create_dir(&closed).unwrap();
    let migrate = async |mode| {
        fs::set_permissions(&closed, Permissions::from_mode(mode)).unwrap();
        output(&[], &[MILEPOST, "migrate"], &closed.join("data")).await
    };
    let (code, text) = migrate(0o700).await;
    assert_eq!((code, text.lines().count()), (Some(1), 1), "{text}");
    for word in [format!(" {}: ", closed.display()).as_str(), "chmod o+x", "--data-dir"] {
        assert!(text.contains(word), "{word} in {text}");
    }
    // The remedy that the error names is sufficient.
    let (code, text) = migrate(0o711).await;
    assert_eq!(code, Some(0), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_of_a_server_and_its_embedded_postgres_logs_no_warning() {
    let mut server = ServerProcess::start().await;
    server.logged("the database answers", 1).await;
    server.terminate();
    assert_eq!(server.exit().await.code(), Some(0));
    let log = server.log();
    assert!(log.contains("draining") && !log.contains("WARN") && !log.contains("ERROR"), "{log}");
}
