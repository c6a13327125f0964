//! kakuri: every workload in its own strongly isolated sandbox, through CRI v1, without Kubernetes.
//!
//! A control plane (HTTP) places workloads on nodes; the agent on each node (JSON lines over TCP or a Unix socket) turns a workload
//! into a sandbox and a container by calling the node's CRI v1 runtime over its Unix socket. All I/O is blocking; each connection has
//! a thread; there is no async runtime.
//!
//! # Code map, in reading order
//!
//! | room | is |
//! |---|---|
//! | [`limits`] | the bounds on what comes from outside, and the relations between them |
//! | [`deadline`] | deadlines that know their phase; the two clocks |
//! | [`report`] | errors and log lines for people; exit codes |
//! | [`metrics`] | counters and gauges, and their text form |
//! | [`failpoint`] | where a test lets a daemon die |
//! | [`workload`] | what runs, and its states; pure |
//! | [`wire`] | every JSON shape: the line protocol ([`wire::agent`]), HTTP bodies ([`wire::api`]), strict reading ([`wire::json`]),
//! | | what the agent's journal holds ([`wire::record`]) and what the store does ([`wire::stored`]) |
//! | [`net`] | sockets with deadlines, listeners with slots, lines |
//! | [`http`] | HTTP/1.1, server side |
//! | [`grpc`] | gRPC on `h2` with blocking reads: [`grpc::pump`] is the trick, [`grpc::call`] the calls |
//! | [`cri`] | the container runtime: [`cri::client`] one function per RPC, [`cri::runtime`] a workload's start with its undo |
//! | [`flags`], [`config`] | command lines and TOML files |
//! | [`daemon`] | what the daemons share: signals, listeners |
//! | [`agent`] | the node agent: [`agent::registry`] what it knows, [`agent::reconcile`] what is true, [`agent::work`] what it does,
//! | | [`agent::logs`] what workloads wrote, [`agent::rotate`] how much of that is kept, [`agent::images`] pulls and what is kept of them |
//! | [`control_plane`] | the HTTP API, placement, the store and who follows it |
//! | [`sim`] | a simulated CRI runtime with scripted faults |
//! | [`cli`] | the `kakuri` command |
//!
//! # Invariants, as absences
//!
//! - No request to a runtime has an empty handler, a host namespace, privilege, or an annotation that a user chose ([`cri`]).
//! - No byte from outside meets logic before a limit and a deadline ([`limits`], [`deadline`]).
//! - No lock is held across I/O.
//! - No state is invented: an unknown exit code is `null`, and `observed_at` says how old the truth is.
//! - `agent` and `control_plane` never import each other; they meet in [`wire`]. Arrows point down the table above.
//! - A crate from outside has one door: `h2`, `http`, `bytes` in [`grpc`] (and the server side in [`sim`]), `tokio` in [`grpc::pump`],
//!   `prost` in [`cri`] and [`sim`], `rustix` in [`agent`], [`daemon`], [`deadline`], [`net`] and the store, `redb` in the store of
//!   [`control_plane`], `httparse` in [`http`], `serde` in [`wire`] and [`config`], `ureq` in [`cli`]. JSON values, base64, RFC 3339 and
//!   channels are common.

pub mod agent;
pub mod cli;
pub mod config;
pub mod control_plane;
pub mod cri;
pub mod daemon;
pub mod deadline;
pub mod failpoint;
pub mod flags;
pub mod grpc;
pub mod http;
pub mod limits;
pub mod metrics;
pub mod net;
pub mod report;
pub mod sim;
pub mod wire;
pub mod workload;
