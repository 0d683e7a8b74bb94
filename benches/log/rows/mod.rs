//! The rows of the table.

mod append;
mod calls;
mod fan_out;
mod flat;
mod publish;
mod reconnect;
mod replay;
mod sleepers;
mod watch;

use clap::ValueEnum;

use crate::{Result, bed::Bed, report::Outcome};

/// What can be measured.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Row {
    /// Unary appends of one event, 1,000 jobs, 8 connections with 32 in flight each
    #[value(name = "append-8x32")]
    Append8x32,
    /// The same with 8 connections and 1 in flight each
    #[value(name = "append-8x1")]
    Append8x1,
    /// The same with 1 connection and 1 in flight: its median latency
    #[value(name = "append-1x1")]
    Append1x1,
    /// A publish stream's batches of 100, beside the append statement and COPY
    #[value(name = "publish-100")]
    Publish100,
    /// From the sender to 1,000 watchers, each of its own job, 5 events a second each
    #[value(name = "watch-1000")]
    Watch1000,
    /// One event to 10,000 streams
    FanOut,
    /// The server's memory for each of 10,000 streams
    Memory,
    /// Calls with many events and jobs stored, beside the same with few
    Flat,
    /// A job of 500,000 events from its beginning, beside COPY of its rows
    Replay,
    /// GetJob beside an empty method
    GetJob,
    /// GetCurrentUser beside an empty method
    GetCurrentUser,
    /// 1,000 watchers that resume at once after the server was restarted
    #[value(name = "reconnect-1000")]
    Reconnect1000,
    /// Appends while 10,000 watchers of other jobs stand idle
    #[value(name = "idle-10000")]
    Idle10000,
    /// 11,100 watchers of which 100 never read
    #[value(name = "sleepers-100")]
    Sleepers100,
    /// 32 writers on one job
    #[value(name = "one-job-32")]
    OneJob32,
    /// From the sender on one replica to watchers on another
    ReplicaDelay,
    /// Appends through two replicas at once
    TwoReplicas,
}

impl Row {
    /// As it is given on the command line.
    pub(crate) fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// Measures it; some rows come to several lines of the table.
    pub(crate) async fn measure(self, bed: &Bed) -> Result<Vec<Outcome>> {
        let name = self.name();
        match self {
            Self::Append8x32 | Self::Append8x1 | Self::Append1x1 => append::unary(bed, self).await,
            Self::Idle10000 | Self::OneJob32 | Self::TwoReplicas => append::unary(bed, self).await,
            Self::Publish100 => publish::measure(bed, &name).await,
            Self::Watch1000 => watch::watchers(bed, &name).await,
            Self::Sleepers100 => sleepers::measure(bed, &name).await,
            Self::ReplicaDelay => watch::replicas(bed, &name).await,
            Self::FanOut => fan_out::fan_out(bed, &name).await,
            Self::Memory => fan_out::memory(bed, &name).await,
            Self::Flat => flat::measure(bed).await,
            Self::Replay => replay::measure(bed, &name).await,
            Self::GetJob | Self::GetCurrentUser => calls::measure(bed, self).await,
            Self::Reconnect1000 => reconnect::measure(bed, &name).await,
        }
    }
}
