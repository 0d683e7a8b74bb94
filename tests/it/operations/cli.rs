//! The commands demo, watch, share and user.

use std::process::{Output, Stdio};

use milepost_client::pb::{self, NewEvent};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::Command,
};

use crate::support::{
    ServerProcess, TemporaryDir, TestDatabase, TestServer, complete, error, info, named, step, within_timeout,
};

pub(super) fn milepost(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_milepost"));
    command
        .args(arguments)
        .env_remove("DATABASE_URL")
        .env("MILEPOST_BCRYPT_COST", "4")
        .stdin(Stdio::null())
        .kill_on_drop(true);
    command
}

pub(super) async fn output(mut command: Command) -> (i32, String) {
    let Output { status, stdout, stderr } =
        within_timeout("the command's end", command.output()).await.unwrap();
    let text = [stdout, stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat();
    (status.code().unwrap(), text)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_demo_shows_a_job_up_to_its_completion() {
    let dir = TemporaryDir::new();
    // Long enough for the jobs before it to be known when its steps end.
    let mut command = milepost(&["demo", "--seconds", "8"]);
    command.env("MILEPOST_DATA_DIR", dir.path());
    let (code, text) = output(command).await;
    assert_eq!(code, 0, "{text}");
    for line in ["Load the slice", "Segment the lungs", "Analysis complete", "100 %", ", 9 in 10 within "] {
        assert!(text.contains(line), "{line:?} is not in {text}");
    }
}

/// The output of the demo in a terminal of this type and width, which `script` makes.
async fn demo_in_terminal(term: &str, columns: usize) -> String {
    let dir = TemporaryDir::new();
    let demo =
        format!("stty cols {columns} rows 40; exec {} demo --seconds 1", env!("CARGO_BIN_EXE_milepost"));
    let mut command = Command::new("script");
    command
        .args(["--quiet", "--return", "--command", &demo, "/dev/null"])
        .env_remove("DATABASE_URL")
        .env("MILEPOST_BCRYPT_COST", "4")
        .env("MILEPOST_DATA_DIR", dir.path())
        .env("TERM", term)
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let (code, text) = output(command).await;
    assert_eq!(code, 0, "{text}");
    text
}

#[tokio::test(flavor = "multi_thread")]
async fn on_a_dumb_terminal_the_demo_prints_each_event_as_a_plain_line() {
    let text = demo_in_terminal("dumb", 80).await;
    for line in ["step Load the slice", "complete Analysis complete", "complete at 100 % after 32 events"] {
        assert!(text.contains(line), "{line:?} is not in {text}");
    }
    assert!(!text.contains('\u{1b}'), "{text:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_line_of_the_progress_bar_is_no_wider_than_the_terminal() {
    // What the bar's line begins with: two spaces and one of these characters.
    let begins = ['⠋', '⠙', '⠹', '⠸', '⠼', '⠴', '⠦', '⠧', '⠇', '⠏', '★'];
    for columns in [60, 100] {
        let text = demo_in_terminal("xterm-256color", columns).await;
        let text = console::strip_ansi_codes(&text);
        // The line ends with a line break, or where spaces fill it up.
        let lines = || {
            let lines = text.split(begins).skip(1).filter(|line| line.contains(" %  "));
            lines.filter_map(|line| line.split(['\r', '\n']).next()?.split("   ").next())
        };
        for status in ["running", "complete"] {
            assert!(lines().any(|line| line.contains(status)), "{status} is not in {text}");
        }
        for line in lines() {
            assert!(3 + console::measure_text_width(line) <= columns, "{columns} columns: {line:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_demo_uses_a_running_server_named_by_flag_or_found_in_the_data_directory() {
    let server = ServerProcess::start().await;
    let address = server.address.to_string();
    let named = milepost(&["demo", "--seconds", "1", "--server", &address]);
    let mut found = milepost(&["demo", "--seconds", "1"]);
    found.env("MILEPOST_DATA_DIR", server.data_dir());
    for (demos, command) in [named, found].into_iter().enumerate() {
        let (code, text) = output(command).await;
        assert_eq!(code, 0, "{text}");
        for words in [address.as_str(), "found running", "Analysis complete", "100 %"] {
            assert!(text.contains(words), "{words:?} is not in {text}");
        }
        let jobs = server.database().texts("SELECT status::text AS text FROM jobs").await;
        // Twelve jobs are played before the one that is shown.
        assert_eq!(jobs, vec!["complete"; 13 * (demos + 1)]);
    }
    // A demo does not stop a server that it did not start.
    server.ready().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn watch_resumes_after_a_restart_of_the_server_and_exits_by_the_status_of_the_job() {
    let mut server = ServerProcess::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("load", 1), ("report", 3)]).await;
    // The last event, whether the provider then closes the job, and the exit code.
    for (last, closed, expected) in
        [(Some(complete()), false, 0), (Some(error("broken")), true, 3), (None, true, 4)]
    {
        let job = provider.job(&customer).await;
        let named = |event: NewEvent, name: &str| named(event, format!("{name} {}", job.id));
        provider.append(&job, [named(step("load"), "first")]).await;
        let mut watch = milepost(&["watch", &job.id, "--server", &server.address.to_string()])
            .env("MILEPOST_API_KEY", &customer.key_secret)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(watch.stdout.take().unwrap()).lines();
        let mut seen = Vec::new();
        while !seen.iter().any(|line: &String| line.contains("first")) {
            seen.push(
                within_timeout("a line", lines.next_line()).await.unwrap().expect("the watch has not ended"),
            );
        }
        server.kill().await;
        server.restart().await;
        provider = server.other_clients().same(&provider);
        provider.append(&job, [named(info("x"), "second")]).await;
        if let Some(event) = last {
            provider.append(&job, [event]).await;
        }
        if closed {
            provider.close(&job).await.unwrap();
        }
        while let Some(line) = within_timeout("a line", lines.next_line()).await.unwrap() {
            seen.push(line);
        }
        let status = within_timeout("the watch's end", watch.wait()).await.unwrap();
        assert_eq!(status.code(), Some(expected), "{seen:?}");
        for name in ["first", "second"] {
            assert_eq!(seen.iter().filter(|line| line.contains(name)).count(), 1, "{name:?} in {seen:?}");
        }
    }
}

#[tokio::test]
async fn watch_without_a_credential_is_a_usage_error_that_names_the_variable() {
    for (arguments, variable, words) in [
        (&["watch", "JOB"][..], None, ["MILEPOST_API_KEY", "no credential"]),
        (&["watch", "JOB"], Some(""), ["MILEPOST_API_KEY", "no credential"]),
        (&["watch", "JOB", "--wrong"], Some("mpk_"), ["--wrong", "Usage: milepost watch"]),
        (&["watch"], Some("mpk_"), ["<JOB>", "Usage: milepost watch"]),
    ] {
        let mut command = milepost(arguments);
        command.env_remove("MILEPOST_API_KEY").envs(variable.map(|secret| ("MILEPOST_API_KEY", secret)));
        let (code, text) = output(command).await;
        assert_eq!(code, 2, "{arguments:?}: {text}");
        assert!(words.iter().all(|words| text.contains(words)), "{arguments:?}: {text}");
    }
    let (code, help) = output(milepost(&["watch", "--help"])).await;
    assert!(code == 0 && help.contains("3  the job was closed while it was failed"), "{help}");
}

#[tokio::test(flavor = "multi_thread")]
async fn share_prints_a_link_whose_token_shows_the_job_for_the_lifetime_that_was_asked_for() {
    let server = TestServer::start().await;
    let (mut provider, customer) = (server.provider().await, server.customer().await);
    provider.configuration(&[("load", 1)]).await;
    let job = provider.job(&customer).await;
    let address = server.address.to_string();
    let of_job = ["--provider-job-id", &job.provider_job_id, "--server", &address, "--lifetime", "600"];
    for (page, expected) in [
        (&[][..], format!("http://{address}/#/jobs/{}?token=", job.id)),
        (&["--page", "https://jobs.example/"], format!("https://jobs.example/#/jobs/{}?token=", job.id)),
    ] {
        let mut share = milepost(&[&["share"], &of_job[..], page].concat());
        share.env("MILEPOST_API_KEY", &provider.key_secret);
        let (code, link) = output(share).await;
        let secret = link.trim().strip_prefix(&expected).unwrap_or_else(|| panic!("{link}")).to_owned();
        assert_eq!(code, 0, "{link}");
        let mut reader = server.with_secret(&secret);
        let shown = reader
            .jobs
            .get_job(pb::GetJobRequest { job: Some(pb::get_job_request::Job::JobId(job.id.clone())) });
        assert_eq!(shown.await.unwrap().into_inner().job.unwrap().id, job.id);
    }
    let lifetimes =
        "SELECT DISTINCT extract(epoch FROM expires_at - created_at)::int::text AS text FROM watch_tokens";
    assert_eq!(server.database.texts(lifetimes).await, ["600"]);
    let mut share = milepost(&["share", "JOB"]);
    share.env_remove("MILEPOST_API_KEY");
    let (code, text) = output(share).await;
    assert!(code == 2 && text.contains("MILEPOST_API_KEY"), "{text}");
}

/// The demo creates users, so that a variable that is set for other commands is not enough.
#[tokio::test(flavor = "multi_thread")]
async fn the_demo_plays_into_another_database_only_if_a_flag_names_it() {
    let (dir, database) = (TemporaryDir::new(), TestDatabase::migrated().await);
    for (flags, users) in [(&[][..], 0), (&["--database-url", &database.url], 2)] {
        let mut command = milepost(&[&["demo", "--seconds", "0"], flags].concat());
        command
            .env("DATABASE_URL", &database.url)
            .env("MILEPOST_SERVER", "milepost.example:1")
            .env("MILEPOST_DATA_DIR", dir.path())
            .env("MILEPOST_UNSAFE_DATABASE", "true");
        let (code, text) = output(command).await;
        assert_eq!(code, 0, "{text}");
        assert_eq!(database.texts("SELECT id::text AS text FROM users").await.len(), users, "{text}");
        let noted = ["DATABASE_URL is set and not used", "MILEPOST_SERVER is set and not used"];
        assert_eq!(noted.map(|note| text.contains(note)), [users == 0; 2], "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_user_command_creates_a_user_sets_a_password_disables_and_enables_the_user() {
    let mut server = ServerProcess::start().await;
    let dir = server.data_dir();
    let user = |arguments: &[&str], password: Option<&str>| {
        let mut command = milepost(&[&["user"], arguments].concat());
        command.env("MILEPOST_DATA_DIR", &dir);
        if let Some(password) = password {
            let file = dir.join(format!("password-{}", uuid::Uuid::now_v7()));
            std::fs::write(&file, password).unwrap();
            command.arg("--password-file").arg(file);
        }
        output(command)
    };
    let log_in = |password: &'static str| {
        let mut caller = server.anonymous();
        async move {
            let request = milepost_client::pb::LogInRequest {
                email: "OPS@example.com".to_owned(),
                password: password.to_owned(),
            };
            caller.auth.log_in(request).await.is_ok()
        }
    };
    let created = user(&["create", "ops@example.com", "--role", "provider"], Some("first password")).await;
    assert_eq!(created.0, 0, "{}", created.1);
    assert!(log_in("first password").await);
    let again = user(&["create", "Ops@example.com", "--role", "customer"], Some("first password")).await;
    assert_ne!(again.0, 0, "{}", again.1);
    assert_eq!(user(&["set-password", "ops@example.com"], Some("second password")).await.0, 0);
    assert!(!log_in("first password").await);
    assert!(log_in("second password").await);
    assert_eq!(user(&["disable", "ops@example.com"], None).await.0, 0);
    assert!(!log_in("second password").await);
    let (code, text) = user(&["set-password", "ops@example.com"], Some("third password")).await;
    assert!(code == 0 && text.contains("stays disabled") && text.contains("user enable"), "{text}");
    assert!(!log_in("third password").await);
    assert_eq!(user(&["enable", "ops@example.com"], None).await.0, 0);
    assert!(log_in("third password").await);
    let (code, text) = user(&["enable", "ops@example.com"], None).await;
    assert!(code == 0 && text.contains("is not disabled"), "{text}");

    let long = "x".repeat(257);
    for (arguments, password, expected, words) in [
        (
            &["create", "new@example.com", "--role", "customer"][..],
            "short",
            2,
            "the password must have 8 to 71 bytes",
        ),
        (&["set-password", "ops@example.com"], "short", 2, "the password must have 8 to 71 bytes"),
        (
            &["create", "new.example.com", "--role", "customer"],
            "long enough",
            2,
            "the e-mail \"new.example.com\"",
        ),
        (&["create", "new@example.com", "--role", "customer", "--last-name", &long], "long enough", 2, "256"),
        (&["enable", "nobody@example.com"], "", 5, "no such user: \"nobody@example.com\""),
    ] {
        let (code, text) = user(arguments, Some(password).filter(|password| !password.is_empty())).await;
        assert!(code == expected && text.contains(words), "{arguments:?}: {text}");
    }
    server.kill().await;
}

/// E-mails that a server refuses can still be in the table, by a statement of an operator.
#[tokio::test(flavor = "multi_thread")]
async fn the_user_command_prints_no_character_that_commands_the_terminal() {
    let database = TestDatabase::migrated().await;
    let server = TestServer::on(database.clone()).await;
    let user = server.customer().await;
    database
        .execute(&format!(
            "ALTER TABLE users DROP CONSTRAINT users_email_check;
             UPDATE users SET email = E'\\u001B]0;owned\\u0007\\u009B2J\\u202E\\r\\n@example.com' WHERE id = '{}'",
            user.id
        ))
        .await;
    let user_command = |email: &str| {
        let mut command = milepost(&["user", "disable", email]);
        command.env("DATABASE_URL", &database.url).env("MILEPOST_UNSAFE_DATABASE", "true");
        output(command)
    };
    let (code, text) = user_command(&user.email).await;
    assert_eq!(code, 0, "{text:?}");
    let shown = "\u{fffd}]0;owned\u{fffd}\u{fffd}2J\u{fffd}\u{fffd}\u{fffd}@example.com";
    assert_eq!(text, format!("{} {shown} disabled\n", user.id));

    let (code, text) = user_command("\u{1b}[2J\u{202e}\r\n@b").await;
    assert_ne!(code, 0, "{text:?}");
    assert!(
        text.contains("no such user") && !text.trim_end().contains(['\u{1b}', '\u{202e}', '\r', '\n']),
        "{text:?}"
    );
}
