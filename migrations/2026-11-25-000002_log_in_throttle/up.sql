-- A tighter throttle of log-ins, and one of sign-ups, on the same table.
-- begin_log_in and finish_log_in stay for older servers, until a later migration.
--
-- Each attempt counts on three keys: its address, its e-mail, and both together,
-- the pair; always on all of them, whoever it is as, since a guess that counted
-- otherwise for a user than for nobody would tell who is a user.
--
-- A pair that is blocked is refused without a look at the password. One whose
-- address or e-mail alone is blocked is in doubt: its password is looked at all
-- the same, and only who is right and known, having logged in from that address
-- before, is let in. All others are told that they are blocked. So no stranger
-- can lock out a user who is known, be it by failures under the user's e-mail or
-- at an address that both share, and who guesses is answered the same, after the
-- same work, whether there is such a user or not. The price is the work: those in
-- doubt share a part of the turns at hashing, and count only on their pair, and
-- only once they have such a turn.

-- What was never a success is of no use once its count is forgotten.
CREATE INDEX log_in_attempts_failed_last_at_idx ON log_in_attempts (last_at) WHERE succeeded_at IS NULL;

-- Of the pair, the address and the e-mail, in the form in which e-mails are unique.
CREATE FUNCTION log_in_attempt_keys(address text, email text) RETURNS bytea[] LANGUAGE sql STABLE AS $$
    SELECT ARRAY[
        sha256(convert_to('pair ' || address || ' ' || lower(email), 'UTF8')),
        sha256(convert_to('address ' || address, 'UTF8')),
        sha256(convert_to('email ' || lower(email), 'UTF8'))];
$$;

-- Counts an attempt as failed on all of these keys, each with its number of free
-- failures, unless one of them is blocked: then says for how long, and counts
-- nothing. Counts are forgotten after a quarter of an hour without an attempt.
CREATE FUNCTION count_attempt(
    keys bytea[], free integer[], longest interval, OUT counted_at timestamptz, OUT wait interval
) LANGUAGE plpgsql AS $$
DECLARE
    locked boolean;
    moment timestamptz;
BEGIN
    -- Who is blocked costs no more than a look. Who is not may be by the time the
    -- rows are theirs: of many at once each sees those before it.
    FOREACH locked IN ARRAY ARRAY[false, true] LOOP
        IF locked THEN
            -- Locks rows that are there as well. Everybody locks in this order.
            INSERT INTO log_in_attempts (key, failures, last_at)
            SELECT given.key, 0, clock_timestamp() FROM unnest(keys) AS given (key) ORDER BY given.key
            ON CONFLICT (key) DO UPDATE SET failures = 0 WHERE false;
        END IF;
        moment := clock_timestamp();
        SELECT max(blocked_until) - moment INTO wait FROM log_in_attempts
        WHERE key = ANY (keys) AND blocked_until > moment;
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

    -- Last, and only what nobody holds: waiting for these rows while others wait
    -- for ours would be a deadlock.
    DELETE FROM log_in_attempts WHERE key IN (
        SELECT key FROM log_in_attempts WHERE succeeded_at IS NULL AND last_at < moment - interval '15 minutes'
        ORDER BY last_at LIMIT 10 FOR UPDATE SKIP LOCKED);
    DELETE FROM log_in_attempts WHERE key IN (
        SELECT key FROM log_in_attempts WHERE last_at < moment - interval '30 days'
        ORDER BY last_at LIMIT 10 FOR UPDATE SKIP LOCKED);
END;
$$;

-- Counts a log-in as failed before its password is looked at. Not if it is
-- refused; and while it is in doubt, which is when it has to wait without being
-- refused, only where it comes with a turn for those in doubt. When it counted on
-- the address and the e-mail, if it did.
CREATE FUNCTION begin_log_in_attempt(
    address text, email text, pair_free integer, other_free integer, longest interval, has_turn boolean,
    OUT counted_at timestamptz, OUT wait interval, OUT refused boolean, OUT known boolean
) LANGUAGE plpgsql AS $$
DECLARE
    keys bytea[] := log_in_attempt_keys(address, email);
BEGIN
    known := EXISTS (
        SELECT FROM log_in_attempts
        WHERE key = keys[1] AND succeeded_at > clock_timestamp() - interval '30 days');
    SELECT counted.counted_at, counted.wait INTO counted_at, wait
    FROM count_attempt(keys, ARRAY[pair_free, other_free, other_free], longest) AS counted;
    IF wait IS NULL THEN
        refused := false;
    ELSIF has_turn THEN
        SELECT counted.wait IS NOT NULL INTO refused
        FROM count_attempt(keys[1:1], ARRAY[pair_free], longest) AS counted;
    ELSE
        refused := EXISTS (
            SELECT FROM log_in_attempts WHERE key = keys[1] AND blocked_until > clock_timestamp());
    END IF;
END;
$$;

-- The password was right: the pair is known and begins anew. The address and the
-- e-mail are given back what this attempt counted on them, if it did, and when;
-- and no more, lest who logs in as themselves between guesses be never blocked.
-- Its block goes with it, unless another attempt has set one since.
CREATE FUNCTION finish_log_in_attempt(address text, email text, counted_at timestamptz) RETURNS boolean
LANGUAGE plpgsql AS $$
DECLARE
    keys bytea[] := log_in_attempt_keys(address, email);
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
        blocked_until = CASE WHEN last_at > counted_at THEN blocked_until END
    WHERE key = ANY (keys[2:3]);
    RETURN true;
END;
$$;

-- Counts a sign-up on its address, by the same rule; how long it has to wait
-- instead, if it has to. It is never given back.
CREATE FUNCTION begin_sign_up(address text, free integer, longest interval) RETURNS interval LANGUAGE sql AS $$
    SELECT wait FROM count_attempt(
        ARRAY[sha256(convert_to('sign-up ' || address, 'UTF8'))], ARRAY[free], longest);
$$;
