DROP FUNCTION find_silent_jobs;
DROP FUNCTION note_server;
DROP TABLE server_times;
