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

CREATE TYPE event_kind AS ENUM (
    'step', 'error', 'info', 'complete', 'close', 'progress', 'cancellation_requested', 'silent');

-- The rules for a row of events, in a function for the same reason as is_job_state.
CREATE FUNCTION is_event(
    sequence bigint,
    kind event_kind,
    name text,
    step_configuration_id uuid,
    step_percent smallint,
    event_metadata bytea,
    status job_status,
    percent smallint
) RETURNS boolean LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    RETURN sequence >= 1
        AND char_length(name) <= 256
        AND (kind <> 'progress' OR step_configuration_id IS NOT NULL)
        AND (step_percent IS NULL OR kind = 'progress' AND step_percent BETWEEN 0 AND 99)
        AND octet_length(event_metadata) <= 16384
        AND percent BETWEEN 0 AND 100
        AND (percent = 100) = (status = 'complete')
        AND CASE kind
            WHEN 'step' THEN status = 'running'
            WHEN 'progress' THEN status = 'running'
            WHEN 'info' THEN status IN ('running', 'failed')
            WHEN 'error' THEN status = 'failed'
            WHEN 'complete' THEN status = 'complete'
            WHEN 'close' THEN status IN ('cancelled', 'failed')
            WHEN 'cancellation_requested' THEN status IN ('pending', 'running', 'stalled', 'failed')
            WHEN 'silent' THEN status IN ('stalled', 'failed')
        END;
END;
$$;

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
    -- How far a progress event says that its step is.
    step_percent smallint,
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
    CONSTRAINT events_rules_check CHECK (is_event(
        sequence, kind, name, step_configuration_id, step_percent, event_metadata, status, percent))
);

-- What an event counts against the quota of stored bytes; event_bytes in
-- src/models/event.rs says the same. What the server writes counts for nobody.
CREATE FUNCTION event_bytes(kind event_kind, name text, event_metadata bytea) RETURNS bigint
LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE WHEN kind IN ('close', 'cancellation_requested', 'silent') THEN 0 ELSE 256 + octet_length(name) + octet_length(event_metadata) END;
$$;

CREATE TRIGGER events_refuse_update BEFORE UPDATE ON events
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_update();

CREATE TRIGGER events_refuse_truncate BEFORE TRUNCATE ON events
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_update();

-- The constraint events_references: the job and the step of each event exist. Foreign keys
-- would be checked row by row, each with a query and a row lock, which doubles the cost of an
-- event in a large batch. Instead append_events looks up what it refers to, and these triggers
-- refuse to delete it.
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
-- Locks, until the commit: first the rows of job_states in the order of the arrays,
-- which must be that of the jobs' ids, then the rows of jobs, then the row of
-- event_log, then rows of job_silences, which only transactions that hold the row of
-- event_log or wait for nothing lock. Every transaction of the server takes them in this order, so that none
-- deadlock; only the DELETE of a job, which an operator may run, comes from jobs to
-- job_states. The function takes no row of user_usage, which a transaction of one
-- tenant may hold for long.
--
-- Arrays named job_* have one element for each job, arrays named event_* one for
-- each event. The events of a job are adjacent and in order; event_job is the
-- index of the event's job, from 1. job_status_changes says whether the job's status
-- changes or the job is closed: only then is its row of jobs written, which has many
-- indexes. job_silence_changes says the same of what job_silences follows: whether the job is
-- silent, and whether it is closed. job_cancels says whether the events have the request of a
-- cancellation.
--
-- The function has no SET clauses, which would be set and reset at each call: the caller's
-- connection has the settings of AppendConnection in src/models/event/append.rs.
CREATE FUNCTION append_events(
    job_id uuid[],
    job_last_sequence bigint[],
    job_last_event_id uuid[],
    job_event_count integer[],
    job_new_event_id uuid[],
    job_status job_status[],
    job_points_done bigint[],
    job_percent smallint[],
    job_steps bytea[],
    job_last_step_sequence bigint[],
    job_closed boolean[],
    job_status_changes boolean[],
    job_silent boolean[],
    job_silence_changes boolean[],
    job_cancels boolean[],
    event_job integer[],
    event_id uuid[],
    event_id_is_clients boolean[],
    event_sequence bigint[],
    event_kind event_kind[],
    event_name text[],
    event_step uuid[],
    event_step_percent smallint[],
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
) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    stored integer[] := '{}';
    unmoved integer[];
    configurations_of_unmoved uuid[];
    -- Of each job that is appended to.
    configurations uuid[] := array_fill(NULL::uuid, ARRAY[cardinality(job_id)]);
    job integer;
    appended_count bigint := 0;
    inserted_count bigint;
BEGIN
    IF check_ids THEN
        stored := ARRAY(
            SELECT given.job
            FROM unnest(event_job, event_id, event_id_is_clients) AS given (job, id, is_clients)
            JOIN events ON events.job_id = append_events.job_id[given.job] AND events.id = given.id
            WHERE given.is_clients);
    END IF;

    WITH updated AS (
        UPDATE job_states AS state SET
            last_sequence = given.last_sequence + given.event_count,
            last_event_id = given.new_event_id,
            status = given.status,
            closed = given.closed,
            points_done = given.points_done,
            percent = given.percent,
            steps = given.steps,
            last_step_sequence = given.last_step_sequence,
            silent = given.silent,
            updated_at = clock_timestamp()
        FROM unnest(
            append_events.job_id, job_last_sequence, job_last_event_id, job_event_count, job_new_event_id,
            job_status, job_closed, job_points_done, job_percent, job_steps, job_last_step_sequence, job_silent
        ) WITH ORDINALITY AS given (
            id, last_sequence, last_event_id, event_count, new_event_id,
            status, closed, points_done, percent, steps, last_step_sequence, silent, ordinal)
        WHERE state.job_id = given.id AND state.last_sequence = given.last_sequence
            AND state.last_event_id IS NOT DISTINCT FROM given.last_event_id
            AND NOT state.closed AND state.points_done <= given.points_done
            AND state.percent <= given.percent AND given.ordinal <> ALL (stored)
        RETURNING given.ordinal, state.job_configuration_id)
    SELECT array_agg(updated.ordinal), array_agg(updated.job_configuration_id)
    INTO unmoved, configurations_of_unmoved FROM updated;

    outcomes := array_fill(1::smallint, ARRAY[cardinality(job_id)]);
    FOREACH job IN ARRAY stored LOOP
        outcomes[job] := 2;
    END LOOP;
    FOR index IN 1..coalesce(cardinality(unmoved), 0) LOOP
        job := unmoved[index];
        outcomes[job] := 0;
        configurations[job] := configurations_of_unmoved[index];
        appended_count := appended_count + job_event_count[job];
    END LOOP;

    IF appended_count > 0 THEN
        -- Locked before the log, so that no append waits behind the log for a job.
        IF true = ANY (job_status_changes) THEN
            PERFORM FROM unnest(append_events.job_id, job_status_changes, outcomes) AS given (id, changes, outcome)
            JOIN jobs ON jobs.id = given.id
            WHERE given.changes AND given.outcome = 0
            FOR NO KEY UPDATE OF jobs;
        END IF;

        UPDATE event_log SET position = position + appended_count WHERE id = 1
        RETURNING position - appended_count, clock_timestamp() INTO log_position, appended_at;

        INSERT INTO events (
            job_id, sequence, position, id, kind, name, step_configuration_id, step_percent, event_metadata,
            occurred_at, status, points_done, percent, created_at)
        SELECT
            append_events.job_id[given.job], given.sequence,
            log_position + row_number() OVER (ORDER BY given.ordinal),
            given.id, given.kind, given.name, given.step, given.step_percent, given.metadata,
            given.occurred_at, given.status, given.points_done, given.percent, appended_at
        FROM unnest(
            event_job, event_id, event_sequence, event_kind, event_name, event_step, event_step_percent, event_metadata,
            event_occurred_at, event_status, event_points_done, event_percent
        ) WITH ORDINALITY AS given (
            job, id, sequence, kind, name, step, step_percent, metadata,
            occurred_at, status, points_done, percent, ordinal)
        LEFT JOIN step_configurations AS step
            ON step.id = given.step AND step.job_configuration_id = configurations[given.job]
        WHERE outcomes[given.job] = 0 AND (given.step IS NULL OR step.id IS NOT NULL);
        GET DIAGNOSTICS inserted_count = ROW_COUNT;
        IF inserted_count <> appended_count THEN
            RAISE EXCEPTION 'an event names a step that its job does not have'
                USING ERRCODE = 'foreign_key_violation', TABLE = 'events', CONSTRAINT = 'events_references';
        END IF;

        -- A job is closed, and was last changed, at the time of its last event. The
        -- providers have fewer open jobs: see user_usage.
        IF true = ANY (job_status_changes) THEN
            WITH changed AS (
                UPDATE jobs SET
                    status = given.status,
                    closed_at = CASE WHEN given.closed THEN appended_at END
                FROM unnest(append_events.job_id, job_status, job_closed, job_status_changes, outcomes)
                    AS given (id, status, closed, changes, outcome)
                WHERE jobs.id = given.id AND given.changes AND given.outcome = 0
                RETURNING jobs.id, jobs.provider_id, given.closed),
            closed AS (
                UPDATE job_states SET updated_at = appended_at
                FROM changed WHERE job_states.job_id = changed.id AND changed.closed
                RETURNING changed.provider_id)
            INSERT INTO usage_changes (user_id, open_jobs)
            SELECT closed.provider_id, -count(*) FROM closed GROUP BY closed.provider_id;

            INSERT INTO untimed_jobs (job_id)
            SELECT given.id FROM unnest(append_events.job_id, job_status, job_status_changes, outcomes)
                AS given (id, status, changes, outcome)
            WHERE given.status = 'complete' AND given.changes AND given.outcome = 0;
        END IF;

        IF true = ANY (job_cancels) THEN
            UPDATE job_states SET cancellation_requested_at = appended_at
            FROM unnest(append_events.job_id, job_cancels, outcomes) AS given (id, cancels, outcome)
            WHERE job_states.job_id = given.id AND given.cancels AND given.outcome = 0;
        END IF;

        IF true = ANY (job_silence_changes) THEN
            UPDATE job_silences SET
                due_at = CASE WHEN NOT given.silent THEN appended_at + microseconds(max_silence) END
            FROM unnest(append_events.job_id, job_silent, job_closed, job_silence_changes, outcomes)
                AS given (id, silent, closed, changes, outcome)
            WHERE job_silences.job_id = given.id AND given.changes AND given.outcome = 0 AND NOT given.closed;
            DELETE FROM job_silences
            USING unnest(append_events.job_id, job_closed, job_silence_changes, outcomes)
                AS given (id, closed, changes, outcome)
            WHERE job_silences.job_id = given.id AND given.changes AND given.outcome = 0 AND given.closed;
        END IF;
    END IF;
END;
$$;
