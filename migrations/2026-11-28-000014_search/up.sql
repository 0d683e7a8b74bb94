-- The search for jobs by a text that their provider_job_id or their name contains.

-- A database's owner may create them. They may be there already, in any schema.
CREATE EXTENSION IF NOT EXISTS pg_trgm;
CREATE EXTENSION IF NOT EXISTS btree_gin;

-- The texts of each job in lower case. They are apart from jobs, since an index of trigrams has
-- an entry for every three characters, and a row of jobs changes with its status. A row of this
-- table never changes.
CREATE TABLE job_texts (
    job_id uuid NOT NULL,
    -- Copied from jobs.
    provider_id uuid NOT NULL,
    customer_id uuid NOT NULL,
    provider_job_id text NOT NULL,
    provider_job_name text NOT NULL,
    CONSTRAINT job_texts_pkey PRIMARY KEY (job_id),
    CONSTRAINT job_texts_job_id_fkey FOREIGN KEY (job_id) REFERENCES jobs (id) ON DELETE CASCADE
);

-- By the side's id first, so that a search reads no other user's entries.
DO $$
DECLARE
    side text;
    schema text := (
        SELECT nspname FROM pg_extension JOIN pg_namespace ON pg_namespace.oid = extnamespace
        WHERE extname = 'pg_trgm');
BEGIN
    FOREACH side IN ARRAY ARRAY['provider_id', 'customer_id'] LOOP
        EXECUTE format(
            'CREATE INDEX job_texts_%1$s_idx ON job_texts USING gin (
                 %1$I, provider_job_id %2$I.gin_trgm_ops, provider_job_name %2$I.gin_trgm_ops)',
            side, schema);
    END LOOP;
END;
$$;

-- At most `most` jobs of a provider or of a customer, of which one of the texts is like the
-- pattern. The settings keep to the index of trigrams, whatever the statistics say. The pattern
-- must have three letters or digits in a row, otherwise the index is read whole.
CREATE FUNCTION find_jobs_by_text(provider uuid, customer uuid, pattern text, most bigint)
RETURNS SETOF uuid LANGUAGE plpgsql STABLE
SET enable_seqscan = off
SET enable_indexscan = off
AS $$
BEGIN
    IF provider IS NOT NULL THEN
        RETURN QUERY SELECT job_id FROM job_texts
            WHERE provider_id = provider AND (provider_job_id LIKE pattern OR provider_job_name LIKE pattern)
            LIMIT most;
    ELSE
        RETURN QUERY SELECT job_id FROM job_texts
            WHERE customer_id = customer AND (provider_job_id LIKE pattern OR provider_job_name LIKE pattern)
            LIMIT most;
    END IF;
END;
$$;
