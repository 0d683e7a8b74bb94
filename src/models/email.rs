//! E-mail addresses: which are permitted, and which are the same.

use unicode_case_mapping::case_folded;
use unicode_general_category::{GeneralCategory, get_general_category};
use unicode_normalization::UnicodeNormalization as _;

use crate::{
    error::{check_text, quoted},
    limits::TEXT_CHARS,
};

/// Unicode never changes how an assigned character folds or is normalized
/// (<https://www.unicode.org/policies/stability_policy.html>). A key therefore stays the
/// same with newer tables, if no e-mail has a character that the tables of folding and
/// normalization do not know yet.
const _: () = {
    let assigned = unicode_general_category::UNICODE_VERSION.0;
    assert!(unicode_case_mapping::UNICODE_VERSION.0 >= assigned);
    assert!(unicode_normalization::UNICODE_VERSION.0 as u64 >= assigned);
    assert!(assigned == 16, "auth.proto names the version");
};

/// An e-mail address that a user may have: at least one character, `@`, at least one
/// character, at most [`TEXT_CHARS`] Unicode scalar values both as given and in its
/// [`EmailKey`], without white space, control, format, private-use and unassigned
/// characters. Nothing checks that the address exists.
#[derive(Clone, Debug)]
pub struct Email {
    text: String,
    key: EmailKey,
}

/// The form in which e-mails are unique, looked up and counted by the throttle of
/// log-ins: normalized (NFC of UAX #15) and folded by Unicode's simple case folding
/// (statuses C and S of CaseFolding.txt). It is the same on every locale.
///
/// It is made of any text, since a log-in with an e-mail that no user may have must do the
/// same work as one with an unknown e-mail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EmailKey(String);

impl Email {
    /// Refuses any other shape. The error describes the violation.
    pub fn new(text: String) -> Result<Self, String> {
        check_text(&text)?;
        let mut inner = text.chars();
        inner.next();
        inner.next_back();
        if text.chars().any(is_refused) || !inner.as_str().contains('@') {
            return Err(format!(
                "{} must be text, @, text, without white space, invisible and unassigned characters",
                quoted(&text)
            ));
        }
        let key = EmailKey::of(&text);
        if key.0.chars().count() > TEXT_CHARS {
            return Err(format!("{} must have at most {TEXT_CHARS} characters after NFC", quoted(&text)));
        }
        Ok(Self { text, key })
    }

    /// As given.
    pub(super) fn as_str(&self) -> &str {
        &self.text
    }

    pub(super) fn key(&self) -> &EmailKey {
        &self.key
    }
}

impl EmailKey {
    /// Makes the key of an e-mail, or of what was given as one.
    pub fn of(text: &str) -> Self {
        // Folding can leave a letter and an accent that have a composed form, such as H and
        // U+0331: only the small letter with this accent is a character of its own.
        Self(text.nfc().map(fold).nfc().collect())
    }

    /// A key that was read from the table `users`.
    pub(super) fn stored(key: String) -> Self {
        Self(key)
    }

    pub(super) fn as_str(&self) -> &str {
        &self.0
    }
}

/// Unicode's simple case folding, which maps one character to one.
fn fold(character: char) -> char {
    case_folded(character).and_then(|folded| char::from_u32(folded.get())).unwrap_or(character)
}

/// Whether no e-mail may contain the character. All white space is among these categories.
fn is_refused(character: char) -> bool {
    matches!(
        get_general_category(character),
        GeneralCategory::Control
            | GeneralCategory::Format
            | GeneralCategory::LineSeparator
            | GeneralCategory::ParagraphSeparator
            | GeneralCategory::SpaceSeparator
            | GeneralCategory::PrivateUse
            | GeneralCategory::Unassigned
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(text: &str) -> String {
        EmailKey::of(text).0
    }

    #[test]
    fn an_e_mail_has_text_on_both_sides_of_an_at_sign() {
        for fine in ["a@b", "@@@", "é@\u{1F9E0}", "e\u{301}@b", &format!("{}@b", "a".repeat(254))] {
            assert!(Email::new(fine.to_owned()).is_ok(), "{fine}");
        }
        for bad in ["", "@", "a@", "@b", "ab", &format!("{}@b", "a".repeat(255))] {
            assert!(Email::new(bad.to_owned()).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn an_e_mail_has_no_character_that_is_not_seen() {
        let white = ('\0'..=char::MAX).filter(|c| c.is_whitespace() || c.is_control());
        let refused = ['\u{ad}', '\u{200b}', '\u{200d}', '\u{202e}', '\u{2028}', '\u{2066}', '\u{feff}']
            .into_iter()
            .chain(['\u{e000}', '\u{10fffd}', '\u{378}', '\u{ffff}', '\u{e0041}'])
            .chain(white);
        for character in refused {
            let text = format!("a{character}b@c");
            let error = Email::new(text).expect_err(&format!("{character:?} is accepted"));
            assert!(!error.contains(character) || character == ' ', "{error:?}");
        }
    }

    #[test]
    fn a_key_has_at_most_as_many_characters_as_an_e_mail() {
        // NFC replaces this character by three.
        let grows = |count| format!("{}@b", "\u{1d160}".repeat(count));
        let longest = Email::new(grows(84)).expect("an e-mail");
        assert_eq!((longest.as_str().chars().count(), longest.key().0.chars().count()), (86, 254));
        assert!(Email::new(grows(85)).expect_err("too long").contains("256 characters after NFC"));
    }

    #[test]
    fn keys_are_folded_one_character_to_one() {
        for (given, folded) in [
            ("INFO@X.EXAMPLE", "info@x.example"),
            ("ÜÉÀ", "üéà"),
            ("ΟΔΟΣ", "οδοσ"),
            ("οδος", "οδοσ"),
            ("ẞ", "ß"),
            ("ß", "ß"),
            ("ſ", "s"),
            ("\u{212A}", "k"),
            ("Ⅷ", "ⅷ"),
            ("ǅ", "ǆ"),
            ("Ꭰ", "Ꭰ"),
            ("ꭰ", "Ꭰ"),
            ("𐐀", "𐐨"),
            // Folded only by the status T, for Turkic languages, or F, to several characters.
            ("ı", "ı"),
            ("İ", "İ"),
            ("ﬁ", "ﬁ"),
            ("ŉ", "ŉ"),
        ] {
            assert_eq!(key(given), folded, "{given}");
        }
        assert_ne!(key("straße"), key("strasse"));
    }

    #[test]
    fn keys_are_normalized_before_and_after_the_folding() {
        for (one, other) in [
            ("é", "e\u{301}"),
            ("É", "E\u{301}"),
            ("\u{212B}", "å"),
            ("İ", "I\u{307}"),
            ("\u{1E96}", "H\u{331}"),
            ("ǰ", "J\u{30C}"),
            ("ᾳ", "Α\u{345}"),
            ("q\u{323}\u{307}", "Q\u{307}\u{323}"),
            ("가", "\u{1100}\u{1161}"),
        ] {
            assert_eq!(key(one), key(other), "{one} {other}");
        }
        // Compatibility forms stay apart: only NFKC would unite them.
        assert_ne!(key("ａ"), key("a"));
    }

    /// For each character that changes, alone and before accents that compose with letters.
    #[test]
    fn a_key_is_its_own_key_and_that_of_every_canonically_equivalent_text() {
        let accents = ["", "\u{301}", "\u{307}", "\u{30C}", "\u{331}", "\u{345}", "\u{301}\u{345}"];
        let changes = |c: &char| fold(*c) != *c || c.to_string().nfd().ne([*c]);
        let hangul = '\u{ac00}'..='\u{d7a3}';
        let changing: Vec<char> =
            ('\0'..='\u{1ffff}').filter(|c| !hangul.contains(c)).filter(changes).collect();
        assert!(changing.len() > 2_000, "{}", changing.len());
        for character in changing {
            for accent in accents {
                let text = format!("{character}{accent}");
                let key = key(&text);
                assert_eq!(EmailKey::of(&key).0, key, "{}", text.escape_unicode());
                let decomposed: String = text.nfd().collect();
                assert_eq!(EmailKey::of(&decomposed).0, key, "{}", text.escape_unicode());
            }
        }
    }
}
