-- The throttles of log-ins, sign-ups and unknown customer codes, shared by all servers.
--
-- Each log-in attempt counts on three keys: the client's address (for IPv6 its /64
-- network), the e-mail, and the pair of both. It counts on all three whether or not
-- a user has the e-mail: a difference would reveal which e-mails users have.
--
-- An attempt whose pair is blocked is refused, and its password is not checked. An
-- attempt whose address or e-mail is blocked, but not the pair, is restricted: its
-- password is checked, and it succeeds only if the password is right and the pair is
-- known. A pair is known for 30 days after a log-in or sign-up from it. All other
-- restricted attempts get the answer of refused ones. Therefore an unauthenticated
-- caller cannot lock out a user whose pair is known, neither by failures under the
-- user's e-mail nor by failures at an address that both share; and an attempt to guess
-- gets the same answer, after the same work, whether or not the user exists.
--
-- The price is that work. Restricted attempts therefore share a part of the permits
-- for password hashing, and count only once they have such a permit, and only on
-- their pair.
--
-- A caller who shares a user's address can keep the user's pair blocked by failures
-- under the user's e-mail: before there is a session, only the address tells the two
-- apart.

-- Keys are hashes, so that the table keeps no text that a caller typed as an e-mail.
CREATE TABLE log_in_attempts (
    -- SHA-256 of a pair, an address or an e-mail (log_in_attempt_keys), or of a provider
    -- who sends customer codes (customer_code_key).
    key bytea NOT NULL,
    -- Failures in a row, including attempts that are not decided yet.
    failures integer NOT NULL,
    -- Until then attempts are blocked.
    blocked_until timestamptz,
    last_at timestamptz NOT NULL,
    -- When a log-in last succeeded from the pair; null for other keys.
    succeeded_at timestamptz,
    CONSTRAINT log_in_attempts_pkey PRIMARY KEY (key),
    CONSTRAINT log_in_attempts_key_check CHECK (octet_length(key) = 32),
    CONSTRAINT log_in_attempts_failures_check CHECK (failures >= 0)
);

-- count_attempt deletes by these: rows without a success soon, the others later.
CREATE INDEX log_in_attempts_last_at_idx ON log_in_attempts (last_at);
CREATE INDEX log_in_attempts_failed_last_at_idx ON log_in_attempts (last_at) WHERE succeeded_at IS NULL;

-- The keys of the pair, the address and the e-mail, in this order. email_key is the
-- form in which users' e-mails are unique.
CREATE FUNCTION log_in_attempt_keys(address text, email_key text) RETURNS bytea[] LANGUAGE sql STABLE AS $$
    SELECT ARRAY[
        sha256(convert_to('pair ' || address || ' ' || email_key, 'UTF8')),
        sha256(convert_to('address ' || address, 'UTF8')),
        sha256(convert_to('email ' || email_key, 'UTF8'))];
$$;

-- Counts an attempt as failed on all of these keys and returns when (counted_at).
-- If one of the keys is blocked, it counts nothing and returns how long the block
-- lasts (wait). A key is blocked once it has as many failures as `free` says: for
-- a second, then twice as long after each further failure, up to `longest`. A
-- count starts anew after 15 minutes without an attempt.
--
-- The row of a key was last written before now. A row with a later `last_at` was
-- written while the clock was ahead, so that its block tells nothing: it is over, since
-- it must not last longer than `longest`, and the failures count as of now.
CREATE FUNCTION count_attempt(
    keys bytea[], free integer[], longest interval, OUT counted_at timestamptz, OUT wait interval
) LANGUAGE plpgsql AS $$
DECLARE
    locked boolean;
    moment timestamptz;
BEGIN
    -- The first check spares a blocked attempt the row locks. The second one runs
    -- with the locks, since concurrent attempts may have blocked a key meanwhile.
    FOREACH locked IN ARRAY ARRAY[false, true] LOOP
        IF locked THEN
            -- Inserts missing rows and locks those that exist. All transactions lock
            -- in the order of the keys.
            INSERT INTO log_in_attempts (key, failures, last_at)
            SELECT given.key, 0, clock_timestamp() FROM unnest(keys) AS given (key) ORDER BY given.key
            ON CONFLICT (key) DO UPDATE SET failures = 0 WHERE false;
        END IF;
        moment := clock_timestamp();
        SELECT max(blocked_until) - moment INTO wait FROM log_in_attempts
        WHERE key = ANY (keys) AND blocked_until > moment AND last_at <= moment;
        IF wait IS NOT NULL THEN
            RETURN;
        END IF;
    END LOOP;

    UPDATE log_in_attempts AS attempts SET
        failures = counted.failures,
        last_at = moment,
        blocked_until = CASE WHEN counted.failures >= counted.free THEN
            moment + least(longest, interval '1 second' * 2 ^ least(counted.failures - counted.free, 30)) END
    FROM (
        SELECT before.key, given.free,
            CASE WHEN before.last_at < moment - interval '15 minutes' THEN 1 ELSE before.failures + 1 END AS failures
        FROM unnest(keys, free) AS given (key, free) JOIN log_in_attempts AS before ON before.key = given.key
    ) AS counted
    WHERE attempts.key = counted.key;
    counted_at := moment;

    -- At the end, and without rows that are locked: to wait for them while others
    -- wait for the rows above would be a deadlock. Rows written while the clock was
    -- ahead are set to now, so that they do not count once the clock has come that
    -- far. The second condition leaves out what was written after `moment`.
    UPDATE log_in_attempts SET last_at = moment, blocked_until = NULL WHERE key IN (
        SELECT key FROM log_in_attempts WHERE last_at > moment AND last_at > clock_timestamp()
        ORDER BY last_at LIMIT 10 FOR UPDATE SKIP LOCKED);
    DELETE FROM log_in_attempts WHERE key IN (
        SELECT key FROM log_in_attempts WHERE succeeded_at IS NULL AND last_at < moment - interval '15 minutes'
        ORDER BY last_at LIMIT 10 FOR UPDATE SKIP LOCKED);
    DELETE FROM log_in_attempts WHERE key IN (
        SELECT key FROM log_in_attempts WHERE last_at < moment - interval '30 days'
        ORDER BY last_at LIMIT 10 FOR UPDATE SKIP LOCKED);
END;
$$;

-- Counts a log-in as failed before its password is checked, so that concurrent
-- attempts count each other. A refused attempt counts nothing. A restricted attempt
-- (wait is set, refused is false) counts on its pair, and only with a permit for
-- restricted attempts (has_permit). counted_at says when the attempt counted on the
-- address and the e-mail; it is null if it did not.
CREATE FUNCTION begin_log_in_attempt(
    address text, email_key text, pair_free integer, other_free integer, longest interval, has_permit boolean,
    OUT counted_at timestamptz, OUT wait interval, OUT refused boolean, OUT known boolean
) LANGUAGE plpgsql AS $$
DECLARE
    keys bytea[] := log_in_attempt_keys(address, email_key);
BEGIN
    known := EXISTS (
        SELECT FROM log_in_attempts
        WHERE key = keys[1] AND succeeded_at > clock_timestamp() - interval '30 days');
    SELECT counted.counted_at, counted.wait INTO counted_at, wait
    FROM count_attempt(keys, ARRAY[pair_free, other_free, other_free], longest) AS counted;
    IF wait IS NULL THEN
        refused := false;
    ELSIF has_permit THEN
        SELECT counted.wait IS NOT NULL INTO refused
        FROM count_attempt(keys[1:1], ARRAY[pair_free], longest) AS counted;
    ELSE
        refused := EXISTS (
            SELECT FROM log_in_attempts
            WHERE key = keys[1] AND blocked_until > clock_timestamp() AND last_at <= clock_timestamp());
    END IF;
END;
$$;

-- For an attempt whose password was right, and for a sign-up: the pair becomes known
-- and its count starts anew. The address and the e-mail lose the one failure that
-- this attempt counted at counted_at (null: none), and no more: otherwise a caller
-- who logs in to an account of their own between guesses would never be blocked. The
-- block that this attempt set ends as well, unless another attempt has counted since.
-- Returns true.
CREATE FUNCTION finish_log_in_attempt(address text, email_key text, counted_at timestamptz) RETURNS boolean
LANGUAGE plpgsql AS $$
DECLARE
    keys bytea[] := log_in_attempt_keys(address, email_key);
    moment timestamptz := clock_timestamp();
BEGIN
    IF counted_at IS NULL THEN
        keys := keys[1:1];
    END IF;
    PERFORM FROM log_in_attempts WHERE key = ANY (keys) ORDER BY key FOR UPDATE;
    INSERT INTO log_in_attempts (key, failures, last_at, succeeded_at) VALUES (keys[1], 0, moment, moment)
    ON CONFLICT (key) DO UPDATE SET failures = 0, blocked_until = NULL, succeeded_at = moment;
    UPDATE log_in_attempts SET
        failures = greatest(failures - 1, 0),
        blocked_until = CASE WHEN last_at <> counted_at THEN blocked_until END
    WHERE key = ANY (keys[2:3]);
    RETURN true;
END;
$$;

-- For an attempt whose password could not be checked, since no permit for hashing
-- was free or the database was too slow: takes back the failures that it counted.
-- They stay if the database is unavailable then. The block that this attempt set ends
-- as well, as in finish_log_in_attempt. A restricted attempt (counted_at is null),
-- which counted on its pair alone, leaves a block of the pair: another attempt may
-- have set it. Returns true.
CREATE FUNCTION withdraw_log_in_attempt(address text, email_key text, counted_at timestamptz) RETURNS boolean
LANGUAGE plpgsql AS $$
DECLARE
    keys bytea[] := log_in_attempt_keys(address, email_key);
BEGIN
    IF counted_at IS NULL THEN
        keys := keys[1:1];
    END IF;
    PERFORM FROM log_in_attempts WHERE key = ANY (keys) ORDER BY key FOR UPDATE;
    UPDATE log_in_attempts SET
        failures = greatest(failures - 1, 0),
        blocked_until = CASE WHEN counted_at IS NULL OR last_at <> counted_at THEN blocked_until END
    WHERE key = ANY (keys);
    RETURN true;
END;
$$;

-- The key of a provider's unknown customer codes, which are counted as failures without a
-- success: a provider who creates jobs for a customer of their own between guesses would
-- otherwise never be blocked.
CREATE FUNCTION customer_code_key(provider_id uuid) RETURNS bytea LANGUAGE sql STABLE AS $$
    SELECT sha256(convert_to('customer codes ' || provider_id, 'UTF8'));
$$;

-- How long the provider is blocked; null if not. A block of a row from later than now
-- tells nothing, as in count_attempt.
CREATE FUNCTION customer_code_wait(provider_id uuid) RETURNS interval LANGUAGE sql STABLE AS $$
    SELECT blocked_until - clock_timestamp() FROM log_in_attempts
    WHERE key = customer_code_key(provider_id) AND blocked_until > clock_timestamp() AND last_at <= clock_timestamp();
$$;

-- Counts an unknown code of the provider. Returns how long the provider is blocked if they
-- were blocked meanwhile, and then counts nothing.
CREATE FUNCTION count_unknown_customer_code(provider_id uuid, free integer, longest interval) RETURNS interval
LANGUAGE sql AS $$
    SELECT wait FROM count_attempt(ARRAY[customer_code_key(provider_id)], ARRAY[free], longest);
$$;

-- The sign-ups of each address in the last window of an hour, which begins with the
-- address's first sign-up.
CREATE TABLE sign_up_windows (
    -- SHA-256 of the address, as in log_in_attempts.
    key bytea NOT NULL,
    sign_ups integer NOT NULL,
    began_at timestamptz NOT NULL,
    CONSTRAINT sign_up_windows_pkey PRIMARY KEY (key),
    CONSTRAINT sign_up_windows_key_check CHECK (octet_length(key) = 32),
    CONSTRAINT sign_up_windows_sign_ups_check CHECK (sign_ups >= 1)
);

CREATE INDEX sign_up_windows_began_at_idx ON sign_up_windows (began_at);

-- Counts a sign-up on its address. If the address had `most` in its window, it counts
-- nothing and returns the time until the window ends. The count is never taken back.
--
-- A window that begins after now was begun while the clock was ahead: it is over.
CREATE FUNCTION begin_sign_up(address text, most integer, OUT wait interval) LANGUAGE plpgsql AS $$
DECLARE
    window_key bytea := sha256(convert_to('sign-up ' || address, 'UTF8'));
    moment timestamptz;
    before sign_up_windows%ROWTYPE;
BEGIN
    -- Locks the row, or inserts it. A window of which no sign-up is counted yet does not
    -- exist for others.
    INSERT INTO sign_up_windows (key, sign_ups, began_at) VALUES (window_key, 1, clock_timestamp())
    ON CONFLICT (key) DO NOTHING;
    IF NOT FOUND THEN
        SELECT * INTO before FROM sign_up_windows WHERE key = window_key FOR NO KEY UPDATE;
        moment := clock_timestamp();
        IF before.began_at > moment OR before.began_at <= moment - interval '1 hour' THEN
            UPDATE sign_up_windows SET sign_ups = 1, began_at = moment WHERE key = window_key;
        ELSIF before.sign_ups < most THEN
            UPDATE sign_up_windows SET sign_ups = sign_ups + 1 WHERE key = window_key;
        ELSE
            wait := before.began_at + interval '1 hour' - moment;
        END IF;
    END IF;

    -- At the end, and without rows that are locked, as in count_attempt.
    DELETE FROM sign_up_windows WHERE key IN (
        SELECT key FROM sign_up_windows
        WHERE began_at < clock_timestamp() - interval '1 hour' AND key <> window_key
        ORDER BY began_at LIMIT 10 FOR UPDATE SKIP LOCKED);
END;
$$;
