DROP FUNCTION remove_ended_credentials;
DROP TABLE credential_removal;
