DROP TABLE jobs;
DROP FUNCTION jobs_count_usage();
DROP TYPE job_status;
