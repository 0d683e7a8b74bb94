//! Parsers of the values of settings. Each error says what to write instead.

use std::{
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
    time::Duration,
};

use clap::{
    builder::{RangedI64ValueParser, TypedValueParser},
    value_parser,
};
use http::{Uri, uri::Scheme};
use ipnet::IpNet;
use tracing_subscriber::{EnvFilter, filter::LevelFilter};

/// Parses whole seconds within a range.
pub(super) fn seconds(range: RangeInclusive<u64>) -> impl TypedValueParser<Value = Duration> {
    value_parser!(u64).range(range).map(Duration::from_secs)
}

/// Parses a count within a range.
pub(super) fn count(range: RangeInclusive<i64>) -> RangedI64ValueParser<usize> {
    RangedI64ValueParser::new().range(range)
}

/// Parses an IP address or a CIDR range; IPv4-mapped IPv6 addresses become IPv4 addresses.
pub(super) fn network(text: &str) -> Result<IpNet, String> {
    let malformed = || "must be an IP address, or a range as 10.0.0.0/8".to_owned();
    let network = match text.parse::<IpAddr>() {
        Ok(address) => IpNet::from(address),
        Err(_) => text.parse().map_err(|_| malformed())?,
    };
    let address = network.addr().to_canonical();
    let mapped_bits = network.max_prefix_len() - IpNet::from(address).max_prefix_len();
    let prefix = network.prefix_len().checked_sub(mapped_bits).ok_or_else(malformed)?;
    IpNet::new(address, prefix).map_err(|_| malformed())
}

/// Parses the origin of a web page, and writes it as browsers do (RFC 6454, 6.2).
pub(super) fn origin(text: &str) -> Result<String, String> {
    let malformed = || "must be an origin, as https://app.example.com or http://localhost:3000".to_owned();
    let uri: Uri = text.parse().map_err(|_| malformed())?;
    let (scheme, authority) = uri.scheme().zip(uri.authority()).ok_or_else(malformed)?;
    let written = format!("{scheme}://{authority}").to_ascii_lowercase();
    if authority.as_str().contains('@') || !text.eq_ignore_ascii_case(&written) {
        return Err(malformed());
    }
    let default_port = match scheme {
        scheme if *scheme == Scheme::HTTP => ":80",
        scheme if *scheme == Scheme::HTTPS => ":443",
        _ => return Err(malformed()),
    };
    Ok(written.strip_suffix(default_port).unwrap_or(&written).to_owned())
}

pub(super) fn share(text: &str) -> Result<f64, String> {
    let share = text.parse().ok().filter(|share| (0.0..=1.0).contains(share));
    share.ok_or_else(|| "must be a number from 0 to 1".to_owned())
}

/// Parses the address of a listener. A host name is refused: it may stand for several
/// addresses, of which only some are loopback.
pub(super) fn listen_address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| {
        let port = text.rsplit_once(':').map(|(_, port)| port).filter(|port| port.parse::<u16>().is_ok());
        let port = port.unwrap_or("PORT");
        format!(
            "must be an IP address and a port: 127.0.0.1:{port} or [::1]:{port} for clients on this machine, \
             0.0.0.0:{port} for all of this machine's IPv4 addresses"
        )
    })
}

/// Parses the filter of the log. Each word without `=` must be a level: [`EnvFilter`] takes
/// every other word for a target, so that a mistyped level would switch the log off.
pub(super) fn log_filter(text: &str) -> Result<String, String> {
    const FORM: &str = "write error, warn, info, debug, trace or off, and for single targets TARGET=LEVEL, such as \
                        info,milepost::server=warn";
    let is_word = |part: &str| part.chars().all(|c| c.is_alphanumeric() || matches!(c, '_' | '-' | ':'));
    let mut words = text.split(',').map(str::trim).filter(|part| !part.is_empty() && is_word(part));
    match words.find(|word| word.parse::<LevelFilter>().is_err()) {
        Some(word) => Err(format!("{word} is not a level: {FORM}")),
        None if EnvFilter::try_new(text).is_err() => Err(FORM.to_owned()),
        None => Ok(text.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trusted_proxy_is_an_address_or_a_range_in_its_ipv4_form_if_it_has_one() {
        for (text, range) in [
            ("10.0.0.1", "10.0.0.1/32"),
            ("10.0.0.0/8", "10.0.0.0/8"),
            ("2001:db8::1", "2001:db8::1/128"),
            ("2001:db8::/32", "2001:db8::/32"),
            ("::ffff:10.0.0.1", "10.0.0.1/32"),
            ("::ffff:10.0.0.0/104", "10.0.0.0/8"),
            ("0.0.0.0/0", "0.0.0.0/0"),
            ("::/0", "::/0"),
        ] {
            assert_eq!(network(text).map(|parsed| parsed.to_string()).as_deref(), Ok(range), "{text}");
        }
        for text in ["", "10.0.0.1:80", "10.0.0.0/33", "10.0.0.0/", "::ffff:10.0.0.0/95", "proxy.example.com"]
        {
            assert!(network(text).is_err(), "{text}");
        }
    }

    #[test]
    fn an_origin_is_written_as_browsers_write_it() {
        for (text, written) in [
            ("https://app.example.com", "https://app.example.com"),
            ("HTTPS://App.Example.com:443", "https://app.example.com"),
            ("http://localhost:80", "http://localhost"),
            ("http://localhost:3000", "http://localhost:3000"),
            ("http://[::1]:3000", "http://[::1]:3000"),
        ] {
            assert_eq!(origin(text).as_deref(), Ok(written), "{text}");
        }
        for text in ["", "*", "null", "app.example.com", "https://app.example.com/", "https://a@b", "ftp://a"]
        {
            assert!(origin(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_word_in_a_log_filter_is_a_level() {
        for fine in ["warn", "WARN", "off", "info,milepost::server=warn", "milepost=debug", ""] {
            assert_eq!(log_filter(fine).as_deref(), Ok(fine));
        }
        for bad in
            ["warning", "info,milepost", "milepost::server", "info,milepost=loud", "fatal", "=", "info,["]
        {
            let error = log_filter(bad).expect_err(bad);
            assert!(error.contains("error, warn, info, debug, trace"), "{bad}: {error}");
        }
    }
}
