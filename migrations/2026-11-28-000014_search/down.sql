DROP FUNCTION find_jobs_by_text;
DROP TABLE job_texts;
-- The extensions stay if something else needs them, or another role has created them.
DO $$
BEGIN
    DROP EXTENSION btree_gin;
EXCEPTION WHEN dependent_objects_still_exist OR insufficient_privilege THEN
    NULL;
END;
$$;
DO $$
BEGIN
    DROP EXTENSION pg_trgm;
EXCEPTION WHEN dependent_objects_still_exist OR insufficient_privilege THEN
    NULL;
END;
$$;
