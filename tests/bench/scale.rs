//! Many workloads on one node, on a simulator: what a durable POST costs, and what an agent costs that has hundreds to look after.

use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::thread;
use std::time::Duration;

use kakuri::cri::{Client, runtime};
use kakuri::deadline::Stopwatch;
use kakuri::workload::Name;
use serde_json::{Value, json};

use crate::daemons::{Daemon, Http, Line, poll};
use crate::load::Sample;
use crate::{Failure, Setup, Table, mb, ms, progress, starts};

const NODE: &str = "bench-scale";
/// How long an agent is watched at rest.
const REST: Duration = Duration::from_secs(15);

/// A simulator, an agent and a control plane; the agent can be started again where it was.
struct Fleet {
    dir: PathBuf,
    plane: Daemon,
    agent: Option<Daemon>,
    agent_args: Vec<String>,
    _sim: Daemon,
}

impl Fleet {
    fn start(setup: &Setup, name: &str) -> Result<Self, Failure> {
        let dir = setup.work.join(name);
        let text = |path: &Path| path.display().to_string();
        let socket = dir.join("sim.sock");
        std::fs::create_dir_all(&dir)?;
        let sim = Daemon::start(&setup.bins.join("kakuri-cri-sim"), &["--listen", &format!("unix://{}", text(&socket))], &dir.join("sim"))?;
        let endpoint = format!("unix://{}", text(&socket));
        let state = text(&dir.join("state"));
        let args =
            ["--node-id", NODE, "--cri-endpoint", &endpoint, "--state-dir", &state, "--memory-mb", "16777216", "--listen", "127.0.0.1:0"];
        let agent = Daemon::start(&setup.bins.join("kakuri-agent"), &args, &dir.join("agent"))?;
        let mut agent_args = args.map(str::to_owned).to_vec();
        agent_args.truncate(args.len() - 1);
        agent_args.push(agent.tcp()?.to_string());
        let node = format!("{NODE}={}", agent.tcp()?);
        let args = ["--listen", "127.0.0.1:0", "--node", &node, "--data-dir", &text(&dir.join("data"))];
        let plane = Daemon::start(&setup.bins.join("kakuri-control-plane"), &args, &dir.join("plane"))?;
        let fleet = Self { dir, plane, agent: Some(agent), agent_args, _sim: sim };
        fleet.plane.wait_until_ready()?;
        Ok(fleet)
    }

    fn agent(&self) -> Result<&Daemon, Failure> {
        self.agent.as_ref().ok_or_else(|| "the agent is down".into())
    }
}

/// All of it, in the table.
///
/// # Errors
/// Whatever does not work.
pub(crate) fn measure(setup: &Setup, table: &mut Table) -> Result<(), Failure> {
    let fleet = Fleet::start(setup, "posts")?;
    for clients in [1, 16, 64] {
        progress(&format!("durable POSTs, {clients} clients"));
        let (sample, ids) = posts(&fleet, setup, clients, 640 / setup.scale)?;
        let (p50, p95) = (sample.percentile(50), sample.percentile(95));
        let note = format!("{:.0}/s; each is on two disks, its control plane's and its node's, before its 201", sample.per_second());
        table.row(&format!("POST /workloads, acknowledged durably, {clients} clients"), &ms(p50), &ms(p95), &note);
        delete(&fleet, &ids)?;
    }
    // Others, whose memory knows nothing of that.
    let mut fleet = Fleet::start(setup, "many")?;
    let mut there = Vec::new();
    for count in [100 / setup.scale, 500 / setup.scale] {
        progress(&format!("{count} workloads"));
        there.extend(posts(&fleet, setup, 8, count - there.len())?.1);
        all_run(&fleet, count)?;
        at_rest(setup, &fleet, count, table)?;
    }
    progress("recovery");
    recovery(setup, &mut fleet, there.len(), table)?;
    delete(&fleet, &there)
}

/// Posts so many workloads from so many clients; how long each took, and their ids.
fn posts(fleet: &Fleet, setup: &Setup, clients: usize, total: usize) -> Result<(Sample, Vec<String>), Failure> {
    let address = fleet.plane.tcp()?;
    let barrier = Barrier::new(clients + 1);
    let run = |client: usize| -> Result<(Vec<Duration>, Vec<String>), Failure> {
        let http = Http::connect(address);
        barrier.wait();
        let mut http = http?;
        let (mut times, mut ids) = (Vec::new(), Vec::new());
        for i in (client..total).step_by(clients) {
            let id = format!("scale-{clients}-{total}-{i}");
            let body = starts::workload(&id, "native", &setup.image, 16);
            let watch = Stopwatch::start();
            let (status, answer) = http.call("POST", "/workloads", Some(&body))?;
            times.push(watch.elapsed());
            if status != 201 {
                return Err(format!("POST answered {status}: {answer}").into());
            }
            ids.push(id);
        }
        Ok((times, ids))
    };
    thread::scope(|scope| {
        let run = &run;
        let threads: Vec<_> = (0..clients).map(|client| scope.spawn(move || run(client))).collect();
        barrier.wait();
        let watch = Stopwatch::start();
        let (mut times, mut ids) = (Vec::new(), Vec::new());
        for thread in threads {
            let (more_times, more_ids) = thread.join().expect("no panic in a client")?;
            times.extend(more_times);
            ids.extend(more_ids);
        }
        Ok((Sample::of(times, watch.elapsed()), ids))
    })
}

/// Waits until so many run.
fn all_run(fleet: &Fleet, count: usize) -> Result<(), Failure> {
    let mut line = Line::connect(fleet.agent()?.tcp()?)?;
    poll("all run", 120_000, || Ok(running(&mut line)? >= count))
}

/// How many workloads the agent says run.
fn running(line: &mut Line) -> Result<usize, Failure> {
    let (mut count, mut after) = (0, Value::Null);
    loop {
        let page = line.ask(&json!({"type": "ListWorkloads", "after": after}), "Workloads")?;
        let all = page["workloads"].as_array().map(Vec::as_slice).unwrap_or_default();
        count += all.iter().filter(|workload| workload["state"] == "Running").count();
        after = page["continue"].clone();
        if after.is_null() {
            return Ok(count);
        }
    }
}

/// What an agent with so many workloads costs that nobody asks for anything.
fn at_rest(setup: &Setup, fleet: &Fleet, count: usize, table: &mut Table) -> Result<(), Failure> {
    let client = Client::new(fleet.dir.join("sim.sock"));
    let node = Name::new(NODE)?;
    let mut sample = Sample::default();
    for _ in 0..20 {
        let watch = Stopwatch::start();
        let seen = runtime::list(&client, &node)?.len();
        sample.add(watch.elapsed());
        if seen != count {
            return Err(format!("{seen} sandboxes of {count} workloads").into());
        }
    }
    let p50 = sample.percentile(50);
    table.row(
        &format!("one look at {count} workloads (simulator)"),
        &ms(p50),
        &ms(sample.percentile(95)),
        "both lists of the runtime, read and joined",
    );
    table.aim(&format!("one look at {count} workloads"), p50.as_secs_f64(), 1.0, "s");
    let agent = fleet.agent()?;
    // What the starts set in motion goes on for a while, and what an agent does at rest is a matter of time.
    thread::sleep(Duration::from_secs(3));
    let (before, watch) = (agent.processor_time()?, Stopwatch::start());
    thread::sleep(REST / u32::try_from(setup.scale)?.min(3));
    let share = (agent.processor_time()? - before).div_duration_f64(watch.elapsed()) * 100.0;
    let memory = agent.memory()?;
    let note = format!("{} of it anonymous; {} threads; {share:.2} % of a core, relisting as usual", mb(memory.anon_bytes), memory.threads);
    table.row(&format!("memory, agent: {count} workloads (simulator)"), &mb(memory.rss_bytes), "", &note);
    table.aim(&format!("agent at rest, {count} workloads"), share, 1.0, "% of a core");
    table.aim(&format!("agent, resident, {count} workloads"), f64::from(u32::try_from(memory.rss_bytes)?) / 1e6, 12.0, "MB");
    Ok(())
}

/// kill -9 of an agent with so many workloads, and how long until its next one knows them all.
fn recovery(setup: &Setup, fleet: &mut Fleet, count: usize, table: &mut Table) -> Result<(), Failure> {
    let mut sample = Sample::default();
    for _ in 0..5 {
        fleet.agent.take().ok_or("the agent is down")?.kill()?;
        let args: Vec<&str> = fleet.agent_args.iter().map(String::as_str).collect();
        let watch = Stopwatch::start();
        let dir = fleet.dir.join("agent");
        let _ = std::fs::remove_file(dir.join("ready")); // Of the one that was killed.
        fleet.agent = Some(Daemon::start(&setup.bins.join("kakuri-agent"), &args, &dir)?);
        let mut line = Line::connect(fleet.agent()?.tcp()?)?;
        poll("recovery", 60_000, || Ok(line.ask(&json!({"type": "GetNode"}), "Node")?["ready"] == true))?;
        let known = running(&mut line)?;
        sample.add(watch.elapsed());
        if known != count {
            return Err(format!("the agent came back with {known} of {count} workloads").into());
        }
    }
    let note = "from the start of the next agent until it is ready and lists them all";
    table.row(&format!("recovery of an agent, {count} workloads"), &ms(sample.percentile(50)), &ms(sample.percentile(95)), note);
    Ok(())
}

fn delete(fleet: &Fleet, ids: &[String]) -> Result<(), Failure> {
    fleet.plane.wait_until_ready()?;
    let mut http = Http::connect(fleet.plane.tcp()?)?;
    for id in ids {
        let (status, answer) = http.call("DELETE", &format!("/workloads/{id}"), None)?;
        if status != 202 {
            return Err(format!("DELETE answered {status}: {answer}").into());
        }
    }
    poll("deletion", 120_000, || Ok(http.call("GET", "/workloads?limit=1", None)?.1["items"].as_array().is_some_and(Vec::is_empty)))
}
