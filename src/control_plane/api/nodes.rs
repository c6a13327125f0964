//! Nodes, and how the control plane itself is: health, metrics, version.

use super::{Answer, Api, Call, Refusal};
use crate::http::{Response, Status};
use crate::metrics::{HTTP_RESPONSES, Kind, Labels, Text};
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
        let mut lines = String::from("[+]store ok\n");
        let mut is_ready = false;
        for (name, node) in &self.plane.nodes {
            match node.view().trouble {
                None => {
                    is_ready = true;
                    lines.push_str(&format!("[+]node {name} ok\n"));
                }
                Some(trouble) => lines.push_str(&format!("[-]node {name}: {trouble}\n")),
            }
        }
        if self.plane.nodes.is_empty() {
            lines.push_str("[-]nodes: none is configured\n");
        }
        if self.insecure_listen {
            lines.push_str("[!]insecure-listen: whoever reaches a listener may do everything\n");
        }
        match (is_ready, call.request.query_flag("verbose")?) {
            (true, false) => Ok(Response::text(Status::Ok, "ok\n")),
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
