//! The container runtime: what we ask of CRI v1, and what a workload becomes there.
//!
//! *Scope*: CRI v1 (package `runtime.v1`) over [`crate::grpc`]. *Not here*: JSON, the registry of workloads, log files.
//!
//! Invariant: no request carries an empty runtime handler, a host namespace, `privileged`, or an annotation a user chose.
//! Invariant: no call is without a deadline.
//! Invariant: only sandboxes that carry our labels, with our node's name, are ever listed or touched.

pub mod client;
pub mod images;
pub mod proto;
pub mod runtime;

pub use client::Client;
