DROP TABLE api_keys;
DROP TYPE api_key_scope;
DROP TABLE sessions;
DROP FUNCTION refuse_change_of_revocation;
DROP FUNCTION is_valid;
DROP TABLE users;
DROP TYPE user_role;
