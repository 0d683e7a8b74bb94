DROP FUNCTION remove_expired_events;
DROP TABLE removed_logs;
DROP TABLE retention;
