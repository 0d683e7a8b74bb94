//! The exit codes of the command line, and what it says about a failure.

use std::net::TcpListener;

use super::{
    cli::milepost,
    shell::{Printed, Shell, printed},
};
use crate::support::{TestDatabase, TestServer, complete, page};

fn assert_failed(failed: &Printed, code: i32, words: &[&str]) {
    assert_eq!((failed.code, failed.stdout.is_empty()), (code, code != 0), "{failed:?}");
    for words in words {
        assert!(failed.stderr.contains(words), "{words:?} in {failed:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exit_code_tells_why_a_call_failed_and_stderr_what_to_do() {
    let server = TestServer::start().await;
    let (mut provider, customer, job) = server.job(&[("load", 1)]).await;
    provider.append(&job, [complete()]).await;
    let open = provider.job(&customer).await;
    let (by_provider, by_customer) =
        (Shell::new(server.address, &provider.key_secret), Shell::new(server.address, &customer.key_secret));
    let unknown = "01980000-0000-7000-8000-000000000001";
    let create = ["jobs", "create", "--configuration-tag", "analysis", "--customer-id", &customer.id];
    let append = ["events", "append", &open.id, "--kind", "info", "--id", unknown];
    by_provider.table(&append).await;
    for (shell, arguments, code, words) in [
        (
            &by_provider,
            &["jobs", "get", "x\u{1b}"][..],
            2,
            &["FIELD_INVALID", "job_id: \"x\\u{1b}\" must be a UUID", "correct this"][..],
        ),
        (
            &by_provider,
            &["events", "append", &open.id, "--kind", "close", "--name", &"x".repeat(257)],
            2,
            &["\n  events[0].kind: ", "\n  events[0].name: "],
        ),
        (&by_provider, &["jobs", "get", unknown], 5, &["no such job", "RESOURCE_NOT_FOUND", "check the id"]),
        (&by_customer, &["watch", unknown], 5, &["RESOURCE_NOT_FOUND"]),
        (&by_customer, &["events", "tail", unknown], 5, &["RESOURCE_NOT_FOUND"]),
        (
            &by_customer,
            &[&create[..], &["--provider-job-id", "a"]].concat(),
            6,
            &["ROLE_REQUIRED", "use a credential that may do this"],
        ),
        (&by_provider, &["keys", "list"], 6, &["SCOPE_REQUIRED", "MANAGE"]),
        (
            &Shell::new(server.address, "mpk_wrong"),
            &["jobs", "list"],
            6,
            &["CREDENTIAL_INVALID", "MILEPOST_API_KEY"],
        ),
        (
            &by_provider,
            &["events", "append", &job.id, "--kind", "info"],
            7,
            &["JOB_CLOSED", "nothing was changed"],
        ),
        (
            &by_provider,
            &[&append[..], &["--name", "other"]].concat(),
            7,
            &["EVENT_DIFFERS", "events[0].name: differs from"],
        ),
        (
            &by_provider,
            &["events", "append", &open.id, "--kind", "info", "--expected-sequence", "7"],
            7,
            &["SEQUENCE_MISMATCH", "read the later events"],
        ),
        (&by_provider, &["events", "list", &open.id, "--after", "7"], 7, &["POSITION_BEYOND_LOG"]),
    ] {
        let failed = shell.run(arguments).await;
        assert_failed(&failed, code, words);
        assert!(!failed.stderr.contains('\u{1b}'), "{failed:?}");
    }
}

/// The server writes while the database does not answer: the command is to be run again.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_or_database_that_cannot_be_reached_has_an_exit_code_of_its_own() {
    let unused = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let nowhere = Shell::new(unused, "mpk_");
    assert_failed(&nowhere.run(&["jobs", "list"]).await, 8, &["cannot connect to the server"]);

    let mut command = milepost(&["user", "list"]);
    command.env("DATABASE_URL", format!("postgresql://nobody@{unused}/nothing"));
    assert_failed(&printed(command, "").await, 8, &["cannot connect to the database"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_command_line_has_exit_code_2_and_says_what_to_write() {
    let server = TestServer::start().await;
    let (provider, _, job) = server.job(&[("load", 1)]).await;
    let shell = Shell::new(server.address, &provider.key_secret);
    let append = ["events", "append", &job.id];
    for (arguments, input, words) in [
        (&["jobs", "list", "--status", "done"][..], "", "[possible values: cancelled, complete, failed"),
        (&["jobs", "list", "--created-from", "today"], "", "2026-11-26T10:00:00Z"),
        (&["jobs", "list", "--limit", "0"], "", "--limit"),
        (&["jobs", "create", "--provider-job-id", "a"], "", "--customer-id"),
        (&append, "", "--kind <KIND>"),
        (&[&append[..], &["--kind", "info", "--metadata", "rows"]].concat(), "", "NAME=VALUE"),
        (
            &[&append[..], &["--kind", "info", "--metadata", "n=9007199254740993"]].concat(),
            "",
            "n='\"9007199254740993\"'",
        ),
        (&[&append[..], &["--kind", "info", "--file", "-"]].concat(), "", "--file"),
        (&[&append[..], &["--file", "/nowhere/at/all"]].concat(), "", "cannot read /nowhere/at/all"),
        (&[&append[..], &["--file", "-"]].concat(), "{}\n{\"kind\": \"STEP\"}\n", "line 2: "),
        (&["events", "tail", "--after", "1"], "", "<JOB>"),
        (&["configurations", "register", "-"], "{\"tag\": \"a\", \"stepps\": []}", "'stepps'"),
        (&["configurations", "register", "-"], "tag: a\nsteps:\n  - point: 1\n", "'point'"),
        (&["configurations", "register", "-"], "tag: a\nsteps:\n  - {tag: x\n", "line 3"),
        (&["configurations", "register", "-"], "tag: a\ntag: b\n", "tag"),
        (&["configurations", "register", "-"], "{\"tag\": \"a\"}", "\n  version: "),
    ] {
        let failed = shell.run_with(arguments, input).await;
        assert_failed(&failed, 2, &[words]);
    }
    let mut without = shell.command(&["keys", "list"]);
    without.env_remove("MILEPOST_API_KEY");
    assert_failed(&printed(without, "").await, 2, &["MILEPOST_API_KEY"]);
    assert_eq!(server.database.texts("SELECT tag AS text FROM job_configurations").await, ["analysis"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_user_command_has_the_same_exit_codes() {
    let database = TestDatabase::migrated().await;
    let create = ["user", "create", "--role", "customer"];
    for (arguments, password, code, words) in [
        (&[&create[..], &["a@b"]].concat()[..], "long enough", 0, ""),
        (&[&create[..], &["A@b"]].concat(), "long enough", 7, "a user with this e-mail exists"),
        (&[&create[..], &["c@d"]].concat(), "short", 2, "the password must have 8 to 71 bytes"),
        (&[&create[..], &["c.d"]].concat(), "long enough", 2, "the e-mail \"c.d\""),
        (&["user", "disable", "c@d"], "", 5, "no such user: \"c@d\""),
    ] {
        let mut command = milepost(arguments);
        command.env("DATABASE_URL", &database.url);
        assert_failed(&printed(command, password).await, code, &[words]);
    }
}

#[tokio::test]
async fn command_line_md_has_the_exit_codes_of_the_help() {
    let help = printed(milepost(&["--help"]), "").await.stdout;
    let (_, codes) = help.split_once("Exit codes:\n").unwrap();
    let page = page("docs/command-line.md");
    let rows: Vec<&str> = page.lines().filter(|line| line.starts_with("| `")).collect();
    let codes: Vec<String> = codes
        .lines()
        .filter_map(|line| line.trim().split_once("  "))
        .map(|(code, meaning)| format!("| `{code}` | {meaning} |"))
        .collect();
    assert!(
        codes.len() == 9 && codes.iter().all(|code| rows.contains(&code.as_str())),
        "{codes:#?} in {rows:#?}"
    );
}
