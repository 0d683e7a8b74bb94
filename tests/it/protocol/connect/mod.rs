//! The Connect protocol, called as browsers, curl and generated clients do.

mod calls;
mod origins;
mod streams;
