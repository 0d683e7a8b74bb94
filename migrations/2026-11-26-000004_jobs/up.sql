-- Jobs, and their states after their last events. What derives from a job's events (all of
-- job_states, and status and closed_at of jobs) is written by append_events alone. It is
-- stored so that a job is read without its events.

CREATE TYPE job_status AS ENUM ('pending', 'running', 'stalled', 'failed', 'complete', 'cancelled');

CREATE TABLE jobs (
    id uuid NOT NULL,
    provider_id uuid NOT NULL,
    customer_id uuid NOT NULL,
    -- Constants, so that the foreign keys admit the right role only.
    provider_role user_role NOT NULL GENERATED ALWAYS AS ('provider'::user_role) STORED,
    customer_role user_role NOT NULL GENERATED ALWAYS AS ('customer'::user_role) STORED,
    job_configuration_id uuid NOT NULL,
    -- The tag of the job configuration, copied for the filters of ListJobs.
    configuration_tag text NOT NULL,
    -- Sorted by bytes, so that a search by prefix is a range of an index.
    provider_job_id text COLLATE "C" NOT NULL,
    provider_job_name text COLLATE "C" NOT NULL,
    -- The points of all steps of the configuration, as they are weighed.
    points_total bigint NOT NULL,
    -- How long the provider may be silent, in microseconds; null for ever.
    max_silence bigint,
    -- Each key and its value, by key.
    labels text[] NOT NULL DEFAULT '{}',
    -- That of job_states, for the filters of ListJobs.
    status job_status NOT NULL DEFAULT 'pending',
    closed_at timestamptz,
    -- Set by retention, which then deletes the job's events.
    events_removed boolean NOT NULL DEFAULT false,
    -- Retention leaves a job that either side holds.
    held_by_provider boolean NOT NULL DEFAULT false,
    held_by_customer boolean NOT NULL DEFAULT false,
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT jobs_pkey PRIMARY KEY (id),
    CONSTRAINT jobs_provider_fkey FOREIGN KEY (provider_id, provider_role) REFERENCES users (id, role),
    CONSTRAINT jobs_customer_fkey FOREIGN KEY (customer_id, customer_role) REFERENCES users (id, role),
    CONSTRAINT jobs_job_configuration_fkey FOREIGN KEY (job_configuration_id, provider_id) REFERENCES job_configurations (id, provider_id),
    CONSTRAINT jobs_provider_id_provider_job_id_key UNIQUE (provider_id, provider_job_id),
    CONSTRAINT jobs_provider_job_id_check CHECK (char_length(provider_job_id) BETWEEN 1 AND 256 AND provider_job_id = btrim(provider_job_id)),
    CONSTRAINT jobs_provider_job_name_check CHECK (char_length(provider_job_name) <= 256),
    CONSTRAINT jobs_labels_check CHECK (cardinality(labels) <= 32 AND cardinality(labels) % 2 = 0 AND array_position(labels, NULL) IS NULL),
    CONSTRAINT jobs_max_silence_check CHECK (max_silence BETWEEN 10000000 AND 2592000000000),
    CONSTRAINT jobs_closed_at_check CHECK (
        CASE status
            WHEN 'complete' THEN closed_at IS NOT NULL
            WHEN 'cancelled' THEN closed_at IS NOT NULL
            WHEN 'failed' THEN true
            ELSE closed_at IS NULL
        END),
    CONSTRAINT jobs_events_removed_check CHECK (NOT events_removed OR closed_at IS NOT NULL),
    CONSTRAINT jobs_held_check CHECK (NOT (events_removed AND (held_by_provider OR held_by_customer)))
);

-- For ListJobs, newest first, by provider and by customer; each single filter is
-- a range of one index.
CREATE INDEX jobs_provider_id_created_at_idx ON jobs (provider_id, created_at DESC, id DESC);
CREATE INDEX jobs_customer_id_created_at_idx ON jobs (customer_id, created_at DESC, id DESC);
CREATE INDEX jobs_provider_id_status_idx ON jobs (provider_id, status, created_at DESC, id DESC);
CREATE INDEX jobs_customer_id_status_idx ON jobs (customer_id, status, created_at DESC, id DESC);
CREATE INDEX jobs_provider_id_open_idx ON jobs (provider_id, created_at DESC, id DESC) WHERE closed_at IS NULL;
CREATE INDEX jobs_customer_id_open_idx ON jobs (customer_id, created_at DESC, id DESC) WHERE closed_at IS NULL;
CREATE INDEX jobs_provider_id_closed_idx ON jobs (provider_id, created_at DESC, id DESC) WHERE closed_at IS NOT NULL;
CREATE INDEX jobs_customer_id_closed_idx ON jobs (customer_id, created_at DESC, id DESC) WHERE closed_at IS NOT NULL;
CREATE INDEX jobs_provider_id_configuration_tag_idx ON jobs (provider_id, configuration_tag, created_at DESC, id DESC);
CREATE INDEX jobs_customer_id_configuration_tag_idx ON jobs (customer_id, configuration_tag, created_at DESC, id DESC);
CREATE INDEX jobs_provider_id_customer_id_idx ON jobs (provider_id, customer_id, created_at DESC, id DESC);
CREATE INDEX jobs_customer_id_provider_job_id_idx ON jobs (customer_id, provider_job_id);
CREATE INDEX jobs_provider_id_provider_job_name_idx ON jobs (provider_id, provider_job_name);
CREATE INDEX jobs_customer_id_provider_job_name_idx ON jobs (customer_id, provider_job_name);

-- For the question whether a customer has a job of a configuration.
CREATE INDEX jobs_job_configuration_id_customer_id_idx ON jobs (job_configuration_id, customer_id);

-- The jobs whose events retention removes next, in the order in which they closed.
CREATE INDEX jobs_closed_at_idx ON jobs (closed_at)
    WHERE closed_at IS NOT NULL AND NOT events_removed AND NOT held_by_provider AND NOT held_by_customer;

-- The number of stalled jobs, for a metric.
CREATE INDEX jobs_stalled_idx ON jobs (id) WHERE status = 'stalled';

-- The labels of each job, one by one, for ListJobs: the jobs of a label are a range of an index,
-- newest first. A row never changes.
CREATE TABLE job_labels (
    job_id uuid NOT NULL,
    key text COLLATE "C" NOT NULL,
    value text COLLATE "C" NOT NULL,
    -- Copied from jobs.
    provider_id uuid NOT NULL,
    customer_id uuid NOT NULL,
    job_created_at timestamptz NOT NULL,
    CONSTRAINT job_labels_pkey PRIMARY KEY (job_id, key),
    CONSTRAINT job_labels_job_id_fkey FOREIGN KEY (job_id) REFERENCES jobs (id) ON DELETE CASCADE,
    CONSTRAINT job_labels_key_check CHECK (char_length(key) BETWEEN 1 AND 64),
    CONSTRAINT job_labels_value_check CHECK (char_length(value) <= 256)
);

CREATE INDEX job_labels_provider_id_idx ON job_labels (provider_id, key, value, job_created_at DESC, job_id DESC);
CREATE INDEX job_labels_customer_id_idx ON job_labels (customer_id, key, value, job_created_at DESC, job_id DESC);

-- Whether all of the wanted labels are among these.
CREATE FUNCTION has_labels(labels text[], wanted text[]) RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
    SELECT NOT EXISTS (
        SELECT FROM generate_series(1, cardinality(wanted), 2) AS i
        WHERE NOT EXISTS (
            SELECT FROM generate_series(1, cardinality(labels), 2) AS j
            WHERE labels[j] = wanted[i] AND labels[j + 1] = wanted[i + 1]));
$$;

-- About what the labels of a job take: their rows and index entries, and each text four times.
CREATE FUNCTION label_bytes(labels text[]) RETURNS bigint LANGUAGE sql IMMUTABLE AS $$
    SELECT cardinality(labels) / 2 * 400 + octet_length(array_to_string(labels, '')) * 4;
$$;

-- The rules for a row of job_states. They stand in a function because Postgres parses the expressions
-- of all CHECKs of a table anew for each statement that writes to the table. As CHECKs, the 17 rules of
-- job_states and events took a quarter of the time in which append_events appends one event. Postgres parses
-- a function of plpgsql once for each connection. It does not check stored rows again when the function is
-- replaced.
CREATE FUNCTION is_job_state(
    points_total bigint,
    status job_status,
    closed boolean,
    points_done bigint,
    percent smallint,
    last_sequence bigint,
    last_event_id uuid,
    steps bytea,
    last_step_sequence bigint,
    silent boolean,
    cancellation_requested_at timestamptz
) RETURNS boolean LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    RETURN points_done BETWEEN 0 AND points_total
        AND percent BETWEEN 0 AND 100
        AND (percent = 100) = (status = 'complete')
        AND octet_length(steps) <= 200
        AND last_sequence >= 0
        -- A pending job may have the request of a cancellation.
        AND (last_sequence > 0 OR status = 'pending')
        AND last_step_sequence BETWEEN 0 AND last_sequence
        AND (NOT silent OR last_sequence > 0 AND NOT closed)
        AND (status <> 'stalled' OR silent)
        AND (cancellation_requested_at IS NULL OR last_sequence > 0)
        AND (last_event_id IS NULL) = (last_sequence = 0)
        AND CASE status
            WHEN 'complete' THEN closed
            WHEN 'cancelled' THEN closed
            WHEN 'failed' THEN true
            ELSE NOT closed
        END;
END;
$$;

-- The state of each job after its last event. Each append makes a new version of the row.
-- This table has no other index, so that such an update opens and locks one index, and
-- never changes it: the free space in each page keeps the updates heap-only.
CREATE TABLE job_states (
    job_id uuid NOT NULL,
    -- Copied from jobs, so that an append reads no other row of the job.
    job_configuration_id uuid NOT NULL,
    points_total bigint NOT NULL,
    status job_status NOT NULL,
    closed boolean NOT NULL,
    points_done bigint NOT NULL DEFAULT 0,
    percent smallint NOT NULL DEFAULT 0,
    last_sequence bigint NOT NULL DEFAULT 0,
    -- The id of the event with that sequence.
    last_event_id uuid,
    -- When the job was changed last, which is its updated_at in the API.
    updated_at timestamptz NOT NULL,
    -- How far each step is, by position, up to the last one that an event names: 0 to come,
    -- 1 + percent under way, 101 done.
    steps bytea NOT NULL DEFAULT '\x',
    -- The sequence of the event that finished a step last; 0 without one.
    last_step_sequence bigint NOT NULL DEFAULT 0,
    -- A silent event came after the last event of the provider.
    silent boolean NOT NULL DEFAULT false,
    -- When the customer asked to stop.
    cancellation_requested_at timestamptz,
    CONSTRAINT job_states_pkey PRIMARY KEY (job_id),
    CONSTRAINT job_states_job_id_fkey FOREIGN KEY (job_id) REFERENCES jobs (id) ON DELETE CASCADE,
    CONSTRAINT job_states_rules_check CHECK (is_job_state(
        points_total, status, closed, points_done, percent, last_sequence, last_event_id, steps, last_step_sequence,
        silent, cancellation_requested_at))
) WITH (fillfactor = 50);

-- When to look next whether the provider of an open job has been silent for too long. A row
-- changes when that time is reached, and when a silent event is written or followed by an
-- event of the provider. Other appends leave it as it is.
CREATE TABLE job_silences (
    job_id uuid NOT NULL,
    -- Copied from jobs.
    max_silence bigint NOT NULL,
    -- Null while the job is silent.
    due_at timestamptz,
    CONSTRAINT job_silences_pkey PRIMARY KEY (job_id),
    CONSTRAINT job_silences_job_id_fkey FOREIGN KEY (job_id) REFERENCES jobs (id) ON DELETE CASCADE
);

CREATE INDEX job_silences_due_at_idx ON job_silences (due_at) WHERE due_at IS NOT NULL;

-- How long the completion of a job took from the end of each of its steps, for estimates. It is
-- kept apart from the events, which retention removes.
CREATE TABLE step_times (
    job_id uuid NOT NULL,
    -- Copied from jobs.
    provider_id uuid NOT NULL,
    configuration_tag text NOT NULL,
    job_configuration_id uuid NOT NULL,
    completed_at timestamptz NOT NULL,
    -- From the creation of the job to its completion, in microseconds.
    total bigint NOT NULL,
    -- From the first step event of each step to the completion, in microseconds, by the step's
    -- position; null for a step without one.
    remaining bigint[] NOT NULL,
    CONSTRAINT step_times_pkey PRIMARY KEY (job_id),
    CONSTRAINT step_times_job_id_fkey FOREIGN KEY (job_id) REFERENCES jobs (id) ON DELETE CASCADE,
    CONSTRAINT step_times_remaining_check CHECK (cardinality(remaining) <= 200)
);

-- The jobs that completed last, of a version and of a tag.
CREATE INDEX step_times_job_configuration_id_idx ON step_times (job_configuration_id, completed_at DESC);
CREATE INDEX step_times_provider_id_configuration_tag_idx ON step_times (provider_id, configuration_tag, completed_at DESC);

-- The completed jobs whose step times are still to be kept.
CREATE TABLE untimed_jobs (
    job_id uuid NOT NULL,
    -- How far the job's events have been read, and when each step was done by them.
    read_through bigint NOT NULL DEFAULT 0,
    done_at timestamptz[] NOT NULL DEFAULT '{}',
    CONSTRAINT untimed_jobs_pkey PRIMARY KEY (job_id),
    CONSTRAINT untimed_jobs_job_id_fkey FOREIGN KEY (job_id) REFERENCES jobs (id) ON DELETE CASCADE
);

CREATE FUNCTION microseconds(count bigint) RETURNS interval LANGUAGE sql IMMUTABLE AS $$
    SELECT count * interval '1 microsecond';
$$;

CREATE FUNCTION in_microseconds(length interval) RETURNS bigint LANGUAGE sql IMMUTABLE AS $$
    SELECT (extract(epoch FROM length) * 1000000)::bigint;
$$;

-- Gives each new job its state. It copies status and closed_at too, so that the checks above
-- refuse a job that is not new.
CREATE FUNCTION jobs_make_states() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO job_states (job_id, job_configuration_id, points_total, status, closed, updated_at)
    SELECT id, job_configuration_id, points_total, status, closed_at IS NOT NULL, created_at FROM added;
    INSERT INTO job_labels (job_id, key, value, provider_id, customer_id, job_created_at)
    SELECT id, labels[i], labels[i + 1], provider_id, customer_id, created_at
    FROM added CROSS JOIN LATERAL generate_series(1, cardinality(labels), 2) AS i;
    INSERT INTO job_silences (job_id, max_silence, due_at)
    SELECT id, max_silence, created_at + microseconds(max_silence) FROM added WHERE max_silence IS NOT NULL;
    RETURN NULL;
END;
$$;

CREATE TRIGGER jobs_make_states AFTER INSERT ON jobs REFERENCING NEW TABLE AS added
    FOR EACH STATEMENT EXECUTE FUNCTION jobs_make_states();

-- Counts open jobs, and the bytes of all jobs: about what the rows and their index entries
-- take beside its texts. A job that closes is counted by append_events.
CREATE FUNCTION jobs_count_usage() RETURNS trigger LANGUAGE plpgsql
SET enable_seqscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
AS $$
DECLARE
    row_bytes CONSTANT integer := 1024;
BEGIN
    IF TG_OP = 'INSERT' THEN
        UPDATE user_usage AS usage SET
            open_jobs = usage.open_jobs + counted.open,
            stored_bytes = usage.stored_bytes + counted.bytes
        FROM (
            SELECT provider_id, count(*) FILTER (WHERE closed_at IS NULL) AS open,
                sum(row_bytes + octet_length(provider_job_id) + octet_length(provider_job_name)
                    + label_bytes(labels)) AS bytes
            FROM changed GROUP BY provider_id
        ) AS counted
        WHERE usage.user_id = counted.provider_id;
    ELSE
        INSERT INTO usage_changes (user_id, open_jobs, stored_bytes)
        SELECT provider_id, -count(*) FILTER (WHERE closed_at IS NULL),
            -sum(row_bytes + octet_length(provider_job_id) + octet_length(provider_job_name)
                + label_bytes(labels))
        FROM changed GROUP BY provider_id;
    END IF;
    RETURN NULL;
END;
$$;

CREATE TRIGGER jobs_count_added AFTER INSERT ON jobs REFERENCING NEW TABLE AS changed
    FOR EACH STATEMENT EXECUTE FUNCTION jobs_count_usage();
CREATE TRIGGER jobs_count_removed AFTER DELETE ON jobs REFERENCING OLD TABLE AS changed
    FOR EACH STATEMENT EXECUTE FUNCTION jobs_count_usage();
