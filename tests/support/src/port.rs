//! Addresses for server processes. A server keeps its address over restarts,
//! while no process listens there.

use std::{
    net::{SocketAddr, TcpListener},
    process,
    sync::atomic::{AtomicU32, Ordering},
};

/// The ports from 10,000 to 29,999 lie below the ephemeral range, from which the
/// kernel assigns ports to sockets that are bound to port 0.
const FIRST: u32 = 10_000;
const COUNT: u32 = 20_000;

/// An address that no other test of this process gets. The kernel does not assign
/// its port to a socket that is bound to port 0.
pub fn own_address(host: &str) -> SocketAddr {
    static TAKEN: AtomicU32 = AtomicU32::new(0);
    // Test processes that run at the same time start far from each other.
    let first = process::id().wrapping_mul(617);
    for _ in 0..COUNT {
        let offset = first.wrapping_add(TAKEN.fetch_add(1, Ordering::Relaxed)) % COUNT;
        let port = u16::try_from(FIRST + offset).expect("below 30,000");
        if let Ok(listener) = TcpListener::bind((host, port)) {
            return listener.local_addr().expect("a bound listener has an address");
        }
    }
    panic!("no port is free on {host}");
}
