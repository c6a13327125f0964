//! Nodes, and how the control plane itself is: health, metrics, version.

use super::{Answer, Api, Call, Refusal};
use crate::http::{Response, Status};
use crate::metrics::{HTTP_RESPONSES, Kind, Labels, STORE_COMMITS, STORE_FAILURES, Text, WATCH_LINES_UNREAD};
use crate::wire::api::{Nodes, Version, to_json};
use crate::workload::Name;

impl Api {
    pub(super) fn nodes(&self) -> Response {
        let items = self.plane.nodes.values().map(|node| node.object()).collect();
        Response::json(Status::Ok, to_json(&Nodes { items }))
    }

    pub(super) fn node(&self, id: &str) -> Answer {
        let node = Name::new(id).ok().and_then(|name| self.plane.nodes.get(&name));
        let node = node.ok_or_else(|| Refusal::not_found("node"))?;
        Ok(Response::json(Status::Ok, to_json(&node.object())))
    }

    /// Ready is who can place something: 503 as long as no node is. What is missing is listed then, or when asked for.
    pub(super) fn readyz(&self, call: &Call<'_>) -> Answer {
        let trouble = self.plane.store.trouble();
        let mut lines = match &trouble {
            None => String::from("[+]store ok\n"),
            // What exactly is in the log: it names files.
            Some(_) => String::from("[-]store: its disk takes no changes\n"),
        };
        let mut is_ready = false;
        for (name, node) in &self.plane.nodes {
            match node.view().trouble {
                None => {
                    is_ready = trouble.is_none();
                    lines.push_str(&format!("[+]node {name} ok\n"));
                }
                Some(trouble) => lines.push_str(&format!("[-]node {name}: {trouble}\n")),
            }
        }
        if self.plane.nodes.is_empty() {
            lines.push_str("[-]nodes: none is configured\n");
        }
        let warning = if self.insecure_listen { "[!]insecure-listen: whoever reaches a listener may do everything\n" } else { "" };
        lines.push_str(warning);
        match (is_ready, call.request.query_flag("verbose")?) {
            (true, false) => Ok(Response::text(Status::Ok, format!("ok\n{warning}"))),
            (true, true) => Ok(Response::text(Status::Ok, lines + "ready\n")),
            (false, _) => Ok(Response::text(Status::Unavailable, lines + "not ready\n").with_header("Retry-After", "1")),
        }
    }

    pub(super) fn metrics(&self) -> Response {
        let mut text = Text::default();
        let build = (Labels::of(&[("version", env!("CARGO_PKG_VERSION"))]), 1);
        text.family("kakuri_build_info", Kind::Gauge, "The program's version.", [build]);
        let counts = self.plane.store.counts();
        let counts = counts.iter().map(|(state, count)| (Labels::of(&[("state", state.as_str())]), count));
        text.family("kakuri_workloads", Kind::Gauge, "Workloads by their last known state.", counts);
        let views: Vec<_> = self.plane.nodes.iter().map(|(name, node)| (name, node.view())).collect();
        let ready = views.iter().map(|(name, view)| (Labels::of(&[("node", name.as_str())]), u8::from(view.trouble.is_none())));
        text.family("kakuri_node_ready", Kind::Gauge, "Whether the node takes work.", ready);
        let heard = views.iter().filter_map(|(name, view)| {
            let seconds = view.observed_at?.as_millis() / 1000;
            Some((Labels::of(&[("node", name.as_str())]), seconds))
        });
        text.family("kakuri_node_last_heartbeat_timestamp_seconds", Kind::Gauge, "When its agent last answered.", heard);
        let strangers = self.plane.nodes.iter().map(|(name, node)| (Labels::of(&[("node", name.as_str())]), node.strangers()));
        text.family("kakuri_node_strangers", Kind::Gauge, "Workloads there that this control plane did not place there.", strangers);
        let unread = "Events of agents that this version cannot read.";
        text.family("kakuri_watch_lines_unread_total", Kind::Counter, unread, [(Labels::none(), WATCH_LINES_UNREAD.value())]);
        // Of those that answer: the last word of another says nothing about now.
        let said = || {
            let answering = views.iter().filter(|(_, view)| view.is_reachable);
            answering.filter_map(|(name, view)| Some((Labels::of(&[("node", name.as_str())]), view.node.as_deref()?)))
        };
        let stopping = said().map(|(labels, node)| (labels, node.stopping));
        text.family("kakuri_node_workloads_stopping", Kind::Gauge, "Workloads there that are being stopped or deleted.", stopping);
        let oldest =
            said().map(|(labels, node)| (labels, format!("{}.{:03}", node.oldest_stopping_ms / 1000, node.oldest_stopping_ms % 1000)));
        text.family("kakuri_node_oldest_stopping_seconds", Kind::Gauge, "For how long the longest of them.", oldest);
        let one = |value: u64| [(Labels::none(), value)];
        text.family("kakuri_store_commits_total", Kind::Counter, "Commits of the store.", one(STORE_COMMITS.value()));
        text.family("kakuri_store_failures_total", Kind::Counter, "Commits that the disk did not take.", one(STORE_FAILURES.value()));
        text.family("kakuri_store_revision", Kind::Gauge, "The last change.", one(self.plane.store.kept().newest));
        text.family("kakuri_event_followers", Kind::Gauge, "Readers of /events.", [(Labels::none(), self.plane.store.followers())]);
        let responses =
            (1..).zip(&HTTP_RESPONSES).map(|(class, counter)| (Labels::of(&[("code", &format!("{class}xx"))]), counter.value()));
        text.family("kakuri_http_requests_total", Kind::Counter, "HTTP responses by the class of their status.", responses);
        text.process();
        Response::full(Status::Ok, Text::CONTENT_TYPE, text.into_string().into_bytes())
    }
}

pub(super) fn version() -> Response {
    let version = Version { version: env!("CARGO_PKG_VERSION"), api: "v1", program: "kakuri-control-plane" };
    Response::json(Status::Ok, to_json(&version))
}
