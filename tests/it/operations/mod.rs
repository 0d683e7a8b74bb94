//! What operators use: the command line, settings, TLS, metrics, traces, drains and upgrades.

mod backup;
mod cli;
mod command_line;
mod documentation;
mod drain;
mod embedded;
mod exit_codes;
mod floors;
pub mod health;
pub mod metrics;
mod monitoring;
mod packaging;
mod settings;
mod settings_take_effect;
mod shell;
mod tls;
mod traces;
mod upgrades;
