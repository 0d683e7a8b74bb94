//! What `milepost export` writes is read by the programs that people open it with.

use std::{collections::BTreeMap, fs, path::Path};

use milepost_client::pb;
use milepost_testing::{
    TemporaryDir, TestServer, complete, info,
    installed::{python_with, succeed},
    step, with_metadata,
};
use prost_types::{Value, value::Kind};
use tokio::process::Command;

#[tokio::test(flavor = "multi_thread")]
async fn exports_are_read_back_by_csv_pandas_and_duckdb() {
    let server = TestServer::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("load", 1)]).await;
    for number in 0..3 {
        let labels = BTreeMap::from([("ward".to_owned(), format!("\"{number}\", b"))]);
        let new = pb::CreateJobRequest {
            provider_job_name: format!("@job {number}"),
            labels: if number == 2 { BTreeMap::new() } else { labels },
            ..provider.new_job(&customer)
        };
        let job = provider.jobs.create_job(new).await.unwrap().into_inner().job.unwrap();
        let texts = ["=1+1", "-2", "a \"quoted\", text\nof two lines", "Ünïcode 🧠", "'single", "0012"];
        provider.append(&job, texts.map(info)).await;
        let number = || Value { kind: Some(Kind::NumberValue(512.5)) };
        provider.append(&job, [with_metadata(step("load"), [("rows", number())])]).await;
        provider.append(&job, [complete()]).await;
    }
    let folder = TemporaryDir::new();
    for (what, format) in [("events", "csv"), ("events", "jsonl"), ("jobs", "csv"), ("jobs", "jsonl")] {
        let mut export = Command::new(env!("CARGO_BIN_EXE_milepost"));
        export
            .args(["export", what, "--format", format])
            .env("MILEPOST_SERVER", server.address.to_string())
            .env("MILEPOST_API_KEY", &provider.key_secret);
        fs::write(folder.path().join(format!("{what}.{format}")), succeed(&mut export).await).unwrap();
    }
    let venv = Path::new(env!("CARGO_TARGET_TMPDIR")).join("python-exports");
    let python = python_with("python3", &["duckdb==2.0.1", "pandas==3.1.1"], &venv).await;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop/exports.py");
    let read = succeed(Command::new(python).arg(script).arg(folder.path())).await;
    assert_eq!(read, "24 events and 3 jobs are read back\n");
}
