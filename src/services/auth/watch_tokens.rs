//! The message for a watch token.

use crate::{models::watch_token::WatchToken, pb, proto_enums::timestamp};

impl From<WatchToken> for pb::WatchToken {
    fn from(token: WatchToken) -> Self {
        Self {
            id: token.id.to_string(),
            job_id: token.job_id.to_string(),
            secret_prefix: token.secret_prefix,
            note: token.note,
            expires_at: Some(timestamp(token.expires_at)),
            last_used_at: token.last_used_at.map(timestamp),
            created_at: Some(timestamp(token.created_at)),
            revoked_at: token.revoked_at.map(timestamp),
            updated_at: Some(timestamp(token.updated_at)),
        }
    }
}
