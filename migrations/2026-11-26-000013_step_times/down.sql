DROP FUNCTION keep_step_times;
