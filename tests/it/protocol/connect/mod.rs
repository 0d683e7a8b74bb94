//! The Connect protocol, called as browsers, curl and generated clients do.

mod calls;
mod client;
mod origins;
mod streams;
