//! The commands for jobs, events, configurations, keys and users, as tables and as JSON.

use std::process::Stdio;

use milepost_client::pb::{self, ApiKeyScope::Manage, UserRole};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, ChildStdout},
};

use super::{
    cli::milepost,
    shell::{Shell, lines, printed},
};
use crate::support::{
    Clients, ServerProcess, TemporaryDir, TestDatabase, TestServer, User, complete,
    connect_client::call_json, error, info, named, step, within_timeout,
};

/// The header and the rows of a table, without its further lines.
fn columns(table: &str) -> Vec<Vec<&str>> {
    table
        .lines()
        .map(|line| line.split("  ").map(str::trim).filter(|text| !text.is_empty()).collect())
        .collect()
}

const CONFIGURATION: &str = "
# Steps of an analysis.
tag: analysis
name: CT analysis
version: 1.0.0
steps:
  - {tag: load, name: Load, points: 1}
  - tag: report
    name: 42
    points: 3
    metadata:
      - name: nodule
        kind: METADATA_KIND_NUMBER
        units: mm
";

async fn provider(server: &Clients) -> User {
    server.sign_up(UserRole::Provider, &[pb::ApiKeyScope::Read, pb::ApiKeyScope::Append, Manage]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn configurations_are_registered_from_yaml_and_json_listed_and_shown() {
    let server = TestServer::start().await;
    let shell = Shell::new(server.address, &provider(&server).await.key_secret);
    let register = ["configurations", "register", "-"];
    let registered = shell.run_with(&register, CONFIGURATION).await.succeeded(&register);
    for line in ["version  1.0.0", "report  3       42    nodule (number mm)"] {
        assert!(registered.contains(line), "{line:?} in {registered}");
    }

    // What the list prints in JSON can be registered, here and for another provider.
    let listed = shell.table(&["configurations", "list", "-o", "json"]).await;
    let again = shell.run_with(&["configurations", "register", "-", "-o", "json"], &listed).await;
    let again = lines(&again.succeeded(&register)).remove(0);
    assert_eq!((&again["existed"], &again["jobConfiguration"]["tag"]), (&json!(true), &json!("analysis")));
    let other = Shell::new(server.address, &provider(&server).await.key_secret);
    let copied = other.run_with(&register, &listed).await.succeeded(&register);
    assert!(copied.contains("CT analysis") && !copied.contains("existed"), "{copied}");

    let second = CONFIGURATION.replace("1.0.0", "1.10.0");
    shell.run_with(&register, &second).await.succeeded(&register);
    let list = shell.table(&["configurations", "list"]).await;
    assert_eq!(columns(&list)[0], ["ID", "TAG", "VERSION", "STEPS", "CREATED", "NAME"]);
    assert_eq!((columns(&list).len(), columns(&list)[1][2]), (2, "1.10.0"));
    let versions = shell.json(&["configurations", "list", "--tag", "analysis"]).await;
    let versions: Vec<&Value> = versions.iter().map(|configuration| &configuration["version"]).collect();
    assert_eq!(versions, ["1.10.0", "1.0.0"]);
    assert_eq!(shell.json(&["configurations", "list", "--tag", "analysis", "--limit", "1"]).await.len(), 1);

    let shown = shell.json(&["configurations", "get", "analysis", "--version", "1.0.0"]).await.remove(0);
    assert_eq!(shown["jobConfiguration"], again["jobConfiguration"]);
    let id = shown["jobConfiguration"]["id"].as_str().unwrap();
    let by_id = shell.table(&["configurations", "get", id, "--id"]).await;
    assert!(by_id.contains(id) && by_id.contains("load    1       Load"), "{by_id}");
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_are_created_listed_shown_and_closed() {
    let server = TestServer::start().await;
    let (mut provider, customer) = (provider(&server).await, server.customer().await);
    provider.configuration(&[("load", 1), ("report", 3)]).await;
    let shell = Shell::new(server.address, &provider.key_secret);
    let create = |id: &'static str| {
        let create = ["jobs", "create", "--configuration-tag", "analysis", "--customer-id", &customer.id];
        [&create[..], &["--provider-job-id", id]].concat()
    };
    let named = [&create("scan-1")[..], &["--provider-job-name", "Thorax \u{1b}[2J"]].concat();
    let created = shell.json(&named).await.remove(0);
    assert_eq!(created["job"]["status"], "JOB_STATUS_PENDING");
    let again = shell.table(&named).await;
    assert!(again.contains("existed          yes") && again.contains("status           pending"), "{again}");
    let second = shell.json(&create("scan-2")).await.remove(0);
    let id = |job: &Value| job["job"]["id"].as_str().unwrap().to_owned();

    let shown = shell.json(&["jobs", "get", "scan-1", "--provider-job-id"]).await.remove(0);
    let asked = json!({ "jobId": id(&created) });
    let (_, answer) = call_json(server.address, &provider.key_secret, "JobService/GetJob", &asked).await;
    assert_eq!(shown, answer, "the JSON is that of the API");
    let table = shell.table(&["jobs", "get", &id(&created)]).await;
    for line in [
        "progress         0 %, 0 of 4 points",
        "customer         ",
        "report  to come  0 %       The step report",
    ] {
        assert!(table.contains(line), "{line:?} in {table}");
    }

    let closed = shell.json(&["jobs", "close", &id(&second), "--reason", "no longer needed"]).await;
    assert_eq!(closed[0]["job"]["status"], "JOB_STATUS_CANCELLED");
    let closed = shell.table(&["jobs", "close", "--provider-job-id", "scan-2"]).await;
    assert!(closed.contains("existed          yes") && closed.contains("cancelled"), "{closed}");

    let list = shell.table(&["jobs", "list"]).await;
    assert!(!list.contains('\u{1b}') && list.contains("Thorax \u{fffd}[2J"), "{list:?}");
    let rows = columns(&list);
    assert_eq!(rows[0].last(), Some(&"NAME"));
    assert_eq!([rows[1][0], rows[2][0]], [id(&second), id(&created)], "the newest is the first");
    for (filters, expected) in [
        (&["--status", "pending,failed"][..], &[&created][..]),
        (&["--status", "running"], &[]),
        (&["--openness", "closed"], &[&second]),
        (&["--provider-job-id-prefix", "scan", "--limit", "1"], &[&second]),
        (&["--provider-job-name-prefix", "Thorax"], &[&created]),
        (&["--configuration-tag", "analysis", "--counterpart-id", &customer.id], &[&second, &created]),
        (&["--counterpart-id", &provider.id], &[]),
        (&["--created-from", "2020-01-01T00:00:00Z", "--created-before", "2020-01-02T00:00:00+01:00"], &[]),
    ] {
        let listed = shell.json(&[&["jobs", "list"], filters].concat()).await;
        let ids: Vec<&Value> = listed.iter().map(|job| &job["id"]).collect();
        let expected: Vec<Value> = expected.iter().map(|job| job["job"]["id"].clone()).collect();
        assert_eq!(ids, expected.iter().collect::<Vec<_>>(), "{filters:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_is_appended_by_flags_once_for_each_id_and_listed() {
    let server = TestServer::start().await;
    let (provider, customer, job) = server.job(&[("load", 1), ("report", 3)]).await;
    let shell = Shell::new(server.address, &provider.key_secret);
    let id = "01980000-0000-7000-8000-000000000001";
    let append =
        [
            &[
                "events", "append", &job.id, "--kind", "step", "--step", "load", "--name", "Loaded", "--id",
                id,
            ][..],
            &["--metadata", "rows=512", "--metadata", "spacing=0.74", "--metadata", "ok=true"],
            &["--metadata", "code=\"007\"", "--metadata", "note=a = b", "--metadata", "empty="],
            &["--occurred-at", "2026-11-26T10:00:00.5+01:00", "--expected-sequence", "0"],
        ]
        .concat();
    let appended = shell.json(&append).await.remove(0);
    assert_eq!((&appended["id"], &appended["sequence"]), (&json!(id), &json!("1")));
    let again = shell.table(&append).await;
    assert_eq!(columns(&again)[1], ["1", "yes", "running", "25 %", id]);
    shell.table(&["events", "append", &job.provider_job_id, "--provider-job-id", "--kind", "info"]).await;

    let reader = Shell::new(server.address, &customer.key_secret);
    let events = reader.json(&["events", "list", &job.id]).await;
    let metadata =
        json!({ "rows": 512, "spacing": 0.74, "ok": true, "code": "007", "note": "a = b", "empty": "" });
    assert_eq!(
        (&events[0]["metadata"], &events[0]["occurredAt"]),
        (&metadata, &json!("2026-11-26T09:00:00.500Z"))
    );
    let table = reader.table(&["events", "list", &job.id]).await;
    assert_eq!(columns(&table)[0].len(), 8);
    for words in
        ["step  running  25 %", "load  Loaded  code=007 empty= note=a = b ok=true rows=512 spacing=0.74"]
    {
        assert!(table.contains(words), "{words:?} in {table}");
    }
    for (filters, sequences) in [
        (&["--after", "1"][..], &["2"][..]),
        (&["--kind", "step,error"], &["1"]),
        (&["--limit", "1"], &["1"]),
    ] {
        let listed = reader.json(&[&["events", "list", &job.id], filters].concat()).await;
        let listed: Vec<&Value> = listed.iter().map(|event| &event["sequence"]).collect();
        assert_eq!(listed, sequences, "{filters:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_of_events_is_appended_in_batches_and_all_pages_are_listed() {
    let server = TestServer::start().await;
    let (provider, _, job) = server.job(&[("load", 1)]).await;
    let shell = Shell::new(server.address, &provider.key_secret);
    let line =
        |n: i32| format!("{}\n", json!({ "kind": "EVENT_KIND_INFO", "name": n.to_string(), "id": uuid(n) }));
    let file: String = (1..=1201).map(line).collect();
    let append = ["events", "append", &job.id, "--file", "-", "--expected-sequence", "0", "-o", "json"];
    let appended = lines(&shell.run_with(&append, &file).await.succeeded(&append));
    let sequences: Vec<Value> = (1..=1201).map(|n: i32| json!(n.to_string())).collect();
    let of =
        |events: &[Value], field: &str| events.iter().map(|event| event[field].clone()).collect::<Vec<_>>();
    assert_eq!(of(&appended, "sequence"), sequences);
    // The same file again stores nothing.
    let again = lines(&shell.run_with(&append, &file).await.succeeded(&append));
    assert_eq!((of(&again, "sequence"), &again[1200]["existed"]), (sequences.clone(), &json!(true)));

    let listed = shell.json(&["events", "list", &job.id]).await;
    assert_eq!(of(&listed, "name"), sequences);
    assert_eq!(shell.json(&["events", "list", &job.id, "--limit", "700"]).await.len(), 700);

    let dir = TemporaryDir::new();
    let path = dir.path().join("events");
    std::fs::write(
        &path,
        "\n{\"kind\": \"EVENT_KIND_STEP\", \"step_tag\": \"load\"}\n{\"kind\": 1, \"stepTag\": \"no\"}\n",
    )
    .unwrap();
    let refused = shell.run(&["events", "append", &job.id, "--file", path.to_str().unwrap()]).await;
    assert_eq!(refused.code, 2, "{refused:?}");
    for words in ["not appended: lines 1 to 3", "FIELD_INVALID", "events[1].step_tag: "] {
        assert!(refused.stderr.contains(words), "{words:?} in {refused:?}");
    }
    assert_eq!(shell.json(&["events", "list", &job.id, "--after", "1201"]).await.len(), 0);
}

fn uuid(n: i32) -> String {
    format!("01980000-0000-7000-8000-{n:012}")
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_created_listed_and_expired() {
    let server = TestServer::start().await;
    let shell = Shell::new(server.address, &provider(&server).await.key_secret);
    let created =
        shell.json(&["keys", "create", "--note", "first", "--scope", "read,manage"]).await.remove(0);
    assert_eq!(created["apiKey"]["scopes"], json!(["API_KEY_SCOPE_READ", "API_KEY_SCOPE_MANAGE"]));
    let manager = Shell::new(server.address, created["secret"].as_str().unwrap());
    let table =
        manager.table(&["keys", "create", "--scope", "read", "--expires-at", "2999-01-01T00:00:00Z"]).await;
    assert!(
        table.contains("secret   mpk_") && table.contains("expires  2999-01-01T00:00:00.000Z"),
        "{table}"
    );

    let id = created["apiKey"]["id"].as_str().unwrap();
    let expired = shell.json(&["keys", "expire", id]).await.remove(0);
    assert!(expired["apiKey"]["revokedAt"].is_string(), "{expired}");
    assert_eq!(manager.run(&["keys", "list"]).await.code, 6);
    let again = shell.run(&["keys", "expire", id]).await;
    assert!(again.code == 7 && again.stderr.contains("API_KEY_ALREADY_EXPIRED"), "{again:?}");
    let list = shell.table(&["keys", "list"]).await;
    assert!(columns(&list).len() == 4 && list.contains("read,manage"), "{list}");
    let listed = shell.json(&["keys", "list"]).await;
    assert_eq!((listed.len(), &listed[1]["id"]), (3, &json!(id)));
    assert_eq!(shell.json(&["keys", "list", "--limit", "2"]).await.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn share_prints_the_link_beside_the_answer_of_the_api() {
    let server = TestServer::start().await;
    let (provider, _, job) = server.job(&[("load", 1)]).await;
    let shell = Shell::new(server.address, &provider.key_secret);
    let shared = shell.json(&["share", &job.id, "--note", "for Bob"]).await.remove(0);
    assert_eq!(
        (&shared["watchToken"]["jobId"], &shared["watchToken"]["note"]),
        (&json!(job.id), &json!("for Bob"))
    );
    let link =
        format!("http://{}/#/jobs/{}?token={}", server.address, job.id, shared["secret"].as_str().unwrap());
    assert_eq!(shared["link"], link);
}

#[tokio::test(flavor = "multi_thread")]
async fn users_are_listed_with_filters_and_each_change_is_printed_in_json_too() {
    let database = TestDatabase::migrated().await;
    let user = async |arguments: &[&str]| {
        let mut command = milepost(&[&["user"], arguments].concat());
        command.env("DATABASE_URL", &database.url);
        printed(command, "some password\n").await.succeeded(arguments)
    };
    let create = ["create", "--role", "provider", "-o", "json", "ada@example.com", "--first-name", "Ada"];
    let ada = lines(&user(&create).await).remove(0);
    assert_eq!((&ada["role"], &ada["firstName"]), (&json!("USER_ROLE_PROVIDER"), &json!("Ada")));
    user(&["create", "--role", "customer", "bob@example.com"]).await;
    let disabled = lines(&user(&["disable", "bob@example.com", "-o", "json"]).await).remove(0);
    assert!(disabled["disabledAt"].is_string(), "{disabled}");
    let set = lines(&user(&["set-password", "bob@example.com", "-o", "json"]).await).remove(0);
    assert_eq!((&set["id"], &set["disabledAt"]), (&disabled["id"], &disabled["disabledAt"]));

    let table = user(&["list"]).await;
    assert_eq!(columns(&table)[0], ["ID", "ROLE", "CREATED", "DISABLED", "E-MAIL", "NAME"]);
    assert!(table.lines().nth(1).unwrap().ends_with("ada@example.com  Ada"), "{table}");
    let listed = lines(&user(&["list", "-o", "json"]).await);
    assert_eq!((&listed[0], &listed[1]["disabledAt"]), (&ada, &disabled["disabledAt"]));
    for (filters, expected) in [
        (&["--disabled"][..], &["bob@example.com"][..]),
        (&["--role", "provider"], &["ada@example.com"]),
        (&["--role", "provider", "--disabled"], &[]),
        (&["--limit", "1"], &["ada@example.com"]),
    ] {
        let listed = lines(&user(&[&["list", "-o", "json"], filters].concat()).await);
        assert_eq!(listed.iter().map(|user| &user["email"]).collect::<Vec<_>>(), expected, "{filters:?}");
    }
    let enabled = lines(&user(&["enable", "bob@example.com", "-o", "json"]).await).remove(0);
    assert_eq!((&enabled["id"], &enabled["disabledAt"]), (&disabled["id"], &Value::Null));

    // More users than a page has.
    let insert = "INSERT INTO users (id, role, email, email_key, password_hash, first_name, last_name)
        SELECT gen_random_uuid(), 'provider', n || '@b', n || '@b',
               (SELECT password_hash FROM users LIMIT 1), '', '' FROM generate_series(1, 1100) AS n";
    database.execute(insert).await;
    let mut ids: Vec<String> =
        lines(&user(&["list", "-o", "json"]).await).iter().map(|user| user["id"].to_string()).collect();
    ids.dedup();
    assert_eq!(ids.len(), 1102);
}

/// A running `events tail`, and its output.
struct Tail {
    child: Child,
    lines: tokio::io::Lines<BufReader<ChildStdout>>,
}

impl Tail {
    fn start(shell: &Shell, arguments: &[&str]) -> Self {
        let mut command = shell.command(&[&["events", "tail", "-o", "json"], arguments].concat());
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { child, lines }
    }

    async fn next(&mut self) -> Option<Value> {
        let line = within_timeout("an event", self.lines.next_line()).await.unwrap()?;
        Some(serde_json::from_str(&line).unwrap())
    }

    async fn names(mut self) -> (Vec<Value>, i32) {
        let mut names = Vec::new();
        while let Some(event) = self.next().await {
            names.push(event["name"].clone());
        }
        let status = within_timeout("the tail's end", self.child.wait()).await.unwrap();
        (names, status.code().unwrap())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tail_prints_each_event_once_over_a_restart_and_exits_by_the_status_of_the_job() {
    let mut server = ServerProcess::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("load", 1)]).await;
    let shell = Shell::new(server.address, &customer.key_secret);
    for (last, expected) in [(complete(), 0), (error("broken"), 3)] {
        let job = provider.job(&customer).await;
        provider.append(&job, [named(step("load"), "first"), named(info(""), "second")]).await;
        let mut tail = Tail::start(&shell, &[&job.id, "--after", "1"]);
        assert_eq!(tail.next().await.unwrap()["name"], "second");
        server.kill().await;
        server.restart().await;
        provider = server.other_clients().same(&provider);
        provider.append(&job, [info("third"), named(last, "last")]).await;
        if expected != 0 {
            provider.close(&job).await.unwrap();
        }
        let (names, code) = tail.names().await;
        assert_eq!((&names[..2], code), (&[json!("third"), json!("last")][..], expected), "{names:?}");
        assert_eq!(names.len(), if expected == 0 { 2 } else { 3 }, "{names:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tail_follows_all_jobs_of_the_caller_by_kind_from_the_beginning_or_from_now_on() {
    let server = TestServer::start().await;
    let (mut provider, customer, job) = server.job(&[("load", 1)]).await;
    provider.append(&job, [named(step("load"), "old"), named(info(""), "other kind")]).await;
    let shell = Shell::new(server.address, &customer.key_secret);
    let mut all = Tail::start(&shell, &["--kind", "step"]);
    assert_eq!(all.next().await.unwrap()["name"], "old");
    let mut new = Tail::start(&shell, &["--from-now", "--kind", "step", "--configuration-tag", "analysis"]);
    let second = provider.job(&customer).await;
    // The second tail starts at some time: until then events pass it by.
    let first = loop {
        provider.append(&second, [named(step("load"), "new")]).await;
        let waited = tokio::time::timeout(std::time::Duration::from_millis(200), new.next()).await;
        if let Ok(event) = waited {
            break event.unwrap();
        }
    };
    assert_eq!((&first["name"], &first["jobId"]), (&json!("new"), &json!(second.id)));
    assert_eq!(all.next().await.unwrap()["jobId"], second.id);

    // The table names the job of each event.
    let mut command = shell.command(&["events", "tail", "--counterpart-id", &provider.id]);
    let mut table = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(table.stdout.take().unwrap()).lines();
    let header = within_timeout("a header", lines.next_line()).await.unwrap().unwrap();
    let row = within_timeout("a row", lines.next_line()).await.unwrap().unwrap();
    assert_eq!(
        (columns(&header)[0][..2].concat(), columns(&row)[0][0]),
        ("JOBSEQUENCE".to_owned(), &*job.id)
    );
    let sequence = header.find("SEQUENCE").unwrap();
    assert!(row[sequence..].starts_with("1 "), "the columns are aligned:\n{header}\n{row}");
}
