//! Every JSON shape that leaves or enters the process, and its conversion to and from the domain.
//!
//! *Scope*: text to types and back. *Not here*: sockets, files.
//!
//! What an outsider may fill is read by hand from strict JSON ([`json`]), so that every problem of a body is reported at once,
//! each with a JSON pointer, and unknown fields and duplicate keys are problems too. What a *peer of ours* answers ([`agent::Reply`])
//! is read leniently: an unknown field of a newer version is ignored.
//!
//! `serde` enters here and in `config` alone.

pub mod agent;
pub mod api;
pub mod containerd;
pub mod docker;
pub mod images;
pub mod json;
pub mod record;
pub mod status;
pub mod stored;
pub mod workload;

pub use json::{Problem, Problems};
pub use status::Status;
