//! One function per CRI call: build the message, call, read the message.

use std::path::PathBuf;

use prost::Message;

use super::proto::{
    AuthConfig, ContainerConfig, ContainerEventResponse, ContainerFilter, ContainerStats, ContainerStatsRequest, ContainerStatsResponse,
    ContainerStatus, ContainerStatusRequest, ContainerStatusResponse, CreateContainerRequest, CreateContainerResponse, ExecSyncRequest,
    ExecSyncResponse, FilesystemUsage, GetEventsRequest, Image, ImageFsInfoRequest, ImageFsInfoResponse, ImageSpec, ImageStatusRequest,
    ImageStatusResponse, ListContainersRequest, ListContainersResponse, ListImagesRequest, ListImagesResponse, ListPodSandboxRequest,
    ListPodSandboxResponse, PodSandbox, PodSandboxConfig, PodSandboxFilter, PodSandboxStatus, PodSandboxStatusRequest,
    PodSandboxStatusResponse, PullImageRequest, PullImageResponse, RemoveContainerRequest, RemoveContainerResponse, RemoveImageRequest,
    RemoveImageResponse, RemovePodSandboxRequest, RemovePodSandboxResponse, ReopenContainerLogRequest, ReopenContainerLogResponse,
    RunPodSandboxRequest, RunPodSandboxResponse, StartContainerRequest, StartContainerResponse, StatusRequest, StatusResponse,
    StopContainerRequest, StopContainerResponse, StopPodSandboxRequest, StopPodSandboxResponse, VersionRequest, VersionResponse,
};
use crate::deadline::Deadline;
use crate::grpc::{Channel, Error, ErrorKind, Messages, Method};
use crate::limits;
use crate::net::Stream;

/// A CRI endpoint. Cheap to share; calls at the same time use several connections.
#[derive(Debug)]
pub struct Client {
    channel: Channel,
    endpoint: PathBuf,
}

macro_rules! methods {
    ($($name:ident = $service:literal $rpc:literal $idempotent:literal;)+) => {
        $(const $name: Method = Method { path: concat!("/runtime.v1.", $service, "/", $rpc), idempotent: $idempotent };)+
    };
}

// The last column: doing it twice is doing it once. CRI says so of stop and remove, and of pulling; the reads are by nature.
methods! {
    VERSION = "RuntimeService" "Version" true;
    STATUS = "RuntimeService" "Status" true;
    RUN_POD_SANDBOX = "RuntimeService" "RunPodSandbox" false;
    STOP_POD_SANDBOX = "RuntimeService" "StopPodSandbox" true;
    REMOVE_POD_SANDBOX = "RuntimeService" "RemovePodSandbox" true;
    POD_SANDBOX_STATUS = "RuntimeService" "PodSandboxStatus" true;
    LIST_POD_SANDBOX = "RuntimeService" "ListPodSandbox" true;
    CREATE_CONTAINER = "RuntimeService" "CreateContainer" false;
    START_CONTAINER = "RuntimeService" "StartContainer" false;
    STOP_CONTAINER = "RuntimeService" "StopContainer" true;
    REMOVE_CONTAINER = "RuntimeService" "RemoveContainer" true;
    LIST_CONTAINERS = "RuntimeService" "ListContainers" true;
    CONTAINER_STATUS = "RuntimeService" "ContainerStatus" true;
    REOPEN_CONTAINER_LOG = "RuntimeService" "ReopenContainerLog" true;
    EXEC_SYNC = "RuntimeService" "ExecSync" false;
    CONTAINER_STATS = "RuntimeService" "ContainerStats" true;
    GET_CONTAINER_EVENTS = "RuntimeService" "GetContainerEvents" true;
    LIST_IMAGES = "ImageService" "ListImages" true;
    IMAGE_STATUS = "ImageService" "ImageStatus" true;
    PULL_IMAGE = "ImageService" "PullImage" true;
    REMOVE_IMAGE = "ImageService" "RemoveImage" true;
    IMAGE_FS_INFO = "ImageService" "ImageFsInfo" true;
}

/// The answer, or the error every call here can end with.
pub type Answer<T> = Result<T, Error>;

impl Client {
    /// A client of the socket at `endpoint`; connects when first used.
    pub fn new(endpoint: PathBuf) -> Self {
        Self { channel: Channel::new(endpoint.clone()), endpoint }
    }

    /// The socket.
    pub fn endpoint(&self) -> &std::path::Path {
        &self.endpoint
    }

    /// The runtime's name and versions.
    #[allow(clippy::missing_errors_doc)] // As for all calls here: any [`Error`].
    pub fn version(&self, deadline: Deadline) -> Answer<VersionResponse> {
        self.call(VERSION, &VersionRequest { version: "v1".into() }, deadline)
    }

    /// Conditions, handlers, and with `verbose` the runtime's configuration.
    pub fn status(&self, verbose: bool, deadline: Deadline) -> Answer<StatusResponse> {
        self.call(STATUS, &StatusRequest { verbose }, deadline)
    }

    /// Makes and starts a sandbox; returns its id.
    pub fn run_pod_sandbox(&self, config: &PodSandboxConfig, handler: &str, deadline: Deadline) -> Answer<String> {
        assert!(!handler.is_empty(), "an empty handler may mean no isolation at all");
        let request = RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: handler.to_owned() };
        let answer: RunPodSandboxResponse = self.call(RUN_POD_SANDBOX, &request, deadline)?;
        Ok(answer.pod_sandbox_id)
    }

    /// Stops a sandbox and its containers, at once; done already is fine.
    pub fn stop_pod_sandbox(&self, id: &str, deadline: Deadline) -> Answer<()> {
        let request = StopPodSandboxRequest { pod_sandbox_id: id.to_owned() };
        self.call::<_, StopPodSandboxResponse>(STOP_POD_SANDBOX, &request, deadline).map(drop)
    }

    /// Removes a sandbox and its containers; done already is fine.
    pub fn remove_pod_sandbox(&self, id: &str, deadline: Deadline) -> Answer<()> {
        let request = RemovePodSandboxRequest { pod_sandbox_id: id.to_owned() };
        self.call::<_, RemovePodSandboxResponse>(REMOVE_POD_SANDBOX, &request, deadline).map(drop)
    }

    /// The state of a sandbox; an answer without one is an error.
    pub fn pod_sandbox_status(&self, id: &str, deadline: Deadline) -> Answer<PodSandboxStatus> {
        let request = PodSandboxStatusRequest { pod_sandbox_id: id.to_owned(), verbose: false };
        let answer: PodSandboxStatusResponse = self.call(POD_SANDBOX_STATUS, &request, deadline)?;
        present(POD_SANDBOX_STATUS, answer.status)
    }

    /// The sandboxes that fit the filter.
    pub fn list_pod_sandbox(&self, filter: PodSandboxFilter, deadline: Deadline) -> Answer<Vec<PodSandbox>> {
        let answer: ListPodSandboxResponse = self.call(LIST_POD_SANDBOX, &ListPodSandboxRequest { filter: Some(filter) }, deadline)?;
        Ok(answer.items)
    }

    /// Makes a container in a sandbox; returns its id.
    pub fn create_container(
        &self,
        sandbox_id: &str,
        config: ContainerConfig,
        sandbox_config: &PodSandboxConfig,
        deadline: Deadline,
    ) -> Answer<String> {
        let request = CreateContainerRequest {
            pod_sandbox_id: sandbox_id.to_owned(),
            config: Some(config),
            sandbox_config: Some(sandbox_config.clone()),
        };
        let answer: CreateContainerResponse = self.call(CREATE_CONTAINER, &request, deadline)?;
        Ok(answer.container_id)
    }

    /// Starts a created container.
    pub fn start_container(&self, id: &str, deadline: Deadline) -> Answer<()> {
        let request = StartContainerRequest { container_id: id.to_owned() };
        self.call::<_, StartContainerResponse>(START_CONTAINER, &request, deadline).map(drop)
    }

    /// Stops a container: politely, and after `grace_s` seconds by force. The answer comes when it ended.
    pub fn stop_container(&self, id: &str, grace_s: i64, deadline: Deadline) -> Answer<()> {
        let request = StopContainerRequest { container_id: id.to_owned(), timeout: grace_s };
        self.call::<_, StopContainerResponse>(STOP_CONTAINER, &request, deadline).map(drop)
    }

    /// Removes a container, by force if need be; done already is fine.
    pub fn remove_container(&self, id: &str, deadline: Deadline) -> Answer<()> {
        let request = RemoveContainerRequest { container_id: id.to_owned() };
        self.call::<_, RemoveContainerResponse>(REMOVE_CONTAINER, &request, deadline).map(drop)
    }

    /// The containers that fit the filter.
    pub fn list_containers(&self, filter: ContainerFilter, deadline: Deadline) -> Answer<Vec<super::proto::Container>> {
        let answer: ListContainersResponse = self.call(LIST_CONTAINERS, &ListContainersRequest { filter: Some(filter) }, deadline)?;
        Ok(answer.containers)
    }

    /// The state of a container; an answer without one is an error.
    pub fn container_status(&self, id: &str, deadline: Deadline) -> Answer<ContainerStatus> {
        let request = ContainerStatusRequest { container_id: id.to_owned(), verbose: false };
        let answer: ContainerStatusResponse = self.call(CONTAINER_STATUS, &request, deadline)?;
        present(CONTAINER_STATUS, answer.status)
    }

    /// Makes the runtime write to a new log file after the old one was renamed.
    pub fn reopen_container_log(&self, id: &str, deadline: Deadline) -> Answer<()> {
        let request = ReopenContainerLogRequest { container_id: id.to_owned() };
        self.call::<_, ReopenContainerLogResponse>(REOPEN_CONTAINER_LOG, &request, deadline).map(drop)
    }

    /// Runs a command in a container and waits for it; the runtime kills it after `timeout_s` seconds, at least one.
    pub fn exec_sync(&self, id: &str, command: &[String], timeout_s: i64, deadline: Deadline) -> Answer<ExecSyncResponse> {
        let request = ExecSyncRequest { container_id: id.to_owned(), cmd: command.to_vec(), timeout: timeout_s.max(1) };
        self.call(EXEC_SYNC, &request, deadline)
    }

    /// CPU and memory of a container.
    pub fn container_stats(&self, id: &str, deadline: Deadline) -> Answer<ContainerStats> {
        let request = ContainerStatsRequest { container_id: id.to_owned() };
        let answer: ContainerStatsResponse = self.call(CONTAINER_STATS, &request, deadline)?;
        present(CONTAINER_STATS, answer.stats)
    }

    /// Every change of every container, as it happens; `Unimplemented` before containerd 1.7.
    pub fn container_events(&self, deadline: Deadline) -> Answer<Events> {
        self.channel.stream(GET_CONTAINER_EVENTS, &GetEventsRequest {}.encode_to_vec(), deadline).map(Events)
    }

    /// All images.
    pub fn list_images(&self, deadline: Deadline) -> Answer<Vec<Image>> {
        let answer: ListImagesResponse = self.call(LIST_IMAGES, &ListImagesRequest { filter: None }, deadline)?;
        Ok(answer.images)
    }

    /// An image; `None` when the runtime has none of that name.
    pub fn image_status(&self, image: &ImageSpec, deadline: Deadline) -> Answer<Option<Image>> {
        let request = ImageStatusRequest { image: Some(image.clone()), verbose: false };
        let answer: ImageStatusResponse = self.call(IMAGE_STATUS, &request, deadline)?;
        Ok(answer.image)
    }

    /// Pulls an image as long as somebody wants it, which is asked again and again; returns the runtime's reference to it. `None` when
    /// nobody wanted it any more, and the runtime was told to stop.
    pub fn pull_image(
        &self,
        image: &ImageSpec,
        auth: Option<AuthConfig>,
        sandbox_config: &PodSandboxConfig,
        deadline: Deadline,
        is_wanted: &dyn Fn() -> bool,
    ) -> Answer<Option<String>> {
        let request = PullImageRequest { image: Some(image.clone()), auth, sandbox_config: Some(sandbox_config.clone()) };
        // As a stream of one message, whose reader may stop: that closes its connection, and the runtime gives up the pull.
        let mut answers = self.channel.stream(PULL_IMAGE, &request.encode_to_vec(), deadline)?;
        let mut answer: Option<Vec<u8>> = None;
        loop {
            match answers.next(deadline.at_most_ms(limits::PULL_LOOK_MS, PULL_IMAGE.name())) {
                Ok(Some(_)) if answer.is_some() => return Err(protocol(PULL_IMAGE, "two messages answer a unary call")),
                Ok(Some(message)) => answer = Some(message),
                Ok(None) => break,
                Err(error) if matches!(error.kind, ErrorKind::Expired(_)) && deadline.left().is_ok() => {
                    if !is_wanted() {
                        return Ok(None);
                    }
                }
                Err(error) => return Err(error),
            }
        }
        let bytes = answer.ok_or(protocol(PULL_IMAGE, "status OK without a message"))?;
        let answer = PullImageResponse::decode(bytes.as_slice()).map_err(|_| not_the_message(PULL_IMAGE.name()))?;
        Ok(Some(answer.image_ref))
    }

    /// What images take, by the file system they are on.
    pub fn image_fs_info(&self, deadline: Deadline) -> Answer<Vec<FilesystemUsage>> {
        let answer: ImageFsInfoResponse = self.call(IMAGE_FS_INFO, &ImageFsInfoRequest {}, deadline)?;
        Ok(answer.image_filesystems)
    }

    /// Removes an image; done already is fine.
    pub fn remove_image(&self, image: &ImageSpec, deadline: Deadline) -> Answer<()> {
        let request = RemoveImageRequest { image: Some(image.clone()) };
        self.call::<_, RemoveImageResponse>(REMOVE_IMAGE, &request, deadline).map(drop)
    }

    fn call<Q: Message, A: Message + Default>(&self, method: Method, request: &Q, deadline: Deadline) -> Answer<A> {
        let bytes = self.channel.unary(method, &request.encode_to_vec(), deadline.phase(method.name()))?;
        A::decode(bytes.as_slice()).map_err(|_| not_the_message(method.name()))
    }
}

/// The stream of container events.
pub struct Events(Messages);

impl Events {
    /// Waits for the next event; `None` when the runtime ended the stream.
    ///
    /// # Errors
    /// As for [`Messages::next`]: after a timeout it may be asked again.
    pub fn next(&mut self, deadline: Deadline) -> Answer<Option<ContainerEventResponse>> {
        let Some(bytes) = self.0.next(deadline)? else { return Ok(None) };
        ContainerEventResponse::decode(bytes.as_slice()).map(Some).map_err(|_| not_the_message(GET_CONTAINER_EVENTS.name()))
    }

    /// A handle that ends the stream from another thread.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub fn stopper(&self) -> Result<Stream, crate::net::Error> {
        self.0.stopper()
    }
}

fn present<T>(method: Method, part: Option<T>) -> Answer<T> {
    part.ok_or(Error { method: method.name(), kind: ErrorKind::Protocol("the answer lacks its status") })
}

fn protocol(method: Method, rule: &'static str) -> Error {
    Error { method: method.name(), kind: ErrorKind::Protocol(rule) }
}

fn not_the_message(method: &'static str) -> Error {
    Error { method, kind: ErrorKind::Protocol("the answer is not the message it should be") }
}
