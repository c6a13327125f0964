//! The HTTP API: the route table, problems, and the only mapping of errors to statuses.
//!
//! *Not here*: what the routes do ([`workloads`], [`output`], [`nodes`]).
//!
//! Invariant: everything that is not a success is `application/problem+json` with a stable `code`.
//! Invariant: a parameter of the query that a route does not know is refused, so that no filter is lost to a typing error.

mod caller;
mod events;
mod holds;
mod nodes;
mod output;
mod selector;
mod workloads;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::Value;

use super::{Plane, node_client, profiles, scheduler, store};
use crate::http::{Client, Handler, Method, Reject, Request, Response, Status};
use crate::limits;
use crate::metrics;
use crate::report::{Chain, random_id};
use crate::wire::agent::{ErrorCode, ErrorReply, ProblemBody};
use crate::wire::api::{ProblemDetails, to_json};
use crate::wire::{Problems, json};
use crate::workload::{Name, Unfit};
use caller::Caller;
use holds::Holds;

/// A route, with what its path names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Route<'a> {
    Create,
    Delete(&'a str),
    Events,
    Exec(&'a str),
    Get(&'a str),
    /// Of a later version.
    Later,
    List,
    Livez,
    Logs(&'a str),
    Metrics,
    Node(&'a str),
    Nodes,
    OpenApi,
    Patch(&'a str),
    Readyz,
    Stop(&'a str),
    Version,
}

/// The table.
fn route<'a>(method: Method, path: &[&'a str]) -> Option<Route<'a>> {
    use Method::{Delete, Get, Patch, Post, Put};
    Some(match (method, path) {
        (Get, ["workloads"]) => Route::List,
        (Post, ["workloads"]) => Route::Create,
        (Get, ["workloads", id]) => Route::Get(id),
        (Delete, ["workloads", id]) => Route::Delete(id),
        (Patch, ["workloads", id]) => Route::Patch(id),
        (Post, ["workloads", id, "stop"]) => Route::Stop(id),
        (Get, ["workloads", id, "logs"]) => Route::Logs(id),
        (Post, ["workloads", id, "exec"]) => Route::Exec(id),
        (Get, ["nodes"]) => Route::Nodes,
        (Get, ["nodes", id]) => Route::Node(id),
        (Post, ["nodes", _, "cordon" | "uncordon" | "drain"]) => Route::Later,
        (Get | Put | Delete, ["security-profiles", _]) => Route::Later,
        (Get, ["events"]) => Route::Events,
        (Get | Post, ["api", "runtime-cloud", ..]) => Route::Later,
        (Get, ["livez" | "healthz"]) => Route::Livez,
        (Get, ["readyz"]) => Route::Readyz,
        (Get, ["metrics"]) => Route::Metrics,
        (Get, ["version"]) => Route::Version,
        (Get, ["openapi.json"]) => Route::OpenApi,
        _ => return None,
    })
}

/// The parameters a route knows.
fn parameters(route: Route<'_>) -> &'static [&'static str] {
    match route {
        Route::Create => &["wait_ms"],
        Route::Events => &["id", "label", "node", "replay", "since"],
        Route::Get(_) => &["for", "wait_ms"],
        Route::List => &["class", "continue", "label", "limit", "node", "state"],
        Route::Livez | Route::Readyz => &["verbose"],
        Route::Logs(_) => &["follow", "since", "stream", "tail", "timestamps"],
        Route::Delete(_) => &["force"],
        Route::Exec(_) | Route::Patch(_) | Route::Stop(_) => &[],
        Route::Later | Route::Metrics | Route::Node(_) | Route::Nodes | Route::OpenApi | Route::Version => &[],
    }
}

/// The methods a path has.
fn allowed(path: &[&str]) -> Vec<&'static str> {
    let mut methods: Vec<&str> = [Method::Delete, Method::Get, Method::Patch, Method::Post, Method::Put]
        .into_iter()
        .filter(|m| route(*m, path).is_some())
        .map(Method::as_str)
        .collect();
    if methods.contains(&"GET") {
        methods.push("HEAD");
    }
    methods
}

/// The API of one control plane.
pub(super) struct Api {
    plane: Arc<Plane>,
    insecure_listen: bool,
    holds: Arc<Holds>,
    /// Begins every request id made here, so that two starts make different ones.
    prefix: String,
    requests: AtomicU64,
}

/// A request and who sent it.
struct Call<'a> {
    request: &'a Request,
    caller: Caller,
    client: &'a mut dyn Client,
}

type Answer = Result<Response, Refusal>;

impl Handler for Api {
    fn handle(&self, request: &Request, client: &mut dyn Client) -> Response {
        let id = request.header("x-request-id").filter(|id| is_request_id(id)).map_or_else(|| self.next_id(), str::to_owned);
        let answer = caller::identify(request).and_then(|caller| self.answer(&mut Call { request, caller, client }));
        self.finish(answer.unwrap_or_else(|refusal| refusal.response(&id)), id)
    }

    fn reject(&self, reject: &Reject) -> Response {
        let id = self.next_id();
        self.finish(Refusal::from(*reject).response(&id), id)
    }
}

impl Api {
    pub(super) fn new(plane: Arc<Plane>, insecure_listen: bool) -> Self {
        Self { plane, insecure_listen, holds: Arc::default(), prefix: random_id(), requests: AtomicU64::new(0) }
    }

    fn answer(&self, call: &mut Call<'_>) -> Answer {
        let request = call.request;
        let path = request.path();
        let path = match path.as_slice() {
            ["v1", rest @ ..] => rest,
            path => path,
        };
        // HEAD is a GET whose body the server leaves out.
        let method = if request.method == Method::Head { Method::Get } else { request.method };
        let Some(route) = route(method, path) else { return no_route(method, path) };
        if let Some((name, _)) = request.query.iter().find(|(name, _)| !parameters(route).contains(&name.as_str()) && route != Route::Later)
        {
            let known = parameters(route).join(", ");
            let known = if known.is_empty() { "none" } else { &known };
            return Err(Refusal::bad_query(format!("unknown query parameter {name:?}; known here: {known}")));
        }
        match route {
            Route::Create => self.create(call),
            Route::Delete(id) => self.delete(call, id),
            Route::Events => self.events(call),
            Route::Exec(id) => self.exec(call, id),
            Route::Get(id) => self.get(call, id),
            Route::Later => {
                Err(Refusal::new(Status::NotImplemented, "not_implemented", format!("/{} is not in this version", path.join("/"))))
            }
            Route::List => self.list(call),
            Route::Livez => Ok(Response::text(Status::Ok, "ok\n")),
            Route::Logs(id) => self.logs(call, id),
            Route::Metrics => Ok(self.metrics()),
            Route::Node(id) => self.node(id),
            Route::Nodes => Ok(self.nodes()),
            Route::OpenApi => Ok(Response::json(Status::Ok, include_bytes!("openapi.json").to_vec())),
            Route::Patch(id) => self.patch(call, id),
            Route::Readyz => self.readyz(call),
            Route::Stop(id) => self.stop(call, id),
            Route::Version => Ok(nodes::version()),
        }
    }

    fn finish(&self, response: Response, id: String) -> Response {
        metrics::count_http_response(response.status.code());
        response.with_header("X-Request-Id", id)
    }

    fn next_id(&self) -> String {
        format!("{}-{}", self.prefix, self.requests.fetch_add(1, Ordering::Relaxed))
    }
}

fn no_route(method: Method, path: &[&str]) -> Answer {
    let allowed = allowed(path).join(", ");
    match (method, allowed.as_str()) {
        (_, "") => Err(Refusal::new(Status::NotFound, "no_route", "there is nothing at this path; /openapi.json lists what there is")),
        (Method::Options, _) => Ok(Response::empty(Status::NoContent).with_header("Allow", allowed)),
        _ => {
            let detail = format!("this path has {allowed}");
            Err(Refusal { allow: Some(allowed), ..Refusal::new(Status::MethodNotAllowed, "method_not_allowed", detail) })
        }
    }
}

/// An id a client made: short and visible, so that it can stand in a log line.
fn is_request_id(id: &str) -> bool {
    (1..=limits::REQUEST_ID_BYTES_MAX).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic())
}

/// The JSON of a body.
fn body(request: &Request) -> Result<Value, Refusal> {
    body_of(request, "application/json", &[])
}

/// The JSON of a patch (RFC 7396). Plain JSON passes for one, as it does with Kubernetes' clients.
fn patch_body(request: &Request) -> Result<Value, Refusal> {
    body_of(request, "application/merge-patch+json", &["application/json"])
}

fn body_of(request: &Request, content_type: &str, others: &[&str]) -> Result<Value, Refusal> {
    if !request.has_body_framing {
        let detail = "send a JSON body, with Content-Length or chunked";
        return Err(Refusal::new(Status::LengthRequired, "body_required", detail));
    }
    let given = request.header("content-type").unwrap_or_default().split(';').next().unwrap_or_default().trim();
    let fits = |given: &str| given.eq_ignore_ascii_case(content_type) || others.iter().any(|other| given.eq_ignore_ascii_case(other));
    // Without a type it could be a page's, which may send that to anybody.
    if !fits(given) {
        let detail = format!("send JSON as Content-Type: {content_type} (curl: -H 'Content-Type: {content_type}')");
        return Err(Refusal::new(Status::UnsupportedMediaType, "not_json", detail));
    }
    json::parse(&request.body).map_err(|problems| Refusal::problems(Status::BadRequest, "bad_json", "the body is not good JSON", &problems))
}

/// A response that is a problem (RFC 9457).
#[derive(Debug)]
struct Refusal {
    status: Status,
    code: &'static str,
    detail: String,
    errors: Vec<ProblemBody>,
    allow: Option<String>,
}

impl Refusal {
    fn new(status: Status, code: &'static str, detail: impl Into<String>) -> Self {
        Self { status, code, detail: detail.into(), errors: Vec::new(), allow: None }
    }

    fn problems(status: Status, code: &'static str, detail: &str, problems: &Problems) -> Self {
        Self { errors: problems.into(), ..Self::new(status, code, detail) }
    }

    fn bad_query(detail: impl Into<String>) -> Self {
        Self::new(Status::BadRequest, "bad_query", detail)
    }

    fn not_found(what: &str) -> Self {
        Self::new(Status::NotFound, "not_found", format!("there is no such {what}"))
    }

    fn response(self, request_id: &str) -> Response {
        let Self { status, code, detail, errors, allow } = self;
        log::debug!("request {request_id}: {} {code}: {detail}", status.code());
        let details = ProblemDetails {
            r#type: "about:blank",
            title: status.reason(),
            status: status.code(),
            code,
            detail: &detail,
            errors,
            request_id: Some(request_id),
        };
        let response = Response::full(status, "application/problem+json", to_json(&details));
        // Only what certainly was not done is worth doing again: 503 says that, and `outcome_unknown` is 504.
        match (status, allow) {
            (_, Some(allow)) => response.with_header("Allow", allow),
            (Status::Unavailable | Status::TooManyRequests, None) => response.with_header("Retry-After", "1"),
            (_, None) => response,
        }
    }

    /// Nobody knows whether it was done, so nobody is told to do it again.
    fn outcome_unknown(why: impl fmt::Display) -> Self {
        Self::new(Status::GatewayTimeout, "outcome_unknown", format!("{why}; it may have been done"))
    }

    /// What an agent's error is to a client. The pointers of an agent begin at its request, those of a client at the workload.
    fn refused(node: &Name, reply: ErrorReply) -> Self {
        let (status, code) = match reply.code {
            ErrorCode::AlreadyExists => (Status::Conflict, "workload_exists"),
            ErrorCode::DeadlineExceeded => (Status::GatewayTimeout, "node_timeout"),
            ErrorCode::Internal => (Status::InternalServerError, "node_internal"),
            ErrorCode::InvalidArgument => (Status::UnprocessableContent, "node_rule"),
            ErrorCode::NotFound => (Status::NotFound, "unknown_to_node"),
            ErrorCode::PermissionDenied => (Status::Forbidden, "node_denied"),
            ErrorCode::ResourceExhausted => (Status::Unavailable, "node_full"),
            // It is our credentials that the agent does not take, not the client's.
            ErrorCode::Unauthenticated => (Status::Unavailable, "node_unauthenticated"),
            ErrorCode::Unavailable => (Status::Unavailable, "node_unavailable"),
        };
        let cut = |body: ProblemBody| match body.pointer.strip_prefix("/workload") {
            Some(rest) => ProblemBody { pointer: rest.to_owned(), ..body },
            None => body,
        };
        let errors = reply.errors.into_iter().map(cut).collect();
        Self { errors, ..Self::new(status, code, format!("{node}: {}", reply.message)) }
    }

    fn of_node(node: &Name, error: node_client::Error) -> Self {
        use node_client::Error;
        let (status, code) = match &error {
            Error::Refused(_) => (Status::Unavailable, "node_unavailable"),
            Error::Expired(_) => (Status::GatewayTimeout, "node_timeout"),
            Error::Garbled(_) | Error::TooLong | Error::Unexpected => (Status::InternalServerError, "node_garbled"),
            Error::Closed | Error::Connect(_) | Error::NoSuchNode | Error::Socket(_) | Error::Somebody(_) => {
                (Status::Unavailable, "node_unreachable")
            }
            Error::Stopping => (Status::Unavailable, "stopping"),
        };
        match error {
            Error::Refused(reply) => Self::refused(node, reply),
            error => Self::new(status, code, format!("{node}: {}", Chain(&error))),
        }
    }
}

impl From<Reject> for Refusal {
    fn from(reject: Reject) -> Self {
        let is_query = matches!(reject, Reject::QueryFlag { .. } | Reject::QueryNumber { .. } | Reject::QueryRepeated { .. });
        let code = match reject.status() {
            Status::ContentTooLarge => "body_too_large",
            Status::ExpectationFailed => "expectation_failed",
            Status::HeaderFieldsTooLarge => "header_too_large",
            Status::NotImplemented => "not_implemented",
            Status::RequestTimeout => "request_timeout",
            Status::Unavailable => "stopping",
            Status::UriTooLong => "uri_too_long",
            Status::VersionNotSupported => "version_not_supported",
            _ if is_query => "bad_query",
            _ => "bad_request",
        };
        Self::new(reject.status(), code, reject.to_string())
    }
}

impl From<Unfit> for Refusal {
    fn from(unfit: Unfit) -> Self {
        Self::bad_query(unfit.0)
    }
}

impl From<profiles::Denial> for Refusal {
    fn from(denial: profiles::Denial) -> Self {
        use profiles::Denial;
        let rule = |pointer: &str, detail: String| {
            Self::problems(Status::UnprocessableContent, "invalid_workload", "the workload breaks a rule", &Problems::one(pointer, detail))
        };
        match denial {
            Denial::ClassNotAllowed { profile, allowed } => {
                Self::new(Status::Forbidden, "policy_denied", format!("security profile {profile} allows only {allowed}"))
            }
            Denial::NothingNamed => rule("/runtime_class", CLASS_REQUIRED.into()),
            Denial::UnknownProfile(names) => rule("/security_profile", format!("must be one of {names}")),
        }
    }
}

const CLASS_REQUIRED: &str = "is required, or a security_profile that chooses it";

impl From<scheduler::Misfit> for Refusal {
    fn from(misfit: scheduler::Misfit) -> Self {
        use scheduler::Misfit;
        match misfit {
            Misfit::NoNode(reasons) if reasons.is_empty() => Self::new(Status::Unavailable, "no_node", "no node is configured"),
            Misfit::NoNode(reasons) => {
                let lines: Vec<String> = reasons.iter().map(|(node, why)| format!("{node}: {why}")).collect();
                Self::new(Status::Unavailable, "no_node", format!("no node can take it now: {}", lines.join(", ")))
            }
            Misfit::UnknownClass { offered } => {
                let detail = format!("no node offers this runtime class; on offer: {}", offered.join(", "));
                let problems = Problems::one("/runtime_class", format!("must be one of {}", offered.join(", ")));
                Self::problems(Status::UnprocessableContent, "unknown_class", &detail, &problems)
            }
        }
    }
}

impl From<store::Error> for Refusal {
    fn from(error: store::Error) -> Self {
        let detail = Chain(&error).to_string();
        let (status, code) = match &error {
            store::Error::Closed => (Status::Unavailable, "store_closed"),
            store::Error::Disk(cause) if cause.is_full() => (Status::InsufficientStorage, "disk_full"),
            // It is undone with the next commit, unless there is none before the next start.
            store::Error::Disk(_) | store::Error::Slow => return Self::outcome_unknown(&error),
            store::Error::Revisions => (Status::Unavailable, "disk_failed"),
            store::Error::Full => (Status::InsufficientStorage, "store_full"),
            store::Error::Labels => (Status::UnprocessableContent, "too_many_labels"),
        };
        match error {
            // Where the file lies is nobody's business but the operator's, who has the log. What is full is so before a commit counts.
            store::Error::Disk(_) => Self::new(status, code, format!("{error}; nothing was changed")),
            _ => Self::new(status, code, detail),
        }
    }
}

#[cfg(test)]
mod tests;
