-- How often log-ins failed, so that guessing gets slow on all replicas alike.
-- Keys are hashes: what people type into the field of an e-mail is not kept.

CREATE TABLE log_in_attempts (
    -- SHA-256 of an e-mail, of an address, or of both together.
    key bytea NOT NULL,
    -- In a row, those under way included.
    failures integer NOT NULL,
    -- Until then the next one is refused.
    blocked_until timestamptz,
    last_at timestamptz NOT NULL,
    -- When a log-in last succeeded.
    succeeded_at timestamptz,
    CONSTRAINT log_in_attempts_pkey PRIMARY KEY (key),
    CONSTRAINT log_in_attempts_key_check CHECK (octet_length(key) = 32),
    CONSTRAINT log_in_attempts_failures_check CHECK (failures >= 0)
);

CREATE INDEX log_in_attempts_last_at_idx ON log_in_attempts (last_at);

-- Counts an attempt as failed before its password is looked at, so that many at
-- once are many. How long to wait before it may be made instead, if it may not.
--
-- Somebody is known where they logged in before from the same address: only
-- what failed from there slows them down, so that no stranger can lock them
-- out. Counts are forgotten after a quarter of an hour without a failure.
CREATE FUNCTION begin_log_in(
    pair bytea, address bytea, email bytea, pair_free integer, other_free integer, longest interval,
    OUT wait interval
) LANGUAGE plpgsql AS $$
DECLARE
    moment timestamptz := clock_timestamp();
    known boolean := EXISTS (
        SELECT FROM log_in_attempts WHERE key = pair AND succeeded_at > moment - interval '30 days');
    blocked timestamptz;
BEGIN
    DELETE FROM log_in_attempts WHERE key IN (
        SELECT key FROM log_in_attempts WHERE last_at < moment - interval '30 days'
        ORDER BY last_at LIMIT 10 FOR UPDATE SKIP LOCKED);

    SELECT max(blocked_until) INTO blocked FROM log_in_attempts
    WHERE blocked_until > moment AND (key = pair OR NOT known AND key IN (address, email));
    IF blocked IS NOT NULL THEN
        wait := blocked - moment;
        RETURN;
    END IF;

    INSERT INTO log_in_attempts AS attempts (key, failures, last_at)
    SELECT given.key, 1, moment
    FROM unnest(ARRAY[pair, address, email]) AS given (key)
    -- A known one's failures are no reason to slow others down.
    WHERE given.key = pair OR NOT known
    -- Everybody locks in this order.
    ORDER BY given.key
    ON CONFLICT (key) DO UPDATE SET
        failures = CASE WHEN attempts.last_at < moment - interval '15 minutes' THEN 1 ELSE attempts.failures + 1 END,
        last_at = moment;

    UPDATE log_in_attempts SET
        blocked_until = moment + least(
            longest,
            interval '1 second' * 2 ^ least(failures - CASE WHEN key = pair THEN pair_free ELSE other_free END, 30))
    WHERE key IN (pair, address, email) AND (key = pair OR NOT known)
        AND failures >= CASE WHEN key = pair THEN pair_free ELSE other_free END;
END;
$$;

-- Takes back what begin_log_in counted: the password was right.
CREATE FUNCTION finish_log_in(pair bytea, address bytea, email bytea, other_free integer) RETURNS boolean
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM FROM log_in_attempts WHERE key IN (pair, address, email) ORDER BY key FOR UPDATE;
    UPDATE log_in_attempts SET failures = 0, blocked_until = NULL, succeeded_at = clock_timestamp()
    WHERE key = pair;
    UPDATE log_in_attempts SET
        failures = greatest(failures - 1, 0),
        blocked_until = CASE WHEN failures > other_free THEN blocked_until END
    WHERE key IN (address, email);
    RETURN true;
END;
$$;
