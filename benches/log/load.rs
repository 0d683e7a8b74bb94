//! Closed-loop load: each worker makes its next call once the last one is answered.

use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use crate::{Options, Result, report::Measure};

pub(crate) trait Worker: Send + 'static {
    /// Makes one call and returns once it is answered.
    fn work(&mut self) -> impl Future<Output = Result<()>> + Send;

    /// Waits for answers that are outstanding at the end of a round.
    fn finish(&mut self) -> impl Future<Output = Result<()>> + Send {
        async { Ok(()) }
    }
}

/// The calls of a round that ended within its measured time.
pub(crate) struct Calls {
    pub(crate) latencies: Vec<Duration>,
    /// The measured time.
    pub(crate) window: Duration,
}

impl Calls {
    /// The calls a second, multiplied by `units`, the number of events in a call.
    pub(crate) fn rate(&self, units: f64) -> Measure {
        let calls = f64::from(u32::try_from(self.latencies.len()).unwrap_or(u32::MAX));
        let value = units * calls / self.window.as_secs_f64();
        Measure { value, latencies: Some(latency(&self.latencies)) }
    }

    /// The median latency in milliseconds.
    pub(crate) fn p50(&self) -> Measure {
        let latencies = latency(&self.latencies);
        Measure { value: latencies[0], latencies: Some(latencies) }
    }
}

/// p50, p99 and p99.9 in milliseconds; zeros without latencies.
pub(crate) fn latency(latencies: &[Duration]) -> [f64; 3] {
    let mut sorted = latencies.to_vec();
    sorted.sort_unstable();
    [500, 990, 999].map(|permille| {
        let index = (sorted.len() * permille / 1000).min(sorted.len().saturating_sub(1));
        sorted.get(index).map_or(0.0, |latency| latency.as_secs_f64() * 1e3)
    })
}

/// Runs the workers for a round. Before it they warm up, which is not measured. Returns the workers once all calls are answered.
pub(crate) async fn drive<W: Worker>(workers: Vec<W>, options: &Options) -> Result<(Vec<W>, Calls)> {
    let window = options.round();
    let from = Instant::now() + options.warm_up();
    let until = from + window;
    let mut running = JoinSet::new();
    for mut worker in workers {
        running.spawn(async move {
            let mut latencies = Vec::new();
            let mut started = Instant::now();
            while started < until {
                worker.work().await?;
                let ended = Instant::now();
                if ended >= from && ended < until {
                    latencies.push(ended - started);
                }
                started = ended;
            }
            worker.finish().await?;
            Ok::<_, crate::Error>((worker, latencies))
        });
    }
    let (mut workers, mut latencies) = (Vec::new(), Vec::new());
    while let Some(ended) = running.join_next().await {
        let (worker, own) = ended??;
        workers.push(worker);
        latencies.extend(own);
    }
    Ok((workers, Calls { latencies, window }))
}
