DROP FUNCTION finish_log_in;
DROP FUNCTION begin_log_in;
DROP TABLE log_in_attempts;
