DROP FUNCTION append_events;
DROP TRIGGER step_configurations_refuse_delete ON step_configurations;
DROP FUNCTION step_configurations_refuse_delete;
DROP TRIGGER jobs_refuse_delete ON jobs;
DROP FUNCTION jobs_refuse_delete;
DROP TABLE events;
DROP FUNCTION events_check_references;
DROP TYPE event_kind;
DROP TABLE event_log;
