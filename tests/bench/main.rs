//! What kakuri costs: time of a start beside the bare CRI calls, requests a second, memory, sizes.
//!
//! `scripts/bench` builds everything, brings up a runtime and runs this; started bare, it says so and measures nothing. All that is
//! compared is measured in one run and in turns, so that the machine's moods hit all alike.
//!
//! Prints a Markdown table, then the aims that were missed.

#![allow(clippy::print_stdout)] // The table is for a person, and goes to stdout.

mod daemons;
mod load;
mod relay;
mod scale;
mod starts;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use kakuri::cri::{Client, runtime};
use kakuri::deadline::{Deadline, Stopwatch};
use kakuri::flags::{self, Flag, Parsed, Takes, Usage};
use kakuri::net::address::unix_path;
use kakuri::report::complain;
use kakuri::workload::Name;
use serde_json::json;

use daemons::{Daemon, Http, Line, Memory, Pair};
use load::{Protocol, Sample};
use starts::{RAW, Setting, Stage, WAYS};

/// Whatever ends a bench early.
pub(crate) type Failure = Box<dyn Error + Send + Sync>;

/// The node of the agent under measurement.
const NODE: &str = "bench";
/// The node the bare calls claim to be, so that no agent sweeps what they make.
pub(crate) const RAW_NODE: &str = "bench-raw";

const USAGE: Usage = Usage::new(
    "starts",
    "--bins DIR --work DIR [OPTIONS]",
    "Measures kakuri; scripts/bench prepares everything and runs this.",
    &[&[
        Flag::long("bins", Takes::Value("DIR"), "the release binaries"),
        Flag::long("static", Takes::Value("DIR"), "the static binaries, to be measured too"),
        Flag::long("work", Takes::Value("DIR"), "an empty directory"),
        Flag::long("cri-endpoint", Takes::Value("unix:///PATH"), "a real runtime; without it only the simulator is measured"),
        Flag::long("image", Takes::Value("REF"), "an image it has, with a sleep in it"),
        Flag::long("rounds", Takes::Value("N"), "starts of each kind (20)"),
        Flag::long("quick", Takes::Nothing, "a tenth of all other numbers"),
        Flag::long("sweep", Takes::Nothing, "only remove what a bench that was killed left at the runtime"),
        // Given by `cargo bench`.
        Flag::long("bench", Takes::Nothing, "nothing"),
    ]],
    "scripts/bench --rounds 20",
);

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain("bench", &error);
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Failure> {
    let matches = match USAGE.parse(&flags::arguments("starts")?, |_| None)? {
        Parsed::Special(text) => {
            println!("{text}");
            return Ok(());
        }
        Parsed::Run(matches) => matches,
    };
    let endpoint = matches.parsed("cri-endpoint", unix_path)?;
    if matches.present("sweep") {
        return endpoint.map_or(Ok(()), |endpoint| sweep(&endpoint));
    }
    let (Some(bins), Some(work)) = (matches.one("bins"), matches.one("work")) else {
        println!("skipped: measures nothing by itself; run scripts/bench");
        return Ok(());
    };
    let setup = Setup {
        bins: bins.into(),
        statics: matches.one("static").map(PathBuf::from),
        work: work.into(),
        image: matches.one("image").unwrap_or_else(|| "localhost/busybox:1.35".into()),
        rounds: matches.parsed("rounds", |n| n.parse().map_err(|_| "must be a number"))?.unwrap_or(20),
        scale: if matches.present("quick") { 10 } else { 1 },
        endpoint,
    };
    let mut table = Table::default();
    let result = measure(&setup, &mut table);
    let swept = setup.endpoint.as_deref().map_or(Ok(()), sweep);
    result.and(swept)?;
    table.print();
    Ok(())
}

pub(crate) struct Setup {
    pub(crate) bins: PathBuf,
    statics: Option<PathBuf>,
    pub(crate) work: PathBuf,
    endpoint: Option<PathBuf>,
    pub(crate) image: String,
    rounds: usize,
    pub(crate) scale: usize,
}

/// A runtime, and a pair of daemons on it.
struct Side {
    name: &'static str,
    endpoint: PathBuf,
    relayed: PathBuf,
    meter: Arc<relay::Meter>,
    pair: Pair,
    /// Ends after the pair.
    _runtime: Option<Daemon>,
}

impl Side {
    fn start(setup: &Setup, name: &'static str, endpoint: PathBuf, runtime: Option<Daemon>) -> Result<Self, Failure> {
        let relayed = setup.work.join(format!("{name}-relay.sock"));
        let meter = relay::start(&relayed, &endpoint)?;
        let pair = Pair::start(&setup.bins, &relayed, &setup.work.join(name), NODE)?;
        Ok(Self { name, endpoint, relayed, meter, pair, _runtime: runtime })
    }

    fn stages(&self, setup: &Setup) -> Result<Vec<Stage>, Failure> {
        let mut stages = Vec::new();
        for (class, handler) in Line::connect(self.pair.agent.tcp()?)?.classes()? {
            // All classes of the simulator are alike.
            if class == "native" || (class == "gvisor" && self.name == REAL) {
                stages.push(Stage::new(Setting {
                    name: format!("{handler}, {}", self.name),
                    class,
                    handler,
                    image: &setup.image,
                    endpoint: self.relayed.clone(),
                    meter: Arc::clone(&self.meter),
                    pair: &self.pair,
                    dir: setup.work.join("raw"),
                })?);
            }
        }
        Ok(stages)
    }
}

const REAL: &str = "containerd";
const SIMULATED: &str = "simulator";

fn measure(setup: &Setup, table: &mut Table) -> Result<(), Failure> {
    let socket = setup.work.join("sim.sock");
    let listen = format!("unix://{}", socket.display());
    let simulator = Daemon::start(&setup.bins.join("kakuri-cri-sim"), &["--listen", &listen], &setup.work.join("sim"))?;
    let mut sides = Vec::new();
    if let Some(endpoint) = &setup.endpoint {
        sweep(endpoint)?;
        sides.push(Side::start(setup, REAL, endpoint.clone(), None)?);
    }
    sides.push(Side::start(setup, SIMULATED, socket, Some(simulator))?);

    let main = sides.first().ok_or("no runtime")?;
    progress("memory");
    memory(setup, main, table)?;
    let mut stages = Vec::new();
    for side in &sides {
        stages.extend(side.stages(setup)?);
    }
    for round in 1..=setup.rounds {
        progress(&format!("starts, round {round} of {}", setup.rounds));
        stages.iter_mut().try_for_each(Stage::round)?;
    }
    report_starts(&stages, table);
    drop(stages);
    progress("rates");
    rates(setup, main, table)?;
    drop(sides);
    scale::measure(setup, table)?;
    sizes(setup, table)
}

/// Time of each way to start, in the table.
fn report_starts(stages: &[Stage], table: &mut Table) {
    let mut worst = Duration::ZERO;
    for stage in stages {
        let raw = stage.starts[RAW].wall.percentile(50);
        for (way, start) in WAYS.iter().zip(&stage.starts) {
            let (p50, p95) = (start.wall.percentile(50), start.wall.percentile(95));
            let (own, own_p95) = (start.own.percentile(50), start.own.percentile(95));
            let beside = if p50 == raw { String::new() } else { format!("{:.3} x bare; ", p50.div_duration_f64(raw)) };
            let note = format!("{beside}own share p50 {}, p95 {}", ms(own), ms(own_p95));
            table.row(&format!("start, {}: {way}", stage.name), &ms(p50), &ms(p95), &note);
            if way != &WAYS[RAW] {
                worst = worst.max(own);
            }
        }
    }
    let names: Vec<&str> = stages.iter().map(|stage| stage.name.as_str()).collect();
    table.aim(&format!("own share of a start, p50, the worst of {}", names.join(" / ")), worst.as_secs_f64() * 1e3, 5.0, "ms");
}

/// Resident memory at rest, with workloads, and without them again.
fn memory(setup: &Setup, side: &Side, table: &mut Table) -> Result<(), Failure> {
    let workloads = 50 / setup.scale;
    let both = |pair: &Pair| -> Result<[Memory; 2], Failure> {
        // What the start, or the work before, set in motion goes on for a while, and nothing tells when it is over.
        thread::sleep(Duration::from_millis(2000));
        Ok([pair.agent.memory()?, pair.plane.memory()?])
    };
    let mut note = |when: &str, [agent, plane]: [Memory; 2]| {
        for (name, memory) in [("agent", agent), ("control plane", plane)] {
            let Memory { rss_bytes, anon_bytes, threads } = memory;
            let note = format!("{} of it anonymous; {threads} threads", mb(anon_bytes));
            table.row(&format!("memory, {name}: {when}"), &mb(rss_bytes), "", &note);
        }
    };
    let idle = both(&side.pair)?;
    note("idle", idle);
    let mut http = Http::connect(side.pair.plane.tcp()?)?;
    let ids: Vec<String> = (0..workloads).map(|i| format!("bench-many-{i}")).collect();
    let watch = Stopwatch::start();
    for id in &ids {
        let (status, answer) = http.call("POST", "/workloads", Some(&starts::workload(id, "native", &setup.image, 16)))?;
        if status != 201 {
            return Err(format!("POST answered {status}: {answer}").into());
        }
    }
    for id in &ids {
        starts::is_running(&http.call("GET", &format!("/workloads/{id}?for=running&wait_ms=120000"), None)?.1)?;
    }
    let elapsed = watch.elapsed();
    note(&format!("{workloads} workloads, {}", side.name), both(&side.pair)?);
    for id in &ids {
        starts::delete(&mut http, id)?;
    }
    note("after deleting them", both(&side.pair)?);
    if let Some(statics) = &setup.statics {
        let pair = Pair::start(statics, &side.endpoint, &setup.work.join("static"), "bench-static")?;
        note("idle, static binary", both(&pair)?);
    }
    let rate = f64::from(u32::try_from(workloads)?) / elapsed.as_secs_f64();
    let what = format!("{workloads} workloads posted at once, {}: until all run", side.name);
    table.row(&what, &ms(elapsed), "", &format!("{rate:.1}/s"));
    for (name, memory, limit) in [("agent", idle[0], 6.0), ("control plane", idle[1], 8.0)] {
        table.aim(&format!("{name}, resident, idle"), f64::from(u32::try_from(memory.rss_bytes)?) / 1e6, limit, "MB");
    }
    Ok(())
}

/// Calls and requests a second, in turns of a tenth of each.
///
/// Where one side waits for the other, a virtual machine's halted processor may take longer to wake than the call itself, or not
/// halt at all: whole turns are fast or slow. So the best turn stands beside the median of all.
fn rates(setup: &Setup, side: &Side, table: &mut Table) -> Result<(), Failure> {
    const TURNS: usize = 10;
    let mut line = Line::connect(side.pair.agent.tcp()?)?;
    let mut http = Http::connect(side.pair.plane.tcp()?)?;
    let (status, object) =
        http.call("POST", "/workloads?wait_ms=120000", Some(&starts::workload("bench-asked", "native", &setup.image, 16)))?;
    starts::is_created(status, &object)?;
    line.ask(&json!({"type": "Ping"}), "Pong")?;

    let client = Client::new(side.endpoint.clone());
    let (agent, plane) = (side.pair.agent.tcp()?, side.pair.plane.tcp()?);
    let ask = |text: &'static str, expect: &'static str, connections| {
        move |total| load::tcp(agent, Protocol::Line, text.as_bytes(), expect.as_bytes(), connections, total)
    };
    let get = |path: &'static str, connections| {
        let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n");
        move |total| load::tcp(plane, Protocol::Http, request.as_bytes(), b"HTTP/1.1 200 ", connections, total)
    };
    const PING: (&str, &str) = ("{\"type\":\"Ping\"}\n", "{\"type\":\"Pong\"");
    const STATUS: (&str, &str) = ("{\"type\":\"GetStatus\",\"id\":\"bench-asked\"}\n", "{\"type\":\"Status\"");
    const LIVEZ: &str = "/livez";
    const WORKLOAD: &str = "/workloads/bench-asked";
    type Run<'a> = Box<dyn Fn(usize) -> Result<Sample, Failure> + 'a>;
    let runs: Vec<(&str, usize, Run<'_>)> = vec![
        ("64 bytes there and back, socket pair", 20_000, Box::new(load::ping_pong)),
        ("CRI Version, packed by hand on a bare socket", 5000, Box::new(|total| load::version_by_hand(&side.endpoint, total))),
        ("CRI Version, 1 connection", 5000, Box::new(|total| load::version(&client, 1, total))),
        ("CRI Version, 4 threads", 5000, Box::new(|total| load::version(&client, 4, total))),
        ("agent Ping, 1 connection", 20_000, Box::new(ask(PING.0, PING.1, 1))),
        ("agent Ping, 8 connections", 20_000, Box::new(ask(PING.0, PING.1, 8))),
        ("agent GetStatus, 1 connection", 20_000, Box::new(ask(STATUS.0, STATUS.1, 1))),
        ("agent GetStatus, 8 connections", 20_000, Box::new(ask(STATUS.0, STATUS.1, 8))),
        ("GET /livez, 1 connection", 20_000, Box::new(get(LIVEZ, 1))),
        ("GET /livez, 8 connections", 40_000, Box::new(get(LIVEZ, 8))),
        ("GET /livez, 64 connections", 40_000, Box::new(get(LIVEZ, 64))),
        ("GET /workloads/{id}, 1 connection", 10_000, Box::new(get(WORKLOAD, 1))),
        ("GET /workloads/{id}, 8 connections", 20_000, Box::new(get(WORKLOAD, 8))),
        ("GET /workloads/{id}, 64 connections", 20_000, Box::new(get(WORKLOAD, 64))),
    ];
    let mut samples: Vec<(Sample, Duration)> = runs.iter().map(|_| (Sample::default(), Duration::MAX)).collect();
    for _ in 0..TURNS {
        for ((name, total, run), (sample, best)) in runs.iter().zip(&mut samples) {
            let turn = run(total / setup.scale / TURNS).map_err(|e| format!("{name}: {e}"))?;
            *best = turn.percentile(50).min(*best);
            sample.append(turn);
        }
    }
    let [pair, by_hand] = [0, 1].map(|i| samples.get(i).map(|(_, best)| *best).unwrap_or_default());
    for (i, ((name, ..), (sample, best))) in runs.iter().zip(&samples).enumerate() {
        let beside = match i {
            1 => format!(", {:.1} x the socket pair", best.div_duration_f64(pair)),
            2 => format!(", {:.2} x by hand", best.div_duration_f64(by_hand)),
            _ => String::new(),
        };
        let note = format!("{:.0}/s; p50 of the best turn {}{beside}", sample.per_second(), us(*best));
        table.row(name, &us(sample.percentile(50)), &us(sample.percentile(95)), &note);
        if i == 2 && side.name == REAL {
            // 58 us: measured where the method was worked out, on two cores. Another machine has another figure.
            table.aim("CRI unary call, p50 of the best turn", best.as_secs_f64() * 1e6, 1.1 * 58.0, "us");
        }
    }
    let after = [("agent", side.pair.agent.memory()?), ("control plane", side.pair.plane.memory()?)];
    for (name, Memory { rss_bytes, anon_bytes, threads }) in after {
        let note = format!("{} of it anonymous; {threads} threads", mb(anon_bytes));
        table.row(&format!("memory, {name}: after all of this"), &mb(rss_bytes), "", &note);
    }
    starts::delete(&mut http, "bench-asked")
}

const BINARIES: [&str; 4] = ["kakuri-agent", "kakuri-control-plane", "kakuri", "kakuri-cri-sim"];

fn sizes(setup: &Setup, table: &mut Table) -> Result<(), Failure> {
    let dirs = [("dynamic", Some(&setup.bins)), ("static", setup.statics.as_ref())];
    for (kind, dir) in dirs {
        let Some(dir) = dir else { continue };
        let mut total = 0;
        let mut each = Vec::new();
        for binary in BINARIES {
            let bytes = std::fs::metadata(dir.join(binary))?.len();
            total += bytes;
            each.push(format!("{binary} {}", mb(bytes)));
            if kind == "static" && binary == "kakuri-agent" {
                table.aim("agent, static binary", f64::from(u32::try_from(bytes)?) / 1e6, 2.5, "MB");
            }
        }
        table.row(&format!("size, {kind}: all four"), &mb(total), "", &each.join(", "));
        if kind == "static" {
            table.aim("all four static binaries", f64::from(u32::try_from(total)?) / 1e6, 12.0, "MB");
        }
    }
    Ok(())
}

/// Removes what our nodes have at the runtime.
fn sweep(endpoint: &Path) -> Result<(), Failure> {
    let client = Client::new(endpoint.to_owned());
    for node in [NODE, RAW_NODE] {
        for seen in runtime::list(&client, &Name::new(node)?)? {
            progress(&format!("removing sandbox {} of {}", seen.sandbox_id, seen.workload));
            runtime::remove_sandbox(&client, &seen.sandbox_id, Deadline::within_ms(60_000, "removal"))?;
        }
    }
    Ok(())
}

pub(crate) fn progress(text: &str) {
    complain("bench", &text);
}

#[derive(Default)]
pub(crate) struct Table {
    rows: Vec<String>,
    missed: Vec<String>,
    aims: Vec<String>,
}

impl Table {
    pub(crate) fn row(&mut self, what: &str, p50: &str, p95: &str, note: &str) {
        self.rows.push(format!("| {what} | {p50} | {p95} | {note} |"));
    }

    pub(crate) fn aim(&mut self, what: &str, seen: f64, limit: f64, unit: &str) {
        self.aims.push(format!("{what}: {seen:.2} {unit}, aim {limit:.1} {unit}"));
        if seen > limit {
            self.missed.push(format!("{what} {seen:.2} {unit} > {limit:.1} {unit}"));
        }
    }

    fn print(&self) {
        println!("| what | p50, or the figure | p95 | beside it |\n|---|---:|---:|---|");
        self.rows.iter().for_each(|row| println!("{row}"));
        println!();
        self.aims.iter().for_each(|aim| println!("- {aim}"));
        println!();
        match self.missed.as_slice() {
            [] => println!("all aims met"),
            missed => println!("missed: {}", missed.join("; ")),
        }
    }
}

/// Bytes of so many MiB.
pub(crate) fn mib(n: u64) -> u64 {
    n << 20
}

pub(crate) fn ms(time: Duration) -> String {
    format!("{:.2} ms", time.as_secs_f64() * 1e3)
}

fn us(time: Duration) -> String {
    format!("{:.1} us", time.as_secs_f64() * 1e6)
}

/// Decimal megabytes, as the aims count.
pub(crate) fn mb(bytes: u64) -> String {
    format!("{}.{:02} MB", bytes / 1_000_000, bytes % 1_000_000 / 10_000)
}
