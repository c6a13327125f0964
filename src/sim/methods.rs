//! The methods of CRI: a message in, a message out, and the faults before and after.

use std::sync::atomic::Ordering;

use bytes::Bytes;
use prost::Message;

use super::faults::{Action, Plan};
use super::machine::{Call, Machine};
use super::script::{NoProgram, Script};
use super::server::{Answer, End, Outbox, too_large};
use super::state::{World, no_program, reported, sandbox_name};
use crate::cri::proto as p;
use crate::deadline::Deadline;
use crate::grpc::{Code, Status};
use crate::limits;

/// What is served, by service.
const SERVICES: [(&str, &str); 2] = [
    (
        "RuntimeService",
        "Version Status RunPodSandbox StopPodSandbox RemovePodSandbox PodSandboxStatus ListPodSandbox CreateContainer StartContainer \
         StopContainer RemoveContainer ListContainers ContainerStatus ReopenContainerLog ExecSync ContainerStats GetContainerEvents",
    ),
    ("ImageService", "ListImages ImageStatus PullImage RemoveImage ImageFsInfo"),
];

/// The method called `name`, of any service.
pub(super) fn named(name: &str) -> Option<&'static str> {
    SERVICES.iter().flat_map(|(_, names)| names.split(' ')).find(|known| *known == name)
}

/// The method at `/runtime.v1.SERVICE/METHOD`.
///
/// # Errors
/// UNIMPLEMENTED, in the words of grpc-go.
pub(super) fn at(path: &str) -> Result<&'static str, Status> {
    let (service, method) = path.trim_start_matches('/').rsplit_once('/').unwrap_or((path, ""));
    let found = SERVICES.iter().find(|(known, _)| service.strip_prefix("runtime.v1.") == Some(known));
    let message = match found.map(|(_, names)| names.split(' ').find(|known| *known == method)) {
        Some(Some(method)) => return Ok(method),
        Some(None) => format!("unknown method {method} for service {service}"),
        None => format!("unknown service {service}"),
    };
    Err(Status { code: Code::Unimplemented, message })
}

/// For waits that only a call's own deadline or the caller ends.
pub(super) const DAY_MS: u64 = 86_400_000;
/// A message over the limit of every client.
const GIANT_BYTES: usize = 17 << 20;
/// No field of CRI has this number.
const UNKNOWN_FIELD: u32 = 500_000;
/// What `exit` leaves behind: as if killed.
const EXIT_KILLED: i32 = 137;

/// The line a call leaves in the log of calls: `METHOD OUTCOME key=value...`.
struct Record<'a> {
    machine: &'a Machine,
    line: Option<(&'static str, String)>,
}

impl Record<'_> {
    /// What the request names. Requests with the same first field are read alike: protobuf skips the rest.
    fn keys(&mut self, body: &[u8]) {
        match self.line.as_ref().map_or("", |(method, _)| method) {
            "RunPodSandbox" => {
                let r = p::RunPodSandboxRequest::decode(body).unwrap_or_default();
                self.key("name", &r.config.and_then(|c| c.metadata).map(|m| sandbox_name(&m)).unwrap_or_default());
                self.key("handler", &r.runtime_handler);
            }
            "CreateContainer" => {
                let r = p::CreateContainerRequest::decode(body).unwrap_or_default();
                self.key("sandbox", &r.pod_sandbox_id);
                self.key("name", &r.config.and_then(|c| c.metadata).unwrap_or_default().name);
            }
            "StopPodSandbox" | "RemovePodSandbox" | "PodSandboxStatus" => {
                self.key("sandbox", &p::StopPodSandboxRequest::decode(body).unwrap_or_default().pod_sandbox_id);
            }
            "StartContainer" | "StopContainer" | "RemoveContainer" | "ContainerStatus" | "ReopenContainerLog" | "ExecSync"
            | "ContainerStats" => self.key("container", &p::StartContainerRequest::decode(body).unwrap_or_default().container_id),
            "ImageStatus" | "PullImage" | "RemoveImage" => {
                self.key("image", &image_of(p::RemoveImageRequest::decode(body).unwrap_or_default().image));
            }
            _ => {}
        }
    }

    fn key(&mut self, key: &str, value: &str) {
        if let Some((_, keys)) = &mut self.line {
            // No blanks in a value: a line is words.
            keys.push_str(&format!(" {key}={}", value.escape_debug().to_string().replace(' ', r"\u{20}")));
        }
    }

    /// Once: for a call that hangs or kills when it begins to, for any other just before its answer.
    fn write(&mut self, outcome: &str) {
        if let Some((method, keys)) = self.line.take() {
            self.machine.record(&format!("{method} {outcome}{keys}"));
        }
    }
}

impl Machine {
    /// Runs a call and sends its answer.
    pub(super) fn serve(&self, call: &Call, body: &[u8], outbox: &Outbox<'_>) {
        let plan = self.faults.begin(call.method);
        let mut record = Record { machine: self, line: Some((call.method, String::new())) };
        record.keys(body);
        let (message, end) = match self.answer(call, body, &plan, &mut record, outbox) {
            Ok(message) if plan.after.contains(&Action::NoStatus) => (message, End::Bare),
            Ok(message) => (message, End::Status(Status { code: Code::Ok, message: String::new() })),
            Err(end) => (Bytes::new(), end),
        };
        record.write(&match &end {
            End::Bare => "OK".into(),
            End::Drop => "drop".into(),
            End::Http(status) => format!("http={status}"),
            End::Reset(reason) => format!("rst={}", u32::from(*reason)),
            End::Status(Status { code: Code::Ok, .. }) => "OK".into(),
            End::Status(status) => format!("{:?}", status.code),
        });
        if plan.after.contains(&Action::GoAway) {
            outbox.send(Answer::GoAway);
        }
        if !message.is_empty() {
            outbox.send(Answer::Item(message));
        }
        outbox.send(Answer::End(end));
    }

    /// The framed message of the answer, or an end without one.
    fn answer(&self, call: &Call, body: &[u8], plan: &Plan, record: &mut Record<'_>, outbox: &Outbox<'_>) -> Result<Bytes, End> {
        for action in &plan.before {
            self.strike(call, action, record)?;
        }
        let outcome = self.effect(call, body, plan, record, outbox);
        if call.method == "StartContainer" && outcome.is_ok() && !plan.after.is_empty() {
            // Whatever the caller hears: code of the user's ran, and tests count how often.
            record.key("effect", "yes");
        }
        for action in &plan.after {
            self.strike(call, action, record)?;
        }
        let mut message = outcome.map_err(End::Status)?;
        if message.len() > limits::GRPC_MESSAGE_BYTES_MAX {
            return Err(End::Status(too_large("trying to send", message.len() as u64)));
        }
        for action in &plan.after {
            match action {
                Action::Big(bytes) => prost::encoding::bytes::encode(UNKNOWN_FIELD, &vec![0; *bytes], &mut message),
                Action::Giant => message = vec![0; GIANT_BYTES],
                Action::Malformed => message = vec![0xff; 32],
                _ => {}
            }
        }
        Ok(framed(u8::from(plan.after.contains(&Action::Compressed)), &message))
    }

    /// Lets a fault happen. Those that concern the answer alone wait for it.
    fn strike(&self, call: &Call, action: &Action, record: &mut Record<'_>) -> Result<(), End> {
        let pause = |ms| self.wait(call, Deadline::within_ms(ms, "fault"), |_| None::<()>).map(|_| ()).map_err(End::Status);
        match action {
            Action::Delay(ms) => pause(*ms),
            Action::Drop => Err(End::Drop),
            Action::Error(status) => Err(End::Status(status.clone())),
            Action::Exit => {
                record.write("exit");
                std::process::exit(EXIT_KILLED);
            }
            Action::Hang => {
                record.write("hang");
                pause(DAY_MS)
            }
            Action::Http(status) => Err(End::Http(*status)),
            Action::Reset(code) => Err(End::Reset((*code).into())),
            Action::Big(_) | Action::Compressed | Action::Giant | Action::GoAway | Action::Malformed | Action::NoStatus => Ok(()),
        }
    }

    fn effect(&self, call: &Call, body: &[u8], plan: &Plan, record: &mut Record<'_>, outbox: &Outbox<'_>) -> Result<Vec<u8>, Status> {
        match call.method {
            "Version" => unary(body, |_: p::VersionRequest| {
                Ok(p::VersionResponse {
                    version: "0.1.0".into(),
                    runtime_name: "kakuri-cri-sim".into(),
                    runtime_version: env!("CARGO_PKG_VERSION").into(),
                    runtime_api_version: "v1".into(),
                })
            }),
            "Status" => unary(body, |r: p::StatusRequest| Ok(self.status(&r, plan))),
            "RunPodSandbox" => unary(body, |r: p::RunPodSandboxRequest| {
                let pod_sandbox_id = self.change(|world, now| world.run_sandbox(r, &self.options.handlers, now))?;
                record.key("sandbox", &pod_sandbox_id);
                Ok(p::RunPodSandboxResponse { pod_sandbox_id })
            }),
            "StopPodSandbox" => unary(body, |r: p::StopPodSandboxRequest| {
                self.change(|world, now| world.stop_sandbox(&r.pod_sandbox_id, now)).map(|()| p::StopPodSandboxResponse {})
            }),
            "RemovePodSandbox" => unary(body, |r: p::RemovePodSandboxRequest| {
                self.change(|world, now| world.remove_sandbox(&r.pod_sandbox_id, now));
                Ok(p::RemovePodSandboxResponse {})
            }),
            "PodSandboxStatus" => unary(body, |r: p::PodSandboxStatusRequest| {
                let status = self.read(|world, _| world.sandbox(&r.pod_sandbox_id).map(|s| reported(s, plan)))?;
                Ok(p::PodSandboxStatusResponse { status: Some(status), ..Default::default() })
            }),
            "ListPodSandbox" => unary(body, |r: p::ListPodSandboxRequest| {
                let items = self.read(|world, _| world.list_sandboxes(&r.filter.unwrap_or_default(), plan));
                Ok(p::ListPodSandboxResponse { items })
            }),
            "CreateContainer" => unary(body, |r: p::CreateContainerRequest| {
                let container_id = self.change(|world, now| world.create_container(r, now))?;
                record.key("container", &container_id);
                Ok(p::CreateContainerResponse { container_id })
            }),
            "StartContainer" => {
                unary(body, |r: p::StartContainerRequest| self.start_container(&r.container_id).map(|()| p::StartContainerResponse {}))
            }
            "StopContainer" => unary(body, |r: p::StopContainerRequest| {
                if let Some(id) = self.change(|world, now| world.terminate(&r.container_id, r.timeout, now))? {
                    let grace = Deadline::within_ms(seconds_ms(r.timeout), "grace");
                    self.wait(call, grace, |world| world.running(&id).err())?;
                    self.change(|world, now| world.kill(&id, now));
                }
                Ok(p::StopContainerResponse {})
            }),
            "RemoveContainer" => unary(body, |r: p::RemoveContainerRequest| {
                self.change(|world, now| world.remove_container(&r.container_id, now));
                Ok(p::RemoveContainerResponse {})
            }),
            "ListContainers" => unary(body, |r: p::ListContainersRequest| {
                let containers = self.read(|world, _| world.list_containers(&r.filter.unwrap_or_default(), plan));
                Ok(p::ListContainersResponse { containers })
            }),
            "ContainerStatus" => unary(body, |r: p::ContainerStatusRequest| {
                let status = self.read(|world, _| world.container(&r.container_id).map(|c| world.reported(c, plan)))?;
                Ok(p::ContainerStatusResponse { status: Some(status), ..Default::default() })
            }),
            "ReopenContainerLog" => {
                unary(body, |r: p::ReopenContainerLogRequest| self.reopen_log(&r.container_id).map(|()| p::ReopenContainerLogResponse {}))
            }
            "ExecSync" => unary(body, |r: p::ExecSyncRequest| self.exec(call, &r, plan)),
            "ContainerStats" => unary(body, |r: p::ContainerStatsRequest| self.stats(&r.container_id)),
            "ListImages" => unary(body, |r: p::ListImagesRequest| {
                let wanted = image_of(r.filter.and_then(|f| f.image));
                let one = |world: &World| world.image(&wanted).into_iter().collect();
                Ok(p::ListImagesResponse { images: self.read(|world, _| if wanted.is_empty() { world.images() } else { one(world) }) })
            }),
            "ImageStatus" => unary(body, |r: p::ImageStatusRequest| {
                let image = self.read(|world, _| world.image(&image_of(r.image)));
                Ok(p::ImageStatusResponse { image, ..Default::default() })
            }),
            "PullImage" => unary(body, |r: p::PullImageRequest| {
                record.key("pulls", &(self.pulls.fetch_add(1, Ordering::SeqCst) + 1).to_string());
                let answer = self.pull(call, &image_of(r.image), r.auth.as_ref());
                self.pulls.fetch_sub(1, Ordering::SeqCst);
                answer
            }),
            "ImageFsInfo" => unary(body, |_: p::ImageFsInfoRequest| {
                let of_images = || self.read(|world, _| world.images().iter().map(|image| image.size).sum());
                let value = plan.settings("image-used").find_map(|used| used.parse().ok()).unwrap_or_else(of_images);
                let fs_id = Some(p::FilesystemIdentifier { mountpoint: "/".into() });
                let usage = p::FilesystemUsage { timestamp: 0, fs_id, used_bytes: Some(p::UInt64Value { value }) };
                Ok(p::ImageFsInfoResponse { image_filesystems: vec![usage] })
            }),
            "RemoveImage" => unary(body, |r: p::RemoveImageRequest| {
                self.change(|world, _| world.remove_image(&image_of(r.image)));
                Ok(p::RemoveImageResponse {})
            }),
            "GetContainerEvents" if self.options.has_events => {
                record.write("open");
                Err(self.events(call, outbox))
            }
            other => Err(Status { code: Code::Unimplemented, message: format!("method {other} not implemented") }),
        }
    }

    fn status(&self, request: &p::StatusRequest, plan: &Plan) -> p::StatusResponse {
        let condition = |name: &str| {
            let status = !plan.settings("unready").any(|unready| unready == name);
            let (reason, message) = if status { ("", "") } else { ("Simulated", "a fault of the simulator says so") };
            p::RuntimeCondition { r#type: name.into(), status, reason: reason.into(), message: message.into() }
        };
        let conditions = vec![condition("RuntimeReady"), condition("NetworkReady")];
        let mut answer = p::StatusResponse { status: Some(p::RuntimeStatus { conditions }), ..Default::default() };
        let handlers = &self.options.handlers;
        if self.options.lists_handlers {
            // containerd 2 lists its default a second time, under the empty name.
            answer.runtime_handlers =
                handlers.iter().map(String::as_str).chain([""]).map(|name| p::RuntimeHandler { name: name.into() }).collect();
        } else if request.verbose {
            let runtimes: Vec<_> = handlers.iter().map(|h| format!(r#""{h}":{{"runtimeType":"io.containerd.{h}.v2"}}"#)).collect();
            let default = handlers.first().map_or("", String::as_str);
            let config = format!(r#"{{"containerd":{{"defaultRuntimeName":"{default}","runtimes":{{{}}}}}}}"#, runtimes.join(","));
            answer.info.insert("config".into(), config);
        }
        answer
    }

    fn exec(&self, call: &Call, request: &p::ExecSyncRequest, plan: &Plan) -> Result<p::ExecSyncResponse, Status> {
        let fail = |code, why: String| Status { code, message: format!("failed to exec in container: {why}") };
        let (id, kernel, has_programs) = self.read(|world, _| {
            let container = world.running(&request.container_id).map_err(|s| fail(s.code, s.message))?;
            let kernel = self.kernel(world.handler_of(container), plan);
            Ok((container.status.id.clone(), kernel, has_programs(container.image())))
        })?;
        let script = if has_programs { Script::parse(&request.cmd) } else { Err(NoProgram(request.cmd.join(" "))) };
        let script = script.map_err(|e| fail(Code::Unknown, format!("failed to start exec: {}", no_program("exec", &e))))?;
        let (ns, exit_code) = script.end.map_or((i64::MAX, 0), |(ns, code, _)| (ns, code));
        let run_ms = u64::try_from(ns / 1_000_000).unwrap_or(0).min(DAY_MS);
        let limit_ms = if request.timeout > 0 { seconds_ms(request.timeout) } else { DAY_MS };
        if self.wait(call, Deadline::within_ms(run_ms.min(limit_ms), "exec"), |world| world.running(&id).err())?.is_some() {
            return Ok(p::ExecSyncResponse { exit_code: EXIT_KILLED, ..Default::default() });
        }
        if limit_ms < run_ms {
            return Err(fail(Code::DeadlineExceeded, format!("timeout {}s exceeded: context deadline exceeded", request.timeout)));
        }
        let (stdout, stderr) = script.output(&kernel);
        Ok(p::ExecSyncResponse { stdout, stderr, exit_code })
    }

    /// Made up: one percent of a core, and a mebibyte.
    fn stats(&self, id: &str) -> Result<p::ContainerStatsResponse, Status> {
        self.read(|world, now| {
            let gone = |_| Status { code: Code::NotFound, message: "failed to find container: not found".into() };
            let container = world.container(id).map_err(gone)?;
            let ran = if container.is_running() { now.saturating_sub(container.status.started_at) } else { 0 };
            let number = |value| Some(p::UInt64Value { value });
            let p::ContainerStatus { id, metadata, labels, .. } = container.status.clone();
            let stats = p::ContainerStats {
                attributes: Some(p::ContainerAttributes { id, metadata, labels }),
                cpu: Some(p::CpuUsage { timestamp: now, usage_core_nano_seconds: number(ran.unsigned_abs() / 100) }),
                memory: Some(p::MemoryUsage { timestamp: now, working_set_bytes: number(1 << 20), usage_bytes: number(1 << 20) }),
            };
            Ok(p::ContainerStatsResponse { stats: Some(stats) })
        })
    }

    /// The registry: the name of an image says how its pull goes.
    fn pull(&self, call: &Call, image: &str, auth: Option<&p::AuthConfig>) -> Result<p::PullImageResponse, Status> {
        if let Some((_, after)) = image.split_once("slow") {
            let digits: String = after.chars().skip_while(|c| *c == '-').take_while(char::is_ascii_digit).collect();
            let ms = digits.parse().unwrap_or(1000).min(DAY_MS);
            self.wait(call, Deadline::within_ms(ms, "pull"), |_| None::<()>)?;
        }
        let may_read =
            auth.is_some_and(|a| a.password != "wrong" && [&a.password, &a.auth, &a.identity_token].iter().any(|s| !s.is_empty()));
        let resolve = |why: &str| Some(format!("failed to resolve reference {image:?}: {why}"));
        let why = if image.contains("not-found") {
            resolve(&format!("{image}: not found"))
        } else if image.contains("unauthorized") && !may_read {
            resolve("pull access denied, repository does not exist or may require authorization: authorization failed: 401 Unauthorized")
        } else if image.contains("unreachable") {
            resolve(&format!("failed to do request: Head \"https://{image}\": dial tcp 192.0.2.1:443: connect: connection refused"))
        } else if image.contains("disk-full") {
            Some("failed to copy: write /ingest/data: no space left on device".to_owned())
        } else {
            None
        };
        match why {
            Some(why) => Err(Status { code: Code::Unknown, message: format!("failed to pull and unpack image {image:?}: {why}") }),
            None => Ok(p::PullImageResponse { image_ref: self.change(|world, _| world.add_image(image)) }),
        }
    }

    /// Sends events until the call ends; how it ended.
    fn events(&self, call: &Call, outbox: &Outbox<'_>) -> Status {
        let key = self.change(|world, _| world.subscribe());
        outbox.send(Answer::Item(Bytes::new()));
        let status = loop {
            let next = |world: &mut World| match world.subscribers.get_mut(&key) {
                Some(events) => events.pop_front().map(Some),
                None => Some(None),
            };
            match self.wait(call, Deadline::within_ms(DAY_MS, "events"), next) {
                Ok(Some(Some(event))) if outbox.send_and_wait(framed(0, &event)) => {}
                Ok(Some(Some(_))) => break Status { code: Code::Cancelled, message: String::new() },
                Ok(Some(None)) => break Status { code: Code::ResourceExhausted, message: "subscriber is too slow".into() },
                Ok(None) => {}
                Err(status) => break status,
            }
        };
        self.change(|world, _| world.subscribers.remove(&key));
        status
    }
}

/// Whether an image has anything to execute: `scratch` and `no-uname` have not.
fn has_programs(image: &str) -> bool {
    let name = image.rsplit('/').next().unwrap_or_default();
    let name = name.split([':', '@']).next().unwrap_or_default();
    !matches!(name, "scratch" | "no-uname")
}

fn image_of(image: Option<p::ImageSpec>) -> String {
    image.unwrap_or_default().image
}

fn seconds_ms(seconds: i64) -> u64 {
    u64::try_from(seconds).unwrap_or(0).saturating_mul(1000).min(DAY_MS)
}

fn unary<Q: Message + Default, A: Message>(body: &[u8], method: impl FnOnce(Q) -> Result<A, Status>) -> Result<Vec<u8>, Status> {
    let fail = |error| Status { code: Code::Internal, message: format!("grpc: error unmarshalling request: {error}") };
    method(Q::decode(body).map_err(fail)?).map(|answer| answer.encode_to_vec())
}

/// A message with any flags and of any size, which [`crate::grpc::frame`] rightly refuses.
fn framed(flags: u8, message: &[u8]) -> Bytes {
    let mut framed = vec![flags];
    framed.extend_from_slice(&u32::try_from(message.len()).unwrap_or(u32::MAX).to_be_bytes());
    framed.extend_from_slice(message);
    framed.into()
}
