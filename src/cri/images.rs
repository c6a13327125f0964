//! Images at the runtime: is one there, which is it exactly, and what its pull failed of.
//!
//! *Scope*: one image, one call after the other. *Not here*: who waits for whom, credentials files, what is collected when.
//!
//! CRI has no error codes of its own for pulls. What containerd and CRI-O really answer, by gRPC code and in words:
//!
//! | what happened | containerd 1.6 to 2.x | so it is |
//! |---|---|---|
//! | no such tag, repository or digest | `NotFound` | said by the code |
//! | 401, 403 of the registry | `Unknown`, "401 Unauthorized", "authorization failed", "pull access denied" | told by words |
//! | 429, 5xx of the registry | `Unknown`, "429 Too Many Requests", "503 Service Unavailable" | told by words |
//! | refused, reset, no such host, TLS | `Unknown`, "failed to do request: .. dial tcp .. connection refused" | told by words |
//! | disk full | `Unknown`, "no space left on device" | told by words |
//!
//! Where a code says it, no word is looked at. Words only choose between reasons that all mean "not pulled", and whether trying
//! again may help; words nobody knows are a failed pull that is final.

use std::collections::BTreeMap;

use super::client::Client;
use super::proto;
use super::runtime::{LABEL_NODE, NAMESPACE};
use crate::deadline::Deadline;
use crate::grpc::{self, Code, ErrorKind};
use crate::limits;
use crate::report::{Chain, clip};
use crate::workload::{ImageRef, Name, Reason, WorkloadId};

/// An image that is at the runtime.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// The runtime's name for it: for containerd and CRI-O the digest of its configuration. A tag may move, this cannot.
    pub id: String,
    /// The digest of its manifest in the repository it was asked for under, as the registry knows it; none for an image that came
    /// from no registry, or from another repository.
    pub digest: Option<String>,
}

impl Image {
    fn of(reference: &ImageRef, image: proto::Image) -> Self {
        Self { digest: digest(reference, &image.repo_digests), id: image.id }
    }

    /// What a container is made from: exactly this image, whatever its name means by then.
    pub(super) fn of_container(&self, name: &str, handler: &str) -> proto::ImageSpec {
        proto::ImageSpec {
            image: self.id.clone(),
            annotations: BTreeMap::new(),
            user_specified_image: name.to_owned(),
            runtime_handler: handler.to_owned(),
        }
    }
}

/// The manifest digest of an image, of all the names a runtime has for it by digest. That of another repository is not taken: the
/// same content may have another manifest there.
pub fn digest(reference: &ImageRef, repo_digests: &[String]) -> Option<String> {
    let of_repository =
        |named: &String| named.split_once('@').filter(|(name, _)| *name == reference.repository()).map(|(_, d)| d.to_owned());
    reference.digest().map(str::to_owned).or_else(|| repo_digests.iter().find_map(of_repository))
}

/// An image as a runtime showed it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// The image.
    pub image: Image,
    /// All names the runtime has for it, tags and digests.
    pub names: Vec<String>,
}

fn spec(reference: &ImageRef, handler: &str) -> proto::ImageSpec {
    proto::ImageSpec { image: reference.as_str().to_owned(), runtime_handler: handler.to_owned(), ..Default::default() }
}

/// Looks for an image; `None` when it is not there.
///
/// # Errors
/// Those of the call; an id that is too long to be remembered.
pub fn look(client: &Client, reference: &ImageRef, handler: &str, deadline: Deadline) -> Result<Option<Found>, grpc::Error> {
    let Some(image) = client.image_status(&spec(reference, handler), deadline)?.filter(|image| !image.id.is_empty()) else {
        return Ok(None);
    };
    if image.id.len() > limits::IMAGE_BYTES_MAX {
        return Err(grpc::Error { method: "ImageStatus", kind: ErrorKind::Protocol("the id of an image is too long") });
    }
    let names = image.repo_tags.iter().chain(&image.repo_digests).cloned().collect();
    Ok(Some(Found { image: Image::of(reference, image), names }))
}

/// For whom a runtime is asked to pull. Some want to know the sandbox; several may wait for one pull, and this is the first of them.
#[derive(Clone, Debug)]
pub struct Errand {
    /// What.
    pub image: ImageRef,
    /// For which handler.
    pub handler: String,
    /// The class's own annotations.
    pub annotations: BTreeMap<String, String>,
    /// The first that asked.
    pub workload: WorkloadId,
    /// Its acceptance.
    pub uid: String,
    /// This node.
    pub node: Name,
}

impl Errand {
    fn sandbox_config(&self) -> proto::PodSandboxConfig {
        let metadata = proto::PodSandboxMetadata {
            name: self.workload.to_string(),
            uid: self.uid.clone(),
            namespace: NAMESPACE.to_owned(),
            attempt: 0,
        };
        proto::PodSandboxConfig {
            metadata: Some(metadata),
            labels: BTreeMap::from([(LABEL_NODE.to_owned(), self.node.to_string())]),
            annotations: self.annotations.clone(),
            ..Default::default()
        }
    }
}

/// Takes out of a text what nobody may read there.
pub type Scrub<'a> = &'a dyn Fn(String) -> String;

/// Pulls an image as long as somebody wants it; `None` when nobody did any more.
///
/// # Errors
/// [`Trouble`], in words that were scrubbed whole: what is clipped first would keep the beginning of a secret.
pub fn pull(
    client: &Client,
    errand: &Errand,
    auth: Option<proto::AuthConfig>,
    scrub: Scrub<'_>,
    is_wanted: &dyn Fn() -> bool,
) -> Result<Option<Found>, Trouble> {
    let Errand { image, handler, .. } = errand;
    // Each who waits has a start deadline of its own, none beyond this.
    let deadline = Deadline::within_ms(limits::START_DEADLINE_MS_MAX, "PullImage");
    let pulled = client.pull_image(&spec(image, handler), auth, &errand.sandbox_config(), deadline, is_wanted);
    if pulled.map_err(|error| Trouble::new(&error, scrub))?.is_none() {
        return Ok(None);
    }
    look_after(client, errand, scrub).map(Some)
}

/// Looks for an image that was pulled.
///
/// # Errors
/// [`Trouble`]; whatever it is of, the pull is over.
pub fn look_after(client: &Client, errand: &Errand, scrub: Scrub<'_>) -> Result<Found, Trouble> {
    let quick = Deadline::within_ms(limits::CRI_QUICK_MS_MAX, "ImageStatus");
    match look(client, &errand.image, &errand.handler, quick) {
        Ok(Some(found)) => Ok(found),
        Ok(None) => {
            let message = "the runtime pulled the image, and does not have it".to_owned();
            Err(Trouble { kind: Kind::Runtime, remains: Remains::Perhaps, message })
        }
        Err(error) => Err(Trouble { remains: Remains::Perhaps, ..Trouble::new(&error, scrub) }),
    }
}

/// A pull that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// Of what kind.
    pub kind: Kind,
    /// What the runtime may have of it.
    pub remains: Remains,
    /// In words for the status.
    pub message: String,
}

/// What a pull leaves at the runtime beside what it is known to have brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Remains {
    /// Nothing.
    Nothing,
    /// The image may be there by now.
    Perhaps,
    /// The runtime may still be at it.
    Yet,
}

/// What a pull can fail of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// There is no room for the image.
    Disk,
    /// The registry answers no more for now.
    Limit,
    /// The registry is not reached.
    Network,
    /// The registry has no such image.
    NotFound,
    /// Something else, and nothing says that it would pass.
    Other,
    /// The registry failed.
    Registry,
    /// The runtime does not answer.
    Runtime,
    /// The registry does not give it to us.
    Unauthorized,
}

impl Kind {
    /// As statuses spell it.
    pub fn reason(self) -> Reason {
        match self {
            Self::NotFound => Reason::ImageNotFound,
            Self::Unauthorized => Reason::ImageUnauthorized,
            Self::Runtime => Reason::RuntimeUnavailable,
            Self::Disk | Self::Limit | Self::Network | Self::Other | Self::Registry => Reason::ImagePullFailed,
        }
    }

    /// Whether the same may work a little later.
    pub fn is_passing(self) -> bool {
        match self {
            Self::Disk | Self::Limit | Self::Network | Self::Registry | Self::Runtime => true,
            Self::NotFound | Self::Other | Self::Unauthorized => false,
        }
    }

    fn words(self) -> &'static str {
        match self {
            Self::Disk => "disk: no space left for the image: ",
            Self::Limit => "limit: the registry wants fewer requests: ",
            Self::Network => "network: the registry is not reached: ",
            Self::NotFound => "the registry has no such image: ",
            Self::Registry => "registry: it failed: ",
            Self::Unauthorized => "the registry does not let us: no credentials, or not the right ones: ",
            Self::Other | Self::Runtime => "",
        }
    }
}

impl Trouble {
    fn new(error: &grpc::Error, scrub: Scrub<'_>) -> Self {
        let kind = match &error.kind {
            ErrorKind::Broken(_) | ErrorKind::Connect(_) | ErrorKind::Expired(_) => Kind::Runtime,
            ErrorKind::Protocol(_) | ErrorKind::TooLarge { .. } => Kind::Other,
            ErrorKind::Status(status) => match status.code {
                Code::NotFound => Kind::NotFound,
                Code::Unauthenticated | Code::PermissionDenied => Kind::Unauthorized,
                Code::Aborted | Code::Cancelled | Code::DeadlineExceeded | Code::Unavailable => {
                    told(&status.message).unwrap_or(Kind::Runtime)
                }
                Code::Ok
                | Code::AlreadyExists
                | Code::DataLoss
                | Code::FailedPrecondition
                | Code::Internal
                | Code::InvalidArgument
                | Code::OutOfRange
                | Code::ResourceExhausted
                | Code::Unimplemented
                | Code::Unknown => told(&status.message).unwrap_or(Kind::Other),
            },
        };
        let remains = match &error.kind {
            // It was never asked.
            ErrorKind::Connect(_) => Remains::Nothing,
            ErrorKind::Broken(_) | ErrorKind::Expired(_) | ErrorKind::Protocol(_) | ErrorKind::TooLarge { .. } => Remains::Yet,
            ErrorKind::Status(status)
                if matches!(status.code, Code::Aborted | Code::Cancelled | Code::DeadlineExceeded | Code::Unavailable) =>
            {
                Remains::Yet
            }
            // Some of a runtime's steps come after the last of those that store.
            ErrorKind::Status(_) => Remains::Perhaps,
        };
        let message = clip(format!("{}{}", kind.words(), scrub(Chain(error).to_string())), limits::MESSAGE_BYTES_MAX);
        Self { kind, remains, message }
    }
}

/// What the words of a runtime tell. The message quotes the image's name, which a user chose; it is lower case, without blanks, so
/// every word here has a blank, a capital or a colon that a reference cannot have.
fn told(message: &str) -> Option<Kind> {
    let says = |words: &[&str]| words.iter().any(|word| message.contains(word));
    let unauthorized = [
        "401 Unauthorized",
        "403 Forbidden",
        "authorization failed",
        "access denied",
        "access to the resource is denied",
        "unauthorized: ",
        "no basic auth credentials",
        "authentication required",
    ];
    let registry = ["500 Internal Server Error", "502 Bad Gateway", "503 Service Unavailable", "504 Gateway Timeout", "unexpected EOF"];
    let network = [
        "dial tcp",
        "read tcp",
        "write tcp",
        "connection refused",
        "connection reset by peer",
        "no such host",
        "i/o timeout",
        "TLS handshake timeout",
        "network is unreachable",
        "no route to host",
        "tls: ",
        "x509: ",
        "server gave HTTP response to HTTPS client",
        "failed to do request",
        "Client.Timeout exceeded",
    ];
    if says(&["no space left on device", "disk quota exceeded"]) {
        Some(Kind::Disk)
    } else if says(&["429 Too Many Requests", "toomanyrequests: "]) {
        Some(Kind::Limit)
    } else if says(&unauthorized) {
        Some(Kind::Unauthorized)
    } else if says(&["manifest unknown", "name unknown", "404 Not Found", ": not found"]) {
        Some(Kind::NotFound)
    } else if says(&registry) {
        Some(Kind::Registry)
    } else if says(&network) {
        Some(Kind::Network)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grpc::Status;

    fn reference(text: &str) -> ImageRef {
        ImageRef::new(text).expect("valid")
    }

    #[test]
    fn a_digest_is_the_manifests_in_the_repository_that_was_asked() {
        let (a, b) = (format!("sha256:{}", "a".repeat(64)), format!("sha256:{}", "b".repeat(64)));
        let known = [format!("mirror.test/busybox@{b}"), format!("docker.io/library/busybox@{a}")];
        assert_eq!(digest(&reference("busybox"), &known), Some(a.clone()));
        assert_eq!(digest(&reference("mirror.test/busybox:1"), &known), Some(b.clone()));
        assert_eq!(digest(&reference("localhost/busybox:1"), &known), None);
        assert_eq!(digest(&reference("localhost:5000/busybox:1"), &[format!("localhost:5000/busybox@{b}")]), Some(b.clone()));
        assert_eq!(digest(&reference(&format!("x.test/y:1@{b}")), &known), Some(b));
    }

    #[test]
    fn a_pull_fails_of_what_the_runtime_says() {
        let check = |code, words: &str, kind| {
            let message = format!("failed to pull and unpack image \"r.test/a:1\": failed to resolve reference \"r.test/a:1\": {words}");
            let error = grpc::Error { method: "PullImage", kind: ErrorKind::Status(Status { code, message }) };
            let trouble = Trouble::new(&error, &|text| text);
            assert_eq!(trouble.kind, kind, "{code:?} {words}");
            assert!(trouble.message.contains(words), "{trouble:?}");
        };
        let status = |answer: &str| format!("pulling from host r.test failed with status code [manifests 1]: {answer}");
        let request = |why: &str| format!("failed to do request: Head \"https://r.test/v2/a/manifests/1\": {why}");
        // As a containerd 1.6.20 was seen to answer, but for x509.
        check(Code::NotFound, "r.test/a:1: not found", Kind::NotFound);
        check(Code::Unknown, &status("401 Unauthorized"), Kind::Unauthorized);
        check(Code::Unknown, &status("403 Forbidden"), Kind::Unauthorized);
        check(Code::Unknown, &status("429 Too Many Requests"), Kind::Limit);
        check(Code::Unknown, &status("500 Internal Server Error"), Kind::Registry);
        check(Code::Unknown, &status("503 Service Unavailable"), Kind::Registry);
        check(Code::Unknown, &request("dial tcp 192.0.2.1:443: connect: connection refused"), Kind::Network);
        check(Code::Unknown, &request("dial tcp: lookup r.test on 192.0.2.53:53: no such host"), Kind::Network);
        check(Code::Unknown, &request("read tcp 192.0.2.1:4->192.0.2.2:5: read: connection reset by peer"), Kind::Network);
        check(Code::Unknown, &request("x509: certificate signed by unknown authority"), Kind::Network);
        check(Code::Unknown, "failed to copy: write /x/data: no space left on device", Kind::Disk);
        let unpacking = "failed to extract layer sha256:0: mount callback failed on /x: write /x/bin/y: no space left on device: unknown";
        check(Code::Unknown, unpacking, Kind::Disk);
        check(Code::InvalidArgument, "unable to fetch descriptor which reports content size of zero: invalid argument", Kind::Other);
        check(Code::Unknown, "boom", Kind::Other);
        check(Code::Unavailable, "boom", Kind::Runtime);
        check(Code::PermissionDenied, "boom", Kind::Unauthorized);
    }

    #[test]
    fn a_message_is_scrubbed_before_it_is_clipped() {
        let secret = "open-sesame";
        for before in limits::MESSAGE_BYTES_MAX - 80..limits::MESSAGE_BYTES_MAX + 20 {
            let message = format!("{}{secret} it was", ".".repeat(before));
            let error = grpc::Error { method: "PullImage", kind: ErrorKind::Status(Status { code: Code::Unknown, message }) };
            let trouble = Trouble::new(&error, &|text| text.replace(secret, "***"));
            assert!(trouble.message.len() <= limits::MESSAGE_BYTES_MAX && !trouble.message.contains("open"), "{before}: {trouble:?}");
        }
    }

    #[test]
    fn an_image_cannot_be_named_so_that_its_trouble_looks_like_another() {
        let message = "failed to pull \"r.test/429/503/401-unauthorized/no-such-host/dial-tcp/not-found/tls_x509:not-found\": boom";
        assert_eq!(told(message), None);
    }

    #[test]
    fn what_is_not_a_status_is_the_runtimes_trouble_or_its_bug() {
        let of = |kind| Trouble::new(&grpc::Error { method: "PullImage", kind }, &|text| text);
        assert_eq!((of(ErrorKind::Broken(None)).kind, of(ErrorKind::Broken(None)).remains), (Kind::Runtime, Remains::Yet));
        assert_eq!((of(ErrorKind::Protocol("x")).kind, of(ErrorKind::Protocol("x")).remains), (Kind::Other, Remains::Yet));
        let answer = |code| of(ErrorKind::Status(Status { code, message: "boom".into() })).remains;
        assert_eq!(
            (answer(Code::Unavailable), answer(Code::Unknown), answer(Code::NotFound)),
            (Remains::Yet, Remains::Perhaps, Remains::Perhaps)
        );
        assert!(Kind::Runtime.is_passing() && !Kind::Other.is_passing());
    }
}
