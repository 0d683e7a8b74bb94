//! What belongs to somebody else is answered as what does not exist, and in as many steps:
//! neither the answer nor its time reveals that it exists.

use milepost_client::pb;
use prost::Message;
use tonic::Code;
use uuid::Uuid;

use crate::support::{TestDatabase, TestServer, User, raw, registration, within_timeout};

/// The statements that look for what a request names. Those of the server's own tasks, which
/// run at any time, have other texts.
const LOOK_UPS: [&str; 7] = [
    "\"jobs\".\"provider_id\"",
    "\"job_configurations\"",
    "\"users\".\"role\" =",
    "\"users\".\"customer_code\" =",
    "UPDATE \"api_keys\"",
    "\"api_keys\".\"id\" =",
    "\"watch_tokens\".\"id\" =",
];

struct World {
    database: TestDatabase,
    server: TestServer,
    owner: User,
    job: pb::Job,
    configuration_id: String,
}

impl World {
    async fn new() -> Self {
        let database = TestDatabase::migrated().await;
        let first = TestServer::on(database.clone()).await;
        let (mut owner, customer) = (first.provider().await, first.customer().await);
        let configuration_id = owner.configuration(&[("load", 1)]).await.id;
        let job = owner.job(&customer).await;
        database.log_plans().await;
        // Plans are logged on new connections only, such as those of a new server.
        let server = first.replica().await;
        Self { database, owner: server.same(&owner), server, job, configuration_id }
    }

    /// Calls a method and returns its code.
    async fn call(&self, secret: &str, method: &str, message: Vec<u8>) -> Code {
        let answer = raw::open(self.server.channel.clone(), Some(secret), method, [message]).await;
        let mut answers = match answer {
            Ok(answers) => answers,
            Err(status) => return status.code(),
        };
        match within_timeout("an answer", answers.message()).await {
            Err(status) => status.code(),
            Ok(answer) if method.ends_with("/PublishEvents") => refusal(&answer.unwrap()),
            Ok(_) => Code::Ok,
        }
    }

    /// Asserts that all calls have this code, after the same statements.
    async fn assert_alike(&self, secret: &str, method: &str, code: Code, messages: Vec<(&str, Vec<u8>)>) {
        let mut read = self.database.plans().await.len();
        let mut first: Option<Vec<String>> = None;
        for (what, message) in messages {
            assert_eq!(self.call(secret, method, message).await, code, "{method} of {what}");
            let plans = self.database.plans().await;
            let texts = plans[read..].iter().map(|plan| plan["Query Text"].as_str().unwrap().to_owned());
            let statements: Vec<String> =
                texts.filter(|text| LOOK_UPS.iter().any(|part| text.contains(part))).collect();
            assert!(!statements.is_empty(), "{method} of {what} looked for nothing");
            assert_eq!(*first.get_or_insert_with(|| statements.clone()), statements, "{method} of {what}");
            read = plans.len();
        }
    }
}

fn refusal(answer: &[u8]) -> Code {
    let answer = pb::PublishEventsResponse::decode(answer).unwrap();
    match answer.outcome {
        Some(pb::publish_events_response::Outcome::Refused(refused)) => Code::from_i32(refused.code),
        outcome => panic!("{outcome:?}"),
    }
}

type Named = fn(String) -> Vec<u8>;

/// The methods that name a job, for viewers and for providers.
const OF_VIEWERS: [(&str, Named); 3] = [
    ("JobService/GetJob", |id| {
        pb::GetJobRequest { job: Some(pb::get_job_request::Job::JobId(id)) }.encode_to_vec()
    }),
    ("EventService/ListEvents", |id| {
        let job = Some(pb::list_events_request::Job::JobId(id));
        pb::ListEventsRequest { job, ..Default::default() }.encode_to_vec()
    }),
    ("EventService/WatchEvents", |id| {
        let scope = Some(pb::watch_events_request::Scope::JobId(id));
        pb::WatchEventsRequest { scope, ..Default::default() }.encode_to_vec()
    }),
];
const OF_PROVIDERS: [(&str, Named); 6] = [
    ("EventService/AppendEvents", |id| {
        let job = Some(pb::append_events_request::Job::JobId(id));
        let events = vec![crate::support::info("an event")];
        pb::AppendEventsRequest { job, events, ..Default::default() }.encode_to_vec()
    }),
    ("EventService/PublishEvents", |id| {
        let job = Some(pb::publish_events_request::Job::JobId(id));
        let events = vec![crate::support::info("an event")];
        pb::PublishEventsRequest { batch_id: "1".to_owned(), job, events, ..Default::default() }
            .encode_to_vec()
    }),
    ("JobService/CloseJob", |id| {
        let job = Some(pb::close_job_request::Job::JobId(id));
        pb::CloseJobRequest { job, ..Default::default() }.encode_to_vec()
    }),
    ("JobService/HoldJob", |id| {
        let job = Some(pb::hold_job_request::Job::JobId(id));
        pb::HoldJobRequest { job, held: true }.encode_to_vec()
    }),
    ("AuthService/CreateWatchToken", |id| {
        let job = Some(pb::create_watch_token_request::Job::JobId(id));
        pb::CreateWatchTokenRequest { job, ..Default::default() }.encode_to_vec()
    }),
    ("AuthService/ListWatchTokens", |id| {
        let job = Some(pb::list_watch_tokens_request::Job::JobId(id));
        pb::ListWatchTokensRequest { job, ..Default::default() }.encode_to_vec()
    }),
];

/// A session of the user, which the server remembers.
async fn session(server: &TestServer, user: &User) -> String {
    let secret = server.log_in(user).await;
    remember(server, &secret).await;
    secret
}

/// Lets the server look the secret up, which it then remembers.
async fn remember(server: &TestServer, secret: &str) {
    server.with_secret(secret).current_user().await.unwrap();
}

fn unknown() -> String {
    Uuid::now_v7().to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_of_somebody_else_is_looked_for_as_one_that_does_not_exist() {
    let mut world = World::new().await;
    let (mut provider, customer) = (world.server.provider().await, world.server.customer().await);
    provider.configuration(&[("load", 1)]).await;
    let own_job = provider.job(&customer).await;
    let (_, token) = provider.create_watch_token(&own_job).await;
    let providers = OF_VIEWERS.iter().chain(&OF_PROVIDERS).map(|method| (&provider.key_secret, method));
    let customers = OF_VIEWERS.iter().map(|method| (&customer.key_secret, method));
    let tokens = OF_VIEWERS.iter().map(|method| (&token, method));
    let cases: Vec<_> = providers.chain(customers).chain(tokens).collect();
    for remembered in [false, true] {
        if remembered {
            let mut watch = world.owner.watch(&world.job).await;
            watch.caught_up().await;
        }
        for (secret, (method, named)) in &cases {
            remember(&world.server, secret).await;
            let messages = vec![
                ("an unknown job", named(unknown())),
                ("a job of somebody else", named(world.job.id.clone())),
                ("the same job again", named(world.job.id.clone())),
            ];
            world.assert_alike(secret, method, Code::NotFound, messages).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn configurations_credentials_and_customers_of_others_are_looked_for_as_unknown_ones() {
    let mut world = World::new().await;
    let (mut provider, customer) = (world.server.provider().await, world.server.customer().await);
    provider.configuration(&[("load", 1)]).await;
    let session = session(&world.server, &provider).await;
    let owners_session = world.server.with_secret(self::session(&world.server, &world.owner).await);

    let named = |id: String| {
        let key = Some(pb::get_job_configuration_request::Key::Id(id));
        pb::GetJobConfigurationRequest { key, ..Default::default() }.encode_to_vec()
    };
    for secret in [&provider.key_secret, &customer.key_secret] {
        remember(&world.server, secret).await;
        let foreign = ("one of somebody else", named(world.configuration_id.clone()));
        let messages = vec![("an unknown one", named(unknown())), foreign];
        world
            .assert_alike(secret, "ConfigurationService/GetJobConfiguration", Code::NotFound, messages)
            .await;
    }

    let (token_id, _) = world.owner.create_watch_token(&world.job).await;
    let named = |watch_token_id| pb::ExpireWatchTokenRequest { watch_token_id }.encode_to_vec();
    let messages = vec![("an unknown one", named(unknown())), ("one of somebody else", named(token_id))];
    world.assert_alike(&provider.key_secret, "AuthService/ExpireWatchToken", Code::NotFound, messages).await;

    let mut auth = owners_session.auth;
    let keys = auth.list_api_keys(pb::ListApiKeysRequest::default()).await.unwrap();
    let key_id = keys.into_inner().api_keys.remove(0).id;
    let expire = |api_key_id| pb::ExpireApiKeyRequest { api_key_id }.encode_to_vec();
    let rotate = |api_key_id| pb::RotateApiKeyRequest { api_key_id, overlap: None }.encode_to_vec();
    for (method, named) in
        [("AuthService/ExpireApiKey", &expire as &dyn Fn(_) -> _), ("AuthService/RotateApiKey", &rotate)]
    {
        let foreign = ("one of somebody else", named(key_id.clone()));
        let messages = vec![("an unknown one", named(unknown())), foreign];
        world.assert_alike(&session, method, Code::NotFound, messages).await;
    }

    let disabled = world.server.customer().await;
    let code_of_disabled = disabled.customer_code().await;
    world
        .database
        .execute(&format!("UPDATE users SET disabled_at = now() WHERE id = '{}'", disabled.id))
        .await;
    let named = |customer_id| {
        let request = provider.new_job(&customer);
        let customer = Some(pb::create_job_request::Customer::CustomerId(customer_id));
        pb::CreateJobRequest { customer, ..request }.encode_to_vec()
    };
    let messages = vec![
        ("an unknown customer", named(unknown())),
        ("a provider", named(world.owner.id.clone())),
        ("a disabled customer", named(disabled.id)),
    ];
    world.assert_alike(&provider.key_secret, "JobService/CreateJob", Code::NotFound, messages).await;
    let coded = |code: &str| provider.new_job_by_code(&customer, code).encode_to_vec();
    let messages = vec![
        ("an unknown code", coded("0000000000")),
        ("the code of a disabled customer", coded(&code_of_disabled)),
    ];
    world.assert_alike(&provider.key_secret, "JobService/CreateJob", Code::NotFound, messages).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_filter_by_a_configuration_tag_of_somebody_else_is_looked_for_as_an_unknown_one() {
    let mut world = World::new().await;
    let mut provider = world.server.provider().await;
    provider.configuration(&[]).await;
    remember(&world.server, &provider.key_secret).await;
    let of_owner = pb::RegisterJobConfigurationRequest { tag: unknown(), ..registration("1.0.0", &[]) };
    let foreign = world.owner.register(of_owner).await.tag;
    let methods: [(&str, Named); 3] = [
        ("ConfigurationService/ListJobConfigurations", |tag| {
            pb::ListJobConfigurationsRequest { tag, ..Default::default() }.encode_to_vec()
        }),
        ("JobService/ListJobs", |configuration_tag| {
            let filter = Some(pb::JobFilter { configuration_tag, ..Default::default() });
            pb::ListJobsRequest { filter, ..Default::default() }.encode_to_vec()
        }),
        ("EventService/WatchEvents", |configuration_tag| {
            let all = pb::AllJobs { configuration_tag, ..Default::default() };
            let scope = Some(pb::watch_events_request::Scope::AllJobs(all));
            pb::WatchEventsRequest { scope, ..Default::default() }.encode_to_vec()
        }),
    ];
    for (method, named) in methods {
        let foreign = ("a tag of somebody else", named(foreign.clone()));
        let messages = vec![("an unknown tag", named(unknown())), foreign];
        world.assert_alike(&provider.key_secret, method, Code::NotFound, messages).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_by_an_unknown_counterpart_is_read_as_one_by_a_stranger() {
    let world = World::new().await;
    let provider = world.server.provider().await;
    let by = |counterpart_id| {
        let filter = Some(pb::JobFilter { counterpart_id, ..Default::default() });
        pb::ListJobsRequest { filter, ..Default::default() }.encode_to_vec()
    };
    remember(&world.server, &provider.key_secret).await;
    let stranger = world.job.customer.clone().unwrap().id;
    let messages = vec![("an unknown user", by(unknown())), ("a stranger", by(stranger))];
    world.assert_alike(&provider.key_secret, "JobService/ListJobs", Code::Ok, messages).await;
}
