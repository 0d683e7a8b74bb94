//! Secrets and passwords: their format, their stored hashes, and `Debug` without their
//! content.

use std::fmt;

use sha2::{Digest as _, Sha256};

use crate::{
    error::{Error, Result},
    limits::{PASSWORD_MAX_BYTES, PASSWORD_MIN_BYTES},
};

const BASE62: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
/// Random bytes of a secret, and the base62 characters that encode them.
const RANDOM_BYTES: usize = 32;
const RANDOM_CHARS: usize = 43;
/// Base62 characters that encode a CRC-32.
const CHECKSUM_CHARS: usize = 6;
/// Characters of a secret that are shown, so that people can tell secrets apart.
const DISPLAY_CHARS: usize = 8;

/// The kind of credential that a secret belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SecretKind {
    Session,
    ApiKey,
    WatchToken,
}

impl SecretKind {
    const ALL: [Self; 3] = [Self::Session, Self::ApiKey, Self::WatchToken];

    fn prefix(self) -> &'static str {
        match self {
            Self::Session => "mps_",
            Self::ApiKey => "mpk_",
            Self::WatchToken => "mpw_",
        }
    }
}

/// A secret: a prefix, 43 base62 characters of 256 random bits, and 6 of the CRC-32 of
/// all before. By this format secret scanners recognise a leaked secret and its origin
/// (github.blog, "Behind GitHub's new authentication token formats"). A mistyped or
/// foreign secret is refused without a query.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret {
    kind: SecretKind,
    text: String,
}

impl Secret {
    /// Makes a new secret. Fails only if the operating system provides no randomness.
    pub fn generate(kind: SecretKind) -> Result<Self> {
        let mut random = [0; RANDOM_BYTES];
        getrandom::fill(&mut random).map_err(|error| Error::internal(error.to_string()))?;
        Ok(Self::of_random(kind, random))
    }

    fn of_random(kind: SecretKind, random: [u8; RANDOM_BYTES]) -> Self {
        let mut text = kind.prefix().to_owned();
        text.push_str(&base62(random, RANDOM_CHARS));
        text.push_str(&checksum(&text));
        Self { kind, text }
    }

    /// Parses what a caller sent; none if it does not have the format.
    pub fn parse(text: &str) -> Option<Self> {
        let kind = SecretKind::ALL.into_iter().find(|kind| text.starts_with(kind.prefix()))?;
        let body = &text[kind.prefix().len()..];
        if body.len() != RANDOM_CHARS + CHECKSUM_CHARS || !body.bytes().all(|b| b.is_ascii_alphanumeric()) {
            return None;
        }
        let (signed, sum) = text.split_at(text.len() - CHECKSUM_CHARS);
        (checksum(signed) == sum).then(|| Self { kind, text: text.to_owned() })
    }

    /// The kind of credential that the secret belongs to.
    pub fn kind(&self) -> SecretKind {
        self.kind
    }

    /// The hash that is stored. A fast hash is enough, because 256 random bits cannot
    /// be guessed.
    pub fn hash(&self) -> SecretHash {
        SecretHash(Sha256::digest(&self.text).into())
    }

    /// The first characters, for display.
    pub fn display_prefix(&self) -> &str {
        &self.text[..DISPLAY_CHARS]
    }

    /// The text of the secret, for the one answer that sends it to its owner.
    pub fn reveal(self) -> String {
        self.text
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secret({}…)", self.kind.prefix())
    }
}

/// SHA-256 of a secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SecretHash([u8; 32]);

impl SecretHash {
    /// The bytes that are stored.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// A password of [`PASSWORD_MIN_BYTES`] to [`PASSWORD_MAX_BYTES`] bytes of UTF-8
/// without NUL. bcrypt reads at most 72 bytes, including a closing NUL, and takes a
/// NUL inside the password for the end.
#[derive(Clone, PartialEq, Eq)]
pub struct Password(String);

impl Password {
    /// Refuses any other text. The error describes the violation and does not quote
    /// the password.
    pub fn new(text: String) -> Result<Self, String> {
        if !(PASSWORD_MIN_BYTES..=PASSWORD_MAX_BYTES).contains(&text.len()) {
            return Err(format!("must have {PASSWORD_MIN_BYTES} to {PASSWORD_MAX_BYTES} bytes in UTF-8"));
        }
        if text.contains('\0') {
            return Err("must not contain NUL".to_owned());
        }
        Ok(Self(text))
    }

    /// The UTF-8 bytes, for hashing.
    pub fn as_bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Password(…)")
    }
}

/// bcrypt's hash of a password, in bcrypt's text form. `Debug` does not print it,
/// because weak passwords can be guessed from it.
#[derive(Clone, PartialEq, Eq)]
pub struct PasswordHash(String);

impl PasswordHash {
    /// Takes the text that bcrypt returned.
    pub fn new(text: String) -> Self {
        Self(text)
    }

    /// The text, to store it and to verify a password.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for PasswordHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PasswordHash(…)")
    }
}

fn checksum(text: &str) -> String {
    base62(crc32fast::hash(text.as_bytes()).to_be_bytes(), CHECKSUM_CHARS)
}

/// Encodes a big-endian number in `chars` base62 digits.
fn base62<const N: usize>(mut number: [u8; N], chars: usize) -> String {
    let mut digits = vec![b'0'; chars];
    for digit in digits.iter_mut().rev() {
        let mut remainder = 0;
        for byte in &mut number {
            let value = remainder << 8 | usize::from(*byte);
            *byte = u8::try_from(value / 62).unwrap_or(u8::MAX);
            remainder = value % 62;
        }
        *digit = BASE62[remainder];
    }
    digits.into_iter().map(char::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_generated_secret_has_the_format_and_parses_to_the_same_hash() {
        for (kind, prefix) in [(SecretKind::Session, "mps_"), (SecretKind::ApiKey, "mpk_")] {
            let secret = Secret::generate(kind).expect("randomness");
            assert_eq!(secret.text.len(), 4 + 49);
            assert!(secret.text.starts_with(prefix));
            assert_eq!(secret.display_prefix(), &secret.text[..8]);
            let parsed = Secret::parse(&secret.text).expect("the format of a secret");
            assert_eq!(parsed.kind(), kind);
            assert_eq!(parsed.hash(), secret.hash());
            assert_ne!(secret, Secret::generate(kind).expect("randomness"));
        }
    }

    #[test]
    fn the_format_never_changes() {
        // Secrets that users have must stay valid in later versions.
        let zero = Secret::of_random(SecretKind::ApiKey, [0; 32]);
        assert_eq!(zero.text, format!("mpk_{}34O1xt", "0".repeat(43)));
        let most = Secret::of_random(SecretKind::Session, [255; 32]);
        assert_eq!(most.text, "mps_yhjskwdA6OZ1AL1YmHWZWm8LLG7HjnuCA2j5rOw8Xp10kbN2i");
        assert_eq!(most.hash().as_bytes()[..4], [0x22, 0xaf, 0xcf, 0xbe]);
        assert_eq!(base62([0xff; 4], 6), "4gfFC3");
        assert_eq!(base62([61], 2), "0z");
        assert_eq!(base62([62], 2), "10");
    }

    #[test]
    fn mistyped_and_foreign_secrets_are_refused() {
        let secret = Secret::generate(SecretKind::ApiKey).expect("randomness").reveal();
        let cut = &secret[..secret.len() - 1];
        let longer = format!("{secret}0");
        let other_kind = secret.replacen("mpk_", "mps_", 1);
        let foreign = format!("ghp_{}", &secret[4..]);
        let wide = "mpk_é".to_owned() + &secret[6..];
        for bad in ["", "mpk_", "mps_", cut, &longer, &other_kind, &foreign, &wide, &"é".repeat(30)] {
            assert_eq!(Secret::parse(bad), None, "{bad}");
        }
        for at in 4..secret.len() {
            let mut typo = secret.clone().into_bytes();
            typo[at] = if typo[at] == b'x' { b'y' } else { b'x' };
            assert_eq!(Secret::parse(std::str::from_utf8(&typo).expect("ASCII")), None, "at {at}");
        }
    }

    #[test]
    fn passwords_are_bounded_in_bytes_and_have_no_nul() {
        for fine in ["12345678", &"é".repeat(35), &"x".repeat(71), "with space", "\u{1F9E0}\u{1F9E0}"] {
            assert!(Password::new((*fine).to_owned()).is_ok(), "{fine}");
        }
        for bad in ["", "1234567", &"x".repeat(72), &"é".repeat(36), "1234\x005678"] {
            let description = Password::new((*bad).to_owned()).expect_err(bad);
            assert!(bad.is_empty() || !description.contains(bad));
        }
    }

    #[test]
    fn debug_prints_no_secret_and_no_password() {
        let secret = Secret::generate(SecretKind::Session).expect("randomness");
        assert_eq!(format!("{secret:?}"), "Secret(mps_…)");
        let password = Password::new("hunter2hunter2".to_owned()).expect("a password");
        assert_eq!(format!("{password:?}"), "Password(…)");
        assert_eq!(format!("{:?}", PasswordHash::new("$2b$".to_owned())), "PasswordHash(…)");
    }
}
