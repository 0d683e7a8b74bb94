//! Injects one fault after the other, in an order that the seed decides, and measures
//! for how long each replica cannot append.

use std::{env, sync::Arc, time::Duration};

use milepost_testing::{Mode, PgBouncer, Proxy, TemporaryDir, print_line, processes::Signal};

use crate::{
    context::Context,
    fault::Fault,
    history::{FaultWindow, Moment},
    postgres::Postgres,
    probes::Successes,
    replica::Replica,
};

/// The campaign is aborted if a replica does not append within this time after a
/// fault.
pub const TIMEOUT: Duration = Duration::from_secs(180);
/// For so long after a fault has been healed it still excuses failed calls.
const SETTLING: Duration = Duration::from_secs(3);
/// One pause in so many is a long one. A stream without messages in a long pause is
/// a violation, since no fault excuses it.
const LONG_PAUSE_ONE_IN: u32 = 10;
const LONG_PAUSE: Duration = Duration::from_secs(13);
/// The service promises to append again within this time once Postgres accepts
/// connections. A debug build, which the hostile tenant keeps busy, has more time.
pub const RECOVERY_LIMIT: Duration = Duration::from_secs(if cfg!(debug_assertions) { 5 } else { 2 });

/// A fault that was injected, and the outage of each replica.
#[derive(Clone, Debug)]
pub struct InjectedFault {
    pub fault: Fault,
    pub what: String,
    /// The replica affected, if it is only one.
    pub replica: Option<usize>,
    pub began_at: Moment,
    /// When the fault was undone and Postgres accepted connections.
    pub healed_at: Moment,
    pub outages: [Outage; 2],
}

impl InjectedFault {
    /// The time in which this fault excuses failed calls.
    pub fn fault_window(&self) -> FaultWindow {
        let affects = self.replica.map_or([true; 2], |replica| [replica == 0, replica == 1]);
        FaultWindow { from: self.began_at, to: self.healed_at + SETTLING, affects }
    }
}

#[derive(Clone, Copy, Debug)]
pub struct Outage {
    /// The longest time between two successful appends since the fault began.
    pub longest_gap: Duration,
    /// From the fault's end to the next successful append.
    pub until_recovered: Duration,
}

/// The parts of the campaign that faults strike.
pub struct FaultInjector {
    pub _dir: TemporaryDir,
    pub postgres: Postgres,
    /// Server 0 has one proxy, which leads to the primary as HAProxy does. Server 1 knows both
    /// nodes and has a proxy to each.
    pub proxies: [Vec<Proxy>; 2],
    pub replicas: [Replica; 2],
    pub context: Arc<Context>,
    pub successes: [Successes; 2],
    pub random: fastrand::Rng,
    /// When the database was available again after each outage of the present fault.
    pub available_at: Vec<Moment>,
}

impl FaultInjector {
    /// Injects every fault once and then random ones until the time is up.
    pub async fn run(&mut self, until: Moment) -> Vec<InjectedFault> {
        let mut faults = Fault::ALL.to_vec();
        let only = env::var("MILEPOST_FAULTS_ONLY").unwrap_or_default();
        faults.retain(|fault| fault.name().contains(&only));
        assert!(!faults.is_empty(), "no fault has {only:?} in its name");
        for (possible, fault, needs) in [
            (self.postgres.has_own_disk(), Fault::FillDisk, "to mount a disk as root"),
            (self.postgres.has_own_clock(), Fault::MoveClock, "Debian's faketime"),
            (self.postgres.has_own_clock(), Fault::MoveDatabaseClock, "Debian's faketime"),
            (PgBouncer::is_installed(), Fault::InsertPooler, "Debian's pgbouncer"),
        ] {
            if !possible && faults.contains(&fault) {
                print_line(format!("the fault {:?} is left out; it needs {needs}", fault.name()));
                faults.retain(|&other| other != fault);
            }
        }
        let mut injected_faults = Vec::new();
        self.random.shuffle(&mut faults);
        let mut each_once = faults.clone().into_iter();
        loop {
            let next = each_once.next();
            if next.is_none() && self.context.now() > until {
                return injected_faults;
            }
            let fault = next.unwrap_or_else(|| faults[self.random.usize(..faults.len())]);
            let pause = Duration::from_millis(self.random.u64(300..1_500));
            let is_long = self.random.u32(..LONG_PAUSE_ONE_IN) == 0;
            tokio::time::sleep(if is_long { LONG_PAUSE } else { pause }).await;
            injected_faults.push(self.inject_and_measure(fault).await);
        }
    }

    async fn inject_and_measure(&mut self, fault: Fault) -> InjectedFault {
        self.available_at.clear();
        self.prepare(fault).await;
        let began_at = self.context.now();
        let (what, replica) = self.inject(fault).await;
        let undone_at = self.context.now();
        self.postgres.primary().wait_until_ready().await;
        let healed_at = self.context.now();
        self.available_at.push(healed_at);
        let mut outages = [Outage { longest_gap: Duration::ZERO, until_recovered: Duration::ZERO }; 2];
        for (number, outage) in outages.iter_mut().enumerate() {
            for available_at in self.available_at.clone() {
                let Outage { longest_gap, until_recovered } =
                    self.outage(number, began_at, available_at).await;
                outage.longest_gap = outage.longest_gap.max(longest_gap);
                outage.until_recovered = outage.until_recovered.max(until_recovered);
            }
        }
        let [first, second] = outages.map(|outage| outage.until_recovered.as_millis());
        let undone_s = (undone_at - began_at).as_secs_f64();
        let healed_s = (healed_at - began_at).as_secs_f64();
        print_line(format!(
            "{:8.3} s  {what}; undone after {undone_s:.3} s, Postgres ready after {healed_s:.3} s, \
             replicas append {first} and {second} ms later; {}",
            began_at.as_secs_f64(),
            self.postgres.disk_usage().await,
        ));
        for (replica, outage) in self.replicas.iter().zip(outages) {
            if fault.is_database_fault() && outage.until_recovered > RECOVERY_LIMIT {
                print_line(format!("slow recovery; the end of the server's log:\n{}", replica.log_tail()));
            }
        }
        InjectedFault { fault, what, replica, began_at, healed_at, outages }
    }

    /// Makes the standby that a fault needs.
    async fn prepare(&mut self, fault: Fault) {
        match fault {
            Fault::PromoteSynchronous | Fault::FreezePrimary => {
                self.postgres.build_standby().await;
                self.postgres.make_synchronous().await;
            }
            Fault::PromoteAsynchronous | Fault::SwitchOver => self.postgres.build_standby().await,
            _ => {}
        }
    }

    /// Waits for an append that is answered after the fault's end, and computes the
    /// outage from the successes since its beginning.
    async fn outage(&self, replica: usize, began_at: Moment, healed_at: Moment) -> Outage {
        let recovered_at = tokio::time::timeout(TIMEOUT, async {
            loop {
                let success = self.successes[replica]
                    .lock()
                    .unwrap()
                    .iter()
                    .rev()
                    .take_while(|(_, answered)| *answered >= healed_at)
                    .last()
                    .copied();
                if let Some((_, answered)) = success {
                    return answered;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
        let Ok(recovered_at) = recovered_at else {
            panic!(
                "server {replica} has appended nothing in the {TIMEOUT:?} since the fault was healed; {}; the end of its log:\n{}",
                self.postgres.disk_usage().await,
                self.replicas[replica].log_tail(),
            );
        };
        let successes = self.successes[replica].lock().unwrap();
        let since_fault = successes.iter().rev().take_while(|(_, answered)| *answered >= began_at);
        let mut moments: Vec<Moment> = since_fault.map(|&(_, answered)| answered).collect();
        moments.push(began_at);
        let longest_gap = moments.windows(2).map(|pair| pair[0] - pair[1]).max().unwrap_or_default();
        Outage { longest_gap, until_recovered: recovered_at - healed_at }
    }

    /// Injects a fault and undoes it. Returns its description, and the replica if only
    /// one is affected.
    async fn inject(&mut self, fault: Fault) -> (String, Option<usize>) {
        let struck = self.random.usize(..2);
        let replica = match fault {
            Fault::KillServer | Fault::TerminateServer | Fault::StopServer => Some(struck),
            // Only replica 1 has a clock of its own.
            Fault::MoveClock => Some(1),
            _ => None,
        };
        let duration = Duration::from_millis(self.random.u64(200..self.context.pace.max_fault_ms));
        let detail = match fault {
            Fault::KillServer => {
                self.replicas[struck].kill().await;
                tokio::time::sleep(duration / 4).await;
                self.replicas[struck].start_again().await;
                format!("server {struck}")
            }
            Fault::TerminateServer => {
                let exit = self.replicas[struck].terminate().await;
                assert!(exit.success(), "server {struck} ended with {exit} after SIGTERM");
                self.replicas[struck].start_again().await;
                format!("server {struck}")
            }
            Fault::StopServer => {
                self.replicas[struck].signal(Signal::STOP);
                tokio::time::sleep(duration).await;
                self.replicas[struck].signal(Signal::CONT);
                format!("server {struck} for {duration:?}")
            }
            Fault::MoveClock => self.move_clock(duration).await,
            Fault::KillPostgres => {
                self.postgres.stop_primary().await;
                tokio::time::sleep(duration / 2).await;
                self.postgres.start_again().await;
                format!("for {:?}", duration / 2)
            }
            Fault::RestartPostgres => {
                self.postgres.primary_mut().stop().await;
                self.postgres.start_again().await;
                String::new()
            }
            Fault::TerminateBackends => self.terminate_backends().await,
            Fault::StopBackend => self.stop_backend(duration).await,
            Fault::CutConnections | Fault::RefuseConnections | Fault::DelayBytes | Fault::HoldBytes => {
                self.disturb_connections(fault, duration).await
            }
            Fault::FillDisk => self.fill_disk(duration).await,
            Fault::UseUpConnections => self.use_up_connections(duration).await,
            Fault::HoldLocks => self.hold_locks(duration).await,
            Fault::PromoteSynchronous => self.promote_synchronous(duration).await,
            Fault::PromoteAsynchronous => self.promote_asynchronous(duration).await,
            Fault::SwitchOver => self.switch_over(duration).await,
            Fault::FreezePrimary => self.freeze_primary(duration).await,
            Fault::MoveDatabaseClock => self.move_database_clock(duration).await,
            Fault::MakeReadOnly => self.make_read_only(duration).await,
            Fault::InsertPooler => self.insert_pooler(duration).await,
        };
        (format!("{}: {detail}", fault.name()), replica)
    }

    async fn disturb_connections(&mut self, fault: Fault, duration: Duration) -> String {
        let which = [[true, false], [false, true], [true, true]][self.random.usize(..3)];
        let delay = Duration::from_millis(self.random.u64(20..250));
        let servers = || (0..2).filter(|&server| which[server]);
        if matches!(fault, Fault::CutConnections | Fault::RefuseConnections) {
            // Bytes must be waiting in the proxy when it cuts the connections.
            let delayed = servers().flat_map(|server| &self.proxies[server]);
            delayed.for_each(|proxy| proxy.set(Mode::Jitter(delay)));
            tokio::time::sleep(delay * 2).await;
        }
        let disturbed = self.proxies.iter().enumerate().filter(|(server, _)| which[*server]);
        for proxy in disturbed.flat_map(|(_, proxies)| proxies) {
            match fault {
                Fault::RefuseConnections => proxy.set(Mode::Refuse),
                Fault::DelayBytes => proxy.set(Mode::Jitter(delay)),
                Fault::HoldBytes => proxy.set(Mode::Hold),
                _ => proxy.cut(),
            }
        }
        let duration = match fault {
            // Long enough for many requests and answers to pass.
            Fault::DelayBytes => duration + Duration::from_secs(1),
            _ => duration,
        };
        if fault != Fault::CutConnections {
            tokio::time::sleep(duration).await;
        }
        let disturbed = self.proxies.iter().enumerate().filter(|(server, _)| which[*server]);
        for proxy in disturbed.flat_map(|(_, proxies)| proxies) {
            proxy.set(Mode::Pass);
        }
        let which: Vec<String> = servers().map(|server| server.to_string()).collect();
        let servers = which.join(" and ");
        match fault {
            Fault::CutConnections => format!("of server {servers}"),
            Fault::DelayBytes => format!("by up to {delay:?}, of server {servers}, for {duration:?}"),
            _ => format!("of server {servers}, for {duration:?}"),
        }
    }
}
