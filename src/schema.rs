// @generated automatically by Diesel CLI.

pub mod sql_types {
    #[derive(diesel::query_builder::QueryId, Clone, diesel::sql_types::SqlType)]
    #[diesel(postgres_type(name = "api_key_scope"))]
    pub struct ApiKeyScope;

    #[derive(diesel::query_builder::QueryId, Clone, diesel::sql_types::SqlType)]
    #[diesel(postgres_type(name = "audit_act"))]
    pub struct AuditAct;

    #[derive(diesel::query_builder::QueryId, Clone, diesel::sql_types::SqlType)]
    #[diesel(postgres_type(name = "audit_actor"))]
    pub struct AuditActor;

    #[derive(diesel::query_builder::QueryId, Clone, diesel::sql_types::SqlType)]
    #[diesel(postgres_type(name = "event_kind"))]
    pub struct EventKind;

    #[derive(diesel::query_builder::QueryId, Clone, diesel::sql_types::SqlType)]
    #[diesel(postgres_type(name = "job_status"))]
    pub struct JobStatus;

    #[derive(diesel::query_builder::QueryId, Clone, diesel::sql_types::SqlType)]
    #[diesel(postgres_type(name = "metadata_kind"))]
    pub struct MetadataKind;

    #[derive(diesel::query_builder::QueryId, Clone, diesel::sql_types::SqlType)]
    #[diesel(postgres_type(name = "user_role"))]
    pub struct UserRole;
}

diesel::table! {
    use diesel::sql_types::*;
    use super::sql_types::ApiKeyScope;

    api_keys (id) {
        id -> Uuid,
        user_id -> Uuid,
        key_hash -> Bytea,
        key_prefix -> Text,
        note -> Text,
        scopes -> Array<Nullable<ApiKeyScope>>,
        expires_at -> Nullable<Timestamptz>,
        revoked_at -> Nullable<Timestamptz>,
        last_used_at -> Nullable<Timestamptz>,
        created_at -> Timestamptz,
        updated_at -> Timestamptz,
    }
}

diesel::table! {
    use diesel::sql_types::*;
    use super::sql_types::AuditAct;
    use super::sql_types::AuditActor;

    audit_entries (id) {
        id -> Uuid,
        act -> AuditAct,
        actor -> AuditActor,
        actor_user_id -> Nullable<Uuid>,
        actor_credential_id -> Nullable<Uuid>,
        user_id -> Nullable<Uuid>,
        session_id -> Nullable<Uuid>,
        api_key_id -> Nullable<Uuid>,
        new_api_key_id -> Nullable<Uuid>,
        watch_token_id -> Nullable<Uuid>,
        job_id -> Nullable<Uuid>,
        client_address -> Nullable<Inet>,
        request_id -> Nullable<Uuid>,
        created_at -> Timestamptz,
        updated_at -> Timestamptz,
    }
}

diesel::table! {
    credential_removal (id) {
        id -> Int2,
        seen_at -> Nullable<Timestamptz>,
        unseen -> Interval,
        unseen_until -> Timestamptz,
    }
}

diesel::table! {
    event_log (id) {
        id -> Int2,
        position -> Int8,
    }
}

diesel::table! {
    event_usage (user_id) {
        user_id -> Uuid,
        stored_bytes -> Int8,
        day -> Date,
        day_events -> Int8,
    }
}

diesel::table! {
    use diesel::sql_types::*;
    use super::sql_types::EventKind;
    use super::sql_types::JobStatus;

    events (job_id, sequence) {
        job_id -> Uuid,
        sequence -> Int8,
        position -> Int8,
        id -> Uuid,
        kind -> EventKind,
        name -> Text,
        step_configuration_id -> Nullable<Uuid>,
        step_percent -> Nullable<Int2>,
        event_metadata -> Bytea,
        occurred_at -> Nullable<Timestamptz>,
        status -> JobStatus,
        points_done -> Int8,
        percent -> Int2,
        created_at -> Timestamptz,
        updated_at -> Timestamptz,
    }
}

diesel::table! {
    histories (number) {
        number -> Int8,
        id -> Uuid,
        database_identity -> Text,
        after_position -> Int8,
        after_removals -> Int8,
        created_at -> Timestamptz,
    }
}

diesel::table! {
    use diesel::sql_types::*;
    use super::sql_types::UserRole;

    job_configurations (id) {
        id -> Uuid,
        provider_id -> Uuid,
        provider_role -> UserRole,
        tag -> Text,
        name -> Text,
        version -> Text,
        release -> Bool,
        precedence -> Bytea,
        max_silence -> Nullable<Int8>,
        created_at -> Timestamptz,
        updated_at -> Timestamptz,
    }
}

diesel::table! {
    job_labels (job_id, key) {
        job_id -> Uuid,
        key -> Text,
        value -> Text,
        provider_id -> Uuid,
        customer_id -> Uuid,
        job_created_at -> Timestamptz,
    }
}

diesel::table! {
    job_silences (job_id) {
        job_id -> Uuid,
        max_silence -> Int8,
        due_at -> Nullable<Timestamptz>,
    }
}

diesel::table! {
    use diesel::sql_types::*;
    use super::sql_types::JobStatus;

    job_states (job_id) {
        job_id -> Uuid,
        job_configuration_id -> Uuid,
        points_total -> Int8,
        status -> JobStatus,
        closed -> Bool,
        points_done -> Int8,
        percent -> Int2,
        last_sequence -> Int8,
        last_event_id -> Nullable<Uuid>,
        updated_at -> Timestamptz,
        steps -> Bytea,
        last_step_sequence -> Int8,
        silent -> Bool,
        cancellation_requested_at -> Nullable<Timestamptz>,
    }
}

diesel::table! {
    job_texts (job_id) {
        job_id -> Uuid,
        provider_id -> Uuid,
        customer_id -> Uuid,
        provider_job_id -> Text,
        provider_job_name -> Text,
    }
}

diesel::table! {
    use diesel::sql_types::*;
    use super::sql_types::UserRole;
    use super::sql_types::JobStatus;

    jobs (id) {
        id -> Uuid,
        provider_id -> Uuid,
        customer_id -> Uuid,
        provider_role -> UserRole,
        customer_role -> UserRole,
        job_configuration_id -> Uuid,
        configuration_tag -> Text,
        provider_job_id -> Text,
        provider_job_name -> Text,
        points_total -> Int8,
        max_silence -> Nullable<Int8>,
        labels -> Array<Nullable<Text>>,
        status -> JobStatus,
        closed_at -> Nullable<Timestamptz>,
        events_removed -> Bool,
        held_by_provider -> Bool,
        held_by_customer -> Bool,
        created_at -> Timestamptz,
    }
}

diesel::table! {
    log_in_attempts (key) {
        key -> Bytea,
        failures -> Int4,
        blocked_until -> Nullable<Timestamptz>,
        last_at -> Timestamptz,
        succeeded_at -> Nullable<Timestamptz>,
    }
}

diesel::table! {
    use diesel::sql_types::*;
    use super::sql_types::MetadataKind;

    metadata_configurations (id) {
        id -> Uuid,
        step_configuration_id -> Uuid,
        position -> Int2,
        name -> Text,
        kind -> MetadataKind,
        units -> Text,
        created_at -> Timestamptz,
        updated_at -> Timestamptz,
    }
}

diesel::table! {
    removed_logs (number) {
        number -> Int8,
        job_id -> Uuid,
        provider_id -> Uuid,
        customer_id -> Uuid,
        configuration_tag -> Text,
        first_position -> Int8,
        position -> Int8,
        created_at -> Timestamptz,
    }
}

diesel::table! {
    retention (id) {
        id -> Int2,
        removals -> Int8,
        deleted -> Int8,
        seen_at -> Nullable<Timestamptz>,
        unseen -> Interval,
        unseen_until -> Timestamptz,
    }
}

diesel::table! {
    schema_compatibility (id) {
        id -> Int2,
        oldest_server -> Text,
    }
}

diesel::table! {
    server_times (id) {
        id -> Int2,
        seen_at -> Timestamptz,
        gap_ended_at -> Timestamptz,
    }
}

diesel::table! {
    sessions (id) {
        id -> Uuid,
        user_id -> Uuid,
        secret_hash -> Bytea,
        expires_at -> Timestamptz,
        revoked_at -> Nullable<Timestamptz>,
        last_used_at -> Nullable<Timestamptz>,
        created_at -> Timestamptz,
        updated_at -> Timestamptz,
    }
}

diesel::table! {
    sign_up_windows (key) {
        key -> Bytea,
        sign_ups -> Int4,
        began_at -> Timestamptz,
    }
}

diesel::table! {
    step_configurations (id) {
        id -> Uuid,
        job_configuration_id -> Uuid,
        position -> Int2,
        tag -> Text,
        name -> Text,
        points -> Int4,
        created_at -> Timestamptz,
        updated_at -> Timestamptz,
    }
}

diesel::table! {
    step_times (job_id) {
        job_id -> Uuid,
        provider_id -> Uuid,
        configuration_tag -> Text,
        job_configuration_id -> Uuid,
        completed_at -> Timestamptz,
        total -> Int8,
        remaining -> Array<Nullable<Int8>>,
    }
}

diesel::table! {
    untimed_jobs (job_id) {
        job_id -> Uuid,
        read_through -> Int8,
        done_at -> Array<Nullable<Timestamptz>>,
    }
}

diesel::table! {
    usage_changes (number) {
        number -> Int8,
        user_id -> Uuid,
        configurations -> Int8,
        open_jobs -> Int8,
        api_keys -> Int8,
        watch_tokens -> Int8,
        stored_bytes -> Int8,
    }
}

diesel::table! {
    user_usage (user_id) {
        user_id -> Uuid,
        configurations -> Int8,
        open_jobs -> Int8,
        api_keys -> Int8,
        watch_tokens -> Int8,
        stored_bytes -> Int8,
    }
}

diesel::table! {
    use diesel::sql_types::*;
    use super::sql_types::UserRole;

    users (id) {
        id -> Uuid,
        role -> UserRole,
        email -> Text,
        email_key -> Text,
        password_hash -> Text,
        first_name -> Text,
        last_name -> Text,
        customer_code -> Nullable<Text>,
        disabled_at -> Nullable<Timestamptz>,
        created_at -> Timestamptz,
        updated_at -> Timestamptz,
    }
}

diesel::table! {
    watch_tokens (id) {
        id -> Uuid,
        job_id -> Uuid,
        user_id -> Uuid,
        secret_hash -> Bytea,
        secret_prefix -> Text,
        note -> Text,
        expires_at -> Timestamptz,
        revoked_at -> Nullable<Timestamptz>,
        last_used_at -> Nullable<Timestamptz>,
        created_at -> Timestamptz,
        updated_at -> Timestamptz,
    }
}

diesel::joinable!(api_keys -> users (user_id));
diesel::joinable!(event_usage -> users (user_id));
diesel::joinable!(job_labels -> jobs (job_id));
diesel::joinable!(job_silences -> jobs (job_id));
diesel::joinable!(job_states -> jobs (job_id));
diesel::joinable!(job_texts -> jobs (job_id));
diesel::joinable!(metadata_configurations -> step_configurations (step_configuration_id));
diesel::joinable!(removed_logs -> jobs (job_id));
diesel::joinable!(sessions -> users (user_id));
diesel::joinable!(step_configurations -> job_configurations (job_configuration_id));
diesel::joinable!(step_times -> jobs (job_id));
diesel::joinable!(untimed_jobs -> jobs (job_id));
diesel::joinable!(user_usage -> users (user_id));
diesel::joinable!(watch_tokens -> jobs (job_id));
diesel::joinable!(watch_tokens -> users (user_id));

diesel::allow_tables_to_appear_in_same_query!(
    api_keys,
    audit_entries,
    credential_removal,
    event_log,
    event_usage,
    events,
    histories,
    job_configurations,
    job_labels,
    job_silences,
    job_states,
    job_texts,
    jobs,
    log_in_attempts,
    metadata_configurations,
    removed_logs,
    retention,
    schema_compatibility,
    server_times,
    sessions,
    sign_up_windows,
    step_configurations,
    step_times,
    untimed_jobs,
    usage_changes,
    user_usage,
    users,
    watch_tokens,
);
