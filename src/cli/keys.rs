//! `milepost keys`: creates, lists and expires API keys.

use std::process::ExitCode;

use clap::{Args, Subcommand};
use milepost_client::pb::{
    ApiKey, ApiKeyScope, CreateApiKeyRequest, ExpireApiKeyRequest, ListApiKeysRequest,
};
use prost_types::Timestamp;

use super::{
    connection::Api,
    output::{Row, short, time},
    values,
};
use crate::error::BoxError;

/// Creates, lists and expires your API keys.
#[derive(Args, Clone, Debug)]
pub(super) struct Keys {
    #[command(subcommand)]
    command: Command,
}

#[derive(Clone, Debug, Subcommand)]
enum Command {
    /// Create an API key and print its secret, which cannot be read again
    Create(Create),
    /// List your API keys, oldest first; those that ended in the last 30 days too
    List(List),
    /// End an API key at once
    Expire(Expire),
}

#[derive(Args, Clone, Debug)]
struct Create {
    /// Remark about the key, by which you recognize it
    #[arg(long, default_value = "", hide_default_value = true)]
    note: String,

    /// What the key may do, separated by commas [default: read, and for a provider append]
    #[arg(long, value_name = "SCOPES", value_delimiter = ',', value_parser = values::enum_value("ApiKeyScope"))]
    scope: Vec<i32>,

    /// When the key expires [default: with the key that this command calls with, otherwise never]
    #[arg(long, value_name = "TIME", value_parser = values::time)]
    expires_at: Option<Timestamp>,

    #[command(flatten)]
    api: Api,
}

#[derive(Args, Clone, Debug)]
struct List {
    /// Most keys to list [default: all]
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
    limit: Option<u32>,

    #[command(flatten)]
    api: Api,
}

#[derive(Args, Clone, Debug)]
struct Expire {
    /// Id of the key
    key: String,

    #[command(flatten)]
    api: Api,
}

impl Keys {
    pub(super) async fn run(self) -> Result<ExitCode, BoxError> {
        match self.command {
            Command::Create(command) => command.run().await?,
            Command::List(command) => command.run().await?,
            Command::Expire(command) => command.run().await?,
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl Create {
    async fn run(self) -> Result<(), BoxError> {
        let Self { note, scope, expires_at, api } = self;
        let request = CreateApiKeyRequest { note, scopes: scope, expires_at };
        let answer = api.connect().await?.auth().create_api_key(request).await?.into_inner();
        api.output.answer(&answer, fields(answer.api_key.as_ref(), answer.secret.clone()))
    }
}

impl List {
    async fn run(&self) -> Result<(), BoxError> {
        let mut auth = self.api.connect().await?.auth();
        let columns = ["ID", "PREFIX", "SCOPES", "CREATED", "LAST USED", "EXPIRES", "REVOKED", "NOTE"];
        let list = self.api.output.list(&columns, row);
        let page = async |page_size, page_token| {
            let page = auth.list_api_keys(ListApiKeysRequest { page_size, page_token }).await?.into_inner();
            Ok((page.api_keys, page.next_page_token))
        };
        list.print_pages(self.limit, page).await
    }
}

impl Expire {
    async fn run(self) -> Result<(), BoxError> {
        let request = ExpireApiKeyRequest { api_key_id: self.key };
        let answer = self.api.connect().await?.auth().expire_api_key(request).await?.into_inner();
        self.api.output.answer(&answer, fields(answer.api_key.as_ref(), String::new()))
    }
}

fn row(key: &ApiKey) -> Row {
    vec![
        key.id.clone(),
        key.key_prefix.clone(),
        scopes(key),
        time(key.created_at),
        time(key.last_used_at),
        time(key.expires_at),
        time(key.revoked_at),
        key.note.clone(),
    ]
}

fn fields(key: Option<&ApiKey>, secret: String) -> Vec<(&'static str, String)> {
    let Some(key) = key else { return Vec::new() };
    vec![
        ("id", key.id.clone()),
        ("secret", secret),
        ("scopes", scopes(key)),
        ("note", key.note.clone()),
        ("created", time(key.created_at)),
        ("expires", time(key.expires_at)),
        ("revoked", time(key.revoked_at)),
    ]
}

fn scopes(key: &ApiKey) -> String {
    let names = key.scopes().map(|scope: ApiKeyScope| short(scope.as_str_name(), "API_KEY_SCOPE_"));
    names.collect::<Vec<_>>().join(",")
}
