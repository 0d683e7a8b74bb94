DROP FUNCTION audit_closed_jobs;
DROP TABLE audit_entries;
DROP TYPE audit_actor;
DROP TYPE audit_act;
