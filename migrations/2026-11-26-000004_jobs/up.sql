-- Jobs. Columns that derive from a job's events (status, points_done, percent,
-- steps_done, last_sequence, last_event_id, closed_at) are written by append_events
-- alone. They stand here so that a job is read without its events.

CREATE TYPE job_status AS ENUM ('pending', 'running', 'failed', 'complete', 'cancelled');

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
    status job_status NOT NULL DEFAULT 'pending',
    points_done bigint NOT NULL DEFAULT 0,
    points_total bigint NOT NULL,
    percent smallint NOT NULL DEFAULT 0,
    -- One bit for each step of the configuration, by position, lowest bit first.
    steps_done bytea NOT NULL DEFAULT '\x',
    last_sequence bigint NOT NULL DEFAULT 0,
    -- The id of the event with that sequence.
    last_event_id uuid,
    closed_at timestamptz,
    -- Set by retention, which then deletes the job's events.
    events_removed boolean NOT NULL DEFAULT false,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT jobs_pkey PRIMARY KEY (id),
    CONSTRAINT jobs_provider_fkey FOREIGN KEY (provider_id, provider_role) REFERENCES users (id, role),
    CONSTRAINT jobs_customer_fkey FOREIGN KEY (customer_id, customer_role) REFERENCES users (id, role),
    CONSTRAINT jobs_job_configuration_fkey FOREIGN KEY (job_configuration_id, provider_id) REFERENCES job_configurations (id, provider_id),
    CONSTRAINT jobs_provider_id_provider_job_id_key UNIQUE (provider_id, provider_job_id),
    CONSTRAINT jobs_provider_job_id_check CHECK (char_length(provider_job_id) BETWEEN 1 AND 256 AND provider_job_id = btrim(provider_job_id)),
    CONSTRAINT jobs_provider_job_name_check CHECK (char_length(provider_job_name) <= 256),
    CONSTRAINT jobs_points_check CHECK (points_done BETWEEN 0 AND points_total),
    CONSTRAINT jobs_percent_check CHECK (percent BETWEEN 0 AND 100 AND (percent = 100) = (status = 'complete')),
    CONSTRAINT jobs_steps_done_check CHECK (octet_length(steps_done) <= 25),
    CONSTRAINT jobs_last_sequence_check CHECK (last_sequence >= 0 AND (last_sequence = 0) = (status = 'pending')),
    CONSTRAINT jobs_last_event_id_check CHECK ((last_event_id IS NULL) = (last_sequence = 0)),
    CONSTRAINT jobs_closed_at_check CHECK (
        CASE status
            WHEN 'complete' THEN closed_at IS NOT NULL
            WHEN 'cancelled' THEN closed_at IS NOT NULL
            WHEN 'failed' THEN true
            ELSE closed_at IS NULL
        END),
    CONSTRAINT jobs_events_removed_check CHECK (NOT events_removed OR closed_at IS NOT NULL)
-- Each append makes a new version of the job's row. The free space in each page
-- takes it: an append that changes neither status nor closed_at changes no indexed
-- column, so that its update is heap-only.
) WITH (fillfactor = 70);

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
CREATE INDEX jobs_closed_at_idx ON jobs (closed_at) WHERE closed_at IS NOT NULL AND NOT events_removed;

-- Counts open jobs, and the bytes of all jobs: about what the row and its index entries take
-- beside its texts. A job that closes is counted by append_events.
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
                sum(row_bytes + octet_length(provider_job_id) + octet_length(provider_job_name)) AS bytes
            FROM changed GROUP BY provider_id
        ) AS counted
        WHERE usage.user_id = counted.provider_id;
    ELSE
        INSERT INTO usage_changes (user_id, open_jobs, stored_bytes)
        SELECT provider_id, -count(*) FILTER (WHERE closed_at IS NULL),
            -sum(row_bytes + octet_length(provider_job_id) + octet_length(provider_job_name))
        FROM changed GROUP BY provider_id;
    END IF;
    RETURN NULL;
END;
$$;

CREATE TRIGGER jobs_count_added AFTER INSERT ON jobs REFERENCING NEW TABLE AS changed
    FOR EACH STATEMENT EXECUTE FUNCTION jobs_count_usage();
CREATE TRIGGER jobs_count_removed AFTER DELETE ON jobs REFERENCING OLD TABLE AS changed
    FOR EACH STATEMENT EXECUTE FUNCTION jobs_count_usage();
