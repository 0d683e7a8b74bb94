-- Foundations: which servers may serve this schema, and the trigger functions
-- that tables of several folders share.

-- One row. A server that does not know the migration `oldest_server` refuses to
-- serve this schema. A migration that only expands the schema leaves the value
-- as it is; a migration that removes something that older servers need raises it.
-- See migrations/README.md.
CREATE TABLE schema_compatibility (
    id smallint NOT NULL DEFAULT 1,
    oldest_server text NOT NULL,
    CONSTRAINT schema_compatibility_pkey PRIMARY KEY (id),
    CONSTRAINT schema_compatibility_id_check CHECK (id = 1)
);

INSERT INTO schema_compatibility (oldest_server) VALUES ('20261126000011');

-- The time of a change is that of its transaction, as are the defaults of created_at and
-- updated_at and the time of a revocation: what one transaction sets is equal. A transaction
-- that waited for the row's lock may have begun before the row's last change.
CREATE FUNCTION set_updated_at() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.updated_at := greatest(now(), OLD.updated_at);
    RETURN NEW;
END;
$$;

-- For tables whose rows never change.
CREATE FUNCTION refuse_update() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% refused: rows of % never change', TG_OP, TG_TABLE_NAME
        USING ERRCODE = 'restrict_violation';
END;
$$;
