-- Keeps the step times of completed jobs. Reads at most `most_events` events, of a job with more
-- of them in several calls, and returns how many it read. A job that another server reads is
-- passed over.
CREATE FUNCTION keep_step_times(most_events bigint) RETURNS bigint LANGUAGE plpgsql
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
AS $$
DECLARE
    left_over bigint := most_events;
    untimed record;
    job record;
    step record;
    through bigint;
    times timestamptz[];
BEGIN
    WHILE left_over > 0 LOOP
        SELECT * INTO untimed FROM untimed_jobs ORDER BY job_id LIMIT 1 FOR UPDATE SKIP LOCKED;
        EXIT WHEN NOT FOUND;
        SELECT jobs.*, job_states.last_sequence INTO job
        FROM jobs JOIN job_states ON job_states.job_id = jobs.id WHERE jobs.id = untimed.job_id;
        through := least(untimed.read_through + left_over, job.last_sequence);
        left_over := left_over - (through - untimed.read_through);
        times := untimed.done_at;
        FOR step IN
            SELECT step_configurations.position, min(events.created_at) AS done_at
            FROM events JOIN step_configurations ON step_configurations.id = events.step_configuration_id
            WHERE events.job_id = untimed.job_id AND events.kind = 'step'
                AND events.sequence > untimed.read_through AND events.sequence <= through
            GROUP BY step_configurations.position
        LOOP
            times[step.position + 1] := least(times[step.position + 1], step.done_at);
        END LOOP;
        IF through < job.last_sequence THEN
            UPDATE untimed_jobs SET read_through = through, done_at = times WHERE job_id = untimed.job_id;
        ELSE
            INSERT INTO step_times (
                job_id, provider_id, configuration_tag, job_configuration_id, completed_at, total, remaining)
            VALUES (
                untimed.job_id, job.provider_id, job.configuration_tag, job.job_configuration_id, job.closed_at,
                in_microseconds(job.closed_at - job.created_at),
                ARRAY(
                    SELECT in_microseconds(job.closed_at - time)
                    FROM unnest(times) WITH ORDINALITY AS done (time, ordinal) ORDER BY ordinal));
            DELETE FROM untimed_jobs WHERE job_id = untimed.job_id;
        END IF;
    END LOOP;
    RETURN most_events - left_over;
END;
$$;
