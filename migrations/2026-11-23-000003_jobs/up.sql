-- Jobs. What the log derives (status, progress, last sequence, closed_at) is
-- written by append_events alone and kept here so that a job is read without
-- its log.

CREATE TYPE job_status AS ENUM ('pending', 'running', 'failed', 'complete', 'cancelled');

CREATE TABLE jobs (
    id uuid NOT NULL,
    provider_id uuid NOT NULL,
    customer_id uuid NOT NULL,
    -- Constants, so that the foreign keys admit the right role only.
    provider_role user_role NOT NULL GENERATED ALWAYS AS ('provider'::user_role) STORED,
    customer_role user_role NOT NULL GENERATED ALWAYS AS ('customer'::user_role) STORED,
    job_configuration_id uuid NOT NULL,
    -- The configuration's, kept here for ListJobs to filter by.
    configuration_tag text NOT NULL,
    -- By their bytes, so that what starts with a prefix is a range of an index.
    provider_job_id text COLLATE "C" NOT NULL,
    provider_job_name text COLLATE "C" NOT NULL,
    status job_status NOT NULL DEFAULT 'pending',
    points_done bigint NOT NULL DEFAULT 0,
    points_total bigint NOT NULL,
    percent smallint NOT NULL DEFAULT 0,
    -- One bit a step of the configuration, by position, lowest bit first.
    steps_done bytea NOT NULL DEFAULT '\x',
    last_sequence bigint NOT NULL DEFAULT 0,
    closed_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    updated_at timestamptz NOT NULL DEFAULT clock_timestamp(),
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
    CONSTRAINT jobs_closed_at_check CHECK (
        CASE status
            WHEN 'complete' THEN closed_at IS NOT NULL
            WHEN 'cancelled' THEN closed_at IS NOT NULL
            WHEN 'failed' THEN true
            ELSE closed_at IS NULL
        END)
-- Room in each page for the row's next versions, since each event makes one;
-- a status that stays and the other columns are in no index, so that those
-- updates are heap-only.
) WITH (fillfactor = 70);

-- Newest first, for either side; and each single filter of ListJobs as a range
-- of its own.
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

-- Whether a customer has a job of a configuration.
CREATE INDEX jobs_job_configuration_id_customer_id_idx ON jobs (job_configuration_id, customer_id);
