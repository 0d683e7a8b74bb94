-- Watch tokens: secrets with which people who have no account watch one job, and
-- can do nothing else.

CREATE TABLE watch_tokens (
    id uuid NOT NULL,
    job_id uuid NOT NULL,
    -- The job's provider, who created the token. It is valid only while that user is.
    user_id uuid NOT NULL,
    secret_hash bytea NOT NULL,
    secret_prefix text NOT NULL,
    note text NOT NULL,
    expires_at timestamptz NOT NULL,
    revoked_at timestamptz,
    last_used_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT watch_tokens_pkey PRIMARY KEY (id),
    CONSTRAINT watch_tokens_job_id_fkey FOREIGN KEY (job_id) REFERENCES jobs (id),
    CONSTRAINT watch_tokens_user_id_fkey FOREIGN KEY (user_id) REFERENCES users (id),
    CONSTRAINT watch_tokens_secret_hash_key UNIQUE (secret_hash),
    CONSTRAINT watch_tokens_secret_hash_check CHECK (octet_length(secret_hash) = 32),
    CONSTRAINT watch_tokens_secret_prefix_check CHECK (char_length(secret_prefix) BETWEEN 1 AND 16),
    CONSTRAINT watch_tokens_note_check CHECK (char_length(note) <= 256)
);

CREATE INDEX watch_tokens_job_id_idx ON watch_tokens (job_id, created_at, id);
CREATE INDEX watch_tokens_user_id_idx ON watch_tokens (user_id);
CREATE INDEX watch_tokens_ended_at_idx ON watch_tokens (least(revoked_at, expires_at));

CREATE TRIGGER watch_tokens_count_added AFTER INSERT ON watch_tokens REFERENCING NEW TABLE AS changed
    FOR EACH STATEMENT EXECUTE FUNCTION count_usage('watch_tokens', 'user_id');
CREATE TRIGGER watch_tokens_count_removed AFTER DELETE ON watch_tokens REFERENCING OLD TABLE AS changed
    FOR EACH STATEMENT EXECUTE FUNCTION count_usage('watch_tokens', 'user_id');

CREATE TRIGGER watch_tokens_set_updated_at BEFORE UPDATE ON watch_tokens
    FOR EACH ROW WHEN (NEW.last_used_at IS NOT DISTINCT FROM OLD.last_used_at)
    EXECUTE FUNCTION set_updated_at();

CREATE TRIGGER watch_tokens_keep_revocation BEFORE UPDATE OF revoked_at ON watch_tokens
    FOR EACH ROW WHEN (OLD.revoked_at IS NOT NULL AND NEW.revoked_at IS DISTINCT FROM OLD.revoked_at)
    EXECUTE FUNCTION refuse_change_of_revocation();

-- All credentials, for the one query that authenticates a secret, whichever kind it is,
-- and for the one that confirms those in use. A watch token belongs to the user who made
-- it: when that user is disabled, the token is refused.
CREATE VIEW credentials AS
    SELECT id, 'session' AS kind, secret_hash, user_id, NULL::uuid AS job_id,
        NULL::api_key_scope[] AS scopes, expires_at, revoked_at
    FROM sessions
    UNION ALL
    SELECT id, 'api_key', key_hash, user_id, NULL, scopes, expires_at, revoked_at
    FROM api_keys
    UNION ALL
    SELECT id, 'watch_token', secret_hash, user_id, job_id, NULL, expires_at, revoked_at
    FROM watch_tokens;
