//! The rows of the benchmark's table.

mod append;
mod calls;
mod fan_out;
mod flat;
mod neighbour;
mod page;
mod publish;
mod reconnect;
mod replay;
mod stalled_watchers;
mod statement;
mod watch;

use clap::ValueEnum;

use crate::{Result, harness::Harness, report::Outcome};

/// The rows. Their doc comments are the texts of `--help`.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Row {
    /// AppendEvents with one event, 1,000 jobs, 8 connections with 32 calls in flight each
    #[value(name = "append-8x32")]
    Append8x32,
    /// The same with 1 call in flight on each of 8 connections
    #[value(name = "append-8x1")]
    Append8x1,
    /// The same with 1 call in flight on 1 connection: the median latency
    #[value(name = "append-1x1")]
    Append1x1,
    /// PublishEvents with batches of 100, compared with the append statement and COPY
    #[value(name = "publish-100")]
    Publish100,
    /// Delay from sender to watcher: 1,000 watchers, each of its own job, 5 events a second each
    #[value(name = "watch-1000")]
    Watch1000,
    /// Delivery of one event to 10,000 streams
    FanOut,
    /// Memory of the server for each of 10,000 streams
    Memory,
    /// Memory and processor time of a page's watch, compared with a watch by gRPC
    Page,
    /// Calls on a database with many jobs and events, compared with the same calls on a small one; and a watch
    /// of all jobs from the beginning by a user who owns a thousandth of them, compared with a database without
    /// the others
    Flat,
    /// Watch of a job with 500,000 events from its beginning, compared with COPY of its rows
    Replay,
    /// GetJob, compared with an empty method
    GetJob,
    /// GetCurrentUser, compared with an empty method
    GetCurrentUser,
    /// 1,000 watchers that all resume after a restart of the server
    #[value(name = "reconnect-1000")]
    Reconnect1000,
    /// Memory and processor time of the server with 100,000 idle streams
    #[value(name = "idle-100000")]
    Idle100000,
    /// AppendEvents while 10,000 watchers of other jobs receive nothing
    #[value(name = "idle-10000")]
    Idle10000,
    /// 11,100 watchers, of which 100 do not read
    #[value(name = "sleepers-100")]
    StalledWatchers100,
    /// AppendEvents by 32 writers to one job
    #[value(name = "one-job-32")]
    OneJob32,
    /// Delay from sender to watchers at another replica
    ReplicaDelay,
    /// AppendEvents through two replicas at the same time
    TwoReplicas,
    /// A quiet provider's appends and watch beside a flood of another provider, compared with them alone
    Neighbour,
}

impl Row {
    /// The row's name on the command line.
    pub(crate) fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// Measures the row; some rows have several lines in the table.
    pub(crate) async fn measure(self, harness: &Harness) -> Result<Vec<Outcome>> {
        let name = self.name();
        match self {
            Self::Append8x32 | Self::Append8x1 | Self::Append1x1 => append::unary(harness, self).await,
            Self::Idle10000 | Self::OneJob32 | Self::TwoReplicas => append::unary(harness, self).await,
            Self::Publish100 => publish::measure(harness, &name).await,
            Self::Watch1000 => watch::watchers(harness, &name).await,
            Self::StalledWatchers100 => stalled_watchers::measure(harness, &name).await,
            Self::ReplicaDelay => watch::replicas(harness, &name).await,
            Self::FanOut => fan_out::fan_out(harness, &name).await,
            Self::Memory => fan_out::memory(harness, &name).await,
            Self::Idle100000 => fan_out::idle(harness, &name).await,
            Self::Page => page::measure(harness, &name).await,
            Self::Flat => flat::measure(harness).await,
            Self::Replay => replay::measure(harness, &name).await,
            Self::GetJob | Self::GetCurrentUser => calls::measure(harness, self).await,
            Self::Neighbour => neighbour::measure(harness, &name).await,
            Self::Reconnect1000 => reconnect::measure(harness, &name).await,
        }
    }
}
