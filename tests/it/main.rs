//! The whole: real daemons and real sockets, on the simulator and, where there is one, on a real runtime.

#![allow(clippy::print_stdout)] // What is skipped, and the evidence of a failure, is said to whoever runs the tests.
#![allow(clippy::cloned_ref_to_slice_refs)] // A list of one is compared with a list.
#![allow(unreachable_pub)] // Nothing is reachable from outside a test.

#[macro_use]
#[allow(dead_code)] // A vocabulary: what kills and restarts a control plane is there for the tests of a store that remembers.
mod harness;

mod agent;
mod api;
mod bad_input;
mod cli;
mod clock;
mod crash;
mod disk;
mod durable;
mod examples;
mod faults;
mod grpcio;
mod images;
mod isolation;
mod lab;
mod lifecycle;
mod logs;
mod recovery;
mod storm;
mod tidy;
mod torture;
