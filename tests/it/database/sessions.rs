//! What milepost demands of a database and sets in its own sessions: the primary, the
//! encoding UTF8, and settings that a role or a database may have set otherwise.

use std::{
    ffi::OsString,
    fs,
    net::TcpListener,
    os::unix::{ffi::OsStringExt as _, fs::MetadataExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use diesel::sql_types::Text;
use diesel_async::{AsyncPgConnection, SimpleAsyncConnection as _};
use milepost::{
    cli::one_line,
    db::embedded::{Embedded, EmbeddedSettings},
    error::Failure,
};
use milepost_client::pb;

use crate::support::{
    ServerProcess, TemporaryDir, TestDatabase, TestServer, complete, database, step, within_timeout,
};

/// A Postgres in recovery, which was started from a stopped primary. It follows nobody.
struct Standby {
    postgres: Child,
    url: String,
    _dir: TemporaryDir,
}

impl Standby {
    async fn start() -> Self {
        let dir = TemporaryDir::new();
        let embedded = Embedded::start(EmbeddedSettings::new(dir.path())).await.unwrap();
        let data = dir.path().join("cluster/data");
        let (program, arguments) = command_of_postmaster(&data);
        embedded.stop().await.unwrap();
        fs::write(data.join("standby.signal"), "").unwrap();
        let owner = fs::metadata(&data).unwrap();
        let mut command = Command::new("setpriv");
        if owner.uid() == fs::metadata(dir.path()).unwrap().uid() {
            command = Command::new("env");
        } else {
            command.args([format!("--reuid={}", owner.uid()), format!("--regid={}", owner.gid())]);
            command.arg("--clear-groups");
        }
        let postgres = command
            .arg(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let url = embedded.database_url();
        within_timeout("the standby to answer", async {
            while tokio_postgres::connect(&url, tokio_postgres::NoTls).await.is_err() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
        Self { postgres, url, _dir: dir }
    }

    async fn promote(&self) {
        let (client, connection) = tokio_postgres::connect(&self.url, tokio_postgres::NoTls).await.unwrap();
        let connection = tokio::spawn(connection);
        client.simple_query("SELECT pg_promote()").await.unwrap();
        connection.abort();
    }

    /// The host of the URL, which is the directory of a socket.
    fn host(&self) -> &str {
        self.url.split_once('@').unwrap().1.split_once('/').unwrap().0
    }
}

impl Drop for Standby {
    fn drop(&mut self) {
        // Postgres is no longer needed: the watchdog of the directory would end it too.
        let _ = self.postgres.kill();
        let _ = self.postgres.wait();
    }
}

/// The program that serves the data directory, and its arguments.
fn command_of_postmaster(data: &Path) -> (PathBuf, Vec<OsString>) {
    let file = fs::read_to_string(data.join("postmaster.pid")).unwrap();
    let process = Path::new("/proc").join(file.lines().next().unwrap());
    let line = fs::read(process.join("cmdline")).unwrap();
    let arguments = line.strip_suffix(b"\0").unwrap().split(|byte| *byte == 0).skip(1);
    let arguments = arguments.map(|argument| OsString::from_vec(argument.to_vec())).collect();
    (fs::read_link(process.join("exe")).unwrap(), arguments)
}

async fn connect(url: &str) -> Result<milepost::db::OwnConnection, String> {
    database(url, None).connect().await.map_err(|error| one_line(&error))
}

#[derive(diesel::QueryableByName)]
struct Setting {
    #[diesel(sql_type = Text)]
    setting: String,
}

async fn setting(connection: &mut AsyncPgConnection, name: &str) -> String {
    let sql = format!("SELECT current_setting('{name}') AS setting");
    let query = diesel::sql_query(sql);
    let row: Setting = diesel_async::RunQueryDsl::get_result(query, connection).await.unwrap();
    row.setting
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_is_refused_until_it_is_promoted() {
    let standby = Standby::start().await;
    let refused = connect(&standby.url).await.err().unwrap();
    assert!(refused.contains("is a standby, and milepost needs the primary"), "{refused}");
    standby.promote().await;
    within_timeout("the promoted server to be used", async {
        while connect(&standby.url).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_several_hosts_the_primary_is_used_wherever_it_stands() {
    let standby = Standby::start().await;
    let primary = TestDatabase::migrated().await;
    // The kernel accepts connections for the listener, which says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = silent.local_addr().unwrap();
    let (user, rest) = primary.url.split_once('@').unwrap();
    let (socket, name) = rest.split_once('/').unwrap();
    let others = [silent.to_string(), format!("{}:5432", standby.host())];
    for hosts in [
        [others[0].as_str(), &others[1], &format!("{socket}:5432")],
        [&format!("{socket}:5432"), &others[0], &others[1]],
        [&others[1], &format!("{socket}:5432"), &others[0]],
    ] {
        let url = format!("{user}@{}/{name}", hosts.join(","));
        let mut connection = connect(&url).await.unwrap();
        assert_eq!(setting(&mut connection, "in_hot_standby").await, "off", "{url}");
    }
    let url = format!("{user}@{},127.0.0.1:1/milepost", others[1]);
    let refused = connect(&url).await.err().unwrap();
    for part in ["is a standby", "; ", "error connecting to server"] {
        assert!(refused.contains(part), "{refused}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_of_the_database_do_not_reach_milepost() {
    let database = TestDatabase::migrated().await;
    for (name, value) in [
        ("default_transaction_isolation", "'repeatable read'"),
        ("default_transaction_read_only", "on"),
        ("default_transaction_deferrable", "on"),
        ("timezone", "'Asia/Kolkata'"),
        ("synchronous_commit", "off"),
        ("search_path", "nowhere"),
    ] {
        let sql = format!(
            "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET {name} = {}', current_database()); END $$",
            value.replace('\'', "''"),
        );
        // The settings before have made new sessions read-only.
        database.execute(&format!("SET transaction_read_only = off; {sql}")).await;
    }
    let mut connection = connect(&database.url).await.unwrap();
    for (name, value) in [
        ("default_transaction_isolation", "read committed"),
        ("default_transaction_read_only", "off"),
        ("default_transaction_deferrable", "off"),
        ("TimeZone", "UTC"),
        ("synchronous_commit", "on"),
        ("search_path", "public"),
    ] {
        assert_eq!(setting(&mut connection, name).await, value, "{name}");
    }

    let server = TestServer::on(database).await;
    let mut provider = server.provider().await;
    let customer = server.customer().await;
    provider.configuration(&[("a", 1)]).await;
    let job = provider.job(&customer).await;
    let mut watch = provider.watch(&job).await;
    provider.append(&job, [complete()]).await;
    watch.events(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_with_another_encoding_is_refused() {
    let utf8 = TestDatabase::empty().await;
    let name = format!("latin1_{}", uuid::Uuid::now_v7().simple());
    let create = format!("CREATE DATABASE {name} ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0");
    utf8.execute(&create).await;
    let url = format!("{}/{name}", utf8.url.rsplit_once('/').unwrap().0);
    let refused = ServerProcess::refused_on(&url).await;
    let expected =
        "the database has the encoding LATIN1, and milepost needs UTF8: create it with ENCODING 'UTF8'";
    assert!(refused.contains(expected), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn prepared_statements_outlive_a_change_of_their_table() {
    let server = TestServer::start().await;
    let mut provider = server.provider().await;
    let customer = server.customer().await;
    provider.configuration(&[("a", 1)]).await;
    let job = provider.job(&customer).await;
    provider.append(&job, [step("a")]).await;
    provider.get(&job).await;
    server
        .database
        .execute("ALTER TABLE jobs ALTER COLUMN provider_job_name TYPE varchar COLLATE \"C\"")
        .await;
    let request = pb::GetJobRequest { job: Some(pb::get_job_request::Job::JobId(job.id)) };
    provider.jobs.get_job(request).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_that_could_not_lock_its_table_may_succeed_later() {
    let database = TestDatabase::migrated().await;
    let (mut victim, mut other) = (database.connect().await, database.connect().await);
    other.batch_execute("SET deadlock_timeout = '1min'; BEGIN; LOCK TABLE jobs").await.unwrap();
    victim.batch_execute("SET lock_timeout = '10ms'").await.unwrap();
    let refused = victim.batch_execute("SELECT FROM jobs").await.unwrap_err();
    assert_eq!(Failure::of(&refused), Failure::Away, "{refused:?}");

    let begin = "SET lock_timeout = 0; SET deadlock_timeout = '1ms'; BEGIN; LOCK TABLE events";
    victim.batch_execute(begin).await.unwrap();
    let waiting = tokio::spawn(async move { other.batch_execute("LOCK TABLE events").await });
    database.wait_for_locks(1).await;
    let refused = victim.batch_execute("SELECT FROM jobs").await.unwrap_err();
    assert_eq!(Failure::of(&refused), Failure::Away, "{refused:?}");
    within_timeout("the other session to get the lock", waiting).await.unwrap().unwrap();
}
