//! A child process that a test started, and how it ends.

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::thread;

use super::{SOON_MS, eventually, within};

/// The programs under test.
pub const AGENT: &str = env!("CARGO_BIN_EXE_kakuri-agent");
pub const CLI: &str = env!("CARGO_BIN_EXE_kakuri");
pub const PLANE: &str = env!("CARGO_BIN_EXE_kakuri-control-plane");
pub const SIM: &str = env!("CARGO_BIN_EXE_kakuri-cri-sim");

/// A command with nothing of this process's environment but the way to programs.
pub fn command(program: &str) -> Command {
    let mut command = Command::new(program);
    command.env_clear().envs(std::env::var_os("PATH").map(|path| ("PATH", path))).env("HOME", "/nonexistent");
    command
}

/// A running daemon.
pub struct Daemon {
    name: String,
    child: Child,
    /// Its end is the daemon's.
    stdin: Option<ChildStdin>,
    is_over: bool,
}

impl Daemon {
    /// Starts a program with `--until-eof` and `--ready-file`, its words appended to `DIR/NAME.log`, and waits until it serves.
    /// Returns it with the lines of its ready file.
    pub fn start(program: &str, name: &str, dir: &Path, args: &[String]) -> (Self, Vec<String>) {
        Self::try_start(program, name, dir, args, &[]).unwrap_or_else(|status| {
            let log = fs::read_to_string(dir.join(format!("{name}.log"))).unwrap_or_default();
            panic!("{name} ended instead of serving: {status}\n{log}")
        })
    }

    /// The same, to die at a failpoint.
    pub fn start_to_die(program: &str, name: &str, dir: &Path, args: &[String], die_at: Option<&str>) -> (Self, Vec<String>) {
        let environment: Vec<(&str, &str)> = die_at.map(|place| ("KAKURI_DIE_AT", place)).into_iter().collect();
        Self::try_start(program, name, dir, args, &environment).unwrap_or_else(|status| panic!("{name} ended instead of serving: {status}"))
    }

    /// The same with more in its environment, for one that may end instead of serving.
    pub fn try_start(
        program: &str,
        name: &str,
        dir: &Path,
        args: &[String],
        environment: &[(&str, &str)],
    ) -> Result<(Self, Vec<String>), ExitStatus> {
        let mut command = command(program);
        command.envs(environment.iter().copied());
        Self::try_start_as(command, name, dir, args)
    }

    /// The same with a command that ends in the program.
    pub fn start_as(command: Command, name: &str, dir: &Path, args: &[String]) -> (Self, Vec<String>) {
        Self::try_start_as(command, name, dir, args).unwrap_or_else(|status| panic!("{name} ended instead of serving: {status}"))
    }

    fn try_start_as(mut command: Command, name: &str, dir: &Path, args: &[String]) -> Result<(Self, Vec<String>), ExitStatus> {
        let (log, ready) = (dir.join(format!("{name}.log")), dir.join(format!("{name}.ready")));
        let _ = fs::remove_file(&ready); // Of an earlier life.
        command.args(args).arg("--until-eof").arg("--ready-file").arg(&ready);
        let mut daemon = Self::spawn(command, name, &log);
        let lines = eventually(&format!("{name} serves"), SOON_MS, || match daemon.try_wait() {
            Some(status) => Some(Err(status)),
            None => fs::read_to_string(&ready).ok().map(Ok),
        })?;
        Ok((daemon, lines.lines().map(str::to_owned).collect()))
    }

    /// Starts any command, its words appended to `log`.
    pub fn spawn(mut command: Command, name: &str, log: &Path) -> Self {
        let log = open_log(log);
        let out = log.try_clone().expect("a descriptor");
        let spawned = command.stdin(Stdio::piped()).stdout(out).stderr(log).spawn();
        let mut child = spawned.unwrap_or_else(|error| panic!("{name}: {error}"));
        let stdin = child.stdin.take();
        Self { name: name.to_owned(), child, stdin, is_over: false }
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, if it did.
    pub fn try_wait(&mut self) -> Option<ExitStatus> {
        let status = self.child.try_wait().expect("a child of ours");
        self.is_over |= status.is_some();
        status
    }

    /// Waits for its end.
    pub fn wait(&mut self, ms: u64) -> ExitStatus {
        eventually(&format!("{} ends", self.name), ms, || self.try_wait())
    }

    /// Ends its stdin and waits; its exit code.
    pub fn stop(&mut self) -> Option<i32> {
        self.stdin = None;
        self.wait(SOON_MS).code()
    }

    /// Sends a signal by its name, `TERM`.
    pub fn signal(&self, name: &str) {
        let sent = Command::new("kill").arg(format!("-{name}")).arg(self.pid().to_string()).status();
        assert!(sent.is_ok_and(|status| status.success()), "kill -{name} {}", self.name);
    }

    /// kill -9.
    pub fn kill(&mut self) {
        self.child.kill().expect("it was there");
        self.wait(SOON_MS);
    }

    /// The names of its threads.
    pub fn threads(&self) -> Vec<String> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.pid())).expect("it runs");
        // A thread may end while we look.
        tasks.flatten().filter_map(|task| fs::read_to_string(task.path().join("comm")).ok()).map(|name| name.trim().to_owned()).collect()
    }

    /// What its descriptors are: `socket:[1]`, `pipe:[2]`, `/a/file`.
    pub fn descriptors(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(format!("/proc/{}/fd", self.pid())).expect("it runs");
        entries.flatten().filter_map(|entry| fs::read_link(entry.path()).ok()).collect()
    }

    /// Its resident memory, in KiB.
    pub fn resident_kib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a process has memory");
        line.trim().trim_end_matches("kB").trim().parse().expect("a number")
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if self.is_over || self.try_wait().is_some() {
            return;
        }
        if thread::panicking() {
            // The test failed already; all that counts is that nothing stays, children of a child included.
            self.stdin = None;
            if within(2000, || self.try_wait()).is_none() {
                let _ = self.child.kill();
                let _ = self.child.wait();
            }
            return;
        }
        let code = self.stop();
        assert_eq!(code, Some(0), "exit code of {}", self.name);
    }
}

fn open_log(path: &Path) -> File {
    let file = OpenOptions::new().create(true).append(true).open(path);
    file.unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}
