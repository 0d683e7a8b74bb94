DROP VIEW credentials;
DROP TABLE watch_tokens;
