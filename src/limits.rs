//! Every bound in the program, in one place. A bound that is exceeded is an error that names it.
//!
//! Units are in the names; `_MAX` stands last. Relations that must hold between bounds are asserted at the end.

/// One line of the agent's protocol, either way, newline included.
pub const LINE_BYTES_MAX: usize = 1 << 20;
/// A client that has begun a line must end it within this.
pub const LINE_MS_MAX: u64 = 10_000;
/// A connection on which nobody speaks is closed after this.
pub const IDLE_MS_MAX: u64 = 600_000;
/// A reader that takes nothing for this long loses its connection.
pub const WRITE_MS_MAX: u64 = 30_000;
/// Connections one listener serves at a time: each is a thread and a descriptor.
pub const CONNECTIONS_MAX: usize = 512;
/// Stack of a connection's thread; JSON nests at most [`JSON_DEPTH_MAX`] deep.
pub const STACK_BYTES: usize = 256 * 1024;
/// How long a stopping daemon waits for requests in flight.
pub const DRAIN_MS: u64 = 10_000;

/// Nesting of any JSON text from outside.
pub const JSON_DEPTH_MAX: usize = 32;
/// Problems reported for one body; the rest is counted.
pub const PROBLEMS_MAX: usize = 64;

/// An HTTP request line and its headers.
pub const HTTP_HEAD_BYTES_MAX: usize = 16 * 1024;
/// Header lines of one HTTP request.
pub const HTTP_HEADERS_MAX: usize = 64;
/// An HTTP request target (path and query).
pub const HTTP_TARGET_BYTES_MAX: usize = 4096;
/// An HTTP request body, after chunks are joined.
pub const HTTP_BODY_BYTES_MAX: usize = 512 * 1024;
/// An HTTP head must be complete within this of its first byte.
pub const HTTP_HEAD_MS_MAX: u64 = 10_000;
/// An HTTP body must be complete within this of its head.
pub const HTTP_BODY_MS_MAX: u64 = 30_000;
/// A keep-alive connection waits this long for the next request.
pub const HTTP_IDLE_MS_MAX: u64 = 60_000;
/// Requests served on one HTTP connection before it is closed.
pub const HTTP_REQUESTS_PER_CONNECTION_MAX: u32 = 100_000;
/// Chunk extensions of one HTTP body, all together; they mean nothing and are dropped.
pub const HTTP_CHUNK_EXTENSION_BYTES_MAX: usize = 1024;
/// The trailer section of one HTTP body; checked and dropped.
pub const HTTP_TRAILER_BYTES_MAX: usize = 4096;
/// How long the last response of an HTTP connection is given to be read before the socket is closed.
pub const LINGER_MS_MAX: u64 = 2000;
/// Bytes dropped meanwhile, of a client that is still sending.
pub const LINGER_BYTES_MAX: usize = 4 << 20;

/// One gRPC message, either way; checked against the 5-byte prefix before anything is allocated.
pub const GRPC_MESSAGE_BYTES_MAX: usize = 16 << 20;
/// Idle connections kept per CRI endpoint.
pub const GRPC_POOL_MAX: usize = 8;
/// Bytes of a peer's `grpc-message` that are kept.
pub const GRPC_STATUS_MESSAGE_BYTES_MAX: usize = 4096;
/// The HTTP/2 receive window of a stream: an answer of this size arrives without a round trip for credit.
pub const GRPC_WINDOW_BYTES: u32 = 1 << 20;

/// Calls the simulator runs at a time on one connection, each on a thread; more wait.
pub const SIM_WORKERS_MAX: usize = 64;
/// Streams a client of the simulator may have open on one connection.
pub const SIM_STREAMS_MAX: u32 = 256;
/// Reads and answers that wait for the simulator's driver of a connection.
pub const SIM_CHUNKS_MAX: usize = 64;
/// Events a subscriber of the simulator may be behind before it is cut off.
pub const SIM_EVENTS_MAX: usize = 10_000;

/// `Workload.id`: an RFC 1123 label.
pub const ID_BYTES_MAX: usize = 63;
/// `Workload.image` as given and as completed.
pub const IMAGE_BYTES_MAX: usize = 512;
/// Names of runtime classes, profiles, nodes, credentials.
pub const NAME_BYTES_MAX: usize = 63;
/// `Workload.memory_mb`, MiB.
pub const MEMORY_MB_MIN: u64 = 4;
/// `Workload.memory_mb`, MiB.
pub const MEMORY_MB_MAX: u64 = 1_048_576;
/// `Workload.cpu_millicores`.
pub const CPU_MILLICORES_MIN: u64 = 10;
/// `Workload.cpu_millicores`.
pub const CPU_MILLICORES_MAX: u64 = 1_024_000;
/// Words of `command`, of `args`.
pub const WORDS_MAX: usize = 256;
/// One word of `command` or `args`, one value of `env`.
pub const WORD_BYTES_MAX: usize = 32 * 1024;
/// Entries of `env`.
pub const ENV_MAX: usize = 256;
/// Entries of `labels` and of `node_selector`.
pub const LABELS_MAX: usize = 64;
/// A key or a value of a label.
pub const LABEL_BYTES_MAX: usize = 128;
/// Entries of `ports`, of `mounts`.
pub const PORTS_MAX: usize = 64;
/// Paths inside and outside the sandbox.
pub const PATH_BYTES_MAX: usize = 4096;
/// `pids_max`.
pub const PIDS_MAX: u64 = 4_194_304;
/// Uid and gid: the range every kernel interface agrees on (31 bits).
pub const UID_MAX: u64 = 2_147_483_647;
/// `start_deadline_ms`.
pub const START_DEADLINE_MS_MAX: u64 = 3_600_000;
/// `start_deadline_ms` when absent.
pub const START_DEADLINE_MS_DEFAULT: u64 = 120_000;
/// `ttl_ms`: a year.
pub const TTL_MS_MAX: u64 = 31_536_000_000;
/// `stop_grace_ms`.
pub const STOP_GRACE_MS_MAX: u64 = 3_600_000;
/// `stop_grace_ms` when absent.
pub const STOP_GRACE_MS_DEFAULT: u64 = 10_000;
/// `wait_ms` of a request.
pub const WAIT_MS_MAX: u64 = 600_000;
/// `memory_mb` when absent.
pub const MEMORY_MB_DEFAULT: u64 = 512;
/// `cpu_millicores` when absent.
pub const CPU_MILLICORES_DEFAULT: u64 = 500;
/// A status message or error text kept in a status.
pub const MESSAGE_BYTES_MAX: usize = 1024;

/// Workloads one agent keeps, ended ones included.
pub const AGENT_WORKLOADS_MAX: usize = 4096;
/// Starts waiting for a worker.
pub const START_QUEUE_MAX: usize = 1024;
/// A status older than this is asked for again before it is told.
pub const FRESH_MS: u64 = 2000;
/// `DeleteWorkload`: how long the answer may take when the request does not say.
pub const DELETE_WAIT_MS_DEFAULT: u64 = 60_000;
/// Workers that start workloads, when the configuration names no other number.
pub const START_WORKERS_DEFAULT: usize = 8;
/// Workers that stop and remove workloads; apart from starts, so that a slow pull never delays a kill.
pub const STOP_WORKERS_DEFAULT: usize = 4;
/// Workers of either kind.
pub const WORKERS_MAX: u64 = 256;
/// Addresses one daemon listens on.
pub const LISTENERS_MAX: usize = 16;
/// Runtime classes of one agent.
pub const CLASSES_MAX: usize = 64;
/// Memory a node's configuration may claim, MiB: 64 TiB.
pub const NODE_MEMORY_MB_MAX: u64 = 1 << 26;
/// CPU a node's configuration may claim, thousandths of a core.
pub const NODE_CPU_MILLICORES_MAX: u64 = 8_192_000;
/// Undoing a failed start may take this long before it is left to the orphan sweep.
pub const UNDO_MS_MAX: u64 = 60_000;
/// Any quick CRI call (lists, statuses, Version).
pub const CRI_QUICK_MS_MAX: u64 = 10_000;
/// How long past the grace a StopContainer answer may take.
pub const CRI_STOP_MARGIN_MS: u64 = 15_000;
/// The own-kernel probe: one ExecSync.
pub const PROBE_MS_MAX: u64 = 10_000;
/// Time between two relists where the runtime sends no events.
pub const RELIST_MS_DEFAULT: u64 = 1000;
/// Time between two relists where the runtime sends events.
pub const RELIST_WITH_EVENTS_MS_DEFAULT: u64 = 10_000;
/// Time between two relists, as configured.
pub const RELIST_MS_MIN: u64 = 100;
/// Time between two relists, as configured.
pub const RELIST_MS_MAX: u64 = 600_000;
/// `Exec`: how long a command may run.
pub const EXEC_MS_MAX: u64 = 600_000;
/// `Exec`: how long a command may run when the request does not say.
pub const EXEC_MS_DEFAULT: u64 = 30_000;
/// `Exec`: bytes of each output stream handed on; what is over is cut and said.
pub const EXEC_OUTPUT_BYTES_MAX: usize = 256 * 1024;
/// Between two heartbeats on a `Watch`.
pub const HEARTBEAT_MS: u64 = 10_000;
/// Events a `Watch` may be behind before it is cut off.
pub const WATCH_EVENTS_MAX: usize = 1024;
/// Watches at a time.
pub const WATCHES_MAX: usize = 32;

/// One physical line of a CRI log file as the runtime writes it (containerd splits at 16 KiB).
pub const LOG_RECORD_BYTES_MAX: usize = 64 * 1024;
/// A line joined of partial records; what is over is handed on in pieces of this size.
pub const LOG_LINE_BYTES_MAX: usize = 256 * 1024;
/// `tail` of a log request.
pub const LOG_TAIL_MAX: u64 = 1_000_000;
/// How often a follower looks whether the file grew.
pub const LOG_FOLLOW_MS: u64 = 100;

/// Workloads the control plane keeps, ended ones included.
pub const STORE_WORKLOADS_MAX: usize = 20_000;
/// Nodes of one control plane.
pub const NODES_MAX: usize = 1000;
/// Items on one page of a list.
pub const PAGE_MAX: usize = 500;
/// Idle connections kept per agent.
pub const NODE_POOL_MAX: usize = 16;
/// Connecting to an agent.
pub const NODE_CONNECT_MS_MAX: u64 = 2000;
/// One quick request to an agent and its reply.
pub const NODE_REQUEST_MS_MAX: u64 = 5000;

/// A configuration file.
pub const CONFIG_BYTES_MAX: usize = 1 << 20;
/// An answer the command line reads whole: a page of workloads of average size, many times over.
pub const CLI_ANSWER_BYTES_MAX: u64 = 64 << 20;
/// The command line's connecting to a control plane.
pub const CLI_CONNECT_MS_MAX: u64 = 5000;
/// The command line's waiting for an answer, beyond what it asked the control plane to wait.
pub const CLI_ANSWER_MS_MAX: u64 = 30_000;
/// One long poll of the command line.
pub const CLI_WAIT_SLICE_MS: u64 = 30_000;
/// The least time between two polls, for answers that come at once and say "not yet".
pub const CLI_POLL_MS_MIN: u64 = 250;
/// `kakuri play`: a child must serve within this.
pub const PLAY_READY_MS_MAX: u64 = 20_000;
/// `kakuri play`: how often it looks whether a child is ready or gone while it waits for that.
pub const PLAY_POLL_MS: u64 = 20;

const _: () = assert!(HTTP_BODY_BYTES_MAX + 16 * 1024 < LINE_BYTES_MAX, "a body always fits one line to the agent");
const _: () = assert!(EXEC_OUTPUT_BYTES_MAX * 3 < LINE_BYTES_MAX, "both exec outputs in base64 fit one reply");
const _: () = assert!(LOG_LINE_BYTES_MAX * 3 < LINE_BYTES_MAX, "a log line, escaped, fits one reply");
const _: () = assert!(LINE_BYTES_MAX < GRPC_MESSAGE_BYTES_MAX, "a workload always fits one CRI message");
const _: () = assert!(HTTP_TARGET_BYTES_MAX < HTTP_HEAD_BYTES_MAX, "a long target is 414, not 431");
const _: () = assert!(CRI_QUICK_MS_MAX < UNDO_MS_MAX, "an undo has time for several calls");
const _: () = assert!(CLI_WAIT_SLICE_MS <= WAIT_MS_MAX, "the command line asks for waits that are granted");
