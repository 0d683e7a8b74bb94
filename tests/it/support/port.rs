//! Addresses for servers in processes of their own, which stay theirs while
//! nobody listens there.

use std::{
    net::{SocketAddr, TcpListener},
    process,
    sync::atomic::{AtomicU32, Ordering},
};

/// Below those that a system gives to whoever asks for any.
const FIRST: u32 = 10_000;
const COUNT: u32 = 20_000;

/// An address that nobody else takes: its port is never given to whoever asks
/// for any, and no other test of this process gets it.
pub fn own_address(host: &str) -> SocketAddr {
    static TAKEN: AtomicU32 = AtomicU32::new(0);
    // Processes that run side by side begin far from each other.
    let first = process::id().wrapping_mul(617);
    for _ in 0..COUNT {
        let offset = first.wrapping_add(TAKEN.fetch_add(1, Ordering::Relaxed)) % COUNT;
        let port = u16::try_from(FIRST + offset).expect("below 30,000");
        if let Ok(listener) = TcpListener::bind((host, port)) {
            return listener.local_addr().expect("it listens");
        }
    }
    panic!("no port is free on {host}");
}
