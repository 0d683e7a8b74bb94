-- Configurations: the versions of a provider's job configuration, their steps,
-- and the metadata that each step declares. Registered once, never changed.

CREATE TABLE job_configurations (
    id uuid NOT NULL,
    provider_id uuid NOT NULL,
    -- A constant, so that the foreign key admits providers only.
    provider_role user_role NOT NULL GENERATED ALWAYS AS ('provider'::user_role) STORED,
    tag text NOT NULL,
    name text NOT NULL,
    version text NOT NULL,
    -- False for a pre-release version.
    release boolean NOT NULL,
    -- Bytes that sort by the version's SemVer precedence.
    precedence bytea NOT NULL,
    -- How long the provider of a job may be silent, in microseconds; null for ever.
    max_silence bigint,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL GENERATED ALWAYS AS (created_at) STORED,
    CONSTRAINT job_configurations_pkey PRIMARY KEY (id),
    CONSTRAINT job_configurations_provider_fkey FOREIGN KEY (provider_id, provider_role) REFERENCES users (id, role),
    CONSTRAINT job_configurations_provider_id_tag_version_key UNIQUE (provider_id, tag, version),
    -- The target of a foreign key of jobs.
    CONSTRAINT job_configurations_id_provider_id_key UNIQUE (id, provider_id),
    CONSTRAINT job_configurations_tag_check CHECK (char_length(tag) BETWEEN 1 AND 256 AND tag = btrim(tag)),
    -- 10 seconds to 30 days.
    CONSTRAINT job_configurations_max_silence_check CHECK (max_silence BETWEEN 10000000 AND 2592000000000),
    CONSTRAINT job_configurations_name_check CHECK (char_length(name) BETWEEN 1 AND 256 AND name = btrim(name)),
    CONSTRAINT job_configurations_version_check CHECK (
        char_length(version) <= 256
        -- The regular expression published on semver.org.
        AND version ~ '^(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-((0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*)(\.(0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*))*))?(\+([0-9a-zA-Z-]+(\.[0-9a-zA-Z-]+)*))?$')
);

-- The latest version of a tag: releases before pre-releases.
CREATE INDEX job_configurations_latest_idx ON job_configurations
    (provider_id, tag, release DESC, precedence DESC, created_at DESC, id DESC);

-- All versions of a tag, by precedence alone.
CREATE INDEX job_configurations_precedence_idx ON job_configurations
    (provider_id, tag, precedence DESC, created_at DESC, id DESC);

CREATE TRIGGER job_configurations_refuse_update BEFORE UPDATE ON job_configurations
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_update();

CREATE TRIGGER job_configurations_count_added AFTER INSERT ON job_configurations REFERENCING NEW TABLE AS changed
    FOR EACH STATEMENT EXECUTE FUNCTION count_usage('configurations', 'provider_id');
CREATE TRIGGER job_configurations_count_removed AFTER DELETE ON job_configurations REFERENCING OLD TABLE AS changed
    FOR EACH STATEMENT EXECUTE FUNCTION count_usage('configurations', 'provider_id');

CREATE TABLE step_configurations (
    id uuid NOT NULL,
    job_configuration_id uuid NOT NULL,
    -- 0, 1, 2 ... within the job configuration.
    position smallint NOT NULL,
    tag text NOT NULL,
    name text NOT NULL,
    points integer NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL GENERATED ALWAYS AS (created_at) STORED,
    CONSTRAINT step_configurations_pkey PRIMARY KEY (id),
    CONSTRAINT step_configurations_job_configuration_id_fkey FOREIGN KEY (job_configuration_id) REFERENCES job_configurations (id),
    CONSTRAINT step_configurations_job_configuration_id_tag_key UNIQUE (job_configuration_id, tag),
    CONSTRAINT step_configurations_job_configuration_id_position_key UNIQUE (job_configuration_id, position),
    CONSTRAINT step_configurations_position_check CHECK (position BETWEEN 0 AND 199),
    CONSTRAINT step_configurations_tag_check CHECK (char_length(tag) BETWEEN 1 AND 256 AND tag = btrim(tag)),
    CONSTRAINT step_configurations_name_check CHECK (char_length(name) BETWEEN 1 AND 256 AND name = btrim(name)),
    CONSTRAINT step_configurations_points_check CHECK (points BETWEEN 0 AND 1000000)
);

CREATE TRIGGER step_configurations_refuse_update BEFORE UPDATE ON step_configurations
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_update();

CREATE TYPE metadata_kind AS ENUM ('text', 'number', 'link');

CREATE TABLE metadata_configurations (
    id uuid NOT NULL,
    step_configuration_id uuid NOT NULL,
    -- 0, 1, 2 ... within the step configuration.
    position smallint NOT NULL,
    name text NOT NULL,
    kind metadata_kind NOT NULL DEFAULT 'text',
    units text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL GENERATED ALWAYS AS (created_at) STORED,
    CONSTRAINT metadata_configurations_pkey PRIMARY KEY (id),
    CONSTRAINT metadata_configurations_step_configuration_id_fkey FOREIGN KEY (step_configuration_id) REFERENCES step_configurations (id),
    CONSTRAINT metadata_configurations_step_configuration_id_name_key UNIQUE (step_configuration_id, name),
    CONSTRAINT metadata_configurations_step_configuration_id_position_key UNIQUE (step_configuration_id, position),
    CONSTRAINT metadata_configurations_position_check CHECK (position BETWEEN 0 AND 63),
    CONSTRAINT metadata_configurations_name_check CHECK (char_length(name) BETWEEN 1 AND 256 AND name = btrim(name)),
    CONSTRAINT metadata_configurations_units_check CHECK (char_length(units) <= 256)
);

CREATE TRIGGER metadata_configurations_refuse_update BEFORE UPDATE ON metadata_configurations
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_update();
