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

-- Takes one small step and returns how many jobs it marked and how many events it
-- deleted. While marked jobs have events left, the step deletes at most
-- `most_events` of them, each job's in their order. Otherwise it marks at most
-- `most_jobs` of the jobs that closed longer ago than `age`. While another
-- transaction takes a step, this one does nothing.
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
    due_before timestamptz := clock_timestamp() - age;
    current_job_id uuid;
    through_sequence bigint;
    step bigint;
BEGIN
    marked := 0;
    deleted := 0;
    SELECT * INTO state FROM retention WHERE id = 1 FOR UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN;
    END IF;

    IF state.deleted = state.removals THEN
        WITH due AS (
            SELECT id FROM jobs
            WHERE closed_at < due_before AND NOT events_removed
            ORDER BY closed_at LIMIT most_jobs
            FOR UPDATE SKIP LOCKED),
        emptied AS (
            UPDATE jobs SET events_removed = true FROM due WHERE jobs.id = due.id
            RETURNING jobs.id, provider_id, customer_id, configuration_tag, last_sequence)
        INSERT INTO removed_logs (
            number, job_id, provider_id, customer_id, configuration_tag, first_position, position)
        SELECT state.removals + row_number() OVER (), emptied.id, provider_id, customer_id,
            configuration_tag,
            (SELECT position FROM events WHERE job_id = emptied.id AND sequence = 1),
            (SELECT position FROM events WHERE job_id = emptied.id AND sequence = last_sequence)
        FROM emptied;
        GET DIAGNOSTICS marked = ROW_COUNT;
        UPDATE retention SET removals = removals + marked WHERE id = 1 AND marked > 0;
        RETURN;
    END IF;

    WHILE state.deleted < state.removals AND deleted < most_events LOOP
        SELECT job_id INTO current_job_id FROM removed_logs WHERE number = state.deleted + 1;
        SELECT max(sequence) INTO through_sequence FROM (
            SELECT sequence FROM events WHERE job_id = current_job_id
            ORDER BY sequence LIMIT most_events - deleted) AS first;
        DELETE FROM events WHERE job_id = current_job_id AND sequence <= through_sequence;
        GET DIAGNOSTICS step = ROW_COUNT;
        deleted := deleted + step;
        EXIT WHEN EXISTS (SELECT FROM events WHERE job_id = current_job_id);
        state.deleted := state.deleted + 1;
    END LOOP;
    UPDATE retention SET deleted = state.deleted WHERE id = 1;
END;
$$;
