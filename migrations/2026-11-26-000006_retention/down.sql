DROP FUNCTION remove_expired_events;
DROP FUNCTION find_due;
DROP TABLE removed_logs;
DROP TABLE retention;
