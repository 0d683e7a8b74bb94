-- Accounts: users, the credentials with which they authenticate (sessions and API
-- keys), and what each user has and is counted against a quota.

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
    -- What a provider names the customer by. The server makes it of 50 random bits, so that
    -- of ten million customers two get the same code with a probability of 4 %: the second
    -- insert then fails, and succeeds when it is repeated.
    customer_code text COLLATE "C",
    disabled_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT users_pkey PRIMARY KEY (id),
    -- The target of foreign keys that admit users of one role only.
    CONSTRAINT users_id_role_key UNIQUE (id, role),
    CONSTRAINT users_email_key_key UNIQUE (email_key),
    -- The server refuses more: see Email::new. Classes such as [:space:] depend on the locale.
    CONSTRAINT users_email_check CHECK (char_length(email) BETWEEN 3 AND 256
        AND email ~ '^[^\u0001-\u0020\u007F-\u00A0]+@[^\u0001-\u0020\u007F-\u00A0]+$'),
    CONSTRAINT users_email_key_check CHECK (char_length(email_key) BETWEEN 3 AND 256),
    CONSTRAINT users_first_name_check CHECK (char_length(first_name) <= 256),
    CONSTRAINT users_last_name_check CHECK (char_length(last_name) <= 256),
    CONSTRAINT users_customer_code_key UNIQUE (customer_code),
    CONSTRAINT users_customer_code_check CHECK (customer_code ~ '^[0-9A-HJKMNP-TV-Z]{10}$'),
    CONSTRAINT users_customer_code_role_check CHECK ((customer_code IS NOT NULL) = (role = 'customer'))
);

CREATE TRIGGER users_set_updated_at BEFORE UPDATE ON users
    FOR EACH ROW EXECUTE FUNCTION set_updated_at();

-- What each user has, for the quotas.
--
-- A transaction that adds something locks its user's row, compares, and adds to it
-- (settle_usage, and triggers of the tables that are counted). So no two transactions take
-- the last place, on however many servers. Whoever takes something away, or closes a job,
-- only inserts into usage_changes, and never waits for that lock: the append of all tenants,
-- which closes jobs, must not wait for a transaction of one of them, nor must retention and
-- the removal of ended credentials. Whoever locks the row next takes the changes over.
--
-- Locks: no transaction takes a row of jobs, job_states, events, event_log, sessions, api_keys
-- or watch_tokens that another one can hold after a row of user_usage, with one exception: a
-- log-in beyond the quota of sessions, which ends the user's oldest sessions. Whoever locks
-- those rows takes no row of user_usage after them. And no transaction locks the rows of two
-- users, except settle_some_usage, which leaves out what is locked. So none deadlock.
CREATE TABLE user_usage (
    user_id uuid NOT NULL,
    configurations bigint NOT NULL DEFAULT 0,
    open_jobs bigint NOT NULL DEFAULT 0,
    -- Ended keys and tokens count until they are removed.
    api_keys bigint NOT NULL DEFAULT 0,
    watch_tokens bigint NOT NULL DEFAULT 0,
    -- The bytes of the user's jobs, less the bytes of events that retention removed. The
    -- bytes that were appended are in event_usage.
    stored_bytes bigint NOT NULL DEFAULT 0,
    CONSTRAINT user_usage_pkey PRIMARY KEY (user_id),
    CONSTRAINT user_usage_user_id_fkey FOREIGN KEY (user_id) REFERENCES users (id)
-- The free space in each page keeps the updates heap-only.
) WITH (fillfactor = 50);

CREATE FUNCTION users_make_usage() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO user_usage (user_id) SELECT id FROM added;
    RETURN NULL;
END;
$$;

CREATE TRIGGER users_make_usage AFTER INSERT ON users REFERENCING NEW TABLE AS added
    FOR EACH STATEMENT EXECUTE FUNCTION users_make_usage();

-- Changes that are not in user_usage yet. Without a foreign key, whose check would lock a
-- row of users.
CREATE TABLE usage_changes (
    number bigint NOT NULL GENERATED ALWAYS AS IDENTITY,
    user_id uuid NOT NULL,
    configurations bigint NOT NULL DEFAULT 0,
    open_jobs bigint NOT NULL DEFAULT 0,
    api_keys bigint NOT NULL DEFAULT 0,
    watch_tokens bigint NOT NULL DEFAULT 0,
    stored_bytes bigint NOT NULL DEFAULT 0,
    CONSTRAINT usage_changes_pkey PRIMARY KEY (number)
);

CREATE INDEX usage_changes_user_id_idx ON usage_changes (user_id, number);

-- What each user's events come to. Servers add to it once a second, outside of the
-- transactions that append. Its rows are not those of user_usage, so that no server waits
-- for the transaction of a user before it writes what all others have appended.
CREATE TABLE event_usage (
    user_id uuid NOT NULL,
    stored_bytes bigint NOT NULL,
    -- The UTC day, by the database's clock, in which these events were appended.
    day date NOT NULL,
    day_events bigint NOT NULL,
    CONSTRAINT event_usage_pkey PRIMARY KEY (user_id),
    CONSTRAINT event_usage_user_id_fkey FOREIGN KEY (user_id) REFERENCES users (id),
    CONSTRAINT event_usage_stored_bytes_check CHECK (stored_bytes >= 0),
    CONSTRAINT event_usage_day_events_check CHECK (day_events >= 0)
) WITH (fillfactor = 50);

CREATE FUNCTION utc_day() RETURNS date LANGUAGE sql AS $$
    SELECT (clock_timestamp() AT TIME ZONE 'UTC')::date;
$$;

-- Takes over some changes of users, whose rows of user_usage the caller has locked.
CREATE FUNCTION take_over_usage(user_ids uuid[], most_changes integer) RETURNS void LANGUAGE sql AS $$
    WITH taken AS (
        DELETE FROM usage_changes WHERE number IN (
            SELECT number FROM usage_changes WHERE user_id = ANY (user_ids) LIMIT most_changes)
        RETURNING user_id, configurations, open_jobs, api_keys, watch_tokens, stored_bytes),
    summed AS (
        SELECT user_id, sum(configurations)::bigint AS configurations, sum(open_jobs)::bigint AS open_jobs,
            sum(api_keys)::bigint AS api_keys, sum(watch_tokens)::bigint AS watch_tokens,
            sum(stored_bytes)::bigint AS stored_bytes
        FROM taken GROUP BY user_id)
    UPDATE user_usage AS usage SET
        configurations = usage.configurations + summed.configurations,
        open_jobs = usage.open_jobs + summed.open_jobs,
        api_keys = usage.api_keys + summed.api_keys,
        watch_tokens = usage.watch_tokens + summed.watch_tokens,
        stored_bytes = usage.stored_bytes + summed.stored_bytes
    FROM summed WHERE usage.user_id = summed.user_id;
$$;

-- Locks a user's row, takes over some changes, and returns what the user has. If there
-- are more changes, the caller calls again before it refuses anything.
CREATE FUNCTION settle_usage(
    settled uuid,
    OUT configurations bigint,
    OUT open_jobs bigint,
    OUT api_keys bigint,
    OUT watch_tokens bigint,
    OUT stored_bytes bigint,
    OUT more boolean
) LANGUAGE plpgsql AS $$
#variable_conflict use_column
BEGIN
    PERFORM FROM user_usage WHERE user_id = settled FOR NO KEY UPDATE;
    PERFORM take_over_usage(ARRAY[settled], 1000);
    SELECT usage.configurations, usage.open_jobs, usage.api_keys, usage.watch_tokens,
        usage.stored_bytes + coalesce(appended.stored_bytes, 0),
        EXISTS (SELECT FROM usage_changes WHERE user_id = settled)
    INTO STRICT configurations, open_jobs, api_keys, watch_tokens, stored_bytes, more
    FROM user_usage AS usage LEFT JOIN event_usage AS appended ON appended.user_id = usage.user_id
    WHERE usage.user_id = settled;
END;
$$;

-- Takes over changes of users who add nothing themselves, so that they do not pile up.
-- Leaves out users whose rows are locked. Returns true if there may be more.
CREATE FUNCTION settle_some_usage(most_changes integer) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    free uuid[];
BEGIN
    free := ARRAY(
        SELECT user_id FROM user_usage
        WHERE user_id = ANY (ARRAY(SELECT user_id FROM usage_changes ORDER BY number LIMIT most_changes))
        FOR NO KEY UPDATE SKIP LOCKED);
    PERFORM take_over_usage(free, most_changes);
    RETURN cardinality(free) > 0 AND EXISTS (SELECT FROM usage_changes);
END;
$$;

-- Adds the appended events of some users, and returns for each of them, also for those with
-- nothing to add, what all servers have added so far.
--
-- Rows are locked in the order of the arrays, which must be that of the users' ids.
CREATE FUNCTION add_event_usage(
    user_ids uuid[],
    bytes bigint[],
    events bigint[]
) RETURNS TABLE (user_id uuid, stored_bytes bigint, day_events bigint, day_left interval) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    today date := utc_day();
BEGIN
    INSERT INTO event_usage AS usage (user_id, stored_bytes, day, day_events)
    SELECT given.user_id, given.bytes, today, given.events
    FROM unnest(user_ids, bytes, events) WITH ORDINALITY AS given (user_id, bytes, events, ordinal)
    JOIN users ON users.id = given.user_id
    WHERE given.events > 0 ORDER BY given.ordinal
    ON CONFLICT (user_id) DO UPDATE SET
        stored_bytes = usage.stored_bytes + excluded.stored_bytes,
        day_events = CASE WHEN usage.day = excluded.day THEN usage.day_events ELSE 0 END + excluded.day_events,
        day = excluded.day;
    RETURN QUERY
        SELECT given.user_id,
            coalesce(appended.stored_bytes, 0) + usage.stored_bytes + coalesce((
                SELECT sum(changes.stored_bytes)::bigint FROM usage_changes AS changes
                WHERE changes.user_id = given.user_id), 0),
            CASE WHEN appended.day = today THEN appended.day_events ELSE 0 END,
            (today + 1) AT TIME ZONE 'UTC' - clock_timestamp()
        FROM unnest(user_ids) AS given (user_id)
        JOIN user_usage AS usage ON usage.user_id = given.user_id
        LEFT JOIN event_usage AS appended ON appended.user_id = given.user_id;
END;
$$;

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
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT sessions_pkey PRIMARY KEY (id),
    CONSTRAINT sessions_user_id_fkey FOREIGN KEY (user_id) REFERENCES users (id),
    CONSTRAINT sessions_secret_hash_key UNIQUE (secret_hash),
    CONSTRAINT sessions_secret_hash_check CHECK (octet_length(secret_hash) = 32)
);

CREATE INDEX sessions_user_id_idx ON sessions (user_id, expires_at);

-- For the quota of sessions: those that are valid, however many ended ones are kept.
CREATE INDEX sessions_user_id_valid_idx ON sessions (user_id, expires_at) WHERE revoked_at IS NULL;

-- For the removal of ended sessions. The earlier of the two times is when one ended.
CREATE INDEX sessions_ended_at_idx ON sessions (least(revoked_at, expires_at));

-- That a credential is used does not change it.
CREATE TRIGGER sessions_set_updated_at BEFORE UPDATE ON sessions
    FOR EACH ROW WHEN (NEW.last_used_at IS NOT DISTINCT FROM OLD.last_used_at)
    EXECUTE FUNCTION set_updated_at();

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
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT api_keys_pkey PRIMARY KEY (id),
    CONSTRAINT api_keys_user_id_fkey FOREIGN KEY (user_id) REFERENCES users (id),
    CONSTRAINT api_keys_key_hash_key UNIQUE (key_hash),
    CONSTRAINT api_keys_key_hash_check CHECK (octet_length(key_hash) = 32),
    CONSTRAINT api_keys_key_prefix_check CHECK (char_length(key_prefix) BETWEEN 1 AND 16),
    CONSTRAINT api_keys_note_check CHECK (char_length(note) <= 256),
    CONSTRAINT api_keys_scopes_check CHECK (cardinality(scopes) BETWEEN 1 AND 3 AND array_position(scopes, NULL) IS NULL)
);

CREATE INDEX api_keys_user_id_idx ON api_keys (user_id, created_at, id);
CREATE INDEX api_keys_ended_at_idx ON api_keys (least(revoked_at, expires_at));

-- Counts the rows that a statement adds to a table or removes from it. The arguments of the
-- trigger are the column of user_usage and the column with the user's id.
CREATE FUNCTION count_usage() RETURNS trigger LANGUAGE plpgsql
SET enable_seqscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        EXECUTE format(
            'UPDATE user_usage AS usage SET %1$I = usage.%1$I + counted.rows
            FROM (SELECT %2$I AS user_id, count(*) AS rows FROM changed GROUP BY 1) AS counted
            WHERE usage.user_id = counted.user_id', TG_ARGV[0], TG_ARGV[1]);
    ELSE
        EXECUTE format(
            'INSERT INTO usage_changes (user_id, %1$I) SELECT %2$I, -count(*) FROM changed GROUP BY 1',
            TG_ARGV[0], TG_ARGV[1]);
    END IF;
    RETURN NULL;
END;
$$;

CREATE TRIGGER api_keys_count_added AFTER INSERT ON api_keys REFERENCING NEW TABLE AS changed
    FOR EACH STATEMENT EXECUTE FUNCTION count_usage('api_keys', 'user_id');
CREATE TRIGGER api_keys_count_removed AFTER DELETE ON api_keys REFERENCING OLD TABLE AS changed
    FOR EACH STATEMENT EXECUTE FUNCTION count_usage('api_keys', 'user_id');

CREATE TRIGGER api_keys_set_updated_at BEFORE UPDATE ON api_keys
    FOR EACH ROW WHEN (NEW.last_used_at IS NOT DISTINCT FROM OLD.last_used_at)
    EXECUTE FUNCTION set_updated_at();

CREATE TRIGGER api_keys_keep_revocation BEFORE UPDATE OF revoked_at ON api_keys
    FOR EACH ROW WHEN (OLD.revoked_at IS NOT NULL AND NEW.revoked_at IS DISTINCT FROM OLD.revoked_at)
    EXECUTE FUNCTION refuse_change_of_revocation();
