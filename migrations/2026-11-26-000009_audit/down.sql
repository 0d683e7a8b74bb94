DROP FUNCTION audit_appends;
DROP TABLE audit_entries;
DROP TYPE audit_actor;
DROP TYPE audit_act;
