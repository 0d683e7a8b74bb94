-- Retention removes the events of a job a set time after the job closed. First one
-- short transaction marks the job (jobs.events_removed), then small steps delete
-- its events, so that no other transaction waits long for a lock. The row of the
-- job stays.

-- One row. A transaction that marks or deletes locks it, so that removals are
-- numbered in commit order: a transaction that sees removal n sees every removal
-- below it.
CREATE TABLE retention (
    id smallint NOT NULL DEFAULT 1,
    -- The number of the job that was marked last.
    removals bigint NOT NULL DEFAULT 0,
    -- All events of the jobs up to this number are deleted.
    deleted bigint NOT NULL DEFAULT 0,
    -- The time of the last step; null before the first one.
    seen_at timestamptz,
    -- How far the clock went on without steps, until `unseen_until`: see
    -- remove_expired_events.
    unseen interval NOT NULL DEFAULT '0',
    unseen_until timestamptz NOT NULL DEFAULT '-infinity',
    CONSTRAINT retention_pkey PRIMARY KEY (id),
    CONSTRAINT retention_id_check CHECK (id = 1),
    CONSTRAINT retention_removals_check CHECK (deleted BETWEEN 0 AND removals)
);

INSERT INTO retention DEFAULT VALUES;

-- One row for each marked job. From it a watch of all jobs learns that events in
-- its scope were removed before the watch read them.
CREATE TABLE removed_logs (
    number bigint NOT NULL,
    job_id uuid NOT NULL,
    provider_id uuid NOT NULL,
    customer_id uuid NOT NULL,
    configuration_tag text NOT NULL,
    -- Position of the job's first event. A watch of all jobs from the beginning
    -- that has not come that far has missed none of the job's events.
    first_position bigint NOT NULL,
    -- Position of the job's last event.
    position bigint NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT removed_logs_pkey PRIMARY KEY (number),
    CONSTRAINT removed_logs_job_id_key UNIQUE (job_id),
    CONSTRAINT removed_logs_job_id_fkey FOREIGN KEY (job_id) REFERENCES jobs (id),
    CONSTRAINT removed_logs_number_check CHECK (number >= 1)
);

CREATE INDEX removed_logs_provider_id_number_idx ON removed_logs (provider_id, number);
CREATE INDEX removed_logs_customer_id_number_idx ON removed_logs (customer_id, number);

CREATE TRIGGER removed_logs_refuse_update BEFORE UPDATE ON removed_logs
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_update();

-- Which rows a removal concerns that removes what is older than `age`: those of before
-- due_before. A caller takes a step every now and then, and keeps the other values from one
-- step to the next.
--
-- If the clock went on by more than `plausible` since the step before, it was set ahead or
-- no server ran, which look the same. That time is `unseen`: what is from before it is kept
-- so much longer, at most until `age` has passed since. A clock that is set back takes its
-- part of `unseen` back.
CREATE FUNCTION find_due(
    age interval,
    plausible interval,
    seen timestamptz,
    INOUT seen_at timestamptz,
    INOUT unseen interval,
    INOUT unseen_until timestamptz,
    OUT due_before timestamptz
) LANGUAGE plpgsql AS $$
BEGIN
    due_before := seen - age;
    IF seen > seen_at + plausible THEN
        -- What was unseen before concerns nothing any more if all from before it is due.
        unseen := seen - seen_at + CASE WHEN due_before < unseen_until THEN unseen ELSE interval '0' END;
        unseen_until := seen;
    ELSIF seen < unseen_until THEN
        unseen := greatest(unseen + (seen - seen_at), interval '0');
        unseen_until := seen;
    END IF;
    IF due_before < unseen_until THEN
        due_before := due_before - unseen;
    END IF;
    seen_at := seen;
END;
$$;

-- Takes one small step and returns how many jobs it marked and how many events it
-- deleted. While marked jobs have events left, the step deletes at most
-- `most_events` of them, each job's in their order. Otherwise it marks at most
-- `most_jobs` of the jobs that closed longer ago than `age`. While another
-- transaction takes a step, this one does nothing.
--
-- A step compares the clock with the step before, the first one with the log's last
-- event. Servers take a step at least every tenth of `age` and every minute; twice as
-- much (and 10 s) is plausible. See find_due.
--
-- What this promises: a clock that is set ahead, for a minute or for good, has no events
-- removed early by more than that twice as much. What it does not: events are removed
-- later after a time without servers, and those of jobs that closed while the clock was
-- ahead. And if the clock is set ahead before the first step and events are appended
-- then, neither steps nor log show it.
--
-- Each query reads ranges of indexes that are no longer than the step. For that,
-- `due_before` is computed once, since an expression that is evaluated for each
-- row bounds no range; and the events to delete are bounded by one sequence. The
-- settings keep these plans whatever the statistics say, since the plans are kept
-- while the tables grow.
CREATE FUNCTION remove_expired_events(
    age interval,
    most_jobs integer,
    most_events integer,
    OUT marked bigint,
    OUT deleted bigint
) LANGUAGE plpgsql
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
SET enable_sort = off
AS $$
#variable_conflict use_column
DECLARE
    state retention%ROWTYPE;
    seen timestamptz := clock_timestamp();
    plausible interval := greatest(least(age / 5, interval '2 minutes'), interval '10 seconds');
    due_before timestamptz;
    current_job_id uuid;
    current_provider_id uuid;
    through_sequence bigint;
    step bigint;
    bytes bigint;
BEGIN
    marked := 0;
    deleted := 0;
    SELECT * INTO state FROM retention WHERE id = 1 FOR UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN;
    END IF;

    IF state.seen_at IS NULL THEN
        SELECT created_at INTO state.seen_at FROM events
        WHERE position = (SELECT position FROM event_log WHERE id = 1);
    END IF;
    SELECT due.seen_at, due.unseen, due.unseen_until, due.due_before
    INTO state.seen_at, state.unseen, state.unseen_until, due_before
    FROM find_due(age, plausible, seen, state.seen_at, state.unseen, state.unseen_until) AS due;
    UPDATE retention SET seen_at = state.seen_at, unseen = state.unseen, unseen_until = state.unseen_until
    WHERE id = 1;

    IF state.deleted = state.removals THEN
        WITH due AS (
            SELECT id FROM jobs
            WHERE closed_at < due_before AND NOT events_removed
                AND NOT held_by_provider AND NOT held_by_customer
                -- Estimates need the events of a completed job once.
                AND NOT EXISTS (SELECT FROM untimed_jobs WHERE job_id = jobs.id)
            ORDER BY closed_at LIMIT most_jobs
            FOR UPDATE SKIP LOCKED),
        emptied AS (
            UPDATE jobs SET events_removed = true FROM due WHERE jobs.id = due.id
            RETURNING jobs.id, provider_id, customer_id, configuration_tag)
        INSERT INTO removed_logs (
            number, job_id, provider_id, customer_id, configuration_tag, first_position, position)
        SELECT state.removals + row_number() OVER (), emptied.id, provider_id, customer_id,
            configuration_tag,
            (SELECT position FROM events WHERE job_id = emptied.id AND sequence = 1),
            (SELECT position FROM events WHERE job_id = emptied.id AND sequence = last_sequence)
        FROM emptied JOIN job_states ON job_states.job_id = emptied.id;
        GET DIAGNOSTICS marked = ROW_COUNT;
        UPDATE retention SET removals = removals + marked WHERE id = 1 AND marked > 0;
        RETURN;
    END IF;

    WHILE state.deleted < state.removals AND deleted < most_events LOOP
        SELECT job_id, provider_id INTO current_job_id, current_provider_id
        FROM removed_logs WHERE number = state.deleted + 1;
        SELECT max(sequence) INTO through_sequence FROM (
            SELECT sequence FROM events WHERE job_id = current_job_id
            ORDER BY sequence LIMIT most_events - deleted) AS first;
        WITH removed AS (
            DELETE FROM events WHERE job_id = current_job_id AND sequence <= through_sequence
            RETURNING event_bytes(kind, name, event_metadata) AS bytes)
        SELECT count(*), coalesce(sum(removed.bytes), 0) INTO step, bytes FROM removed;
        deleted := deleted + step;
        -- See user_usage.
        INSERT INTO usage_changes (user_id, stored_bytes) SELECT current_provider_id, -bytes WHERE bytes > 0;
        EXIT WHEN EXISTS (SELECT FROM events WHERE job_id = current_job_id);
        state.deleted := state.deleted + 1;
    END LOOP;
    UPDATE retention SET deleted = state.deleted WHERE id = 1;
END;
$$;
