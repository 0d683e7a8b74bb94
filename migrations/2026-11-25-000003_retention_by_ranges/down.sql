CREATE OR REPLACE FUNCTION remove_expired_events(
    age interval,
    most_jobs integer,
    most_events integer,
    OUT marked bigint,
    OUT deleted bigint
) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    place retention%ROWTYPE;
    of_job uuid;
    step bigint;
BEGIN
    marked := 0;
    deleted := 0;
    SELECT * INTO place FROM retention WHERE id = 1 FOR UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN;
    END IF;

    IF place.deleted = place.removals THEN
        WITH due AS (
            SELECT id FROM jobs
            WHERE closed_at < clock_timestamp() - age AND NOT events_removed
            ORDER BY closed_at LIMIT most_jobs
            FOR UPDATE SKIP LOCKED),
        emptied AS (
            UPDATE jobs SET events_removed = true FROM due WHERE jobs.id = due.id
            RETURNING jobs.id, provider_id, customer_id, configuration_tag, last_sequence)
        INSERT INTO removed_logs (
            number, job_id, provider_id, customer_id, configuration_tag, first_position, position)
        SELECT place.removals + row_number() OVER (), emptied.id, provider_id, customer_id,
            configuration_tag,
            (SELECT position FROM events WHERE job_id = emptied.id AND sequence = 1),
            (SELECT position FROM events WHERE job_id = emptied.id AND sequence = last_sequence)
        FROM emptied;
        GET DIAGNOSTICS marked = ROW_COUNT;
        UPDATE retention SET removals = removals + marked WHERE id = 1 AND marked > 0;
        RETURN;
    END IF;

    WHILE place.deleted < place.removals AND deleted < most_events LOOP
        SELECT job_id INTO of_job FROM removed_logs WHERE number = place.deleted + 1;
        DELETE FROM events WHERE job_id = of_job AND sequence IN (
            SELECT sequence FROM events WHERE job_id = of_job ORDER BY sequence LIMIT most_events - deleted);
        GET DIAGNOSTICS step = ROW_COUNT;
        deleted := deleted + step;
        EXIT WHEN EXISTS (SELECT FROM events WHERE job_id = of_job);
        place.deleted := place.deleted + 1;
    END LOOP;
    UPDATE retention SET deleted = place.deleted WHERE id = 1;
END;
$$;
