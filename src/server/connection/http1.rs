//! Bounds of HTTP/1.1 connections, beside hyper's own: the time for the head of a request, the
//! number of connections of one address, and the time until a peer that has disappeared is
//! noticed. HTTP/2 has PINGs for the last one.

use std::{
    collections::HashMap,
    io,
    net::IpAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    task::Context,
    time::Duration,
};

use ipnet::IpNet;
use parking_lot::Mutex;
use rustix::net::sockopt::set_tcp_user_timeout;
use tokio::{
    net::TcpStream,
    time::{Sleep, sleep},
};

use crate::models::log_in_throttle::network;

/// Limits of all HTTP/1.1 connections of a server.
#[derive(Clone, Debug)]
pub(in crate::server) struct Http1Limits {
    /// Longest time from the first byte of a head to its last one.
    pub(in crate::server) head: Duration,
    /// How long a peer may acknowledge or take nothing of what it is sent.
    pub(in crate::server) silence: Duration,
    /// Most connections of one address, and of one IPv6 network of 64 bits.
    pub(in crate::server) per_address: usize,
    /// The addresses of proxies, which carry the connections of many clients.
    pub(in crate::server) trusted_proxies: Vec<IpNet>,
}

#[cfg(test)]
impl Http1Limits {
    pub(in crate::server) fn of_a_test() -> Self {
        let time = Duration::from_secs(60);
        Self { head: time, silence: time, per_address: 2, trusted_proxies: Vec::new() }
    }
}

/// Counts the HTTP/1.1 connections of each address.
#[derive(Clone, Debug)]
pub(super) struct Addresses {
    limits: Arc<Http1Limits>,
    open: Arc<Mutex<HashMap<IpAddr, usize>>>,
}

impl Addresses {
    pub(super) fn new(limits: Http1Limits) -> Self {
        Self { limits: Arc::new(limits), open: Arc::default() }
    }

    /// The state of a connection that turned out to be one of HTTP/1.1. An error if the address
    /// has too many.
    pub(super) fn connected(
        &self,
        stream: &TcpStream,
        address: Option<IpAddr>,
        exchange: Exchange,
    ) -> io::Result<Http1> {
        let address = address.map(|address| address.to_canonical());
        let counted = address
            .filter(|address| !self.limits.trusted_proxies.iter().any(|trusted| trusted.contains(address)));
        let permit = counted.map(|address| self.enter(network(address))).transpose()?;
        let silence_ms = u32::try_from(self.limits.silence.as_millis()).unwrap_or(u32::MAX);
        set_tcp_user_timeout(stream, silence_ms)?;
        Ok(Http1 { exchange, head_time: self.limits.head, head: None, _permit: permit })
    }

    fn enter(&self, network: IpAddr) -> io::Result<Permit> {
        let mut open = self.open.lock();
        let count = open.entry(network).or_default();
        if *count >= self.limits.per_address {
            tracing::debug!(%network, "too many HTTP/1.1 connections of one address: closing a new one");
            return Err(io::ErrorKind::QuotaExceeded.into());
        }
        *count += 1;
        Ok(Permit { open: Arc::clone(&self.open), network })
    }
}

/// Counts a connection until it is dropped.
#[derive(Debug)]
struct Permit {
    open: Arc<Mutex<HashMap<IpAddr, usize>>>,
    network: IpAddr,
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut open = self.open.lock();
        if let Some(count) = open.get_mut(&self.network) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.network);
            }
        }
    }
}

/// Whether a request of the connection is under way: from the end of its head to the end of its
/// answer.
#[derive(Clone, Debug, Default)]
pub(in crate::server) struct Exchange(Arc<AtomicBool>);

impl Exchange {
    /// The request is under way until the guard is dropped.
    pub(in crate::server) fn begin(&self) -> UnderWay {
        self.0.store(true, Relaxed);
        UnderWay(self.clone())
    }
}

#[derive(Debug)]
pub(in crate::server) struct UnderWay(Exchange);

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.0.store(false, Relaxed);
    }
}

/// The state of one connection.
#[derive(Debug)]
pub(super) struct Http1 {
    exchange: Exchange,
    head_time: Duration,
    /// Runs from the first byte of a head on.
    head: Option<Pin<Box<Sleep>>>,
    _permit: Option<Permit>,
}

impl Http1 {
    /// To be called at each read: whether bytes were read. An error if a head takes too long.
    pub(super) fn read(&mut self, some: bool, cx: &mut Context<'_>) -> io::Result<()> {
        if self.exchange.0.load(Relaxed) {
            self.head = None;
        } else if some && self.head.is_none() {
            self.head = Some(Box::pin(sleep(self.head_time)));
        }
        if self.head.as_mut().is_some_and(|head| head.as_mut().poll(cx).is_ready()) {
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(())
    }
}
