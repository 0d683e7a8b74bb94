//! Servers behind nginx, HAProxy and Envoy, with the files of `examples/proxies` as they are,
//! except for addresses, paths and shorter time-outs.
//!
//! `cargo test --test proxies` needs Debian's nginx, haproxy, curl, postgresql and python3-venv, and
//! installs Envoy itself.

#![allow(
    clippy::unwrap_used,
    clippy::wildcard_enum_match_arm,
    unreachable_pub,
    reason = "a test fails by a panic, and the other lints do not help in test code"
)]

mod checks;
mod proxy;

use checks::Scene;
use proxy::Kind;

#[tokio::test(flavor = "multi_thread")]
async fn nginx_passes_everything_on() {
    let scene = Scene::new(Kind::Nginx).await;
    scene.passes_everything_on().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn haproxy_passes_everything_on_over_a_connection_for_each_client() {
    let scene = Scene::new(Kind::HaProxy).await;
    scene.passes_everything_on().await;
    let (clients, connections) = scene.many_clients().await;
    assert!(connections >= clients, "{connections} connections for {clients} clients");
}

#[tokio::test(flavor = "multi_thread")]
async fn envoy_passes_everything_on_over_one_connection() {
    let scene = Scene::new(Kind::Envoy).await;
    scene.passes_everything_on().await;
    let (_, connections) = scene.many_clients().await;
    // One for all clients, and one for the checks of health.
    assert!(connections <= 2, "{connections} connections");
}

#[tokio::test(flavor = "multi_thread")]
async fn behind_envoy_a_log_out_ends_only_the_streams_of_its_user() {
    let scene = Scene::new(Kind::Envoy).await;
    scene.ends_only_the_unread_watch_of_a_user_who_logs_out().await;
}
