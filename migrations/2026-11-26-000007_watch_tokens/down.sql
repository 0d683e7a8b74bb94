DROP VIEW credentials;
DROP TABLE watch_tokens;
DROP FUNCTION watch_tokens_count_usage();
