//! The bounds on what comes from outside, or that more than one room must know, in one place. One that is exceeded is an error that
//! names it.
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
/// Connections the listeners of one daemon serve at a time: each is a thread and two descriptors.
pub const CONNECTIONS_MAX: usize = 256;
/// Stack of a connection's thread; JSON nests at most [`JSON_DEPTH_MAX`] deep.
pub const STACK_BYTES: usize = 256 * 1024;
/// Whoever listens at the path of a Unix socket that is to be made answers within this.
pub const PROBE_LISTENER_MS: u64 = 1000;
/// After the drain: how long a connection may take to notice that both its sides are shut.
pub const CUT_OFF_MS: u64 = 1000;
/// How long a stopping daemon waits for requests in flight.
pub const DRAIN_MS: u64 = 10_000;

/// Nesting of any JSON text from outside.
pub const JSON_DEPTH_MAX: usize = 32;
/// Values in one JSON text, keys not counted: a small text can hold many, and each costs memory.
pub const JSON_VALUES_MAX: usize = 8192;
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
/// Headers or trailers of a gRPC answer: error messages quote what the user sent.
pub const GRPC_HEADER_BYTES_MAX: u32 = 256 * 1024;
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
/// How long a stopping simulator goes on sending answers.
pub const SIM_DRAIN_MS: u64 = 1000;
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
/// `restart_max_attempts`.
pub const RESTART_ATTEMPTS_MAX: u64 = 1_000_000;
/// `restart_backoff_ms`: no workload is restarted more often than this.
pub const RESTART_BACKOFF_MS_MIN: u64 = 100;
/// `restart_backoff_ms` when absent.
pub const RESTART_BACKOFF_MS_DEFAULT: u64 = 10_000;
/// `restart_backoff_max_ms` when absent.
pub const RESTART_BACKOFF_MS_MAX_DEFAULT: u64 = 300_000;
/// `restart_backoff_ms`, `restart_backoff_max_ms` and `restart_reset_ms`: a day.
pub const RESTART_MS_MAX: u64 = 86_400_000;
/// `restart_reset_ms` when absent.
pub const RESTART_RESET_MS_DEFAULT: u64 = 600_000;
/// `health.interval_ms`.
pub const HEALTH_INTERVAL_MS_MIN: u64 = 100;
/// `health.interval_ms`: a day.
pub const HEALTH_INTERVAL_MS_MAX: u64 = 86_400_000;
/// `health.interval_ms` when absent.
pub const HEALTH_INTERVAL_MS_DEFAULT: u64 = 10_000;
/// `health.timeout_ms`.
pub const HEALTH_TIMEOUT_MS_MAX: u64 = 60_000;
/// `health.timeout_ms` when absent.
pub const HEALTH_TIMEOUT_MS_DEFAULT: u64 = 1000;
/// `health.failures`.
pub const HEALTH_FAILURES_MAX: u64 = 1000;
/// `health.failures` when absent.
pub const HEALTH_FAILURES_DEFAULT: u64 = 3;
/// The head of a workload's answer to a health check.
pub const HEALTH_ANSWER_BYTES_MAX: usize = 1024;
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
/// Ids of which an agent remembers the number of the last request, of those it has and of as many that are gone.
pub const FENCES_MAX: usize = 2 * AGENT_WORKLOADS_MAX;
/// One workload as JSON.
pub const WORKLOAD_BYTES_MAX: usize = 512 * 1024;
/// All workloads of one agent as JSON: the runtime lists them as annotations, and its list is one message.
pub const AGENT_SPECS_BYTES_MAX: usize = 8 << 20;
/// `pids_max` of a workload that names none and shares the host's kernel.
pub const PIDS_DEFAULT: u64 = 4096;
/// What is removed in the background: sandboxes that nobody wants.
pub const SWEEP_QUEUE_MAX: usize = 1024;
/// A workload that must end now gets no more grace than this.
pub const FORCED_GRACE_MS_MAX: u64 = 10_000;
/// How long a worker waits for a polite stop before it turns to others.
pub const STOP_WAIT_MS: u64 = 2000;
/// Between two probes of a guest that does not answer, doubling up to [`PROBE_PAUSE_MS_MAX`].
pub const PROBE_PAUSE_MS_MIN: u64 = 1000;
/// Between two probes of a guest that does not answer.
pub const PROBE_PAUSE_MS_MAX: u64 = 60_000;
/// The truth of a runtime that was not listed for this long is too old to call it ready.
pub const LIST_AGE_MS_MAX: u64 = 30_000;
/// A journal shorter than this is never written anew.
pub const JOURNAL_COMPACT_BYTES_MIN: u64 = 256 * 1024;
/// Between two attempts to write a journal that could not be written, doubling up to [`JOURNAL_PAUSE_MS_MAX`].
pub const JOURNAL_PAUSE_MS_MIN: u64 = 250;
/// Between two attempts to write a journal that could not be written.
pub const JOURNAL_PAUSE_MS_MAX: u64 = 5000;
/// What somebody waits for must be in the journal, or in the list of pulled images, within this.
pub const JOURNAL_MS_MAX: u64 = 10_000;
/// How long a container whose start was asked for by an agent that is no more may stay created, before it is known that it never will run.
pub const LAUNCH_DOUBT_MS: u64 = 5000;
/// How long a runtime has to list an image no more, before it is forgotten for whom it was. 24 h.
pub const IMAGE_MISSING_MS_MAX: u64 = 86_400_000;
/// Pause after the first failure of a chore at the runtime (a stop, a removal); doubled with each in a row.
pub const CHORE_RETRY_MS_MIN: u64 = 250;
/// The longest of them: a runtime that restarts is back in a second or two.
pub const CHORE_RETRY_MS_MAX: u64 = 16_000;
/// How long a runtime may say that it does not know whether a container runs, before that is ended: it will not find out by itself.
pub const UNKNOWN_MS_MAX: u64 = 10_000;
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
/// Images pulled at a time, when the configuration names no other number.
pub const PULLS_MAX_DEFAULT: usize = 4;
/// How soon a pull that nobody waits for any more is broken off.
pub const PULL_LOOK_MS: u64 = 200;
/// Between two tries of a pull, doubling from the first to the second.
pub const PULL_RETRY_MS_MIN: u64 = 500;
/// Between two tries of a pull.
pub const PULL_RETRY_MS_MAX: u64 = 30_000;
/// A file of registry credentials.
pub const CREDENTIALS_BYTES_MAX: usize = 256 * 1024;
/// Sets of registry credentials that workloads may name.
pub const CREDENTIALS_MAX: usize = 64;
/// Images an agent remembers to have pulled, and pulls whose end it waits for. What is over is never collected, if everybody may use
/// it, and not pulled otherwise.
pub const IMAGES_MAX: usize = 4096;
/// Names, and sets of credentials, an image is remembered to have been pulled under; under others it is pulled again.
pub const IMAGE_NAMES_MAX: usize = 16;
/// The file they are remembered in.
pub const IMAGES_FILE_BYTES_MAX: usize = 64 << 20;
/// Images one `CollectImages` tells of.
pub const IMAGES_SHOWN_MAX: usize = 400;
/// Between two looks for images to collect, when nothing happens.
pub const IMAGE_GC_PERIOD_MS: u64 = 60_000;
/// The file system of images is collected from here on, percent, when the configuration says nothing else: the kubelet's marks.
pub const IMAGE_GC_HIGH_PERCENT_DEFAULT: u64 = 85;
/// And down to here.
pub const IMAGE_GC_LOW_PERCENT_DEFAULT: u64 = 80;
/// Younger images stay.
pub const IMAGE_GC_MIN_AGE_S_DEFAULT: u64 = 120;
/// The most a configuration may ask for: a year.
pub const IMAGE_GC_MIN_AGE_S_MAX: u64 = 31_536_000;
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
/// Time between two relists where the runtime sends events. Not much longer than without: containerd 1.7 splits its events among
/// those who listen, so any of them may be somebody else's.
pub const RELIST_WITH_EVENTS_MS_DEFAULT: u64 = 3000;
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
/// The same, twice, for a client that closed its side: it may be gone.
pub const HEARTBEAT_HALF_CLOSED_MS: u64 = 200;
/// Events a `Watch` may be behind before it is cut off.
pub const WATCH_EVENTS_MAX: usize = 1024;
/// Events an agent keeps for a `Watch` that resumes.
pub const WATCH_HISTORY_MAX: usize = 256;
/// Their specs as JSON; in memory an event takes a few times that.
pub const WATCH_HISTORY_BYTES_MAX: usize = 512 * 1024;
/// Watches at a time.
pub const WATCHES_MAX: usize = 32;

/// One physical line of a CRI log file as the runtime writes it (containerd splits at 16 KiB), without its newline.
pub const LOG_RECORD_BYTES_MAX: usize = 64 * 1024;
/// The time in it (RFC 3339 with nanoseconds and an offset has 35).
pub const LOG_TIME_BYTES_MAX: usize = 64;
/// A line joined of partial records; a longer one is handed on in pieces of this size.
pub const LOG_LINE_BYTES_MAX: usize = 128 * 1024;
/// What a log request with `tail` holds in memory.
pub const LOG_TAIL_BYTES_MAX: usize = 8 << 20;
/// What one look into a log file reads, before the client is looked at again.
pub const LOG_BATCH_READ_BYTES_MAX: usize = 1 << 20;
/// `tail` of a log request.
pub const LOG_TAIL_MAX: u64 = 1_000_000;
/// How often a follower looks whether the file grew.
pub const LOG_FOLLOW_MS: u64 = 100;
/// How often a reader looks again where a file was just rotated.
pub const LOG_SOON_MS: u64 = 20;
/// A rotated file that did not grow for this long after its successor was there is read to its end: the runtime may still be writing
/// down what it read before.
pub const LOG_SETTLE_MS: u64 = 300;
/// Asking the runtime to open a log file anew.
pub const LOG_REOPEN_MS_MAX: u64 = 5000;
/// Between two such calls for one workload after one that failed, and for one runtime after one that it did not answer.
pub const LOG_REOPEN_PAUSE_MS: u64 = 1000;
/// Workloads whose runtime is being asked that, or is about to be.
pub const LOG_REOPENS_MAX: usize = 64;
/// Files in the log directory of one workload.
pub const LOG_DIR_FILES_MAX: usize = 1024;
/// Files of one workload that are kept beside what it writes to, those of earlier attempts included.
pub const LOG_OLD_FILES_MAX: usize = 64;
/// Size at which a log file is rotated, KiB, when the configuration names no other.
pub const LOG_FILE_KB_DEFAULT: u64 = 10 * 1024;
/// Size at which a log file is rotated, KiB.
pub const LOG_FILE_KB_MIN: u64 = 16;
/// Size at which a log file is rotated, KiB: 64 GiB.
pub const LOG_FILE_KB_MAX: u64 = 1 << 26;
/// Log files of one workload, when the configuration names no other number.
pub const LOG_FILES_DEFAULT: u64 = 5;
/// Log files of one workload.
pub const LOG_FILES_MAX: u64 = LOG_OLD_FILES_MAX as u64;
/// All logs of one node, MiB, when the configuration names no other number.
pub const LOG_TOTAL_MB_DEFAULT: u64 = 4096;
/// All logs of one node, MiB: 64 TiB.
pub const LOG_TOTAL_MB_MAX: u64 = 1 << 26;
/// What logs leave free of their file system, MiB, when the configuration names no other number, and a twentieth of it is not less.
pub const LOG_RESERVE_MB_DEFAULT: u64 = 512;
/// Between two looks at the size of a log, when the configuration names no other time.
pub const LOG_CHECK_MS_DEFAULT: u64 = 500;
/// Between two looks at the size of a log that grows fast.
pub const LOG_CHECK_MS_MIN: u64 = 20;
/// Between two looks at the size of a log, as configured.
pub const LOG_CHECK_MS_MAX: u64 = 60_000;
/// One that stays quiet is looked at after so many times the configured pause: 2 s by default. With hundreds of workloads the looks are
/// most of what an agent at rest does.
pub const LOG_QUIET_CHECKS_MAX: u64 = 4;
/// What a workload writes to last is worth keeping up to this, even where there is no space.
pub const LOG_SPARE_BYTES: u64 = 64 * 1024;

/// Workloads the control plane keeps, ended ones included.
pub const STORE_WORKLOADS_MAX: usize = 20_000;
/// Ended workloads that are kept until somebody deletes them; the oldest beyond that are deleted.
pub const HISTORY_MAX: usize = 10_000;
/// Ended workloads that are kept, when the configuration names no other number: fewer than one agent has room for.
pub const HISTORY_DEFAULT: usize = 1000;
/// Changes that share one commit of the store.
pub const STORE_BATCH_MAX: usize = 256;
/// Changes that wait for the store.
pub const STORE_QUEUE_MAX: usize = 512;
/// How long a change may wait for its commit before whoever asked hears that nobody knows.
pub const STORE_MS_MAX: u64 = 20_000;
/// How old what an agent said may become before it is on disk.
pub const STORE_LAZY_MS: u64 = 200;
/// Between two attempts at a disk that takes nothing.
pub const STORE_RETRY_MS: u64 = 1000;
/// What a stopping control plane gives its disk.
pub const STORE_CLOSE_MS: u64 = 10_000;
/// The store's own page cache: all records are in memory anyway.
pub const STORE_CACHE_BYTES: usize = 1 << 20;
/// Stack of a thread that works in the store's trees.
pub const STORE_STACK_BYTES: usize = 1 << 20;
/// Revisions that one commit reserves: a restart skips what is left of them.
pub const REVISIONS_RESERVED: u64 = 1 << 20;
/// Values in the JSON of one stored workload: what a client may send, and a status.
pub const STORED_VALUES_MAX: usize = 2 * JSON_VALUES_MAX;
/// Changes kept for those who follow `GET /events`.
pub const EVENTS_MAX: usize = 10_000;
/// The same in bytes, as far as they are not of workloads that are still there.
pub const EVENTS_BYTES_MAX: usize = 16 << 20;
/// Changes written to a follower at a time.
pub const EVENTS_BATCH_MAX: usize = 64;
/// Followers of `GET /events` at a time: each holds a connection.
pub const FOLLOWERS_MAX: usize = 64;
/// Nodes of one control plane.
pub const NODES_MAX: usize = 1000;
/// Items on one page of a list.
pub const PAGE_MAX: usize = 500;
/// Waits, logs and commands at a time: each holds a connection for long.
pub const HOLDS_MAX: usize = 160;
/// Of them, those about workloads of one node, whose agent has as many connections as we.
pub const NODE_HOLDS_MAX: usize = 96;
/// Idle connections kept per agent.
pub const NODE_POOL_MAX: usize = 16;
/// Connecting to an agent.
pub const NODE_CONNECT_MS_MAX: u64 = 2000;
/// One quick request to an agent and its reply.
pub const NODE_REQUEST_MS_MAX: u64 = 5000;
/// Asking an agent how a workload is, before the last known truth is the answer.
pub const NODE_STATUS_MS_MAX: u64 = 2000;
/// How often whoever waits, for an agent or for a change, looks whether we are stopping, and, but for commands, whether the client left.
pub const NODE_WAIT_SLICE_MS: u64 = 500;
/// Between two attempts to reach an agent, doubling from the first to the second.
pub const NODE_PAUSE_MS_MIN: u64 = 100;
/// Between two attempts to reach an agent.
pub const NODE_PAUSE_MS_MAX: u64 = 5000;
/// A `Watch` on which nothing came for this long is dead.
pub const WATCH_SILENCE_MS_MAX: u64 = 3 * HEARTBEAT_MS;
/// Threads that bring agents to what is desired.
pub const DISPATCHERS: usize = 8;
/// Of them, those that may be busy with one node at a time: a node that hangs must leave some to the others.
pub const DISPATCHERS_PER_NODE_MAX: usize = 3;
/// Of them, those that may be busy at a time with nodes that did not answer in time lately.
pub const DISPATCHERS_IN_DOUBT_MAX: usize = 2;
/// So many answers in time make up for any number that were not: until then a node gets one dispatcher.
pub const DISPATCH_DOUBTS_MAX: u32 = 7;
/// Workloads waiting for a dispatcher; what does not fit waits for the next pass.
pub const DISPATCH_QUEUE_MAX: usize = 1024;
/// Between two passes over all workloads.
pub const RECONCILE_MS: u64 = 2000;
/// Between two attempts on one workload, doubling from the first to the second.
pub const RETRY_MS_MIN: u64 = 500;
/// Between two attempts on one workload.
pub const RETRY_MS_MAX: u64 = 30_000;
/// Nodes whose reason not to be chosen is kept with a workload, or shown when there is no place.
pub const PLACEMENT_REASONS_MAX: usize = 32;
/// Such a reason: it is kept with the workload, and so many of them.
pub const PLACEMENT_REASON_BYTES_MAX: usize = 256;
/// Statements on its health that are read of a node.
pub const NODE_CONDITIONS_MAX: usize = 256;
/// What an agent can that others cannot, by name.
pub const NODE_FEATURES_MAX: usize = 64;
/// What an agent says when it refuses; what is kept of that is shorter.
pub const REFUSAL_BYTES_MAX: usize = 16 * 1024;
/// An idle connection to an agent that nobody needed for this long is closed; the agent would close it as well, in the end.
pub const NODE_IDLE_MS_MAX: u64 = 60_000;
/// Items on one page of a list, when the request does not say.
pub const PAGE_DEFAULT: usize = 100;
/// `X-Request-Id`.
pub const REQUEST_ID_BYTES_MAX: usize = 64;
/// A log request that got no first line within this is taken for a quiet one, and its response begins.
pub const LOG_FIRST_MS: u64 = 250;
/// Log lines that lie ready are written together, up to this.
pub const LOG_BATCH_BYTES: usize = 16 * 1024;

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
const _: () =
    assert!((LOG_LINE_BYTES_MAX + LOG_TIME_BYTES_MAX) * 6 + 1024 < LINE_BYTES_MAX, "a log line of control characters fits one reply");
const _: () = assert!(LOG_LINE_BYTES_MAX >= LOG_RECORD_BYTES_MAX, "a record is cut once at most");
const _: () = assert!(AGENT_SPECS_BYTES_MAX + AGENT_WORKLOADS_MAX * 1536 < GRPC_MESSAGE_BYTES_MAX, "the runtime can list all workloads");
const _: () = assert!(WORKLOAD_BYTES_MAX + 16 * 1024 < LINE_BYTES_MAX, "a workload and its status fit one reply");
const _: () = assert!(IMAGES_SHOWN_MAX * (IMAGE_BYTES_MAX * 3 + 512) < LINE_BYTES_MAX, "what CollectImages tells fits one reply");
const _: () = assert!(IMAGES_MAX * IMAGE_RECORD_BYTES_MAX < IMAGES_FILE_BYTES_MAX, "what is written of images can be read again");
/// An image in that file: its names, completed, its sets of credentials, and id and socket in the longest escapes of JSON.
const IMAGE_RECORD_BYTES_MAX: usize =
    IMAGE_NAMES_MAX * (IMAGE_BYTES_MAX + 64) + IMAGE_NAMES_MAX * (NAME_BYTES_MAX + 8) + 6 * IMAGE_BYTES_MAX + 6 * SOCKET_BYTES_MAX + 256;
/// The path of a Unix socket (unix(7)).
const SOCKET_BYTES_MAX: usize = 108;
const _: () = assert!(PULL_RETRY_MS_MAX < START_DEADLINE_MS_DEFAULT, "a start sees several tries of its pull");
const _: () = assert!(LINE_BYTES_MAX < GRPC_MESSAGE_BYTES_MAX, "a workload always fits one CRI message");
const _: () = assert!(HTTP_TARGET_BYTES_MAX < HTTP_HEAD_BYTES_MAX, "a long target is 414, not 431");
const _: () = assert!(CRI_QUICK_MS_MAX < UNDO_MS_MAX, "an undo has time for several calls");
const _: () = assert!(LOG_OLD_FILES_MAX * 2 < LOG_DIR_FILES_MAX, "a directory that is kept in order can be listed");
const _: () = assert!(LOG_REOPEN_MS_MAX < DRAIN_MS, "whoever rotates notices the drain in time");
const _: () = assert!(CLI_WAIT_SLICE_MS <= WAIT_MS_MAX, "the command line asks for waits that are granted");
const _: () = assert!(HISTORY_MAX * 2 <= STORE_WORKLOADS_MAX, "ended workloads leave room for others");
const _: () = assert!(HISTORY_DEFAULT < AGENT_WORKLOADS_MAX, "ended workloads do not fill a node");
const _: () = assert!(FOLLOWERS_MAX + HOLDS_MAX + 16 < CONNECTIONS_MAX, "what takes its time leaves connections to what is quick");
const _: () = assert!(
    HOLDS_MAX - NODE_HOLDS_MAX >= FOLLOWERS_MAX && NODE_HOLDS_MAX + NODE_POOL_MAX + WATCHES_MAX < CONNECTIONS_MAX / 4 * 3,
    "a node with much to wait for leaves room to others, and its agent has connections for everything else"
);
const _: () = assert!(NODE_REQUEST_MS_MAX < DRAIN_MS, "a quick request to an agent ends within the drain");
const _: () = assert!(NODE_WAIT_SLICE_MS * 4 <= DRAIN_MS, "a long wait notices the drain in time");
const _: () = assert!(DISPATCHERS_PER_NODE_MAX * 2 < DISPATCHERS, "two nodes that hang leave a dispatcher to the others");
const _: () = assert!(DISPATCHERS_IN_DOUBT_MAX < DISPATCHERS, "however many nodes hang, the others have dispatchers");
const _: () = assert!(NODE_IDLE_MS_MAX < IDLE_MS_MAX, "an idle connection is closed by whoever pools it");
const _: () = assert!(CONNECTIONS_MAX * 3 + LISTENERS_MAX + DISPATCHERS + 64 < 1024, "what a process commonly has does for all but nodes");
