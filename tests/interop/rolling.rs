//! Replicas are replaced one by one under load. The retries of the client are only those
//! of the service config in `examples`.

use std::{collections::HashMap, path::Path, process::Stdio, time::Duration};

use milepost_testing::{ServerProcess, TIMEOUT, TestDatabase, within_timeout};
use serde_json::Value;
use tokio::{io::AsyncReadExt as _, process::Command, time::timeout};

use crate::{python, python_path};

/// How often each replica is replaced.
const ROUNDS: usize = 3;
const REPLICAS: usize = 2;
/// Batches of the first job go through PublishEvents, those of the others through
/// AppendEvents.
const JOBS: usize = 5;
/// Appends through a replica that show that clients use it again.
const APPENDS: usize = 20;

/// The number of AppendEvents calls that a replica has answered.
fn appends(server: &ServerProcess) -> usize {
    server.log().matches("EventService/AppendEvents").count()
}

async fn wait_until_used(server: &ServerProcess) {
    let before = appends(server);
    let used = async {
        while appends(server) < before + APPENDS {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    // The client is another process, which has to start first.
    if timeout(TIMEOUT, used).await.is_err() {
        panic!("no client uses a replica, whose log is\n{}", server.log());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn while_replicas_are_replaced_no_call_fails_and_no_event_is_lost_or_duplicated() {
    let python = python().await;
    let database = TestDatabase::migrated().await;
    let mut servers = [ServerProcess::on(&database).await, ServerProcess::on(&database).await];
    let (mut provider, customer) = (servers[0].provider().await, servers[0].customer().await);
    provider.configuration(&[]).await;
    let mut jobs = Vec::new();
    for _ in 0..JOBS {
        jobs.push(provider.job(&customer).await.id);
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut load = Command::new(python)
        .arg(root.join("tests/interop/rolling.py"))
        .arg(format!("ipv4:{},{}", servers[0].address, servers[1].address))
        .arg(root.join("examples/service_config.json"))
        .args(&jobs)
        .env("PYTHONPATH", python_path())
        .env("MILEPOST_API_KEY", &provider.key_secret)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    for server in &servers {
        wait_until_used(server).await;
    }
    for round in 0..ROUNDS * REPLICAS {
        let server = &mut servers[round % REPLICAS];
        server.terminate();
        assert_eq!(server.exit().await.code(), Some(0));
        server.restart().await;
        // Clients find a ready replica only later, because they wait between their
        // attempts to connect.
        wait_until_used(server).await;
    }
    drop(load.stdin.take());
    let mut report = String::new();
    let mut stdout = load.stdout.take().unwrap();
    within_timeout("the report of rolling.py", stdout.read_to_string(&mut report)).await.unwrap();
    let report: Value = serde_json::from_str(&report).unwrap_or_else(|_| panic!("{report}"));
    assert_eq!(report["failures"], serde_json::json!([]), "{}", report["failures"]);

    let acknowledged: HashMap<String, Vec<String>> =
        serde_json::from_value(report["acknowledged"].clone()).unwrap();
    for job in &jobs {
        let stored = database
            .texts(&format!("SELECT id::text AS text FROM events WHERE job_id = '{job}' ORDER BY sequence"))
            .await;
        assert!(stored.len() > APPENDS, "only {} events were appended", stored.len());
        assert_eq!(stored, acknowledged[job]);
    }
}
