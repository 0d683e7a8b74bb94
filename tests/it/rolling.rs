//! Replicas that are replaced one by one under load: what a client meets that
//! has nothing but the service config of `examples`.

use std::{collections::HashMap, path::Path, process::Stdio, time::Duration};

use serde_json::Value;
use tokio::{io::AsyncReadExt as _, process::Command, time::timeout};

use crate::{
    interop::{examples, python},
    support::{ServerProcess, TIMEOUT, TestDatabase, within_timeout},
};

/// How often each replica is replaced.
const ROUNDS: usize = 3;
const REPLICAS: usize = 2;
/// The first is published to, the others are written to call by call.
const JOBS: usize = 5;
/// So many appends through a replica say that clients have found it again.
const FOUND: usize = 20;

/// How many single appends a replica has answered.
fn appends(server: &ServerProcess) -> usize {
    server.log().matches("EventService/AppendEvents").count()
}

async fn wait_until_found(server: &ServerProcess) {
    let before = appends(server);
    let found = async {
        while appends(server) < before + FOUND {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    // Another process, which first has to start.
    if timeout(TIMEOUT * 3, found).await.is_err() {
        panic!("clients do not find a replica, which logged\n{}", server.log());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn while_replicas_are_replaced_no_call_fails_and_no_event_is_lost_or_doubled() {
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
        .arg(root.join("tests/it/rolling.py"))
        .arg(format!("ipv4:{},{}", servers[0].address, servers[1].address))
        .arg(root.join("examples/service_config.json"))
        .args(&jobs)
        .env("PYTHONPATH", examples())
        .env("MILEPOST_API_KEY", &provider.key_secret)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    for server in &servers {
        wait_until_found(server).await;
    }
    for round in 0..ROUNDS * REPLICAS {
        let server = &mut servers[round % REPLICAS];
        server.terminate().await;
        assert_eq!(server.exit().await.code(), Some(0));
        server.restart().await;
        // A replica that is ready is not yet one that clients have found: they
        // wait between their attempts to connect.
        wait_until_found(server).await;
    }
    drop(load.stdin.take());
    let mut said = String::new();
    let mut stdout = load.stdout.take().unwrap();
    within_timeout("what the load has to say", stdout.read_to_string(&mut said)).await.unwrap();
    let said: Value = serde_json::from_str(&said).unwrap_or_else(|_| panic!("{said}"));
    assert_eq!(said["failures"], serde_json::json!([]), "{}", said["failures"]);

    let acknowledged: HashMap<String, Vec<String>> =
        serde_json::from_value(said["acknowledged"].clone()).unwrap();
    for job in &jobs {
        let stored = database
            .texts(&format!("SELECT id::text AS text FROM events WHERE job_id = '{job}' ORDER BY sequence"))
            .await;
        assert!(stored.len() > FOUND, "{} events are no load", stored.len());
        assert_eq!(stored, acknowledged[job]);
    }
}
