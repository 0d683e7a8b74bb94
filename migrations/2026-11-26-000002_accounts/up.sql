-- Accounts: users, and the credentials with which they authenticate: sessions
-- and API keys.

CREATE TYPE user_role AS ENUM ('customer', 'provider');

CREATE TABLE users (
    id uuid NOT NULL,
    role user_role NOT NULL,
    -- As given.
    email text NOT NULL,
    -- The form in which e-mails are compared. The server makes it (src/models/email.rs),
    -- since Postgres's lower case depends on the database's locale. The collation "C"
    -- compares bytes, so that no update of a locale's library damages the index.
    email_key text COLLATE "C" NOT NULL,
    password_hash text NOT NULL,
    first_name text NOT NULL,
    last_name text NOT NULL,
    disabled_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    updated_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT users_pkey PRIMARY KEY (id),
    -- The target of foreign keys that admit users of one role only.
    CONSTRAINT users_id_role_key UNIQUE (id, role),
    CONSTRAINT users_email_key_key UNIQUE (email_key),
    -- The server refuses more: see Email::new. Classes such as [:space:] depend on the locale.
    CONSTRAINT users_email_check CHECK (char_length(email) BETWEEN 3 AND 256
        AND email ~ '^[^\u0001-\u0020\u007F-\u00A0]+@[^\u0001-\u0020\u007F-\u00A0]+$'),
    CONSTRAINT users_email_key_check CHECK (char_length(email_key) BETWEEN 3 AND 256),
    CONSTRAINT users_first_name_check CHECK (char_length(first_name) <= 256),
    CONSTRAINT users_last_name_check CHECK (char_length(last_name) <= 256)
);

CREATE TRIGGER users_set_updated_at BEFORE UPDATE ON users
    FOR EACH ROW EXECUTE FUNCTION set_updated_at();

-- Whether a credential is valid: a session, an API key or a watch token. The expiry is
-- compared with the present, not with the beginning of the transaction: an update that
-- waited for a row's lock then finds what the transaction that held the lock has set.
CREATE FUNCTION is_valid(revoked_at timestamptz, expires_at timestamptz) RETURNS boolean LANGUAGE sql AS $$
    SELECT revoked_at IS NULL AND (expires_at IS NULL OR expires_at > clock_timestamp());
$$;

-- A credential whose `revoked_at` is set is refused whatever the time there says, also
-- by a standby whose clock is behind. Therefore no update takes a revocation back.
CREATE FUNCTION refuse_change_of_revocation() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% refused: a revocation in % never changes', TG_OP, TG_TABLE_NAME
        USING ERRCODE = 'restrict_violation';
END;
$$;

CREATE TABLE sessions (
    id uuid NOT NULL,
    user_id uuid NOT NULL,
    secret_hash bytea NOT NULL,
    expires_at timestamptz NOT NULL,
    revoked_at timestamptz,
    last_used_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    updated_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT sessions_pkey PRIMARY KEY (id),
    CONSTRAINT sessions_user_id_fkey FOREIGN KEY (user_id) REFERENCES users (id),
    CONSTRAINT sessions_secret_hash_key UNIQUE (secret_hash),
    CONSTRAINT sessions_secret_hash_check CHECK (octet_length(secret_hash) = 32)
);

CREATE INDEX sessions_user_id_idx ON sessions (user_id, expires_at);

CREATE TRIGGER sessions_set_updated_at BEFORE UPDATE ON sessions
    FOR EACH ROW EXECUTE FUNCTION set_updated_at();

CREATE TRIGGER sessions_keep_revocation BEFORE UPDATE OF revoked_at ON sessions
    FOR EACH ROW WHEN (OLD.revoked_at IS NOT NULL AND NEW.revoked_at IS DISTINCT FROM OLD.revoked_at)
    EXECUTE FUNCTION refuse_change_of_revocation();

CREATE TYPE api_key_scope AS ENUM ('read', 'append', 'manage');

CREATE TABLE api_keys (
    id uuid NOT NULL,
    user_id uuid NOT NULL,
    key_hash bytea NOT NULL,
    key_prefix text NOT NULL,
    note text NOT NULL,
    scopes api_key_scope[] NOT NULL,
    expires_at timestamptz,
    revoked_at timestamptz,
    last_used_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    updated_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT api_keys_pkey PRIMARY KEY (id),
    CONSTRAINT api_keys_user_id_fkey FOREIGN KEY (user_id) REFERENCES users (id),
    CONSTRAINT api_keys_key_hash_key UNIQUE (key_hash),
    CONSTRAINT api_keys_key_hash_check CHECK (octet_length(key_hash) = 32),
    CONSTRAINT api_keys_key_prefix_check CHECK (char_length(key_prefix) BETWEEN 1 AND 16),
    CONSTRAINT api_keys_note_check CHECK (char_length(note) <= 256),
    CONSTRAINT api_keys_scopes_check CHECK (cardinality(scopes) BETWEEN 1 AND 3 AND array_position(scopes, NULL) IS NULL)
);

CREATE INDEX api_keys_user_id_idx ON api_keys (user_id, created_at, id);

CREATE TRIGGER api_keys_set_updated_at BEFORE UPDATE ON api_keys
    FOR EACH ROW EXECUTE FUNCTION set_updated_at();

CREATE TRIGGER api_keys_keep_revocation BEFORE UPDATE OF revoked_at ON api_keys
    FOR EACH ROW WHEN (OLD.revoked_at IS NOT NULL AND NEW.revoked_at IS DISTINCT FROM OLD.revoked_at)
    EXECUTE FUNCTION refuse_change_of_revocation();
