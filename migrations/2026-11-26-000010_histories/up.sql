-- Histories of the event log: which run of which primary appended what.
--
-- Commits can be lost: a standby that lacks the last of them is promoted, or an earlier
-- state of the database is restored. Then the log grows again from where it was set back
-- to, with other events at the same positions. A position therefore says how far a reader
-- has come only together with the history in which the reader came there.

-- One row for each run of a primary in which something was appended or removed.
CREATE TABLE histories (
    -- 0, 1, 2 … in the order of the log. Row 0 stands for the empty log.
    number bigint NOT NULL,
    -- Random: where a row was lost, no later row has its id.
    id uuid NOT NULL DEFAULT gen_random_uuid(),
    -- What tells this run from others, as src/db/identity.rs composes it.
    database_identity text NOT NULL,
    -- The last position, and the number of the last removed log, before this history.
    after_position bigint NOT NULL,
    after_removals bigint NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT histories_pkey PRIMARY KEY (number),
    CONSTRAINT histories_id_key UNIQUE (id),
    CONSTRAINT histories_database_identity_key UNIQUE (database_identity),
    CONSTRAINT histories_number_check CHECK (number >= 0),
    CONSTRAINT histories_after_position_check CHECK (after_position >= 0),
    CONSTRAINT histories_after_removals_check CHECK (after_removals >= 0)
);

INSERT INTO histories (number, id, database_identity, after_position, after_removals)
VALUES (0, '00000000-0000-0000-0000-000000000000', '', 0, 0);

CREATE TRIGGER histories_refuse_update BEFORE UPDATE ON histories
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_update();

-- Returns the id of the history of this run; begins it if there is none yet. To be called
-- before the first append and the first removal of a run. It takes the lock of the log, so
-- that every append of this run comes after it.
CREATE FUNCTION enter_history(identity text) RETURNS uuid LANGUAGE plpgsql AS $$
DECLARE
    entered uuid;
    last_position bigint;
BEGIN
    SELECT id INTO entered FROM histories WHERE database_identity = identity;
    IF NOT FOUND THEN
        SELECT position INTO STRICT last_position FROM event_log WHERE id = 1 FOR UPDATE;
        INSERT INTO histories (number, database_identity, after_position, after_removals)
        SELECT max(number) + 1, identity, last_position, (SELECT removals FROM retention) FROM histories
        ON CONFLICT (database_identity) DO NOTHING;
        SELECT id INTO STRICT entered FROM histories WHERE database_identity = identity;
    END IF;
    RETURN entered;
END;
$$;

-- For a reader who came to this position of the log in this history: null if a part of
-- what the reader has read is lost, which also holds for a history that is lost. Otherwise
-- the number up to which the removals that the reader knows are those of the log.
CREATE FUNCTION kept_removals(history uuid, read_to bigint) RETURNS bigint LANGUAGE sql STABLE AS $$
    SELECT CASE
        WHEN coalesce(min(later.after_position), read_to) >= read_to
        THEN coalesce(min(later.after_removals), 9223372036854775807) END
    FROM histories AS own LEFT JOIN histories AS later ON later.number > own.number
    WHERE own.id = history
    GROUP BY own.id;
$$;
