DROP FUNCTION append_events;
DROP TABLE events;
DROP TYPE event_kind;
DROP TABLE event_log;
