//! Each setting takes effect.

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener},
    time::Duration,
};

use futures_util::future::join_all;
use milepost_client::pb::{self, ErrorReason, NewEvent, publish_events_request::Job};
use prost_types::{Value, value::Kind};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::mpsc,
    time::timeout,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Status, Streaming};

use crate::support::{
    Clients, PASSWORD, ServerProcess, TestServer, User, assert_refused, complete, http, info, own_address,
    with_metadata, within_timeout,
};

/// `configured` has settings other than the defaults. `server` shares its database and
/// prepares the users and the job.
struct Fixture {
    server: TestServer,
    configured: ServerProcess,
    metrics: SocketAddr,
    collector: TcpListener,
    /// Both users call `configured`.
    provider: User,
    customer: User,
    job: pb::Job,
}

impl Fixture {
    async fn start() -> Self {
        let server = TestServer::start().await;
        let (provider, customer, job) = server.job(&[]).await;
        let metrics = own_address("127.0.0.1");
        let collector = TcpListener::bind("127.0.0.1:0").unwrap();
        let (metrics_listen, otlp_endpoint) =
            (metrics.to_string(), format!("http://{}", collector.local_addr().unwrap()));
        let configured = ServerProcess::on_with(
            &server.database,
            &[
                ("MILEPOST_DATABASE_CONNECTIONS", "4"),
                ("MILEPOST_DATABASE_CONNECT_TIMEOUT_S", "1"),
                ("MILEPOST_REQUEST_TIMEOUT_S", "2"),
                ("MILEPOST_STATEMENT_TIMEOUT_S", "4"),
                ("MILEPOST_SYNCHRONOUS_COMMIT", "remote_apply"),
                ("MILEPOST_SIGN_UP", "closed"),
                ("MILEPOST_SESSION_LIFETIME_S", "77"),
                ("MILEPOST_BCRYPT_COST", "5"),
                ("MILEPOST_TRUSTED_PROXY", "127.0.0.8,127.0.0.9"),
                ("MILEPOST_ALLOW_ORIGIN", "https://one.example,https://two.example"),
                ("MILEPOST_FRAME_ANCESTORS", "https://portal.example,https://two.example"),
                ("MILEPOST_STREAMS_PER_CONNECTION", "7"),
                ("MILEPOST_STREAMS_PER_USER", "2"),
                ("MILEPOST_PUBLISH_WINDOW", "2"),
                ("MILEPOST_RETENTION_S", "1"),
                ("MILEPOST_DRAIN_DEADLINE_S", "1"),
                ("MILEPOST_CONFIGURATIONS_PER_USER", "21"),
                ("MILEPOST_OPEN_JOBS_PER_USER", "22"),
                ("MILEPOST_API_KEYS_PER_USER", "23"),
                ("MILEPOST_SESSIONS_PER_USER", "24"),
                ("MILEPOST_WATCH_TOKENS_PER_USER", "25"),
                ("MILEPOST_STORED_MIB_PER_USER", "26"),
                ("MILEPOST_EVENTS_PER_USER_DAY", "27000"),
                ("MILEPOST_METRICS_LISTEN", &metrics_listen),
                ("MILEPOST_OTLP_ENDPOINT", &otlp_endpoint),
                ("MILEPOST_LOG_FORMAT", "text"),
                ("MILEPOST_LOG_LEVEL", "warn"),
            ],
        )
        .await;
        let (provider, customer) = (configured.same(&provider), configured.same(&customer));
        Self { server, configured, metrics, collector, provider, customer, job }
    }

    async fn texts(&self, sql: &str) -> Vec<String> {
        self.server.database.texts(sql).await
    }

    /// Both ends of a publish stream over a connection of its own.
    async fn publish(
        &self,
    ) -> (mpsc::Sender<pb::PublishEventsRequest>, Streaming<pb::PublishEventsResponse>) {
        let (batches, stream) = mpsc::channel(1);
        let mut provider = self.configured.other_clients().same(&self.provider);
        let answers = provider.events.publish_events(ReceiverStream::new(stream)).await.unwrap();
        (batches, answers.into_inner())
    }

    fn batch(&self, events: impl IntoIterator<Item = NewEvent>) -> pb::PublishEventsRequest {
        pb::PublishEventsRequest {
            batch_id: "a batch".to_owned(),
            job: Some(Job::JobId(self.job.id.clone())),
            expected_sequence: None,
            events: events.into_iter().collect(),
        }
    }

    async fn sign_up(&self) {
        let request = pb::SignUpRequest {
            role: pb::UserRole::Customer.into(),
            email: "new@example.com".to_owned(),
            password: PASSWORD.to_owned(),
            ..Default::default()
        };
        let answer = self.configured.anonymous().auth.sign_up(request).await;
        assert_refused(answer, Code::PermissionDenied, ErrorReason::SignUpClosed);
    }

    /// Session lifetime, bcrypt cost and trusted proxies. Also the settings of a database
    /// connection, which a trigger records.
    async fn log_in(&self) {
        self.server
            .database
            .execute(
                "CREATE TABLE recorded (setting text);
                 CREATE FUNCTION record_settings() RETURNS trigger LANGUAGE plpgsql AS $$
                 BEGIN
                     INSERT INTO recorded SELECT name || ' ' || current_setting(name) FROM unnest(ARRAY[
                         'statement_timeout', 'lock_timeout', 'idle_in_transaction_session_timeout',
                         'synchronous_commit']) AS name;
                     RETURN NEW;
                 END $$;
                 CREATE TRIGGER record_settings BEFORE INSERT ON sessions
                     FOR EACH ROW EXECUTE FUNCTION record_settings()",
            )
            .await;
        let credentials =
            pb::LogInRequest { email: self.customer.email.clone(), password: PASSWORD.to_owned() };
        let mut request = Request::new(credentials);
        request.metadata_mut().insert("x-forwarded-for", "10.1.2.3".parse().unwrap());
        let proxy = self.configured.from(Ipv4Addr::new(127, 0, 0, 8));
        proxy.anonymous().auth.log_in(request).await.unwrap();

        let recorded = self.texts("SELECT setting AS text FROM recorded ORDER BY setting").await;
        let expected = [
            "idle_in_transaction_session_timeout 4s",
            "lock_timeout 4s",
            "statement_timeout 4s",
            "synchronous_commit remote_apply",
        ];
        assert_eq!(recorded, expected);
        let lifetime = "SELECT extract(epoch FROM expires_at - created_at)::integer::text AS text
            FROM sessions ORDER BY created_at DESC LIMIT 1";
        assert_eq!(self.texts(lifetime).await, ["77"]);
        let hash =
            format!("SELECT left(password_hash, 7) AS text FROM users WHERE id = '{}'", self.customer.id);
        assert_eq!(self.texts(&hash).await, ["$2b$05$"]);
        let address = "SELECT host(client_address) AS text FROM audit_entries
            ORDER BY created_at DESC LIMIT 1";
        assert_eq!(self.texts(address).await, ["10.1.2.3"]);
    }

    async fn origins(&self) {
        for (origin, status) in
            [("https://one.example", "204"), ("https://two.example", "204"), ("null", "403")]
        {
            let mut stream = TcpStream::connect(self.configured.address).await.unwrap();
            let request = format!(
                "OPTIONS / HTTP/1.1\r\nhost: x\r\norigin: {origin}\r\nconnection: close\r\n\
                 access-control-request-method: POST\r\n\r\n"
            );
            stream.write_all(request.as_bytes()).await.unwrap();
            let mut answer = String::new();
            within_timeout("an answer", stream.read_to_string(&mut answer)).await.unwrap();
            assert_eq!(answer.split(' ').nth(1), Some(status), "{origin}: {answer}");
        }
        let (head, _) = http(self.configured.address, "GET /", "").await.unwrap();
        assert!(head.contains("; frame-ancestors https://portal.example https://two.example\r\n"), "{head}");
        let (head, _) = http(self.server.address, "GET /", "").await.unwrap();
        assert!(head.contains("; frame-ancestors 'none'\r\n"), "{head}");
    }

    async fn quotas(&self) {
        let usage = self.customer.clone().auth.get_usage(pb::GetUsageRequest {}).await.unwrap().into_inner();
        let quotas = [
            usage.configurations,
            usage.open_jobs,
            usage.api_keys,
            usage.sessions,
            usage.watch_tokens,
            usage.stored_bytes,
            usage.events_per_day,
        ];
        assert_eq!(quotas.map(|quota| quota.unwrap().limit), [21, 22, 23, 24, 25, 26 << 20, 27_000]);
    }

    async fn streams(&self) {
        let stream = TcpStream::connect(self.configured.address).await.unwrap();
        let (client, connection) = h2::client::handshake(stream).await.unwrap();
        tokio::spawn(connection);
        within_timeout("SETTINGS_MAX_CONCURRENT_STREAMS of 7", async {
            while client.current_max_send_streams() != 7 {
                tokio::task::yield_now().await;
            }
        })
        .await;
        let mut customer = self.customer.clone();
        let _two = (customer.watch(&self.job).await, customer.watch(&self.job).await);
        let scope = Some(pb::watch_events_request::Scope::JobId(self.job.id.clone()));
        let third = customer.watch_by(pb::WatchEventsRequest { scope, ..Default::default() }).await;
        assert_refused(third, Code::ResourceExhausted, ErrorReason::Overloaded);
    }

    /// The number of database connections, the timeout of a checkout and the request
    /// timeout.
    async fn waits(&self) {
        let list = async || {
            let mut configurations = self.provider.configurations.clone();
            configurations.list_job_configurations(pb::ListJobConfigurationsRequest::default()).await
        };
        // The credential is cached from here on, so that each call checks out one connection.
        list().await.unwrap();
        let locker = self.server.database.lock("job_configurations").await;
        let answers = within_timeout("refusals", join_all((0..6).map(|_| list()))).await;
        drop(locker);
        let (late, refused): (Vec<_>, Vec<_>) = answers
            .into_iter()
            .partition(|answer| answer.as_ref().is_err_and(|status| status.code() == Code::DeadlineExceeded));
        // Of four connections one user has two.
        assert_eq!((late.len(), refused.len()), (2, 4), "{late:?} {refused:?}");
        for answer in refused {
            assert_refused(answer, Code::ResourceExhausted, ErrorReason::Overloaded);
        }
    }

    async fn publish_window(&self) {
        const MOST: usize = 16;
        let locker = self.server.database.lock_job(&self.job).await;
        let (batches, _answers) = self.publish().await;
        let text = Value { kind: Some(Kind::StringValue("x".repeat(15_000))) };
        let mut sent = 0;
        while sent < MOST {
            // 900 KB, so that the buffers of the connection take one or two batches.
            let events = (0..60).map(|_| with_metadata(info("large"), [("text", text.clone())]));
            let sending = batches.send(self.batch(events));
            if timeout(Duration::from_secs(1), sending).await.is_err() {
                break;
            }
            sent += 1;
        }
        assert!((2..MOST / 2).contains(&sent), "{sent} batches were read");
        drop(locker);
    }

    async fn retention(&self) {
        let mut provider = self.provider.clone();
        let job = provider.job(&self.customer).await;
        provider.append(&job, [complete()]).await;
        let kept = format!("SELECT id::text AS text FROM events WHERE job_id = '{}'", job.id);
        within_timeout("the events to be removed", async {
            while !self.texts(&kept).await.is_empty() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
    }

    async fn monitoring(&self) {
        let (_, samples) = http(self.metrics, "GET /metrics", "").await.unwrap();
        assert!(samples.contains("\nmilepost_database_connections_max 4\n"), "{samples}");

        self.collector.set_nonblocking(true).unwrap();
        let collector = tokio::net::TcpListener::from_std(self.collector.try_clone().unwrap()).unwrap();
        within_timeout("traces", collector.accept()).await.unwrap();
    }

    /// The drain ends at its deadline although an append is in flight for longer. The
    /// log has the format and the level that are set.
    async fn drain(mut self) {
        let _locker = self.server.database.lock_job(&self.job).await;
        let (batches, _answers) = self.publish().await;
        batches.send(self.batch([info("in flight")])).await.unwrap();
        self.server.database.wait_for_locks(1).await;
        self.configured.terminate();
        assert_eq!(self.configured.exit().await.code(), Some(0));
        let log = self.configured.log();
        assert!(log.contains("WARN") && log.contains("deadline passed"), "{log}");
        assert!(!log.contains("INFO") && !log.starts_with('{'), "{log}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bcrypt_parallel_bounds_how_many_passwords_are_hashed_at_once() {
    let server = TestServer::start().await;
    let (slow, quick) = (server.customer().await, server.customer().await);
    // At cost 20, to verify the password takes minutes.
    let cost = format!(
        "UPDATE users SET password_hash = overlay(password_hash PLACING '20' FROM 5) WHERE id = '{}'",
        slow.id
    );
    server.database.execute(&cost).await;
    let start = async |parallel: &str, busy: usize| {
        let configured =
            ServerProcess::on_with(&server.database, &[("MILEPOST_BCRYPT_PARALLEL", parallel)]).await;
        for _ in 0..busy {
            tokio::spawn(log_in(&configured, &slow));
        }
        configured
    };

    let configured = start("1", 1).await;
    let refused = within_timeout("a refusal", async {
        loop {
            if let Err(status) = log_in(&configured, &quick).await {
                break Err::<(), _>(status);
            }
        }
    });
    assert_refused(refused.await, Code::ResourceExhausted, ErrorReason::Overloaded);

    drop(configured);

    // The default is not both 1 and 3, so that one of the two values differs from it.
    let configured = start("3", 2).await;
    for _ in 0..100 {
        log_in(&configured, &quick).await.expect("one of three hashes at once is free");
    }
}

fn log_in(clients: &Clients, user: &User) -> impl Future<Output = Result<(), Status>> + use<> {
    let request = pb::LogInRequest { email: user.email.clone(), password: PASSWORD.to_owned() };
    let mut caller = clients.anonymous();
    async move { caller.auth.log_in(request).await.map(drop) }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_setting_takes_effect() {
    let fixture = Fixture::start().await;
    fixture.sign_up().await;
    fixture.log_in().await;
    fixture.origins().await;
    fixture.quotas().await;
    fixture.streams().await;
    fixture.waits().await;
    fixture.publish_window().await;
    fixture.retention().await;
    fixture.monitoring().await;
    fixture.drain().await;
}
