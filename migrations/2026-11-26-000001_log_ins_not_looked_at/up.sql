-- A log-in whose password could not be looked at, since there was no turn at hashing
-- or the database was too slow, is no failure: it gives back what it counted on its
-- keys, unless the database is away. A block goes with it, as in finish_log_in_attempt. One in doubt, which
-- counted on its pair alone, leaves its pair blocked if it is: it may be by
-- another.
--
-- What the rules of 20261125000002 cannot do: who shares a user's address can keep
-- this pair blocked by failing under the user's e-mail. Only the address tells one
-- from the other before there is a session.
CREATE FUNCTION withdraw_log_in_attempt(address text, email text, counted_at timestamptz) RETURNS boolean
LANGUAGE plpgsql AS $$
DECLARE
    keys bytea[] := log_in_attempt_keys(address, email);
BEGIN
    IF counted_at IS NULL THEN
        keys := keys[1:1];
    END IF;
    PERFORM FROM log_in_attempts WHERE key = ANY (keys) ORDER BY key FOR UPDATE;
    UPDATE log_in_attempts SET
        failures = greatest(failures - 1, 0),
        blocked_until = CASE WHEN counted_at IS NULL OR last_at > counted_at THEN blocked_until END
    WHERE key = ANY (keys);
    RETURN true;
END;
$$;
