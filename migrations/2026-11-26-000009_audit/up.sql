-- The audit: which user did what to accounts, credentials and jobs, and from which
-- address. An entry is written in the transaction of its act, so that neither exists
-- without the other. It holds no text that a caller typed, and so no secret.

CREATE TYPE audit_act AS ENUM (
    'sign_up', 'log_in', 'log_in_failed', 'log_out', 'session_ended', 'password_changed',
    'api_key_created', 'api_key_rotated', 'api_key_expired',
    'watch_token_created', 'watch_token_expired', 'job_closed', 'cancellation_requested',
    'job_held', 'job_released', 'user_created', 'password_set', 'user_disabled', 'user_enabled', 'customer_code_renewed');

-- How the caller was authenticated. An operator works on the database itself.
CREATE TYPE audit_actor AS ENUM ('anonymous', 'session', 'api_key', 'watch_token', 'operator');

-- Without foreign keys: an entry outlives the rows that it names.
CREATE TABLE audit_entries (
    id uuid NOT NULL,
    act audit_act NOT NULL,
    actor audit_actor NOT NULL,
    actor_user_id uuid,
    -- The caller's credential, of the kind that `actor` names.
    actor_credential_id uuid,
    -- The user whose account, credential or job was acted on; null for a log-in
    -- under an e-mail that no user has.
    user_id uuid,
    -- The session, API key, watch token or job that was created or ended.
    session_id uuid,
    api_key_id uuid,
    -- The key that replaces the rotated one.
    new_api_key_id uuid,
    watch_token_id uuid,
    job_id uuid,
    -- The client's address; behind a trusted proxy the one in x-forwarded-for.
    client_address inet,
    -- The x-request-id of the call.
    request_id uuid,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- An entry never changes.
    updated_at timestamptz NOT NULL GENERATED ALWAYS AS (created_at) STORED,
    CONSTRAINT audit_entries_pkey PRIMARY KEY (id),
    CONSTRAINT audit_entries_actor_check CHECK (
        num_nonnulls(actor_user_id, actor_credential_id) = CASE WHEN actor IN ('anonymous', 'operator') THEN 0 ELSE 2 END),
    CONSTRAINT audit_entries_user_id_check CHECK (user_id IS NOT NULL OR act = 'log_in_failed'),
    CONSTRAINT audit_entries_session_id_check CHECK ((session_id IS NOT NULL) = (act IN ('sign_up', 'log_in', 'log_out', 'session_ended'))),
    CONSTRAINT audit_entries_api_key_id_check CHECK (
        (api_key_id IS NOT NULL) = (act IN ('api_key_created', 'api_key_rotated', 'api_key_expired'))),
    CONSTRAINT audit_entries_new_api_key_id_check CHECK ((new_api_key_id IS NOT NULL) = (act = 'api_key_rotated')),
    CONSTRAINT audit_entries_watch_token_id_check CHECK (
        (watch_token_id IS NOT NULL) = (act IN ('watch_token_created', 'watch_token_expired'))),
    CONSTRAINT audit_entries_job_id_check CHECK (
        (job_id IS NOT NULL) = (act IN (
            'watch_token_created', 'watch_token_expired', 'job_closed', 'cancellation_requested',
            'job_held', 'job_released'))),
    CONSTRAINT audit_entries_request_id_check CHECK ((request_id IS NOT NULL) = (actor <> 'operator'))
);

CREATE INDEX audit_entries_created_at_idx ON audit_entries (created_at);
CREATE INDEX audit_entries_user_id_idx ON audit_entries (user_id, created_at);

-- Only the owner of the table can disable this trigger, to delete old entries.
CREATE TRIGGER audit_entries_refuse_update BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_entries
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_update();

-- Called around append_events when the append does something that is audited: writes the
-- entries of the jobs that were appended to, in the same statement, and returns the
-- result of append_events unchanged.
--
-- Each array has one element for each entry; job is the job's index in the append,
-- from 1.
CREATE FUNCTION audit_appends(
    appended record,
    job integer[],
    entry_id uuid[],
    act audit_act[],
    job_id uuid[],
    actor audit_actor[],
    actor_user_id uuid[],
    actor_credential_id uuid[],
    client_address inet[],
    request_id uuid[],
    OUT log_position bigint,
    OUT appended_at timestamptz,
    OUT outcomes smallint[]
) LANGUAGE plpgsql AS $$
BEGIN
    log_position := appended.log_position;
    appended_at := appended.appended_at;
    outcomes := appended.outcomes;
    INSERT INTO audit_entries (
        id, act, actor, actor_user_id, actor_credential_id, user_id, job_id, client_address, request_id)
    SELECT
        given.entry_id, given.act, given.actor, given.actor_user_id, given.actor_credential_id,
        given.actor_user_id, given.job_id, given.client_address, given.request_id
    FROM unnest(job, entry_id, act, job_id, actor, actor_user_id, actor_credential_id, client_address, request_id)
        AS given (job, entry_id, act, job_id, actor, actor_user_id, actor_credential_id, client_address, request_id)
    WHERE outcomes[given.job] = 0;
END;
$$;
