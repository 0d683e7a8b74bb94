//! What operators use: the command line, settings, TLS, metrics, traces, drains and upgrades.

mod backup;
mod cli;
mod documentation;
mod drain;
mod embedded;
mod floors;
pub mod health;
pub mod metrics;
mod settings;
mod settings_take_effect;
mod tls;
mod traces;
mod upgrades;
