//! The table of limits: each has a test, in `rows.rs` or in a file that is named here.

/// Limits of `src/limits.rs` and `src/config.rs` without a row in `rows.rs`: the
/// limit, and the file and the name of its test.
const ELSEWHERE: [(&str, &str, &str); 64] = [
    ("TEXT_CHARS", "tests/it/limits/texts.rs", "every_text_has_at_most_256_characters"),
    ("MESSAGE_BYTES", "tests/it/limits/calls.rs", "a_message_has_at_most_one_mebibyte"),
    ("MESSAGE_BYTES", "tests/it/limits/pages.rs", "no_page_of_events_is_larger_than_one_mebibyte"),
    ("MESSAGE_BYTES", "tests/it/limits/pages.rs", "no_page_of_jobs_is_larger_than_one_mebibyte"),
    ("MESSAGE_BYTES", "tests/it/limits/pages.rs", "no_page_of_configurations_is_larger_than_one_mebibyte"),
    ("PASSWORD_WAIT", "src/auth/password.rs", "the_wait_for_a_permit_to_hash_is_bounded"),
    ("PAGE_DEFAULT", "tests/it/jobs/validation.rs", "a_large_page_size_is_cut_and_a_negative_one_is_refused"),
    ("PAGE_MAX", "tests/it/jobs/validation.rs", "a_large_page_size_is_cut_and_a_negative_one_is_refused"),
    ("TOKEN_BYTES", "tests/it/limits/pages.rs", "a_page_token_that_is_too_long_is_not_decoded"),
    (
        "ERROR_DETAILS_BYTES",
        "tests/it/jobs/validation.rs",
        "the_error_of_500_invalid_events_is_small_enough_to_arrive",
    ),
    ("ERROR_QUOTE_CHARS", "tests/it/protocol/errors.rs", "values_quoted_in_errors_are_truncated"),
    (
        "HEARTBEAT",
        "tests/it/log/watch.rs",
        "a_heartbeat_is_sent_after_an_interval_without_messages_of_at_least_5_seconds",
    ),
    ("HEARTBEAT", "src/services/events/requests.rs", "a_heartbeat_interval_is_cut_to_5_to_60_seconds"),
    (
        "STREAM_WINDOW_BYTES",
        "tests/it/protocol/shared_connections.rs",
        "a_publish_stream_that_the_server_does_not_read_holds_up_no_other_call",
    ),
    (
        "PENDING_RESET_STREAMS",
        "tests/it/protocol/http2.rs",
        "a_connection_that_resets_too_many_streams_is_closed",
    ),
    (
        "FAULTY_STREAMS",
        "tests/it/protocol/http2.rs",
        "a_connection_that_sends_too_many_malformed_requests_is_closed",
    ),
    (
        "CREDENTIAL_CONFIRMED_WITHIN",
        "tests/it/guarantees/confined/unconfirmed.rs",
        "events_held_back_for_an_unconfirmed_credential_are_received_after_a_resume",
    ),
    ("CREDENTIALS", "src/auth/cache.rs", "only_credentials_without_a_reference_make_room"),
    (
        "PAIR_FREE",
        "tests/it/accounts/log_in.rs",
        "repeated_failures_are_throttled_on_every_replica_except_for_known_pairs",
    ),
    ("OTHER_FREE", "tests/it/accounts/log_in.rs", "failures_of_one_email_from_many_addresses_are_throttled"),
    (
        "UNKNOWN_FREE",
        "tests/it/jobs/customer_codes.rs",
        "unknown_codes_of_one_provider_are_throttled_on_every_server_whatever_succeeds_between",
    ),
    ("bcrypt_parallel", "src/auth/password.rs", "the_wait_for_a_permit_to_hash_is_bounded"),
    (
        "bcrypt_parallel",
        "tests/it/operations/settings_take_effect.rs",
        "bcrypt_parallel_bounds_how_many_passwords_are_hashed_at_once",
    ),
    (
        "request_timeout",
        "src/server/calls.rs",
        "a_handler_past_the_servers_limit_is_answered_with_deadline_exceeded",
    ),
    (
        "drain_deadline",
        "tests/it/operations/drain.rs",
        "on_sigterm_watches_end_with_draining_and_the_exit_code_is_0",
    ),
    (
        "streams_per_connection",
        "tests/it/protocol/http2.rs",
        "a_connection_announces_max_concurrent_streams_and_refuses_one_more",
    ),
    (
        "streams_per_user",
        "tests/it/log/watch.rs",
        "a_watch_beyond_the_limit_is_refused_until_another_one_closes",
    ),
    (
        "streams_per_user",
        "tests/it/log/publish.rs",
        "a_publish_stream_beyond_the_limit_is_refused_until_another_one_closes",
    ),
    (
        "token_streams_per_user",
        "tests/it/accounts/watch_tokens.rs",
        "the_watch_tokens_of_all_jobs_of_a_provider_have_a_limit_of_streams",
    ),
    (
        "calls_per_second",
        "tests/it/limits/in_flight.rs",
        "calls_beyond_the_rate_of_their_user_are_refused_until_the_time_in_the_refusal",
    ),
    (
        "calls_in_flight",
        "tests/it/limits/in_flight.rs",
        "one_call_more_than_a_user_may_have_in_flight_is_refused_until_one_of_them_ends",
    ),
    (
        "events_per_second",
        "tests/it/limits/in_flight.rs",
        "events_beyond_the_rate_are_refused_in_calls_and_read_more_slowly_from_streams",
    ),
    (
        "bytes_in_flight_mib",
        "tests/it/limits/in_flight.rs",
        "a_batch_counts_until_the_log_does_not_hold_it_also_if_its_caller_has_left",
    ),
    ("total_bytes_in_flight_mib", "src/auth/tenants.rs", "bytes_are_held_by_tenant_and_in_all"),
    ("MESSAGE_CHARGE_BYTES", "src/auth/tenants.rs", "bytes_are_held_by_tenant_and_in_all"),
    ("ANSWER_BYTES", "src/server/in_flight.rs", "a_large_answer_counts_until_it_was_sent"),
    ("JOB_LABELS", "tests/it/jobs/labels.rs", "a_job_and_a_filter_have_at_most_16_labels_of_bounded_texts"),
    (
        "LABEL_KEY_CHARS",
        "tests/it/jobs/labels.rs",
        "a_job_and_a_filter_have_at_most_16_labels_of_bounded_texts",
    ),
    ("SEARCH_TEXT_CHARS", "tests/it/jobs/job_service.rs", "jobs_are_searched_by_three_characters_at_least"),
    (
        "JOB_STATUSES",
        "src/services/filter.rs",
        "unknown_statuses_are_refused_and_repeated_ones_are_kept_once",
    ),
    ("UPDATE_MASK_PATHS", "tests/it/accounts/auth.rs", "every_invalid_path_of_an_update_mask_is_reported"),
    ("API_KEY_SCOPES", "tests/it/accounts/api_keys.rs", "an_api_key_is_asked_for_with_each_scope_once"),
    (
        "EVENT_KINDS",
        "tests/it/jobs/validation.rs",
        "a_kinds_filter_has_at_most_as_many_entries_as_there_are_kinds",
    ),
    ("publish_window", "tests/it/log/publish.rs", "a_publish_stream_is_not_read_while_its_window_is_full"),
    (
        "CONNECTIONS",
        "src/server/incoming.rs",
        "a_connection_beyond_the_limit_is_closed_and_a_missing_preface_times_out",
    ),
    ("UNAUTHENTICATED_CALLS", "tests/it/limits/calls.rs", "unauthenticated_streams_open_at_once_are_limited"),
    ("UNAUTHENTICATED_CALLS", "tests/it/limits/calls.rs", "unauthenticated_calls_in_flight_are_limited"),
    (
        "UNAUTHENTICATED_CALL_BYTES",
        "tests/it/limits/calls.rs",
        "an_unauthenticated_call_sends_at_most_64_kib",
    ),
    (
        "UNAUTHENTICATED_CALL_BYTES",
        "tests/it/protocol/compression.rs",
        "a_message_that_decompresses_beyond_its_limit_is_refused_without_taking_memory",
    ),
    (
        "REFLECTION_STREAM_BYTES",
        "tests/it/protocol/reflection.rs",
        "a_stream_of_reflection_sends_four_times_as_much_as_it_may_receive",
    ),
    (
        "REFLECTION_BYTES",
        "tests/it/protocol/reflection.rs",
        "reflection_sends_each_address_and_each_user_no_more_than_a_budget",
    ),
    (
        "REFLECTION_REQUEST_BYTES",
        "tests/it/protocol/reflection.rs",
        "a_request_of_reflection_has_at_most_1_kib",
    ),
    (
        "REFLECTION_BYTES_PER_SECOND",
        "src/server/reflection.rs",
        "a_budget_fills_up_again_with_time_and_refuses_more_than_it_has",
    ),
    ("HANDSHAKE", "tests/it/operations/tls.rs", "silent_connections_delay_no_others_and_are_closed"),
    (
        "HANDSHAKE",
        "tests/it/protocol/http1.rs",
        "a_connection_is_closed_that_does_not_say_in_time_what_it_wants",
    ),
    (
        "IDLE",
        "tests/it/protocol/http1.rs",
        "an_idle_connection_is_closed_after_a_minute_and_not_before_the_time_of_a_head",
    ),
    (
        "HTTP1_CONNECTIONS_PER_ADDRESS",
        "tests/it/protocol/http1.rs",
        "one_address_has_a_limited_number_of_connections_and_others_have_their_own",
    ),
    ("HANDSHAKES", "src/server/incoming.rs", "one_handshake_too_many_ends_the_oldest"),
    ("start_timeout", "tests/it/database/first_connection.rs", "a_start_waits_no_longer_than_its_timeout"),
    ("retention", "tests/it/log/retention.rs", "events_are_removed_a_set_time_after_their_job_closed"),
    ("session_lifetime", "tests/it/accounts/auth.rs", "a_session_expires_after_its_lifetime"),
    (
        "statement_timeout",
        "tests/it/database/pool.rs",
        "statements_locks_and_idle_transactions_end_after_the_statement_timeout",
    ),
    (
        "connect_timeout",
        "tests/it/database/pool.rs",
        "a_user_waits_for_a_connection_no_longer_than_the_connect_timeout_and_keeps_nobody_waiting",
    ),
    (
        "connections",
        "tests/it/database/pool.rs",
        "a_user_waits_for_a_connection_no_longer_than_the_connect_timeout_and_keeps_nobody_waiting",
    ),
];

#[test]
fn every_limit_has_its_test() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |file: &str| std::fs::read_to_string(root.join(file)).unwrap();
    let (limits, config) = (read("src/limits.rs"), read("src/config.rs"));
    for (limit, file, test) in ELSEWHERE {
        assert!(read(file).contains(&format!("fn {test}()")), "{limit}: {file} has no test {test}");
    }
    let rows = read("tests/it/limits/rows.rs");
    for limit in limits.lines().filter_map(|line| line.strip_prefix("pub const ")?.split(':').next()) {
        let elsewhere = ELSEWHERE.iter().any(|(name, ..)| *name == limit);
        assert!(elsewhere || rows.contains(&format!("&[\"{limit}\"]")), "{limit} has no test");
    }
    // Only the settings that are numbers or durations.
    let numbers = config.lines().filter_map(|line| line.trim().strip_prefix("pub ")?.split_once(": "));
    let limited = |kind: &str| ["u32", "usize", "Duration"].iter().any(|number| kind.contains(number));
    for (setting, kind) in numbers.filter(|(_, kind)| limited(kind)) {
        let known = ELSEWHERE.iter().any(|(name, ..)| *name == setting);
        let no_limit = ["bcrypt_cost", "keepalive_interval", "keepalive_timeout"].contains(&setting);
        assert!(known || no_limit, "{setting}: {kind} has no test");
    }
}
