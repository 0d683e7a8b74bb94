-- Ended sessions, API keys and watch tokens are kept for 30 days, so that their owners can
-- list them, and then removed. Audit entries keep their ids. Those of a disabled user stay
-- ended when the user is enabled.

-- One row, which a transaction that removes locks. The columns are those of retention.
CREATE TABLE credential_removal (
    id smallint NOT NULL DEFAULT 1,
    seen_at timestamptz,
    unseen interval NOT NULL DEFAULT '0',
    unseen_until timestamptz NOT NULL DEFAULT '-infinity',
    CONSTRAINT credential_removal_pkey PRIMARY KEY (id),
    CONSTRAINT credential_removal_id_check CHECK (id = 1)
);

INSERT INTO credential_removal DEFAULT VALUES;

-- Removes at most `most` credentials of each kind that were revoked or expired longer ago
-- than `age`, and returns how many of all kinds. While another transaction does it, this
-- one does nothing.
--
-- Whether a credential has expired depends on the clock. A clock that is set ahead makes a
-- valid one look as if it had expired long ago: refused while the clock is ahead, it would be
-- valid again afterwards. Servers take a step every minute, so that find_due sees such a
-- clock, except before the first step.
--
-- Each query reads a range of an index that is no longer than the step, whatever the
-- statistics say.
CREATE FUNCTION remove_ended_credentials(age interval, most integer) RETURNS bigint LANGUAGE plpgsql
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
SET enable_sort = off
AS $$
DECLARE
    state credential_removal%ROWTYPE;
    due_before timestamptz;
    removed bigint := 0;
    step bigint;
BEGIN
    SELECT * INTO state FROM credential_removal WHERE id = 1 FOR UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN 0;
    END IF;
    SELECT due.seen_at, due.unseen, due.unseen_until, due.due_before
    INTO state.seen_at, state.unseen, state.unseen_until, due_before
    FROM find_due(age, interval '3 minutes', clock_timestamp(), state.seen_at, state.unseen, state.unseen_until)
        AS due;
    UPDATE credential_removal SET
        seen_at = state.seen_at, unseen = state.unseen, unseen_until = state.unseen_until
    WHERE id = 1;

    DELETE FROM sessions WHERE id IN (
        SELECT id FROM sessions WHERE least(revoked_at, expires_at) < due_before
        ORDER BY least(revoked_at, expires_at) LIMIT most FOR UPDATE SKIP LOCKED);
    GET DIAGNOSTICS step = ROW_COUNT;
    removed := removed + step;
    DELETE FROM api_keys WHERE id IN (
        SELECT id FROM api_keys WHERE least(revoked_at, expires_at) < due_before
        ORDER BY least(revoked_at, expires_at) LIMIT most FOR UPDATE SKIP LOCKED);
    GET DIAGNOSTICS step = ROW_COUNT;
    removed := removed + step;
    DELETE FROM watch_tokens WHERE id IN (
        SELECT id FROM watch_tokens WHERE least(revoked_at, expires_at) < due_before
        ORDER BY least(revoked_at, expires_at) LIMIT most FOR UPDATE SKIP LOCKED);
    GET DIAGNOSTICS step = ROW_COUNT;
    RETURN removed + step;
END;
$$;

-- The credentials of a disabled user are refused because of users.disabled_at. When that is
-- taken back, they must not become valid again: servers and clients have seen them end. The
-- condition asks no clock, by which a credential may only seem to have expired.
CREATE FUNCTION revoke_credentials_of_enabled_user() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE sessions SET revoked_at = OLD.disabled_at WHERE user_id = OLD.id AND revoked_at IS NULL;
    UPDATE api_keys SET revoked_at = OLD.disabled_at WHERE user_id = OLD.id AND revoked_at IS NULL;
    UPDATE watch_tokens SET revoked_at = OLD.disabled_at WHERE user_id = OLD.id AND revoked_at IS NULL;
    RETURN NULL;
END;
$$;

CREATE TRIGGER users_revoke_credentials AFTER UPDATE OF disabled_at ON users
    FOR EACH ROW WHEN (OLD.disabled_at IS NOT NULL AND NEW.disabled_at IS NULL)
    EXECUTE FUNCTION revoke_credentials_of_enabled_user();
