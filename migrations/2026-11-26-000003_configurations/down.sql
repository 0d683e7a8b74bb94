DROP TABLE metadata_configurations;
DROP TYPE metadata_kind;
DROP TABLE step_configurations;
DROP TABLE job_configurations;
