-- Silence: a job whose provider sends no event for longer than the job allows gets one
-- silent event. Each server takes a step every second, by find_silent_jobs.

-- One row: when a server that can append was there last. Silence is not counted while none
-- was: no event could have come.
CREATE TABLE server_times (
    id smallint NOT NULL DEFAULT 1,
    seen_at timestamptz NOT NULL DEFAULT '-infinity',
    -- The end of the last gap: more than 5 s without a server, or a jump of the clock.
    gap_ended_at timestamptz NOT NULL DEFAULT '-infinity',
    CONSTRAINT server_times_pkey PRIMARY KEY (id),
    CONSTRAINT server_times_id_check CHECK (id = 1)
) WITH (fillfactor = 10);

INSERT INTO server_times DEFAULT VALUES;

-- Says that a server is there, and returns when the last gap ended. Servers that come at
-- the same moment may read the clock in another order than they write.
CREATE FUNCTION note_server() RETURNS timestamptz LANGUAGE sql AS $$
    UPDATE server_times SET
        gap_ended_at = CASE
            WHEN seen_at = '-infinity' OR clock_timestamp() - seen_at NOT BETWEEN interval '-1 s' AND interval '5 s'
            THEN clock_timestamp()
            ELSE gap_ended_at
        END,
        seen_at = clock_timestamp()
    WHERE id = 1
    RETURNING gap_ended_at;
$$;

-- Looks at up to `most` jobs whose time to look has come, those that are due longest first,
-- and returns those that are silent for too long by now, with their last events. Of the others
-- it sets the next time to look. A job that another server looks at is passed over. This waits
-- for no other lock than that of server_times, which another server holds for as long as this
-- function takes. It is to be called outside a transaction: appends that end a silence wait for
-- the rows that it has locked. `looked_at` is how many there were.
--
-- Silence counts from the latest of the job's creation, the last event of its provider, and
-- the end of the last gap. What the server writes is no event of the provider, and comes at
-- most twice between two of them.
CREATE FUNCTION find_silent_jobs(
    most integer,
    OUT looked_at integer,
    OUT job_ids uuid[],
    OUT last_sequences bigint[]
) LANGUAGE plpgsql
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
AS $$
DECLARE
    gap_ended_at CONSTANT timestamptz := note_server();
    silence record;
    state record;
    next_due timestamptz;
BEGIN
    looked_at := 0;
    job_ids := '{}';
    last_sequences := '{}';
    FOR silence IN
        SELECT job_id, max_silence FROM job_silences
        WHERE due_at <= clock_timestamp() ORDER BY due_at LIMIT most
        FOR UPDATE SKIP LOCKED
    LOOP
        looked_at := looked_at + 1;
        SELECT job_states.last_sequence, job_states.silent, job_states.closed, jobs.created_at INTO state
        FROM job_states JOIN jobs ON jobs.id = job_states.job_id
        WHERE job_states.job_id = silence.job_id;
        IF state.silent OR state.closed THEN
            next_due := NULL;
        ELSE
            SELECT greatest(state.created_at, gap_ended_at, (
                SELECT created_at FROM events
                WHERE job_id = silence.job_id AND kind NOT IN ('cancellation_requested', 'silent')
                ORDER BY sequence DESC LIMIT 1)) + microseconds(silence.max_silence)
            INTO next_due;
        END IF;
        IF next_due <= clock_timestamp() THEN
            job_ids := job_ids || silence.job_id;
            last_sequences := last_sequences || state.last_sequence;
        ELSE
            UPDATE job_silences SET due_at = next_due WHERE job_id = silence.job_id;
        END IF;
    END LOOP;
END;
$$;
