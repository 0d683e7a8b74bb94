//! The faults that the clients meet, in an order that follows from a seed.

use std::{fmt, time::Duration};

use fastrand::Rng;
use milepost_testing::{Mode, Proxy, ServerProcess};
use tokio::time::{Instant, sleep};

/// How often each fault occurs.
const CUTS: usize = 3;
const LOSSES: usize = 3;
const STALLS: usize = 1;
const REFUSALS: usize = 2;
const KILLS: usize = 2;
const DRAINS: usize = 2;

/// Time for the proxy to close its connections.
const CLOSING: Duration = Duration::from_millis(100);

/// What happens to the connections or to the server, and how long it lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// All connections are closed.
    Cut,
    /// All connections are closed after a time in which requests pass, and no answers.
    Lose(Duration),
    /// No bytes pass, and connections stay open.
    Stall(Duration),
    /// All connections are closed, and new ones are refused.
    Refuse(Duration),
    /// The server is killed, and started again after this time.
    Kill(Duration),
    /// The server drains and exits, and is started again after this time.
    Drain(Duration),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cut => write!(f, "close all connections"),
            Self::Lose(time) => write!(f, "lose all answers of {time:.1?}"),
            Self::Stall(time) => write!(f, "stop all bytes for {time:.1?}"),
            Self::Refuse(time) => write!(f, "close and refuse connections for {time:.1?}"),
            Self::Kill(time) => write!(f, "kill the server, and start it after {time:.1?}"),
            Self::Drain(time) => write!(f, "drain the server, and start it after {time:.1?}"),
        }
    }
}

/// Faults, each with the pause before it.
#[derive(Debug)]
pub(crate) struct Script(Vec<(Duration, Fault)>);

impl Script {
    pub(crate) fn new(seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        let mut seconds = |from: f64, to: f64| Duration::from_secs_f64(from + (to - from) * rng.f64());
        let mut faults = vec![Fault::Cut; CUTS];
        faults.extend((0..LOSSES).map(|_| Fault::Lose(seconds(0.3, 1.0))));
        faults.extend((0..STALLS).map(|_| Fault::Stall(seconds(9.0, 11.0))));
        faults.extend((0..REFUSALS).map(|_| Fault::Refuse(seconds(0.5, 3.0))));
        faults.extend((0..KILLS).map(|_| Fault::Kill(seconds(0.0, 3.0))));
        faults.extend((0..DRAINS).map(|_| Fault::Drain(seconds(0.0, 2.0))));
        let pauses: Vec<Duration> = faults.iter().map(|_| seconds(0.2, 4.0)).collect();
        rng.shuffle(&mut faults);
        Self(pauses.into_iter().zip(faults).collect())
    }

    /// The time that the script takes, without the exits and starts of the server.
    pub(crate) fn length(&self) -> Duration {
        let time = |(pause, fault): &(Duration, Fault)| match fault {
            Fault::Cut => *pause,
            Fault::Lose(time)
            | Fault::Stall(time)
            | Fault::Refuse(time)
            | Fault::Kill(time)
            | Fault::Drain(time) => *pause + *time,
        };
        self.0.iter().map(time).sum()
    }

    /// The faults that end connections.
    pub(crate) fn interruptions(&self) -> usize {
        self.0.iter().filter(|(_, fault)| !matches!(fault, Fault::Stall(_))).count()
    }

    /// Does to the proxy and the server what the script says.
    pub(crate) async fn run(&self, proxy: &Proxy, server: &mut ServerProcess) {
        let start = Instant::now();
        for (pause, fault) in &self.0 {
            sleep(*pause).await;
            println!("{:5.1} s  {fault}", start.elapsed().as_secs_f64());
            match *fault {
                Fault::Cut => proxy.cut(),
                Fault::Lose(time) => {
                    proxy.set(Mode::HoldAnswers);
                    sleep(time).await;
                    proxy.cut();
                    // Until the connections are closed.
                    pass_again(proxy, Mode::HoldAnswers, CLOSING).await;
                }
                Fault::Stall(time) => pass_again(proxy, Mode::Hold, time).await,
                Fault::Refuse(time) => pass_again(proxy, Mode::Refuse, time).await,
                Fault::Kill(time) => {
                    server.kill().await;
                    sleep(time).await;
                    server.restart().await;
                }
                Fault::Drain(time) => {
                    server.terminate();
                    server.exit().await;
                    sleep(time).await;
                    server.restart().await;
                }
            }
        }
        println!("{:5.1} s  no more faults", start.elapsed().as_secs_f64());
    }
}

/// Sets another mode for a time.
async fn pass_again(proxy: &Proxy, mode: Mode, time: Duration) {
    proxy.set(mode);
    sleep(time).await;
    proxy.set(Mode::Pass);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_one_script_of_a_bounded_length() {
        for seed in 0..1000 {
            let script = Script::new(seed);
            assert_eq!(script.0, Script::new(seed).0);
            let seconds = script.length().as_secs();
            assert!((25..70).contains(&seconds), "{seconds} s by seed {seed}");
        }
        assert_ne!(Script::new(1).0, Script::new(2).0);
    }
}
