//! Versions of a configuration: strict SemVer 2.0, its precedence as bytes that Postgres
//! can sort, and which version is the latest.

use diesel::{dsl::Desc, prelude::*};
use semver::Version;

use crate::schema::job_configurations as columns;

/// Orders the versions of a tag so that the first one is the latest: the highest release,
/// or, if there is no release, the highest pre-release. Versions that differ only in build
/// metadata have equal precedence, and the one that was created later is the latest.
pub(super) fn latest_first()
-> (Desc<columns::release>, Desc<columns::precedence>, Desc<columns::created_at>, Desc<columns::id>) {
    (columns::release.desc(), columns::precedence.desc(), columns::created_at.desc(), columns::id.desc())
}

/// Parses a version; none if the text is not strict SemVer 2.0, or has a number beyond 64
/// bits, which SemVer permits.
pub fn parse(text: &str) -> Option<Version> {
    Version::parse(text).ok()
}

/// Encodes a version as bytes whose lexicographic order is the precedence of
/// SemVer 2.0, section 11. Versions that differ only in build metadata have equal
/// bytes.
///
/// The bytes are the three numbers, then 0xFF for a release, or else the
/// identifiers of the pre-release. So a release sorts after its pre-releases. An
/// identifier is encoded as follows:
///
/// - A numeric one: 1, the count of its digits, its digits. There are no leading
///   zeros, so the longer number is the larger one; SemVer sets no limit to it.
/// - Any other: 2, its ASCII characters, 0. The 0 sorts before every character.
///
/// Where one pre-release begins with all identifiers of another, the shorter one
/// has fewer bytes and sorts first.
pub fn precedence(version: &Version) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(32 + version.pre.len() * 2);
    for number in [version.major, version.minor, version.patch] {
        bytes.extend(number.to_be_bytes());
    }
    if version.pre.is_empty() {
        bytes.push(0xFF);
        return bytes;
    }
    for identifier in version.pre.split('.') {
        if identifier.bytes().all(|byte| byte.is_ascii_digit()) {
            bytes.push(1);
            bytes.extend((identifier.len() as u64).to_be_bytes());
            bytes.extend(identifier.as_bytes());
        } else {
            bytes.push(2);
            bytes.extend(identifier.as_bytes());
            bytes.push(0);
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(text: &str) -> Version {
        parse(text).expect(text)
    }

    #[test]
    fn the_bytes_sort_by_the_precedence_of_semver() {
        let numbers = ["0.0.0", "0.0.1", "0.1.0", "1.0.0", "1.0.255", "1.0.256", "1.9.0", "1.10.0"];
        let largest = "18446744073709551615.0.0";
        let identifiers = [
            "0",
            "1",
            "2",
            "9",
            "10",
            "255",
            "256",
            "18446744073709551615",
            "18446744073709551616",
            "99999999999999999999999999999999999999999999",
            "-",
            "--",
            "-1",
            "0a",
            "00a",
            "1-",
            "10a",
            "A",
            "Z",
            "a",
            "a-",
            "a0",
            "aa",
            "alpha",
            "beta",
            "rc",
            "rc1",
            "z",
        ];
        let mut pre_releases = vec![String::new()];
        for first in identifiers {
            pre_releases.push(format!("-{first}"));
            for second in identifiers {
                pre_releases.push(format!("-{first}.{second}"));
            }
            pre_releases.push(format!("-{first}.0.a"));
            pre_releases.push(format!("-{first}.0.0.0"));
        }
        let mut versions: Vec<Version> = Vec::new();
        for number in numbers.into_iter().chain([largest]) {
            for build in ["", "+b", "+001.-"] {
                versions.push(version(&format!("{number}{build}")));
                versions.push(version(&format!("{number}-rc.1{build}")));
            }
        }
        for pre_release in &pre_releases {
            versions.push(version(&format!("1.0.0{pre_release}")));
        }
        let versions: Vec<_> = versions.iter().map(|version| (version, precedence(version))).collect();
        for (a, a_bytes) in &versions {
            for (b, b_bytes) in &versions {
                assert_eq!(a_bytes.cmp(b_bytes), a.cmp_precedence(b), "{a} and {b}");
            }
        }
    }

    #[test]
    fn text_that_is_not_strict_semver_is_refused() {
        let refused = [
            "",
            "1",
            "1.0",
            "1.0.0.0",
            "v1.0.0",
            "01.0.0",
            "1.00.0",
            "1.0.0-01",
            "1.0.0-",
            "1.0.0-a..b",
            "1.0.0+",
            "1.0.0-ä",
            " 1.0.0",
            "1.0.0 ",
            "1.x.0",
            "*",
            "-1.0.0",
            "1.0.0-a_b",
            "18446744073709551616.0.0",
            "١.٠.٠",
        ];
        for text in refused {
            assert_eq!(parse(text), None, "{text}");
        }
        for text in ["0.0.0", "1.0.0-0a", "1.0.0--", "1.0.0+001", "1.0.0-x.7.z.92+exp.sha.5114f85"] {
            parse(text).expect(text);
        }
    }
}
