DROP TABLE api_keys;
DROP TYPE api_key_scope;
DROP TABLE sessions;
DROP TABLE users;
DROP TYPE user_role;
