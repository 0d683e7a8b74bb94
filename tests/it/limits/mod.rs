//! Every limit: a value at the limit passes, and a value one past it is refused with an
//! answer that names the limit. One user leaves the others their part.

mod calls;
mod connections;
pub mod fairness;
mod in_flight;
mod memory;
mod pages;
mod quotas;
mod rows;
mod scene;
mod table;
mod texts;
mod usage;
