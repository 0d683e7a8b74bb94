use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command as StdCommand, Stdio},
    time::Duration,
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use milepost_client::{
    Client, PublishError, Publisher, Refusal, Refused, SpoolError, SpoolSettings,
    pb::{self, append_events_request::Job},
};
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::Command,
    time::timeout,
};
use tonic::Code;

use super::{Told, by_id, client, names, numbers};
use crate::support::{
    Mode, Proxy, TIMEOUT, TemporaryDir, TestServer, User, info, is_root, print_line, until, within_timeout,
};

const MOMENT: Duration = Duration::from_millis(200);
/// An address at which nobody listens.
const NO_SERVER: &str = "http://127.0.0.1:1";

/// A spool's folder, and a server with a provider and a job.
struct Scene {
    dir: TemporaryDir,
    server: TestServer,
    provider: User,
    customer: User,
    job: pb::Job,
}

impl Scene {
    async fn new() -> Self {
        let server = TestServer::start().await;
        let (provider, customer, job) = server.job(&[]).await;
        Self { dir: TemporaryDir::new(), server, provider, customer, job }
    }

    fn url(&self) -> String {
        format!("http://{}", self.server.address)
    }

    fn settings(&self) -> SpoolSettings {
        SpoolSettings::new(self.dir.path())
    }

    async fn publisher(&self, url: &str) -> Publisher {
        let spool = self.settings().open().unwrap();
        client(url, &self.provider).await.publisher().spool(spool).start()
    }

    /// Appends events while there is no server.
    async fn append_offline(&self, names: &[String]) {
        let publisher = self.publisher(NO_SERVER).await;
        for name in names {
            publisher.append(by_id(&self.job), info(name)).await.unwrap();
        }
    }

    /// Sends what the spool has.
    async fn deliver(&self) -> Result<(), PublishError> {
        let publisher = self.publisher(&self.url()).await;
        within_timeout("the spool to be delivered", publisher.close()).await
    }

    async fn log(&mut self) -> Vec<pb::Event> {
        self.provider.list(&self.job).await
    }

    fn segment(&self) -> PathBuf {
        self.dir.path().join(format!("{:020}.spool", 0))
    }

    /// What the folder `rejected` tells, in the order of the records.
    fn rejected(&self) -> Vec<Value> {
        let files = fs::read_dir(self.dir.path().join("rejected")).unwrap();
        let mut files: Vec<PathBuf> = files.map(|file| file.unwrap().path()).collect();
        files.sort();
        files.iter().map(|file| serde_json::from_slice(&fs::read(file).unwrap()).unwrap()).collect()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_and_events_without_a_server_are_delivered_later_once_and_in_order() {
    let mut scene = Scene::new().await;
    let requests = [scene.provider.new_job(&scene.customer), scene.provider.new_job(&scene.customer)];
    let job = |request: &pb::CreateJobRequest| Job::ProviderJobId(request.provider_job_id.clone());
    let publisher = scene.publisher(NO_SERVER).await;
    for request in &requests {
        publisher.create_job(request.clone()).await.unwrap();
    }
    for name in numbers(700) {
        for request in &requests {
            publisher.append(job(request), info(&name)).await.unwrap();
        }
    }
    assert!(timeout(MOMENT, publisher.flush()).await.is_err());
    drop(publisher);

    scene.deliver().await.unwrap();
    // As after a failure of the machine, by which the number was lost.
    fs::remove_file(scene.dir.path().join("delivered")).unwrap();
    scene.deliver().await.unwrap();
    for request in requests {
        let created = scene.provider.jobs.create_job(request).await.unwrap().into_inner();
        assert!(created.existed);
        assert_eq!(names(&scene.provider.list(&created.job.unwrap()).await), numbers(700));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_publisher_of_a_spool_tells_a_requested_cancellation_once() {
    let mut scene = Scene::new().await;
    let request = scene.provider.new_job(&scene.customer);
    let job = Job::ProviderJobId(request.provider_job_id.clone());
    let created = scene.provider.jobs.create_job(request.clone()).await.unwrap().into_inner();
    let cancellation =
        pb::RequestCancellationRequest { job_id: created.job.unwrap().id, reason: String::new() };
    scene.customer.session.jobs.request_cancellation(cancellation).await.unwrap();
    let offline = scene.publisher(NO_SERVER).await;
    offline.create_job(request).await.unwrap();
    drop(offline);

    let told = Told::new();
    for run in 1..=2 {
        let tell = told.clone();
        let publisher = client(&scene.url(), &scene.provider)
            .await
            .publisher()
            .spool(scene.settings().open().unwrap())
            .on_cancellation_requested(move |job, _| tell.push(job.clone()))
            .start();
        within_timeout("the job to be created", publisher.flush()).await.unwrap();
        assert_eq!(told.all(), std::slice::from_ref(&job), "by the answer to the creation, once");
        for name in numbers(2) {
            publisher.append(job.clone(), info(&name)).await.unwrap();
            within_timeout("the event to be stored", publisher.flush()).await.unwrap();
        }
        publisher.close().await.unwrap();
        assert_eq!(told.all(), vec![job.clone(); run]);
    }
}

/// The provider of the next test, which runs it in a process of its own and kills it.
#[tokio::test]
#[ignore = "runs only in another test"]
async fn provider_process() {
    let Ok(run) = env::var("SPOOL_RUN") else { return };
    let variable = |name| env::var(name).unwrap();
    let client = Client::connect_lazy(&variable("SPOOL_SERVER"), None).await.unwrap();
    let client = client.with_credential(&variable("SPOOL_KEY")).unwrap();
    let spool = SpoolSettings::new(variable("SPOOL_DIR")).fsync(run == "3").open().unwrap();
    let publisher = client.publisher().spool(spool).start();
    for n in 0.. {
        let job = Job::JobId(variable("SPOOL_JOB"));
        publisher.append(job, info(&format!("{run}/{n}"))).await.unwrap();
        print_line(format!("appended {n}"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_provider_that_is_killed_loses_no_event_that_was_appended() {
    let mut scene = Scene::new().await;
    let proxy = Proxy::to_server(scene.server.address).await;
    let mut appended = Vec::new();
    for (run, mode) in [Mode::Pass, Mode::Refuse, Mode::Pass, Mode::Refuse].into_iter().enumerate() {
        proxy.set(mode);
        let mut provider = Command::new(env::current_exe().unwrap())
            .args(["clients::spool::provider_process", "--exact", "--ignored", "--nocapture"])
            .env("SPOOL_RUN", run.to_string())
            .env("SPOOL_SERVER", &proxy.url)
            .env("SPOOL_KEY", &scene.provider.key_secret)
            .env("SPOOL_DIR", scene.dir.path())
            .env("SPOOL_JOB", &scene.job.id)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(provider.stdout.take().unwrap()).lines();
        let mut count = 0;
        while count < 300 {
            let line = within_timeout("an append", lines.next_line()).await.unwrap().expect("it runs");
            count += usize::from(line.starts_with("appended"));
        }
        let locked = scene.settings().open();
        assert!(matches!(locked, Err(SpoolError::Locked(_))), "{locked:?}");
        provider.kill().await.unwrap();
        while let Some(line) = lines.next_line().await.unwrap() {
            count += usize::from(line.starts_with("appended"));
        }
        appended.push(count);
    }
    scene.deliver().await.unwrap();
    let log = scene.log().await;
    let mut rest = &names(&log)[..];
    for (run, appended) in appended.into_iter().enumerate() {
        let prefix = format!("{run}/");
        let (of_run, later) = rest.split_at(rest.iter().take_while(|name| name.starts_with(&prefix)).count());
        let expected: Vec<String> = (0..of_run.len()).map(|n| format!("{prefix}{n}")).collect();
        assert_eq!(of_run, expected);
        assert!(of_run.len() >= appended, "{appended} were appended, and {} are stored", of_run.len());
        rest = later;
    }
    assert!(rest.is_empty(), "{rest:?}");
    assert_eq!(scene.rejected(), Vec::<Value>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_server_refuses_is_kept_and_told_and_later_records_go_on() {
    let mut scene = Scene::new().await;
    let mut names_with_wrong = numbers(5);
    names_with_wrong.insert(2, "\"wrong\"\n".repeat(50));
    scene.append_offline(&names_with_wrong).await;
    let refused = Told::<Refusal>::new();
    let told = refused.clone();
    let spool = scene.settings().open().unwrap();
    let publisher = client(&scene.url(), &scene.provider)
        .await
        .publisher()
        .spool(spool)
        .on_refused(move |refusal| told.push(refusal.clone()))
        .start();
    within_timeout("the spool to be delivered", publisher.close()).await.unwrap();
    assert_eq!(names(&scene.log().await), numbers(5));
    let [Refusal { refused: Refused::Event { job, event }, error }] = &refused.all()[..] else {
        panic!("{:?}", refused.all())
    };
    assert_eq!((job, error.reason()), (&by_id(&scene.job), Some("FIELD_INVALID")));

    let rejected = scene.rejected();
    assert_eq!(rejected.len(), 1);
    let file = &rejected[0];
    assert_eq!((&file["code"], &file["reason"]), (&"INVALID_ARGUMENT".into(), &"FIELD_INVALID".into()));
    assert_eq!((&file["message"], &file["kind"]), (&error.message().into(), &"AppendEventsRequest".into()));
    assert_eq!(file["details"][0]["field"], "events[0].name");
    let request = BASE64_STANDARD.decode(file["request"].as_str().unwrap()).unwrap();
    let request: pb::AppendEventsRequest = prost::Message::decode(&request[..]).unwrap();
    assert_eq!(request.events, std::slice::from_ref(event));
    // It is not sent again.
    scene.deliver().await.unwrap();
    assert_eq!(scene.rejected().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_record_is_rejected_and_a_torn_one_is_cut() {
    let mut scene = Scene::new().await;
    scene.append_offline(&numbers(1)).await;
    let first = fs::read(scene.segment()).unwrap().len();
    scene.append_offline(&["damaged".to_owned()]).await;
    let second = fs::read(scene.segment()).unwrap().len();
    scene.append_offline(&["later".to_owned()]).await;
    let mut bytes = fs::read(scene.segment()).unwrap();
    bytes[second - 3] ^= 1;
    // The beginning of another record.
    bytes.extend_from_within(..first - 1);
    fs::write(scene.segment(), &bytes).unwrap();

    let delivered = scene.deliver().await;
    let Err(PublishError::Refused(refusal)) = delivered else { panic!("{delivered:?}") };
    assert_eq!(refusal.refused, Refused::Damaged(bytes[first..second].to_vec()));
    assert_eq!(refusal.error.code(), Code::DataLoss);
    assert_eq!(names(&scene.log().await), ["0", "later"]);
    let rejected = scene.rejected();
    assert_eq!(rejected.len(), 1);
    assert_eq!((&rejected[0]["code"], &rejected[0]["kind"]), (&"DATA_LOSS".into(), &"damaged".into()));
    assert_eq!(rejected[0]["request"], BASE64_STANDARD.encode(&bytes[first..second]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_part_of_a_spool_is_rejected() {
    let mut scene = Scene::new().await;
    scene.append_offline(&["0".to_owned(), "later".to_owned()]).await;
    let bytes = fs::read(scene.segment()).unwrap();
    let first = 8 + usize::try_from(u32::from_le_bytes(*bytes.first_chunk().unwrap())).unwrap();
    fs::write(scene.segment(), &bytes[..first]).unwrap();
    fs::write(scene.dir.path().join(format!("{:020}.spool", first + 100)), &bytes[first..]).unwrap();

    let delivered = scene.deliver().await;
    assert!(matches!(delivered, Err(PublishError::Refused(_))), "{delivered:?}");
    assert_eq!(names(&scene.log().await), ["0", "later"]);
    let message = format!("the bytes {first} to {} of the spool are missing", first + 100);
    let rejected = scene.rejected();
    assert_eq!((rejected.len(), &rejected[0]["message"]), (1, &message.into()));
    assert_eq!(delivered_offset(scene.dir.path()), bytes.len() + 100);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ended_key_does_not_stop_a_publisher_with_a_spool() {
    let mut scene = Scene::new().await;
    let interruptions = Told::new();
    let told = interruptions.clone();
    let wrong = client(&scene.url(), &scene.provider).await.with_credential("mpk_wrong").unwrap();
    let publisher = wrong
        .publisher()
        .spool(scene.settings().open().unwrap())
        .on_interruption(move |error, pause| told.push((error.code(), pause)))
        .start();
    publisher.append(by_id(&scene.job), info("0")).await.unwrap();
    until(TIMEOUT, "three attempts", async || interruptions.all().len() >= 3).await;
    publisher.append(by_id(&scene.job), info("1")).await.unwrap();
    drop(publisher);
    let (codes, pauses): (Vec<Code>, Vec<Duration>) = interruptions.all().into_iter().unzip();
    assert!(codes.iter().all(|code| *code == Code::Unauthenticated), "{codes:?}");
    assert!(pauses[2] >= Duration::from_millis(200), "{pauses:?}");
    scene.deliver().await.unwrap();
    assert_eq!(names(&scene.log().await), numbers(2));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_spool_refuses_more_until_something_is_delivered() {
    let mut scene = Scene::new().await;
    let proxy = Proxy::to_server(scene.server.address).await;
    proxy.set(Mode::Refuse);
    let spool = scene.settings().max_bytes(500).open().unwrap();
    let publisher = client(&proxy.url, &scene.provider).await.publisher().spool(spool).start();
    let mut appended = Vec::new();
    let full = loop {
        let name = appended.len().to_string();
        match publisher.append(by_id(&scene.job), info(&name)).await {
            Ok(()) if appended.len() < 100 => appended.push(name),
            Ok(()) => panic!("the spool is never full"),
            Err(error) => break error,
        }
    };
    let expected = matches!(full, PublishError::Spool(SpoolError::Full { max_bytes: 500, .. }));
    assert!(expected && !appended.is_empty(), "{full:?} after {appended:?}");
    proxy.set(Mode::Pass);
    within_timeout("the spool to be delivered", publisher.flush()).await.unwrap();
    append_when_possible(&publisher, &scene.job, "later").await;
    within_timeout("the spool to be delivered", publisher.close()).await.unwrap();
    appended.push("later".to_owned());
    assert_eq!(names(&scene.log().await), appended);
}

/// Appends an event once the spool takes it.
async fn append_when_possible(publisher: &Publisher, job: &pb::Job, name: &str) {
    until(TIMEOUT, "an append", async || publisher.append(by_id(job), info(name)).await.is_ok()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_refuses_more_until_there_is_space() {
    if !is_root() {
        print_line("skipped: only root can mount a small disk");
        return;
    }
    let mut scene = Scene::new().await;
    let succeeds = |mut command: StdCommand| assert!(command.status().unwrap().success(), "{command:?}");
    let mut mount = StdCommand::new("mount");
    mount.args(["-t", "tmpfs", "-o", "size=64k", "tmpfs"]).arg(scene.dir.path());
    succeeds(mount);
    let publisher = scene.publisher(NO_SERVER).await;
    let ballast = scene.dir.path().join("ballast");
    fs::write(&ballast, [0; 24 * 1024]).unwrap();
    let large = |n: usize| format!("{n:0>200}");
    let mut appended = 0;
    let full = loop {
        match publisher.append(by_id(&scene.job), info(&large(appended))).await {
            Ok(()) if appended < 1000 => appended += 1,
            Ok(()) => panic!("the disk is never full"),
            Err(error) => break error,
        }
    };
    let PublishError::Spool(SpoolError::Files { error, .. }) = full else { panic!("{full:?}") };
    assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
    fs::remove_file(&ballast).unwrap();
    publisher.append(by_id(&scene.job), info(&large(appended))).await.unwrap();
    drop(publisher);
    scene.deliver().await.unwrap();
    let expected: Vec<String> = (0..=appended).map(large).collect();
    assert_eq!(names(&scene.log().await), expected);
    assert_eq!(scene.rejected(), Vec::<Value>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_of_a_spool_do_not_wait_for_each_other() {
    let mut scene = Scene::new().await;
    let blocked = scene.provider.job(&scene.customer).await;
    let locker = scene.server.database.lock_job(&blocked).await;
    let publisher = scene.publisher(&scene.url()).await;
    publisher.append(by_id(&blocked), info("blocked")).await.unwrap();
    scene.server.database.wait_for_locks(1).await;
    // More than two segments' worth is read, while what is delivered stands still.
    for name in numbers(3000) {
        publisher.append(by_id(&scene.job), info(&name)).await.unwrap();
    }
    let job = scene.job.clone();
    let all = async || scene.provider.clone().get(&job).await.last_sequence == 3000;
    until(TIMEOUT, "the events of the other job", all).await;
    assert_eq!(delivered_offset(scene.dir.path()), 0);
    drop(locker);
    within_timeout("the spool to be delivered", publisher.close()).await.unwrap();
    assert_eq!(delivered_offset(scene.dir.path()), fs::read(scene.segment()).unwrap().len());
    assert_eq!(names(&scene.provider.list(&blocked).await), ["blocked"]);
    assert_eq!(names(&scene.log().await), numbers(3000));
}

fn delivered_offset(dir: &Path) -> usize {
    fs::read_to_string(dir.join("delivered")).map_or(0, |text| text.parse().unwrap())
}
