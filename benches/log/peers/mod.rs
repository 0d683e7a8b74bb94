//! The systems with which milepost is compared: how they are built, started and called.
//! Each has a client here that does only what the rows need.

pub(crate) mod durable_streams;
pub(crate) mod etcd;
pub(crate) mod naive;
pub(crate) mod nats;
mod programs;

use std::{fs, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use milepost_testing::{TIMEOUT, own_address, processes, start_etcd, until};
use tokio::{
    net::TcpStream,
    process::{Child, Command},
};

use self::programs::Program;
use crate::{Result, harness::Harness, store::Store};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PeerKind {
    Etcd,
    /// A stream of NATS JetStream that is synced with every message.
    Nats,
    DurableStreams,
    /// One transaction for each event, in the tables of milepost; LISTEN and SELECT.
    Naive,
}

/// A peer that runs. Its process is killed when dropped.
pub(crate) struct Peer {
    pub(crate) kind: PeerKind,
    place: Place,
}

enum Place {
    Process {
        child: Child,
        address: SocketAddr,
    },
    /// A database of the Postgres of all rows.
    Database(naive::Database),
}

impl PeerKind {
    /// Its name where events are appended.
    pub(crate) fn append(self) -> &'static str {
        match self {
            Self::Etcd => "etcd Put",
            Self::Nats => "NATS publish",
            Self::DurableStreams => "Durable Streams POST",
            Self::Naive => "naive INSERT",
        }
    }

    /// Its name where events are watched.
    pub(crate) fn watch(self) -> &'static str {
        match self {
            Self::Etcd => "etcd Watch",
            Self::Nats => "NATS consumer",
            Self::DurableStreams => "Durable Streams SSE",
            Self::Naive => "naive LISTEN",
        }
    }

    fn program(self) -> Option<Program> {
        match self {
            Self::Etcd => Some(Program::Etcd),
            Self::Nats => Some(Program::Nats),
            Self::DurableStreams => Some(Program::DurableStreams),
            Self::Naive => None,
        }
    }
}

/// The versions of the peers that have a program, as text.
pub(crate) fn versions() -> String {
    format!(
        "etcd {}, nats-server {}, durable-streams {}",
        Program::Etcd.version(),
        Program::Nats.version(),
        Program::DurableStreams.version()
    )
}

/// Those of the peers that can be built here; a warning names the others.
pub(crate) async fn available(harness: &Harness, kinds: &[PeerKind]) -> Result<Vec<PeerKind>> {
    let mut available = Vec::new();
    for &kind in kinds {
        if let Some(program) = kind.program()
            && let Err(error) = program.build().await
        {
            let (name, version) = (program.name(), program.version());
            harness.report_missing_peer(&format!("{name} {version}, which could not be built: {error}"))?;
        } else {
            available.push(kind);
        }
    }
    Ok(available)
}

impl Peer {
    /// Starts a peer with new data, in which `logs` logs can be opened.
    pub(crate) async fn start(harness: &Harness, kind: PeerKind, logs: usize) -> Result<Self> {
        let address = own_address("127.0.0.1");
        let name = format!("{kind:?}-{}", harness.number()).to_lowercase();
        let dir = harness.dir.path().join(&name);
        fs::create_dir(&dir)?;
        let path = kind.program().map(Program::path).unwrap_or_default();
        let child = match kind {
            PeerKind::Etcd => start_etcd(Command::new(path), &harness.dir, &name, address),
            PeerKind::Nats => {
                let configuration =
                    harness.write_file(&format!("{name}.conf"), &nats::configuration(address, &dir))?;
                run(harness, path, &["--config", &configuration.display().to_string()], &name)
            }
            PeerKind::DurableStreams => {
                let (host, port) = (address.ip().to_string(), address.port().to_string());
                let dir = dir.display().to_string();
                let arguments = ["--host", &host, "--port", &port, "--data-dir", &dir, "--durability", "wal"];
                run(harness, path, &arguments, &name)
            }
            PeerKind::Naive => {
                let place = Place::Database(naive::Database::create(harness, logs).await?);
                return Ok(Self { kind, place });
            }
        };
        until(TIMEOUT, kind.append(), async || match kind {
            PeerKind::Etcd => etcd::probe(address).await.is_ok(),
            PeerKind::Nats => nats::probe(address).await.is_ok(),
            PeerKind::DurableStreams | PeerKind::Naive => TcpStream::connect(address).await.is_ok(),
        })
        .await;
        Ok(Self { kind, place: Place::Process { child, address } })
    }

    /// Opens connections. The logs have these names, except for the naive peer, where they
    /// are as many jobs of its own.
    pub(crate) async fn store(&self, logs: &Arc<[String]>, connections: usize) -> Result<Store> {
        match &self.place {
            Place::Process { address, .. } => Store::of_peer(self.kind, *address, logs, connections).await,
            Place::Database(database) => Store::naive(database, logs.len(), connections).await,
        }
    }

    /// The processor time that the peer has used so far. What is read by the naive peer is
    /// read in the process of its user, so that only Postgres counts.
    pub(crate) fn processor_time(&self, harness: &Harness) -> Result<Duration> {
        match &self.place {
            Place::Process { child, .. } => Ok(processes::processor_time(pid(child)?)),
            Place::Database(_) => Ok(harness.postgres_processor_time()),
        }
    }

    pub(crate) fn resident_bytes(&self) -> Result<usize> {
        match &self.place {
            Place::Process { child, .. } => Ok(processes::resident_bytes(pid(child)?)),
            Place::Database(_) => Err("the naive peer has no process".into()),
        }
    }
}

fn pid(child: &Child) -> Result<u32> {
    child.id().ok_or_else(|| "the process has already ended".into())
}

fn run(harness: &Harness, path: PathBuf, arguments: &[&str], name: &str) -> Child {
    let mut command = Command::new(path);
    command.args(arguments);
    harness.dir.run(command, &format!("{name}.log"))
}
