//! Reads DATABASE_URL. Its parameters are those of libpq, as far as milepost knows them; the
//! others are refused by name, so that none is dropped silently. No error contains a part
//! of the URL that could be a password.

use std::path::{Path, PathBuf};

use percent_encoding::percent_decode_str;
use tokio_postgres::config::{Config, Host, SslMode, SslNegotiation};

/// Parameters that tokio-postgres reads as libpq does.
const PASSED_ON: [&str; 14] = [
    "application_name",
    "connect_timeout",
    "dbname",
    "host",
    "hostaddr",
    "keepalives",
    "keepalives_idle",
    "keepalives_interval",
    "keepalives_retries",
    "options",
    "password",
    "port",
    "tcp_user_timeout",
    "user",
];

/// Where to connect, and how the server is verified.
pub(super) struct Target {
    pub(super) config: Config,
    /// The file of the authorities; none for those of this system.
    pub(super) ca: Option<PathBuf>,
}

/// Reads the URL, beside the file of `--database-ca`. The errors are for the operator.
pub(super) fn read(url: &str, database_ca: Option<&Path>) -> Result<Target, String> {
    let (base, query) = split(url)?;
    let mut passed_on = String::new();
    let (mut ca, mut system) = (None, false);
    for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
        let (name, raw) = parameter.split_once('=').ok_or(
            "a parameter of DATABASE_URL has no value: write each as NAME=VALUE, and & in a value as %26",
        )?;
        let name = percent_decode_str(name).decode_utf8_lossy();
        let value = percent_decode_str(raw).decode_utf8_lossy();
        let raw = match (&*name, &*value) {
            ("sslrootcert", "system") => {
                system = true;
                continue;
            }
            ("sslrootcert", file) => {
                ca = Some(PathBuf::from(file));
                continue;
            }
            // milepost needs the primary, and tries all hosts at once.
            ("target_session_attrs", "any" | "read-write" | "primary") => continue,
            ("load_balance_hosts", "disable" | "random") => continue,
            ("target_session_attrs", "read-only" | "standby" | "prefer-standby") => {
                return Err(format!(
                    "target_session_attrs={value} in DATABASE_URL asks for a standby, and milepost needs the \
                     primary: remove it"
                ));
            }
            // `require` verifies certificate and host name.
            ("sslmode", "verify-ca" | "verify-full") => "require",
            ("sslmode", "disable" | "prefer" | "require")
            | ("channel_binding", "disable" | "prefer" | "require")
            | ("sslnegotiation", "postgres" | "direct") => raw,
            ("target_session_attrs", _) => return Err(unknown_value(&name, "any, read-write or primary")),
            ("load_balance_hosts", _) => return Err(unknown_value(&name, "disable or random")),
            ("sslmode", _) => {
                return Err(unknown_value(&name, "disable, prefer, require, verify-ca or verify-full"));
            }
            ("channel_binding", _) => return Err(unknown_value(&name, "disable, prefer or require")),
            ("sslnegotiation", _) => return Err(unknown_value(&name, "postgres or direct")),
            _ if PASSED_ON.contains(&&*name) => raw,
            _ => {
                return Err(format!(
                    "milepost does not know the parameter {name} of DATABASE_URL: remove it"
                ));
            }
        };
        passed_on.push_str(if passed_on.is_empty() { "?" } else { "&" });
        passed_on.push_str(&format!("{name}={raw}"));
    }
    if database_ca.is_some() && (system || ca.is_some()) {
        return Err("sslrootcert in DATABASE_URL contradicts --database-ca: remove one of them".to_owned());
    }
    let mut config: Config = format!("{base}{passed_on}").parse().map_err(|error| unreadable(&error))?;
    let ca = ca.or_else(|| database_ca.map(Path::to_owned));
    finish(&mut config, system || ca.is_some())?;
    Ok(Target { config, ca })
}

/// The URL up to its parameters, and the parameters.
fn split(url: &str) -> Result<(&str, &str), String> {
    let rest = url.strip_prefix("postgresql://").or_else(|| url.strip_prefix("postgres://"));
    let rest = rest.ok_or("DATABASE_URL does not begin with postgresql://")?;
    // A password may contain a question mark.
    let (_, rest) = rest.split_once('@').unwrap_or(("", rest));
    let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
    if place.contains('@') {
        return Err(
            "DATABASE_URL has an @ too many: write it as %40 within a user, a password or a name".to_owned()
        );
    }
    Ok((&url[..url.len() - rest.len() + place.len()], query))
}

fn unknown_value(name: &str, values: &str) -> String {
    format!("{name} in DATABASE_URL has an unknown value: use {values}")
}

fn unreadable(error: &tokio_postgres::Error) -> String {
    let cause = std::error::Error::source(error).map(ToString::to_string);
    format!("DATABASE_URL cannot be read: {}", cause.unwrap_or_else(|| error.to_string()))
}

/// Checks what depends on several parameters, and decides about TLS.
fn finish(config: &mut Config, verified: bool) -> Result<(), String> {
    let (hosts, addresses) = (config.get_hosts().len(), config.get_hostaddrs().len());
    let unnamed = config.get_hosts().iter().any(|host| matches!(host, Host::Tcp(name) if name.is_empty()));
    if hosts + addresses == 0 || unnamed {
        return Err("DATABASE_URL names no host: write it as postgresql://USER@HOST/DATABASE".to_owned());
    }
    if hosts > 0 && addresses > 0 && hosts != addresses {
        return Err("DATABASE_URL has not as many addresses in hostaddr as hosts".to_owned());
    }
    let ports = config.get_ports().len();
    if ports > 1 && ports != hosts.max(addresses) {
        return Err("DATABASE_URL has not as many ports as hosts: write each as HOST:PORT".to_owned());
    }
    if hosts == 0 {
        // TLS verifies the certificate against `host`, which `hostaddr` alone leaves empty.
        for address in config.get_hostaddrs().to_vec() {
            config.host(address.to_string());
        }
    }
    if config.get_hosts().iter().all(|host| matches!(host, Host::Unix(_))) {
        config.ssl_mode(SslMode::Disable);
    } else if verified {
        if config.get_ssl_mode() == SslMode::Disable {
            return Err(
                "sslmode=disable contradicts --database-ca and sslrootcert, which need TLS: remove one of \
                        them"
                    .to_owned(),
            );
        }
        config.ssl_mode(SslMode::Require);
    }
    if config.get_ssl_mode() == SslMode::Prefer && config.get_ssl_negotiation() == SslNegotiation::Direct {
        return Err("sslnegotiation=direct in DATABASE_URL needs sslmode=require".to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parameters(query: &str) -> Result<Target, String> {
        read(&format!("postgresql://milepost:secret@db1,db2/milepost{query}"), None)
    }

    #[test]
    fn what_libpq_calls_verification_is_require_here() {
        for (query, mode, ca) in [
            ("", SslMode::Prefer, None),
            ("?sslmode=disable", SslMode::Disable, None),
            ("?sslmode=verify-full", SslMode::Require, None),
            ("?sslmode=verify-ca&sslrootcert=%2Fetc%2Fa%20b.pem", SslMode::Require, Some("/etc/a b.pem")),
            ("?sslrootcert=ca.pem", SslMode::Require, Some("ca.pem")),
            ("?sslmode=verify-full&sslrootcert=system", SslMode::Require, None),
            ("?sslrootcert=system", SslMode::Require, None),
        ] {
            let target = parameters(query).expect(query);
            assert_eq!(
                (target.config.get_ssl_mode(), target.ca.as_deref()),
                (mode, ca.map(Path::new)),
                "{query}"
            );
        }
    }

    #[test]
    fn parameters_that_change_nothing_are_accepted_and_others_are_passed_on() {
        let query = "?target_session_attrs=primary&load_balance_hosts=random&connect_timeout=7\
                     &channel_binding=require&&options=-c%20x%3Dy";
        let Target { config, .. } = parameters(query).expect(query);
        assert_eq!(config.get_connect_timeout(), Some(&std::time::Duration::from_secs(7)));
        assert_eq!(config.get_channel_binding(), tokio_postgres::config::ChannelBinding::Require);
        assert_eq!(config.get_options(), Some("-c x=y"));
        assert_eq!(config.get_target_session_attrs(), tokio_postgres::config::TargetSessionAttrs::Any);
        assert_eq!((config.get_hosts().len(), config.get_password()), (2, Some(&b"secret"[..])));
    }

    #[test]
    fn a_password_may_contain_what_separates_parameters() {
        let Target { config, .. } =
            read("postgres://u:a?b/c@db/milepost?sslmode=disable", None).expect("a URL");
        assert_eq!(config.get_password(), Some(&b"a?b/c"[..]));
        assert_eq!((config.get_dbname(), config.get_ssl_mode()), (Some("milepost"), SslMode::Disable));
    }

    #[test]
    fn what_cannot_be_meant_is_refused_by_its_name_and_without_the_password() {
        for (query, name) in [
            ("?sslcert=client.pem", "parameter sslcert "),
            ("?sslmode=allow", "sslmode"),
            ("?channel_binding=yes", "channel_binding"),
            ("?target_session_attrs=read-only", "target_session_attrs=read-only"),
            ("?target_session_attrs=prefer-standby", "target_session_attrs=prefer-standby"),
            ("?target_session_attrs=x", "target_session_attrs"),
            ("?load_balance_hosts=all", "load_balance_hosts"),
            ("?sslnegotiation=direct", "sslnegotiation=direct"),
            ("?sslmode=disable&sslrootcert=ca.pem", "sslmode=disable"),
            ("?connect_timeout=soon", "connect_timeout"),
            ("?hostaddr=127.0.0.1", "hostaddr"),
            ("?port=1", "ports"),
            ("?secret", "no value"),
            ("?password=secret&secret", "no value"),
        ] {
            let error = parameters(query).err().expect(query);
            assert!(error.contains(name) && !error.contains("secret"), "{query}: {error}");
        }
        for (url, words) in [
            ("host=db password=secret", "postgresql://"),
            ("secret", "postgresql://"),
            ("postgresql://u:secret@/milepost", "no host"),
            ("postgresql://u:secret@:5432/milepost", "no host"),
            ("postgresql:///milepost", "no host"),
            ("postgresql://u:a@secret@db/milepost", "%40"),
            ("postgresql://u:secret/db", "port"),
        ] {
            let error = read(url, None).err().expect(url);
            assert!(error.contains(words) && !error.contains("secret"), "{url}: {error}");
        }
        for query in ["?sslrootcert=ca.pem", "?sslrootcert=system"] {
            let url = format!("postgresql://db/milepost{query}");
            let error = read(&url, Some(Path::new("ca.pem"))).err().expect(query);
            assert!(error.contains("sslrootcert") && error.contains("--database-ca"), "{error}");
        }
    }
}
