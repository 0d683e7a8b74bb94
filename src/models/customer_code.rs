//! How a provider names the customer of a new job: by id, or by the customer's code.
//!
//! A code is short, since people read it out, so that providers might guess codes. Therefore
//! unknown codes are counted for their provider, as failed log-ins are for their address.

use std::fmt;

use diesel::{data_types::PgInterval, prelude::*};
use diesel_async::RunQueryDsl;
use uuid::Uuid;

use super::{caller::Provider, duration, interval, log_in_throttle::LONGEST};
use crate::{
    db::Transaction,
    error::{Error, Resource, Result},
    schema::users,
};

/// Characters of a code, of 5 bits each.
const CHARS: usize = 10;
/// Crockford's base32, without the letters that are mistaken for digits or for each other.
const ALPHABET: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
/// Unknown codes of one provider before the next code has to wait.
const UNKNOWN_FREE: i32 = 100;

/// See migrations/2026-11-26-000008_log_in_throttle/up.sql.
mod sql {
    use diesel::sql_types::{Integer, Interval, Uuid};

    #[diesel::declare_sql_function]
    extern "SQL" {
        /// Returns how long the provider is blocked.
        fn customer_code_wait(provider_id: Uuid) -> Nullable<Interval>;

        /// Returns how long the provider is blocked, or NULL if the unknown code is counted.
        fn count_unknown_customer_code(
            provider_id: Uuid,
            free: Integer,
            longest: Interval,
        ) -> Nullable<Interval>;
    }
}

/// A code in its stored form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CustomerCode(String);

impl CustomerCode {
    /// Makes a new code. Fails only if the operating system provides no randomness.
    pub fn generate() -> Result<Self> {
        let random = getrandom::u64().map_err(|error| Error::internal(error.to_string()))?;
        Ok(Self::of_random(random))
    }

    fn of_random(random: u64) -> Self {
        let chars = (0..CHARS).map(|index| {
            let digit = usize::try_from(random >> (5 * index) & 31).unwrap_or_default();
            char::from(ALPHABET[digit])
        });
        Self(chars.collect())
    }

    /// Parses what a person typed: lower case, hyphens, and the letters that Crockford's
    /// base32 takes for digits. None if it is no code.
    pub fn parse(text: &str) -> Option<Self> {
        let typed = text.chars().filter(|char| *char != '-').map(|char| match char.to_ascii_uppercase() {
            'O' => '0',
            'I' | 'L' => '1',
            other => other,
        });
        let code: String = typed.take(CHARS + 1).collect();
        (code.len() == CHARS && code.bytes().all(|byte| ALPHABET.contains(&byte))).then_some(Self(code))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The key by which a request names a customer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CustomerKey {
    Id(Uuid),
    Code(CustomerCode),
}

/// The form in which error texts name the customer.
impl fmt::Display for CustomerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Id(id) => id.fmt(f),
            Self::Code(code) => f.write_str(code.as_str()),
        }
    }
}

impl CustomerKey {
    /// The field of the request that has this key.
    pub(super) fn field(&self) -> &'static str {
        match self {
            Self::Id(_) => "customer_id",
            Self::Code(_) => "customer_code",
        }
    }

    /// The id that the key names, of which there may be no customer; nil for an unknown code.
    /// Fails with [`Error::RateExceeded`] for a code after too many unknown ones.
    pub(super) async fn resolve(&self, tx: &mut Transaction<'_>, provider: Provider) -> Result<Uuid> {
        let code = match self {
            Self::Id(id) => return Ok(*id),
            Self::Code(code) => code,
        };
        blocked(diesel::select(sql::customer_code_wait(provider.id())).get_result(tx).await?)?;
        let query = users::table.filter(users::customer_code.eq(code.as_str())).select(users::id);
        Ok(query.first(tx).await.optional()?.unwrap_or_default())
    }

    /// Refuses a key that names no customer. For an id it fails with [`Error::NotFound`]. A
    /// code is counted.
    pub(super) async fn refuse(&self, tx: &mut Transaction<'_>, provider: Provider) -> Result<()> {
        match self {
            Self::Id(id) => Err(Error::not_found(Resource::Customer, id)),
            Self::Code(_) => {
                let longest = interval(LONGEST);
                let count = sql::count_unknown_customer_code(provider.id(), UNKNOWN_FREE, longest);
                blocked(diesel::select(count).get_result(tx).await?)
            }
        }
    }
}

fn blocked(wait: Option<PgInterval>) -> Result<()> {
    let what = "unknown customer codes of one provider";
    wait.map(duration).map_or(Ok(()), |retry_after| Err(Error::RateExceeded { what, retry_after }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_has_10_characters_of_which_none_is_mistaken_for_another() {
        assert_eq!(CustomerCode::of_random(0).as_str(), "0000000000");
        assert_eq!(CustomerCode::of_random(u64::MAX).as_str(), "ZZZZZZZZZZ");
        let code = CustomerCode::of_random(0x0003_1415_9265_3589);
        assert_eq!(CustomerCode::parse(code.as_str()), Some(code));
    }

    #[test]
    fn a_code_is_read_as_people_type_it() {
        for typed in ["ABC01-1XYZ9", "abc0i-lxyz9", "-a-b-c-o-1-1-x-y-z-9-"] {
            assert_eq!(CustomerCode::parse(typed).expect(typed).as_str(), "ABC011XYZ9", "{typed}");
        }
        for wrong in ["", "ABC011XYZ", "ABC011XYZ99", "ABC011XYZU", "ABC011 XYZ9", "ABC011XYZé"] {
            assert_eq!(CustomerCode::parse(wrong), None, "{wrong}");
        }
    }
}
