//! The loads of the hostile tenant, and what they were answered.

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Load {
    LargeBatches,
    Replays,
    OneJob,
    EmptyEvents,
    UnreadAnswers,
    LargeConfigurations,
    GetConfiguration,
    WatchesOfNothing,
    UnreadWatches,
    AbandonedCalls,
    Connections,
    Credentials,
    InvalidRequests,
}

impl Load {
    pub const ALL: [Self; 13] = [
        Self::LargeBatches,
        Self::Replays,
        Self::OneJob,
        Self::EmptyEvents,
        Self::UnreadAnswers,
        Self::LargeConfigurations,
        Self::GetConfiguration,
        Self::WatchesOfNothing,
        Self::UnreadWatches,
        Self::AbandonedCalls,
        Self::Connections,
        Self::Credentials,
        Self::InvalidRequests,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::LargeBatches => "batches of 0.99 MB",
            Self::Replays => "replays of stored batches of 500",
            Self::OneJob => "one job, through both servers",
            Self::EmptyEvents => "1 MiB of empty events, published",
            Self::UnreadAnswers => "publish streams, not read",
            Self::LargeConfigurations => "large configurations, a job each",
            Self::GetConfiguration => "GetJobConfiguration, 80 at once",
            Self::WatchesOfNothing => "watches of a customer without a job",
            Self::UnreadWatches => "watches of ended sessions, not read",
            Self::AbandonedCalls => "calls that are given up at once",
            Self::Connections => "connections, with one call each",
            Self::Credentials => "watch tokens and API keys",
            Self::InvalidRequests => "invalid requests",
        }
    }
}

/// How often a load got which answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Answers {
    pub accepted: u64,
    /// By a status that says what is wrong with the request.
    pub refused: u64,
    /// RESOURCE_EXHAUSTED: too much at once, too fast, or beyond a quota.
    pub limited: u64,
    /// No answer, or one that leaves open whether the request was executed.
    pub unanswered: u64,
}
