DROP FUNCTION kept_removals;
DROP FUNCTION enter_history;
DROP TABLE histories;
