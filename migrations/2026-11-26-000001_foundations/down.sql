DROP FUNCTION refuse_update();
DROP FUNCTION set_updated_at();
DROP TABLE schema_compatibility;
