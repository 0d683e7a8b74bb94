//! When a job will probably be complete, by how long jobs before it took.
//!
//! The job is compared with completed ones at the step S that it finished last: how long after
//! S did they complete? Those that took less time than has passed since S say nothing of the
//! future. Of the others, what is left of their times is a sample of what is left of the job's.

use std::time::Duration;

/// Most completed jobs that an estimate looks at.
pub const PAST_JOBS: usize = 200;
/// Fewest jobs that an estimate rests on.
pub const LEAST_JOBS: usize = 10;

/// An estimate of the time until a job is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Estimate {
    /// The 50th percentile.
    pub p50: Duration,
    /// The 90th percentile.
    pub p90: Duration,
    /// How many completed jobs it rests on.
    pub jobs: usize,
}

/// The estimate by these times from the step to the completion, when so much time has passed
/// since the step; how many jobs there are if they are too few.
pub fn estimate(times: impl IntoIterator<Item = Duration>, passed: Duration) -> Result<Estimate, usize> {
    let longer = times.into_iter().filter(|time| *time > passed);
    let mut left: Vec<Duration> = longer.map(|time| time - passed).collect();
    if left.len() < LEAST_JOBS {
        return Err(left.len());
    }
    left.sort_unstable();
    Ok(Estimate { p50: percentile(&left, 50), p90: percentile(&left, 90), jobs: left.len() })
}

/// By the nearest rank: the least of the sorted values that is no less than so many percent of
/// them.
fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted[rank - 1]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(seconds: impl IntoIterator<Item = u64>) -> Vec<Duration> {
        seconds.into_iter().map(Duration::from_secs).collect()
    }

    #[test]
    fn the_percentiles_are_those_of_the_jobs_that_took_longer_than_has_passed() {
        let times = seconds(1..=100);
        let of_all = estimate(times.clone(), Duration::ZERO).expect("enough jobs");
        assert_eq!((of_all.p50, of_all.p90, of_all.jobs), (secs(50), secs(90), 100));
        let later = estimate(times.clone(), secs(80)).expect("enough jobs");
        assert_eq!((later.p50, later.p90, later.jobs), (secs(10), secs(18), 20));
        assert_eq!(estimate(times.clone(), secs(90)).expect("enough jobs").jobs, 10);
        assert_eq!(estimate(times, secs(91)), Err(9));
        assert_eq!(estimate(Vec::new(), Duration::ZERO), Err(0));
    }

    fn secs(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// How long the steps of a job take, in seconds.
    type Steps = [f64; 4];

    /// The points by which a provider that knows the mean times of the steps weighs them.
    const POINTS: Steps = [10.0, 20.0, 60.0, 10.0];

    struct Population {
        name: &'static str,
        /// The steps of the job of this number.
        job: fn(&mut fastrand::Rng, usize) -> Steps,
        /// Whether the drift is beyond what an estimate is to follow.
        is_reported_only: bool,
    }

    /// Between 0 and 1, never 0.
    fn uniform(random: &mut fastrand::Rng) -> f64 {
        1.0 - random.f64()
    }

    fn normal(random: &mut fastrand::Rng) -> f64 {
        (-2.0 * uniform(random).ln()).sqrt() * (std::f64::consts::TAU * random.f64()).cos()
    }

    fn each(mut factor: impl FnMut() -> f64) -> Steps {
        POINTS.map(|points| points * factor())
    }

    const POPULATIONS: [Population; 5] = [
        Population {
            name: "steady",
            job: |random, _| each(|| (1.0 + 0.1 * normal(random)).max(0.1)),
            is_reported_only: false,
        },
        Population {
            name: "skewed",
            job: |random, _| each(|| (0.8 * normal(random)).exp()),
            is_reported_only: false,
        },
        Population {
            name: "bimodal",
            job: |random, _| {
                let slow = if random.u32(..10) < 3 { 4.0 } else { 1.0 };
                each(|| slow * (1.0 + 0.1 * normal(random)).max(0.1))
            },
            is_reported_only: false,
        },
        Population {
            name: "drifting by a tenth over 200 jobs",
            job: |random, number| {
                let drift = 1.1_f64.powf(number as f64 / 200.0);
                each(|| drift * (0.5 * normal(random)).exp())
            },
            is_reported_only: false,
        },
        Population {
            name: "drifting by a half over 200 jobs",
            job: |random, number| {
                let drift = 1.5_f64.powf(number as f64 / 200.0);
                each(|| drift * (0.5 * normal(random)).exp())
            },
            is_reported_only: true,
        },
    ];

    /// What became of the estimates of a population.
    struct Outcome {
        /// Of 100 jobs, how many ended before their 90th percentile.
        before_p90: f64,
        /// The median error of the median, and that of an estimate by points alone.
        error: f64,
        error_by_points: f64,
    }

    /// Estimates many jobs of a population while they run, each by the 200 jobs before it.
    fn measure(population: &Population) -> Outcome {
        let mut random = fastrand::Rng::with_seed(42);
        let jobs: Vec<Steps> = (0..1_200).map(|number| (population.job)(&mut random, number)).collect();
        let (mut before, mut asked) = (0_u32, 0_u32);
        let (mut errors, mut by_points) = (Vec::new(), Vec::new());
        for (number, job) in jobs.iter().enumerate().skip(PAST_JOBS) {
            // It is asked at any time within a step, after some of the steps are done.
            let done = random.usize(0..4);
            let since: f64 = random.f64() * job[done];
            let left = job[done..].iter().sum::<f64>() - since;
            let past = jobs[number - PAST_JOBS..number].iter();
            let times = past.map(|past| Duration::from_secs_f64(past[done..].iter().sum()));
            let Ok(estimate) = estimate(times, Duration::from_secs_f64(since)) else { continue };
            asked += 1;
            before += u32::from(left <= estimate.p90.as_secs_f64());
            let points: f64 = POINTS[..done].iter().sum();
            let passed = job[..done].iter().sum::<f64>() + since;
            // Without a step done, points say nothing.
            if points > 0.0 {
                errors.push((estimate.p50.as_secs_f64() - left).abs());
                by_points.push((passed / points * (100.0 - points) - left).abs());
            }
        }
        assert!(asked > 900, "{}: {asked} estimates", population.name);
        Outcome {
            before_p90: 100.0 * f64::from(before) / f64::from(asked),
            error: median(errors),
            error_by_points: median(by_points),
        }
    }

    fn median(mut values: Vec<f64>) -> f64 {
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    }

    #[test]
    fn estimates_are_calibrated_and_better_than_points_alone() {
        for population in &POPULATIONS {
            let Outcome { before_p90, error, error_by_points } = measure(population);
            let name = population.name;
            println!(
                "{name}: {before_p90:.0} of 100 jobs end before p90; error {error:.1} s, by points {error_by_points:.1} s"
            );
            if !population.is_reported_only {
                assert!((85.0..=95.0).contains(&before_p90), "{name}: {before_p90} of 100 before p90");
                assert!(error <= 0.7 * error_by_points, "{name}: {error} s, by points {error_by_points} s");
            }
        }
    }
}
