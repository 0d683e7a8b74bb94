DROP FUNCTION begin_sign_up;
DROP TABLE sign_up_windows;
DROP FUNCTION withdraw_log_in_attempt;
DROP FUNCTION finish_log_in_attempt;
DROP FUNCTION begin_log_in_attempt;
DROP FUNCTION count_attempt;
DROP FUNCTION log_in_attempt_keys;
DROP TABLE log_in_attempts;
