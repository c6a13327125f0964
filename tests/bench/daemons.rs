//! The programs under measurement: started on ports the kernel chooses, ended when the bench ends, however it ends.

use std::fs::{self, File};
use std::io::{BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use kakuri::deadline::Deadline;
use serde_json::{Value, json};

use crate::Failure;
use crate::load::{Protocol, read_reply};

/// A running program. It ends with its stdin (`--until-eof`): a bench that is killed leaves none behind.
pub(crate) struct Daemon {
    child: Child,
    /// What its ready file says: `tcp=ADDRESS` or `unix=PATH`, without the first word.
    address: String,
}

impl Daemon {
    /// Starts `program` with `args` and waits until it serves; its files go into `dir`, which is made.
    ///
    /// # Errors
    /// When it does not serve within 20 s; the end of its log is part of the message.
    pub(crate) fn start(program: &Path, args: &[&str], dir: &Path) -> Result<Self, Failure> {
        fs::create_dir_all(dir)?;
        let (ready, log) = (dir.join("ready"), dir.join("log"));
        let mut command = Command::new(program);
        command.args(args).arg("--ready-file").arg(&ready).arg("--until-eof");
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(File::create(&log)?);
        let mut child = command.spawn().map_err(|e| format!("{}: {e}", program.display()))?;
        let mut address = None;
        let serves = poll("ready file", 20_000, || {
            address = fs::read_to_string(&ready).unwrap_or_default().trim_end().split_once('=').map(|(_, address)| address.to_owned());
            Ok(address.is_some() || child.try_wait()?.is_some())
        });
        match (serves, address) {
            (Ok(()), Some(address)) => Ok(Self { child, address }),
            (..) => Err(format!("{} does not serve: {}", program.display(), fs::read_to_string(&log).unwrap_or_default()).into()),
        }
    }

    /// Waits until a control plane has all its nodes.
    ///
    /// # Errors
    /// When it has not within 30 s.
    pub(crate) fn wait_until_ready(&self) -> Result<(), Failure> {
        let mut http = Http::connect(self.tcp()?)?;
        poll("ready nodes", 30_000, || Ok(http.call("GET", "/readyz", None)?.0 == 200))
    }

    /// Where it listens.
    ///
    /// # Errors
    /// When that is no TCP address.
    pub(crate) fn tcp(&self) -> Result<SocketAddr, Failure> {
        Ok(self.address.parse()?)
    }

    /// What it holds in memory.
    ///
    /// # Errors
    /// When it is gone.
    pub(crate) fn memory(&self) -> Result<Memory, Failure> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let number = |name: &str| -> Result<u64, String> {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.and_then(|line| line.split_whitespace().next()?.parse().ok()).ok_or_else(|| format!("no {name}"))
        };
        Ok(Memory { rss_bytes: number("VmRSS")? * 1024, anon_bytes: number("RssAnon")? * 1024, threads: number("Threads")? })
    }
}

impl Daemon {
    /// kill -9.
    ///
    /// # Errors
    /// When it was gone.
    pub(crate) fn kill(mut self) -> Result<(), Failure> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// The time of processors it took so far (proc_pid_stat(5); a tick is a hundredth of a second on every Linux).
    ///
    /// # Errors
    /// When it is gone.
    pub(crate) fn processor_time(&self) -> Result<Duration, Failure> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        // The second field is a name, and may have anything in it but a closing parenthesis behind its own.
        let (_, fields) = stat.rsplit_once(") ").ok_or("no stat")?;
        let ticks: u64 = fields.split(' ').skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
        Ok(Duration::from_millis(ticks * 10))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        // Over already, as a rule; then the other two are no-ops.
        let _ = poll("end", 15_000, || Ok(self.child.try_wait()?.is_some()));
        let _ = (self.child.kill(), self.child.wait());
    }
}

/// Resident memory of a process (proc_pid_status(5)).
#[derive(Clone, Copy)]
pub(crate) struct Memory {
    /// All of it, the pages of the program's own file included.
    pub(crate) rss_bytes: u64,
    /// What no other process and no file has: heap and stacks.
    pub(crate) anon_bytes: u64,
    /// Threads it has.
    pub(crate) threads: u64,
}

/// An agent and its control plane.
pub(crate) struct Pair {
    /// The control plane. Before the agent, so that it ends first.
    pub(crate) plane: Daemon,
    /// The agent.
    pub(crate) agent: Daemon,
}

impl Pair {
    /// Starts both out of `bins`, the agent on the runtime at `endpoint`.
    ///
    /// # Errors
    /// Those of [`Daemon::start`].
    pub(crate) fn start(bins: &Path, endpoint: &Path, dir: &Path, node: &str) -> Result<Self, Failure> {
        let endpoint = format!("unix://{}", endpoint.display());
        let own = |name: &str| -> (PathBuf, String) { (dir.join(name), dir.join(name).join("state").display().to_string()) };
        let (agent_dir, state) = own("agent");
        let args =
            ["--node-id", node, "--listen", "127.0.0.1:0", "--cri-endpoint", &endpoint, "--state-dir", &state, "--memory-mb", "16777216"];
        let agent = Daemon::start(&bins.join("kakuri-agent"), &args, &agent_dir)?;
        let (plane_dir, data) = own("plane");
        let args = ["--listen", "127.0.0.1:0", "--node", &format!("{node}={}", agent.address), "--data-dir", &data];
        let plane = Daemon::start(&bins.join("kakuri-control-plane"), &args, &plane_dir)?;
        plane.wait_until_ready().map_err(|e| format!("{node}, out of {}: {e}", bins.display()))?;
        Ok(Self { plane, agent })
    }
}

/// Looks again and again until it is so, for nothing that is waited for here tells when it is.
///
/// # Errors
/// When it is not so within `ms`, and whatever the look says.
pub(crate) fn poll(what: &'static str, ms: u64, mut is_so: impl FnMut() -> Result<bool, Failure>) -> Result<(), Failure> {
    let deadline = Deadline::within_ms(ms, what);
    while !is_so()? {
        deadline.left()?;
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// A client of an agent: a line there, a line back.
pub(crate) struct Line {
    stream: BufReader<TcpStream>,
    reply: Vec<u8>,
}

impl Line {
    /// Connects.
    ///
    /// # Errors
    /// The socket's.
    pub(crate) fn connect(address: SocketAddr) -> Result<Self, Failure> {
        Ok(Self { stream: connect(address)?, reply: Vec::new() })
    }

    /// Asks, and expects a reply of this type.
    ///
    /// # Errors
    /// The socket's; any other reply, in words.
    pub(crate) fn ask(&mut self, request: &Value, expect: &str) -> Result<Value, Failure> {
        let mut line = request.to_string();
        line.push('\n');
        self.stream.get_mut().write_all(line.as_bytes())?;
        read_reply(&mut self.stream, Protocol::Line, &mut self.reply)?;
        let reply: Value = serde_json::from_slice(&self.reply)?;
        if reply["type"] == expect { Ok(reply) } else { Err(format!("asked {line}, the agent answered {reply}").into()) }
    }

    /// The runtime classes on offer, each with its handler.
    ///
    /// # Errors
    /// As [`Line::ask`].
    pub(crate) fn classes(&mut self) -> Result<Vec<(String, String)>, Failure> {
        let node = self.ask(&json!({"type": "GetNode"}), "Node")?;
        let text = |class: &Value, name: &str| class[name].as_str().unwrap_or_default().to_owned();
        let classes = node["runtime_classes"].as_array().map(Vec::as_slice).unwrap_or_default();
        Ok(classes.iter().map(|class| (text(class, "name"), text(class, "handler"))).collect())
    }
}

/// A client of a control plane, over one connection.
pub(crate) struct Http {
    stream: BufReader<TcpStream>,
    reply: Vec<u8>,
}

impl Http {
    /// Connects.
    ///
    /// # Errors
    /// The socket's.
    pub(crate) fn connect(address: SocketAddr) -> Result<Self, Failure> {
        Ok(Self { stream: connect(address)?, reply: Vec::new() })
    }

    /// A request, and the status and JSON of its response; `null` where it has none.
    ///
    /// # Errors
    /// The socket's, and those of JSON.
    pub(crate) fn call(&mut self, method: &str, path: &str, body: Option<&Value>) -> Result<(u16, Value), Failure> {
        let body = body.map(Value::to_string).unwrap_or_default();
        let length = body.len();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
        );
        self.stream.get_mut().write_all(request.as_bytes())?;
        read_reply(&mut self.stream, Protocol::Http, &mut self.reply)?;
        let text = String::from_utf8_lossy(&self.reply);
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
        let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).ok_or("no HTTP status")?;
        Ok((status, serde_json::from_str(body).unwrap_or_default()))
    }
}

fn connect(address: SocketAddr) -> Result<BufReader<TcpStream>, Failure> {
    let stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(180)))?;
    Ok(BufReader::new(stream))
}
