DROP TRIGGER users_revoke_credentials ON users;
DROP FUNCTION revoke_credentials_of_enabled_user;
DROP FUNCTION remove_ended_credentials;
DROP TABLE credential_removal;
