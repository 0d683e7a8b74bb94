//! The kinds of faults.

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Fault {
    KillServer,
    TerminateServer,
    StopServer,
    MoveClock,
    KillPostgres,
    RestartPostgres,
    TerminateBackends,
    StopBackend,
    CutConnections,
    RefuseConnections,
    DelayBytes,
    HoldBytes,
    FillDisk,
    UseUpConnections,
    HoldLocks,
    PromoteSynchronous,
    PromoteAsynchronous,
    SwitchOver,
    FreezePrimary,
    MoveDatabaseClock,
    MakeReadOnly,
    InsertPooler,
}

impl Fault {
    pub const ALL: [Self; 22] = [
        Self::KillServer,
        Self::TerminateServer,
        Self::StopServer,
        Self::MoveClock,
        Self::KillPostgres,
        Self::RestartPostgres,
        Self::TerminateBackends,
        Self::StopBackend,
        Self::CutConnections,
        Self::RefuseConnections,
        Self::DelayBytes,
        Self::HoldBytes,
        Self::FillDisk,
        Self::UseUpConnections,
        Self::HoldLocks,
        Self::PromoteSynchronous,
        Self::PromoteAsynchronous,
        Self::SwitchOver,
        Self::FreezePrimary,
        Self::MoveDatabaseClock,
        Self::MakeReadOnly,
        Self::InsertPooler,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::KillServer => "kill -9 of a server",
            Self::TerminateServer => "SIGTERM to a server",
            Self::StopServer => "a server stopped (SIGSTOP)",
            Self::MoveClock => "a server's clock moved",
            Self::KillPostgres => "kill -9 of Postgres",
            Self::RestartPostgres => "restart of Postgres",
            Self::TerminateBackends => "backends terminated",
            Self::StopBackend => "a backend stopped (SIGSTOP)",
            Self::CutConnections => "connections cut",
            Self::RefuseConnections => "connections refused",
            Self::DelayBytes => "bytes delayed",
            Self::HoldBytes => "bytes held back",
            Self::FillDisk => "disk full",
            Self::UseUpConnections => "connections used up",
            Self::HoldLocks => "locks held",
            Self::PromoteSynchronous => "synchronous standby promoted",
            Self::PromoteAsynchronous => "asynchronous standby promoted",
            Self::SwitchOver => "switchover",
            Self::FreezePrimary => "primary frozen, and woken",
            Self::MoveDatabaseClock => "Postgres's clock moved",
            Self::MakeReadOnly => "database read-only",
            Self::InsertPooler => "a pooler put in between",
        }
    }

    /// Whether [`RECOVERY_LIMIT`] holds after this fault: it makes the database
    /// unavailable, and not the server.
    pub fn is_database_fault(self) -> bool {
        match self {
            Self::KillServer | Self::TerminateServer | Self::StopServer | Self::MoveClock => false,
            Self::KillPostgres
            | Self::RestartPostgres
            | Self::TerminateBackends
            | Self::StopBackend
            | Self::CutConnections
            | Self::RefuseConnections
            | Self::DelayBytes
            | Self::HoldBytes
            | Self::FillDisk
            | Self::UseUpConnections
            | Self::HoldLocks
            | Self::PromoteSynchronous
            | Self::PromoteAsynchronous
            | Self::SwitchOver
            | Self::FreezePrimary
            | Self::MoveDatabaseClock
            | Self::MakeReadOnly
            | Self::InsertPooler => true,
        }
    }
    /// Whether a server starts anew, and has forgotten what it knew.
    pub fn restarts_server(self) -> bool {
        matches!(self, Self::KillServer | Self::TerminateServer)
    }
}
