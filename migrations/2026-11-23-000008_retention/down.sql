UPDATE schema_compatibility SET oldest_server = '20261123000004' WHERE id = 1;
DROP FUNCTION remove_expired_events(interval, integer, integer);
DROP TRIGGER events_refuse_truncate ON events;
DROP TRIGGER events_refuse_delete ON events;
DROP FUNCTION events_refuse_delete();
DROP TABLE removed_logs;
DROP TABLE retention;
DROP INDEX jobs_closed_at_idx;
ALTER TABLE jobs DROP COLUMN events_removed;
