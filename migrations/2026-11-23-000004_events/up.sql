-- The event log and the one way to write to it.

-- One row: the position of the last event of the log. It is taken inside the
-- append's transaction and locked until that has committed, so that positions
-- have no gap and become visible in their order: whoever sees position n sees
-- every position below it. A sequence would not do, since its numbers become
-- visible out of order.
CREATE TABLE event_log (
    id smallint NOT NULL DEFAULT 1,
    position bigint NOT NULL DEFAULT 0,
    CONSTRAINT event_log_pkey PRIMARY KEY (id),
    CONSTRAINT event_log_id_check CHECK (id = 1),
    CONSTRAINT event_log_position_check CHECK (position >= 0)
-- Every append makes a new version of this row: a page full of room keeps
-- those heap-only.
) WITH (fillfactor = 10);

INSERT INTO event_log DEFAULT VALUES;

CREATE TYPE event_kind AS ENUM ('step', 'error', 'info', 'complete', 'close');

CREATE TABLE events (
    job_id uuid NOT NULL,
    sequence bigint NOT NULL,
    -- Where it stands among the events of all jobs, in commit order.
    position bigint NOT NULL,
    -- The client's, unique within its job.
    id uuid NOT NULL,
    kind event_kind NOT NULL,
    name text NOT NULL,
    step_configuration_id uuid,
    -- An encoded google.protobuf.Struct, empty for none: the very bytes that
    -- watchers receive, with every number exactly as it was sent.
    event_metadata bytea NOT NULL,
    occurred_at timestamptz,
    -- The job as of this event.
    status job_status NOT NULL,
    points_done bigint NOT NULL,
    percent smallint NOT NULL,
    created_at timestamptz NOT NULL,
    -- An event never changes.
    updated_at timestamptz NOT NULL GENERATED ALWAYS AS (created_at) STORED,
    CONSTRAINT events_pkey PRIMARY KEY (job_id, sequence),
    CONSTRAINT events_job_id_id_key UNIQUE (job_id, id),
    CONSTRAINT events_position_key UNIQUE (position),
    CONSTRAINT events_job_id_fkey FOREIGN KEY (job_id) REFERENCES jobs (id),
    CONSTRAINT events_step_configuration_id_fkey FOREIGN KEY (step_configuration_id) REFERENCES step_configurations (id),
    CONSTRAINT events_sequence_check CHECK (sequence >= 1),
    CONSTRAINT events_name_check CHECK (char_length(name) <= 256),
    CONSTRAINT events_step_check CHECK (kind <> 'step' OR step_configuration_id IS NOT NULL),
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

CREATE INDEX events_step_configuration_id_idx ON events (step_configuration_id)
    WHERE step_configuration_id IS NOT NULL;

CREATE TRIGGER events_refuse_update BEFORE UPDATE ON events
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_update();

-- Appends events to many jobs in one statement, so that no lock is ever held
-- across a client's round trip.
--
-- The caller has computed, from each job's state at last_sequences, the events
-- to append and the state that they lead to. A job takes part only if it still
-- is where the caller believes it to be (outcome 0); otherwise nothing of it is
-- written: it has moved on (outcome 1), or an event that a client made the id
-- of is stored already (outcome 2). One job's outcome does not touch another's.
--
-- Locks: the jobs' rows in the order of their ids, then the log's one row, all
-- until the commit. Everybody takes them in this order, so nobody deadlocks.
--
-- Arrays named job_* have one element a job, event_* one an event: events of
-- one job are adjacent and in order, and event_job is the job's index, from 1.
CREATE FUNCTION append_events(
    job_id uuid[],
    job_last_sequence bigint[],
    job_event_count integer[],
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
    -- The position before the first event appended; events follow it one by
    -- one in the order given.
    OUT log_position bigint,
    OUT appended_at timestamptz,
    OUT outcomes smallint[]
) LANGUAGE plpgsql
-- Every row that this touches is known by its key. A plan that was made while
-- the tables were small is kept as they grow, and must not be one that reads
-- them whole.
SET enable_seqscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    unmoved bigint[];
    appended bigint[];
    appended_count bigint;
BEGIN
    unmoved := ARRAY(
        SELECT locked.ordinal FROM (
            SELECT given.ordinal
            FROM unnest(job_id, job_last_sequence) WITH ORDINALITY AS given (id, last_sequence, ordinal)
            JOIN jobs ON jobs.id = given.id AND jobs.last_sequence = given.last_sequence
            ORDER BY jobs.id
            FOR NO KEY UPDATE OF jobs
        ) AS locked);

    appended := ARRAY(
        SELECT u FROM unnest(unmoved) AS u
        EXCEPT
        SELECT given.job
        FROM unnest(event_job, event_id, event_id_is_clients) AS given (job, id, is_clients)
        JOIN events ON events.job_id = append_events.job_id[given.job] AND events.id = given.id
        WHERE given.is_clients);

    SELECT coalesce(sum(given.n), 0) INTO appended_count
    FROM unnest(job_event_count) WITH ORDINALITY AS given (n, ordinal)
    WHERE given.ordinal = ANY (appended);

    IF appended_count > 0 THEN
        UPDATE event_log SET position = position + appended_count WHERE id = 1
        RETURNING position - appended_count INTO log_position;

        appended_at := clock_timestamp();

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
        WHERE given.job = ANY (appended);

        UPDATE jobs SET
            last_sequence = given.last_sequence + given.event_count,
            status = given.status,
            points_done = given.points_done,
            percent = given.percent,
            steps_done = given.steps_done,
            closed_at = CASE WHEN given.closed THEN appended_at END,
            updated_at = appended_at
        FROM unnest(
            job_id, job_last_sequence, job_event_count, job_status, job_points_done, job_percent,
            job_steps_done, job_closed
        ) WITH ORDINALITY AS given (
            id, last_sequence, event_count, status, points_done, percent, steps_done, closed, ordinal)
        WHERE jobs.id = given.id AND given.ordinal = ANY (appended);
    END IF;

    SELECT array_agg(
        CASE WHEN ordinal = ANY (appended) THEN 0 WHEN ordinal = ANY (unmoved) THEN 2 ELSE 1 END::smallint
        ORDER BY ordinal)
    INTO outcomes
    FROM generate_series(1, cardinality(job_id)) AS ordinal;
END;
$$;
