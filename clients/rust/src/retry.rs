//! Pauses between attempts.

use std::time::Duration;

use crate::CallError;

/// The pause before the second attempt; it doubles with each further failure.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// The longest pause, unless the server asks for a longer one.
pub(crate) const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// The pause after so many earlier failures in a row. Half of it is by chance, so that the
/// clients of a server that restarts do not all come back at the same time.
pub(crate) fn pause(failures: u32, longest: Duration, error: &CallError) -> Duration {
    let whole = FIRST_PAUSE.saturating_mul(2_u32.saturating_pow(failures)).min(longest);
    whole.mul_f64(0.5 + 0.5 * fastrand::f64()).max(error.retry_delay().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use tonic::{Code, Status};
    use tonic_types::{ErrorDetails, StatusExt as _};

    use super::*;

    #[test]
    fn pauses_double_up_to_a_limit_and_are_never_shorter_than_the_server_asks() {
        let plain = CallError::from(Status::unavailable(""));
        for (failures, shortest_ms, longest_ms) in
            [(0, 50, 100), (3, 400, 800), (6, 2500, 5000), (99, 2500, 5000)]
        {
            let pause = pause(failures, LONGEST_PAUSE, &plain);
            assert!(
                pause >= Duration::from_millis(shortest_ms) && pause <= Duration::from_millis(longest_ms)
            );
        }
        let asked = Duration::from_secs(60);
        let details = ErrorDetails::with_retry_info(Some(asked));
        let asking = CallError::from(Status::with_error_details(Code::Unavailable, "", details));
        assert_eq!(pause(0, LONGEST_PAUSE, &asking), asked);
    }
}
