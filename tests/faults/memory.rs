//! The limits that the servers of the campaign are started with, and the most memory that a
//! server may have with these: the sum in docs/limits.md. Most of it is the part of the
//! hostile tenant, which fills its limits.

const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;

/// Small, so that the bound is near, and so that the hostile tenant meets its limits. Nobody
/// else does.
const BYTES_IN_FLIGHT_MIB: usize = 4;
const TOTAL_BYTES_IN_FLIGHT_MIB: usize = 12;
const CACHE_MIB: usize = 4;
const CALLS_IN_FLIGHT: usize = 64;
const STREAMS_PER_USER: usize = 48;
const EVENTS_PER_SECOND: usize = 10_000;
const CONFIGURATIONS_PER_USER: usize = 100;

/// The provider and the customer.
const HOSTILE_USERS: usize = 2;
/// Open at a time to one server.
const HOSTILE_CONNECTIONS: usize = 32;
/// What a server takes with nothing to do, and for the load of all others, which is far from
/// their limits.
const ORDINARY_MIB: usize = 64;

/// The environment variables of these settings.
pub fn settings() -> [(&'static str, usize); 7] {
    [
        ("MILEPOST_BYTES_IN_FLIGHT_MIB", BYTES_IN_FLIGHT_MIB),
        ("MILEPOST_TOTAL_BYTES_IN_FLIGHT_MIB", TOTAL_BYTES_IN_FLIGHT_MIB),
        ("MILEPOST_CACHE_MIB", CACHE_MIB),
        ("MILEPOST_CALLS_IN_FLIGHT", CALLS_IN_FLIGHT),
        ("MILEPOST_STREAMS_PER_USER", STREAMS_PER_USER),
        ("MILEPOST_EVENTS_PER_SECOND", EVENTS_PER_SECOND),
        ("MILEPOST_CONFIGURATIONS_PER_USER", CONFIGURATIONS_PER_USER),
    ]
}

/// The most memory that a server may have, in bytes.
pub fn bound_bytes() -> usize {
    let of_user = 16 * BYTES_IN_FLIGHT_MIB * MIB + CALLS_IN_FLIGHT * 128 * KIB + STREAMS_PER_USER * MIB;
    (ORDINARY_MIB + CACHE_MIB) * MIB + HOSTILE_USERS * of_user + HOSTILE_CONNECTIONS * 2 * MIB
}
