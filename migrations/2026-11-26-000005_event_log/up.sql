-- The event log, and append_events, the only function that writes to it.

-- One row: the position of the last event of the log. An append's transaction
-- updates the row and so locks it until the commit. Therefore positions have no
-- gap and become visible in their order: a transaction that sees position n sees
-- every position below it. A Postgres sequence would not do, since its numbers
-- become visible out of order.
CREATE TABLE event_log (
    id smallint NOT NULL DEFAULT 1,
    position bigint NOT NULL DEFAULT 0,
    CONSTRAINT event_log_pkey PRIMARY KEY (id),
    CONSTRAINT event_log_id_check CHECK (id = 1),
    CONSTRAINT event_log_position_check CHECK (position >= 0)
-- Every append makes a new version of this row: the free space in its page keeps
-- those updates heap-only.
) WITH (fillfactor = 10);

INSERT INTO event_log DEFAULT VALUES;

CREATE TYPE event_kind AS ENUM ('step', 'error', 'info', 'complete', 'close');

CREATE TABLE events (
    job_id uuid NOT NULL,
    sequence bigint NOT NULL,
    -- Among the events of all jobs, in commit order.
    position bigint NOT NULL,
    -- Given by the client or made by the server; unique within the job.
    id uuid NOT NULL,
    kind event_kind NOT NULL,
    name text NOT NULL,
    step_configuration_id uuid,
    -- An encoded google.protobuf.Struct; empty if the event has no metadata. These
    -- bytes are sent to watchers as they are, so that no number is rounded.
    event_metadata bytea NOT NULL,
    occurred_at timestamptz,
    -- The job's status and progress after this event.
    status job_status NOT NULL,
    points_done bigint NOT NULL,
    percent smallint NOT NULL,
    created_at timestamptz NOT NULL,
    -- An event never changes.
    updated_at timestamptz NOT NULL GENERATED ALWAYS AS (created_at) STORED,
    CONSTRAINT events_pkey PRIMARY KEY (job_id, sequence),
    CONSTRAINT events_job_id_id_key UNIQUE (job_id, id),
    CONSTRAINT events_position_key UNIQUE (position),
    CONSTRAINT events_sequence_check CHECK (sequence >= 1),
    CONSTRAINT events_name_check CHECK (char_length(name) <= 256),
    CONSTRAINT events_event_metadata_check CHECK (octet_length(event_metadata) <= 16384),
    CONSTRAINT events_percent_check CHECK (percent BETWEEN 0 AND 100 AND (percent = 100) = (status = 'complete')),
    CONSTRAINT events_status_check CHECK (
        CASE kind
            WHEN 'step' THEN status = 'running'
            WHEN 'info' THEN status IN ('running', 'failed')
            WHEN 'error' THEN status = 'failed'
            WHEN 'complete' THEN status = 'complete'
            WHEN 'close' THEN status IN ('cancelled', 'failed')
        END)
);

-- What an event counts against the quota of stored bytes; event_bytes in
-- src/models/event.rs says the same. What the server writes counts for nobody.
CREATE FUNCTION event_bytes(kind event_kind, name text, event_metadata bytea) RETURNS bigint
LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE WHEN kind = 'close' THEN 0 ELSE 256 + octet_length(name) + octet_length(event_metadata) END;
$$;

CREATE TRIGGER events_refuse_update BEFORE UPDATE ON events
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_update();

CREATE TRIGGER events_refuse_truncate BEFORE TRUNCATE ON events
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_update();

-- Checks that the job and the step of each event exist. Foreign keys would be
-- checked row by row, each with a query and a row lock, which doubles the cost of
-- an event in a large batch. This trigger runs one query for all events of a
-- statement; the two triggers below refuse to delete the referenced rows.
CREATE FUNCTION events_check_references() RETURNS trigger LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
AS $$
BEGIN
    IF EXISTS (
        SELECT FROM appended
        LEFT JOIN jobs ON jobs.id = appended.job_id
        LEFT JOIN step_configurations AS step ON step.id = appended.step_configuration_id
            AND step.job_configuration_id = jobs.job_configuration_id
        WHERE jobs.id IS NULL OR (appended.step_configuration_id IS NOT NULL AND step.id IS NULL))
    THEN
        RAISE EXCEPTION 'an event names a job that does not exist, or a step that its job does not have'
            USING ERRCODE = 'foreign_key_violation', TABLE = 'events', CONSTRAINT = 'events_references';
    END IF;
    RETURN NULL;
END;
$$;

CREATE TRIGGER events_references AFTER INSERT ON events REFERENCING NEW TABLE AS appended
    FOR EACH STATEMENT EXECUTE FUNCTION events_check_references();

CREATE FUNCTION jobs_refuse_delete() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT FROM events WHERE job_id = OLD.id) THEN
        RAISE EXCEPTION 'the job has events'
            USING ERRCODE = 'foreign_key_violation', TABLE = 'events', CONSTRAINT = 'events_references';
    END IF;
    RETURN OLD;
END;
$$;

CREATE TRIGGER jobs_refuse_delete BEFORE DELETE ON jobs
    FOR EACH ROW EXECUTE FUNCTION jobs_refuse_delete();

CREATE FUNCTION step_configurations_refuse_delete() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT FROM jobs WHERE job_configuration_id = OLD.job_configuration_id) THEN
        RAISE EXCEPTION 'the configuration has jobs'
            USING ERRCODE = 'foreign_key_violation', TABLE = 'events', CONSTRAINT = 'events_references';
    END IF;
    RETURN OLD;
END;
$$;

CREATE TRIGGER step_configurations_refuse_delete BEFORE DELETE ON step_configurations
    FOR EACH ROW EXECUTE FUNCTION step_configurations_refuse_delete();

-- Only events of a job that retention has marked can be deleted.
CREATE FUNCTION events_refuse_delete() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT FROM deleted JOIN jobs ON jobs.id = deleted.job_id WHERE NOT jobs.events_removed) THEN
        RAISE EXCEPTION 'events are deleted only of jobs whose events_removed is true'
            USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NULL;
END;
$$;

CREATE TRIGGER events_refuse_delete AFTER DELETE ON events REFERENCING OLD TABLE AS deleted
    FOR EACH STATEMENT EXECUTE FUNCTION events_refuse_delete();

-- The sequence of a job's last event at or before a position of the log; 0 if there is none.
-- `last_sequence` is that of the job's last event. The positions of a job's events ascend, so
-- that halving finds the event, by one look-up of the primary key a step: the last event first
-- and then the first one, since most jobs lie on one side of the position as a whole.
CREATE FUNCTION sequence_at(job uuid, last_sequence bigint, log_position bigint) RETURNS bigint
LANGUAGE plpgsql STABLE AS $$
DECLARE
    before bigint := 0;
    beyond bigint := last_sequence + 1;
    probe bigint := last_sequence;
    probed bigint;
BEGIN
    IF log_position <= 0 THEN
        RETURN 0;
    END IF;
    WHILE before + 1 < beyond LOOP
        SELECT position INTO probed FROM events WHERE job_id = job AND sequence = probe;
        IF probed <= log_position THEN
            before := probe;
        ELSE
            beyond := probe;
        END IF;
        probe := CASE WHEN before = 0 AND beyond = last_sequence THEN 1 ELSE (before + beyond) / 2 END;
    END LOOP;
    RETURN before;
END;
$$;

-- Appends events to many jobs in one statement, so that no lock is held across a
-- client's round trip.
--
-- The caller has computed the events to append, and the state that they lead to,
-- from each job's state after the event job_last_event_id, which has the sequence
-- job_last_sequence. A job whose last event still is that one is appended to
-- (outcome 0). Of a job that has moved on, nothing is written (outcome 1). The
-- sequence alone would not do: where commits were lost, another event may have it.
-- Nor is anything written to a job that is closed or whose progress would fall.
-- One job's outcome does not depend on another's.
--
-- An event that is stored already violates events_job_id_id_key, and the whole
-- statement writes nothing. The caller then calls again with check_ids: a job
-- with such an event is left out (outcome 2). That check may precede the row
-- lock: while a job's last_sequence has not changed, no event was added to it.
--
-- Locks, until the commit: first the rows of jobs in the order of the arrays,
-- which must be that of the jobs' ids, then the row of event_log. Every
-- transaction takes them in this order, so that none deadlock. It takes no row of
-- user_usage, which a transaction of one tenant may hold for long.
--
-- Arrays named job_* have one element for each job, arrays named event_* one for
-- each event. The events of a job are adjacent and in order; event_job is the
-- index of the event's job, from 1.
CREATE FUNCTION append_events(
    job_id uuid[],
    job_last_sequence bigint[],
    job_last_event_id uuid[],
    job_event_count integer[],
    job_new_event_id uuid[],
    job_status job_status[],
    job_points_done bigint[],
    job_percent smallint[],
    job_steps_done bytea[],
    job_closed boolean[],
    event_job integer[],
    event_id uuid[],
    event_id_is_clients boolean[],
    event_sequence bigint[],
    event_kind event_kind[],
    event_name text[],
    event_step uuid[],
    event_metadata bytea[],
    event_occurred_at timestamptz[],
    event_status job_status[],
    event_points_done bigint[],
    event_percent smallint[],
    check_ids boolean DEFAULT false,
    -- The position before the first appended event. The appended events have
    -- the positions that follow it, in the order of the arrays.
    OUT log_position bigint,
    OUT appended_at timestamptz,
    OUT outcomes smallint[]
) LANGUAGE plpgsql
-- Every row is found by its key. The generic plan is made once for arrays of any
-- length; otherwise each call with a few events would be planned anew. The plan
-- is kept while the tables grow, so it must not read a whole table.
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    stored integer[] := '{}';
    unmoved integer[];
    job integer;
    appended_count bigint := 0;
BEGIN
    IF check_ids THEN
        stored := ARRAY(
            SELECT given.job
            FROM unnest(event_job, event_id, event_id_is_clients) AS given (job, id, is_clients)
            JOIN events ON events.job_id = append_events.job_id[given.job] AND events.id = given.id
            WHERE given.is_clients);
    END IF;

    WITH updated AS (
        UPDATE jobs SET
            last_sequence = given.last_sequence + given.event_count,
            last_event_id = given.new_event_id,
            status = given.status,
            points_done = given.points_done,
            percent = given.percent,
            steps_done = given.steps_done,
            closed_at = CASE WHEN given.closed THEN clock_timestamp() END,
            updated_at = clock_timestamp()
        FROM unnest(
            job_id, job_last_sequence, job_last_event_id, job_event_count, job_new_event_id,
            job_status, job_points_done, job_percent, job_steps_done, job_closed
        ) WITH ORDINALITY AS given (
            id, last_sequence, last_event_id, event_count, new_event_id,
            status, points_done, percent, steps_done, closed, ordinal)
        WHERE jobs.id = given.id AND jobs.last_sequence = given.last_sequence
            AND jobs.last_event_id IS NOT DISTINCT FROM given.last_event_id
            AND jobs.closed_at IS NULL AND jobs.points_done <= given.points_done
            AND jobs.percent <= given.percent AND given.ordinal <> ALL (stored)
        RETURNING given.ordinal)
    SELECT array_agg(updated.ordinal) INTO unmoved FROM updated;

    outcomes := array_fill(1::smallint, ARRAY[cardinality(job_id)]);
    FOREACH job IN ARRAY stored LOOP
        outcomes[job] := 2;
    END LOOP;
    FOREACH job IN ARRAY coalesce(unmoved, '{}') LOOP
        outcomes[job] := 0;
        appended_count := appended_count + job_event_count[job];
    END LOOP;

    IF appended_count > 0 THEN
        UPDATE event_log SET position = position + appended_count WHERE id = 1
        RETURNING position - appended_count, clock_timestamp() INTO log_position, appended_at;

        INSERT INTO events (
            job_id, sequence, position, id, kind, name, step_configuration_id, event_metadata,
            occurred_at, status, points_done, percent, created_at)
        SELECT
            append_events.job_id[given.job], given.sequence,
            log_position + row_number() OVER (ORDER BY given.ordinal),
            given.id, given.kind, given.name, given.step, given.metadata,
            given.occurred_at, given.status, given.points_done, given.percent, appended_at
        FROM unnest(
            event_job, event_id, event_sequence, event_kind, event_name, event_step, event_metadata,
            event_occurred_at, event_status, event_points_done, event_percent
        ) WITH ORDINALITY AS given (
            job, id, sequence, kind, name, step, metadata,
            occurred_at, status, points_done, percent, ordinal)
        WHERE outcomes[given.job] = 0;

        -- A job is closed, and was last changed, at the time of its last event. The
        -- providers have fewer open jobs: see user_usage.
        IF true = ANY (job_closed) THEN
            WITH closed AS (
                UPDATE jobs SET closed_at = appended_at, updated_at = appended_at
                FROM unnest(job_id, job_closed, outcomes) AS given (id, closed, outcome)
                WHERE jobs.id = given.id AND given.closed AND given.outcome = 0
                RETURNING jobs.provider_id)
            INSERT INTO usage_changes (user_id, open_jobs)
            SELECT closed.provider_id, -count(*) FROM closed GROUP BY closed.provider_id;
        END IF;
    END IF;
END;
$$;
