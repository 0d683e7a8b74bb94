-- Retention: the events of a job are removed a set time after it closed. First
-- the job is marked, in one short transaction, then its events are deleted in
-- small steps, so that nobody waits for a lock. The job itself stays.

ALTER TABLE jobs ADD COLUMN events_removed boolean NOT NULL DEFAULT false,
    ADD CONSTRAINT jobs_events_removed_check CHECK (NOT events_removed OR closed_at IS NOT NULL);

-- Whose turn it is.
CREATE INDEX jobs_closed_at_idx ON jobs (closed_at) WHERE closed_at IS NOT NULL AND NOT events_removed;

-- One row. Its lock is held by whoever marks or deletes, so removals are
-- numbered in commit order: whoever sees removal n sees every one below it.
CREATE TABLE retention (
    id smallint NOT NULL DEFAULT 1,
    -- The number of the last job that was marked.
    removals bigint NOT NULL DEFAULT 0,
    -- Of all jobs up to this number, every event is deleted.
    deleted bigint NOT NULL DEFAULT 0,
    CONSTRAINT retention_pkey PRIMARY KEY (id),
    CONSTRAINT retention_id_check CHECK (id = 1),
    CONSTRAINT retention_removals_check CHECK (deleted BETWEEN 0 AND removals)
);

INSERT INTO retention DEFAULT VALUES;

-- Logs of jobs that were removed, and whose they were: what tells a watch of
-- all jobs that something which it has not seen is gone.
CREATE TABLE removed_logs (
    number bigint NOT NULL,
    job_id uuid NOT NULL,
    provider_id uuid NOT NULL,
    customer_id uuid NOT NULL,
    configuration_tag text NOT NULL,
    -- Of the last event.
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

-- An event is there for as long as its job's log is.
CREATE FUNCTION events_refuse_delete() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT FROM deleted JOIN jobs ON jobs.id = deleted.job_id WHERE NOT jobs.events_removed) THEN
        RAISE EXCEPTION 'events are never deleted singly' USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NULL;
END;
$$;

CREATE TRIGGER events_refuse_delete AFTER DELETE ON events REFERENCING OLD TABLE AS deleted
    FOR EACH STATEMENT EXECUTE FUNCTION events_refuse_delete();

CREATE TRIGGER events_refuse_truncate BEFORE TRUNCATE ON events
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_update();

-- One small step: marks jobs that closed longer ago than `age`, at most
-- `most_jobs`, or, where nothing is left to mark or marked jobs wait, deletes
-- events of those marked before, at most about `most_events`, each job's in
-- their order. What it did; nothing at all while another does it.
CREATE FUNCTION remove_expired_events(
    age interval,
    most_jobs integer,
    most_events integer,
    OUT marked bigint,
    OUT deleted bigint
) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    place retention%ROWTYPE;
    of_job uuid;
    step bigint;
BEGIN
    marked := 0;
    deleted := 0;
    SELECT * INTO place FROM retention WHERE id = 1 FOR UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN;
    END IF;

    IF place.deleted = place.removals THEN
        WITH due AS (
            SELECT id FROM jobs
            WHERE closed_at < clock_timestamp() - age AND NOT events_removed
            ORDER BY closed_at LIMIT most_jobs
            FOR UPDATE SKIP LOCKED),
        emptied AS (
            UPDATE jobs SET events_removed = true FROM due WHERE jobs.id = due.id
            RETURNING jobs.id, provider_id, customer_id, configuration_tag, last_sequence)
        INSERT INTO removed_logs (number, job_id, provider_id, customer_id, configuration_tag, position)
        SELECT place.removals + row_number() OVER (), emptied.id, provider_id, customer_id,
            configuration_tag,
            (SELECT position FROM events WHERE job_id = emptied.id AND sequence = last_sequence)
        FROM emptied;
        GET DIAGNOSTICS marked = ROW_COUNT;
        UPDATE retention SET removals = removals + marked WHERE id = 1 AND marked > 0;
        RETURN;
    END IF;

    WHILE place.deleted < place.removals AND deleted < most_events LOOP
        SELECT job_id INTO of_job FROM removed_logs WHERE number = place.deleted + 1;
        DELETE FROM events WHERE job_id = of_job AND sequence IN (
            SELECT sequence FROM events WHERE job_id = of_job ORDER BY sequence LIMIT most_events - deleted);
        GET DIAGNOSTICS step = ROW_COUNT;
        deleted := deleted + step;
        EXIT WHEN EXISTS (SELECT FROM events WHERE job_id = of_job);
        place.deleted := place.deleted + 1;
    END LOOP;
    UPDATE retention SET deleted = place.deleted WHERE id = 1;
END;
$$;

-- Older servers would pass over what was removed.
UPDATE schema_compatibility SET oldest_server = '20261123000008' WHERE id = 1;
