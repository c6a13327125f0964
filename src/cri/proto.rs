//! The messages of CRI v1, generated from `proto/runtime/v1/api.proto`, which documents the fields. Nothing is added here.
#![allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, clippy::nursery)]

include!(concat!(env!("OUT_DIR"), "/runtime.v1.rs"));
