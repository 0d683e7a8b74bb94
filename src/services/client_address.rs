//! The address of a client, also behind proxies.

use std::net::{IpAddr, SocketAddr};

use http::HeaderMap;
use ipnet::IpNet;

/// The header to which each proxy appends the address of its client.
const FORWARDED: &str = "x-forwarded-for";

/// The client's address: that of its connection or, where that is a trusted proxy, the
/// last address of `x-forwarded-for` that is no trusted proxy. Clients can invent what
/// stands before it.
pub(super) fn client_address(connection: IpAddr, headers: &HeaderMap, trusted: &[IpNet]) -> IpAddr {
    // A socket for both IPv6 and IPv4 has IPv4 addresses in their IPv6 form.
    let connection = connection.to_canonical();
    let is_trusted = |address: IpAddr| trusted.iter().any(|network| network.contains(&address));
    if !is_trusted(connection) {
        return connection;
    }
    let values: Vec<&str> = headers
        .get_all(FORWARDED)
        .iter()
        // A value that is no text becomes one entry that is no address.
        .flat_map(|value| value.to_str().unwrap_or("?").split(','))
        .collect();
    let hops = values.into_iter().rev().map(address);
    let last = hops.into_iter().find(|hop| hop.is_none_or(|hop| !is_trusted(hop)));
    // An entry that is no address ends the search: what stands before it may be invented.
    last.flatten().unwrap_or(connection)
}

/// An entry of the header: an address, in brackets or not, with a port or without one.
fn address(entry: &str) -> Option<IpAddr> {
    let entry = entry.trim();
    let in_brackets = || entry.strip_prefix('[')?.strip_suffix(']')?.parse().ok().map(IpAddr::V6);
    let with_port = || entry.parse().ok().map(|address: SocketAddr| address.ip());
    let address = entry.parse().ok().or_else(with_port).or_else(in_brackets);
    address.map(|address: IpAddr| address.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn an_entry_is_an_address_with_or_without_a_port() {
        for (entry, parsed) in [
            ("192.0.2.7", "192.0.2.7"),
            (" 192.0.2.7\t", "192.0.2.7"),
            ("192.0.2.7:5678", "192.0.2.7"),
            ("2001:db8::1", "2001:db8::1"),
            ("[2001:db8::1]", "2001:db8::1"),
            ("[2001:db8::1]:443", "2001:db8::1"),
            // Not a port: an IPv6 address has one only behind brackets.
            ("2001:db8::1:443", "2001:db8::1:443"),
            ("::ffff:192.0.2.7", "192.0.2.7"),
            ("[::ffff:192.0.2.7]:443", "192.0.2.7"),
        ] {
            assert_eq!(address(entry), Some(ip(parsed)), "{entry:?}");
        }
        for entry in [
            "",
            "unknown",
            "_hidden",
            "for=192.0.2.7",
            "\"192.0.2.7\"",
            "unix:",
            "/run/proxy.sock",
            "192.0.2.7:",
            "192.0.2.7:65536",
            "192.0.2",
            "[192.0.2.7]",
            "[192.0.2.7]:80",
            "[2001:db8::1",
            "2001:db8::1]:443",
            "[2001:db8::1]443",
            "fe80::1%eth0",
            "192.0.2.7 10.0.0.1",
        ] {
            assert_eq!(address(entry), None, "{entry:?}");
        }
    }

    #[test]
    fn the_last_address_that_is_no_trusted_proxy_is_the_clients() {
        let trusted = ["10.0.0.0/8", "192.0.2.1/32", "2001:db8:1::/48"];
        let trusted = trusted.map(|network| network.parse::<IpNet>().expect("a network"));
        for (connection, forwarded, client) in [
            ("198.51.100.1", &["203.0.113.9"][..], "198.51.100.1"),
            ("10.1.2.3", &["203.0.113.9"], "203.0.113.9"),
            ("::ffff:10.1.2.3", &["203.0.113.9:1234"], "203.0.113.9"),
            ("2001:db8:1::5", &["[2001:db8:2::5]:1234"], "2001:db8:2::5"),
            ("2001:db8:2::5", &["203.0.113.9"], "2001:db8:2::5"),
            ("10.1.2.3", &["198.51.100.7, 203.0.113.9, 192.0.2.1, 10.9.9.9:80"], "203.0.113.9"),
            ("10.1.2.3", &["198.51.100.7, 203.0.113.9", "10.9.9.9", "::ffff:10.8.8.8"], "203.0.113.9"),
            ("10.1.2.3", &["203.0.113.9", "192.0.2.2"], "192.0.2.2"),
            // What cannot be understood ends the search, whatever stands before it.
            ("10.1.2.3", &["203.0.113.9, unknown"], "10.1.2.3"),
            ("10.1.2.3", &["203.0.113.9, unknown, 10.9.9.9"], "10.1.2.3"),
            ("10.1.2.3", &["203.0.113.9,"], "10.1.2.3"),
            ("10.1.2.3", &["10.4.4.4, 10.9.9.9"], "10.1.2.3"),
            ("10.1.2.3", &[], "10.1.2.3"),
        ] {
            let mut headers = HeaderMap::new();
            for value in forwarded {
                headers.append(FORWARDED, value.parse().expect("a value"));
            }
            assert_eq!(client_address(ip(connection), &headers, &trusted), ip(client), "{forwarded:?}");
        }
        let mut headers = HeaderMap::new();
        headers.append(FORWARDED, "203.0.113.9".parse().expect("a value"));
        let no_text = http::HeaderValue::from_bytes(b"203.0.113.9\xff").expect("a value");
        headers.append(FORWARDED, no_text);
        assert_eq!(client_address(ip("10.1.2.3"), &headers, &trusted), ip("10.1.2.3"));
    }
}
