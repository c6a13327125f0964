//! Which node gets a workload. Pure: nodes as last seen and a wish go in, a placement or a reason per node comes out.
//!
//! The first class of the choice that some node can take, on the first such node in the order of their names. *Not here*: what was
//! accepted since a node last said what it has allocated; its agent counts that, and refuses. CPU is not counted: a quota is a limit and
//! no claim, and nodes share theirs.
//!
//! Invariant: nothing is placed on a node that did not answer last time, that has not the memory left for it and its class's overhead,
//! or on a class its runtime does not offer.
//! Invariant: a reason is at most `PLACEMENT_REASON_BYTES_MAX` long, whatever an agent says.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use super::profiles::Choice;
use crate::limits;
use crate::report::clip;
use crate::wire::agent::{Class, Node};
use crate::workload::{Name, Spec};

/// A node as last seen.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate<'a> {
    pub(super) name: &'a Name,
    /// Where the workload is already, so that it can go nowhere else.
    pub(super) home: Option<&'a Name>,
    /// Why it takes no work now.
    pub(super) trouble: Option<&'a str>,
    /// As its agent described it; `None` as long as it never did.
    pub(super) node: Option<&'a Node>,
}

/// Where a workload goes.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Placement {
    pub(super) node: Name,
    pub(super) class: Name,
    /// Every other node and why not, up to `PLACEMENT_REASONS_MAX`.
    pub(super) rejected: Map<String, Value>,
}

/// Why it goes nowhere.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Misfit {
    /// No node can take it now; every node and why not, up to `PLACEMENT_REASONS_MAX`.
    NoNode(Vec<(Name, String)>),
    /// Every node has said what it offers, and this class is not among it.
    UnknownClass {
        /// All classes on offer.
        offered: Vec<String>,
    },
}

/// Places a workload.
///
/// # Errors
/// [`Misfit`]
pub(super) fn place(nodes: &[Candidate<'_>], choice: &Choice, spec: &Spec) -> Result<Placement, Misfit> {
    for class in &choice.classes {
        let fits = |candidate: &Candidate<'_>| misfit(candidate, class, choice.own_kernel, spec).is_none();
        if let Some(chosen) = nodes.iter().find(|candidate| fits(candidate)) {
            let reason = |candidate: &Candidate<'_>| {
                let why = misfit(candidate, class, choice.own_kernel, spec);
                why.unwrap_or_else(|| format!("fits too; {} comes first", chosen.name))
            };
            let others = nodes.iter().filter(|candidate| candidate.name != chosen.name).take(limits::PLACEMENT_REASONS_MAX);
            let rejected = others.map(|candidate| (candidate.name.to_string(), reason(candidate).into())).collect();
            return Ok(Placement { node: chosen.name.clone(), class: class.clone(), rejected });
        }
    }
    let offered: BTreeSet<&str> = nodes.iter().filter_map(|c| c.node).flat_map(|n| &n.runtime_classes).map(|c| c.name.as_str()).collect();
    let is_known = choice.classes.iter().any(|class| offered.contains(class.as_str()));
    // A node that offers nothing has not heard yet what its runtime has.
    let has_spoken = |candidate: &Candidate<'_>| candidate.node.is_some_and(|node| !node.runtime_classes.is_empty());
    if !is_known && !nodes.is_empty() && nodes.iter().all(has_spoken) {
        return Err(Misfit::UnknownClass { offered: offered.into_iter().map(str::to_owned).collect() });
    }
    let reasons = |candidate: &Candidate<'_>| {
        let mut reasons: Vec<String> =
            choice.classes.iter().filter_map(|class| misfit(candidate, class, choice.own_kernel, spec)).collect();
        // A node in trouble says so once, not once for each class.
        reasons.dedup();
        (candidate.name.clone(), clip(reasons.join("; "), limits::PLACEMENT_REASON_BYTES_MAX))
    };
    Err(Misfit::NoNode(nodes.iter().take(limits::PLACEMENT_REASONS_MAX).map(reasons).collect()))
}

/// Why this node cannot take it under this class.
fn misfit(candidate: &Candidate<'_>, class: &Name, own_kernel: bool, spec: &Spec) -> Option<String> {
    find_misfit(candidate, class, own_kernel, spec).map(|why| clip(why, limits::PLACEMENT_REASON_BYTES_MAX))
}

fn find_misfit(candidate: &Candidate<'_>, class: &Name, own_kernel: bool, spec: &Spec) -> Option<String> {
    if let Some(home) = candidate.home.filter(|home| *home != candidate.name) {
        return Some(format!("the agent of {home} has a workload of this id"));
    }
    if let Some(trouble) = candidate.trouble {
        return Some(format!("not ready: {trouble}"));
    }
    let Some(node) = candidate.node else { return Some("not ready: it never answered".into()) };
    let Some(offer) = node.runtime_classes.iter().find(|offer| offer.name == class.as_str()) else {
        return Some(format!("runtime_class: {class} is not on offer"));
    };
    let Class { own_kernel: has_own_kernel, available, memory_mb_min, overhead_mb, .. } = offer;
    if *available == Some(false) {
        return Some(format!("runtime_class: the runtime does not offer the handler of {class}"));
    }
    if own_kernel && !has_own_kernel {
        return Some(format!("runtime_class: {class} has no kernel of its own here"));
    }
    if spec.memory_mb < *memory_mb_min {
        return Some(format!("memory: {class} needs at least {memory_mb_min}, wants {}", spec.memory_mb));
    }
    if let Some(why) = lack_of_memory(node, spec.memory_mb, *overhead_mb) {
        return Some(why);
    }
    let lacking = spec.node_selector.iter().find(|(key, value)| node.labels.get(*key).and_then(Value::as_str) != Some(value.as_str()));
    lacking.map(|(key, value)| format!("node_selector: wants {key}={value}"))
}

/// Why there is no room for a workload, by what its agent said last. A node that does not tell what it has (0) is not judged.
fn lack_of_memory(node: &Node, memory_mb: u64, overhead_mb: u64) -> Option<String> {
    let (capacity, allocated) = (node.capacity.memory_mb, node.allocated.memory_mb);
    let free = capacity.saturating_sub(allocated);
    let with_overhead = if overhead_mb > 0 { format!(" and {overhead_mb} of overhead") } else { String::new() };
    let is_short = capacity > 0 && memory_mb.checked_add(overhead_mb).is_none_or(|wants| wants > free);
    is_short.then(|| format!("memory: wants {memory_mb}{with_overhead}, free {free} of {capacity}"))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::super::store::tests::draft;
    use super::*;
    use crate::deadline::Timestamp;
    use crate::wire::agent::Resources;

    /// A class as a node offers it.
    pub(crate) fn class(name: &str) -> Class {
        let own_kernel = name != "native";
        let memory_mb_min = if name == "edera-zone" { 300 } else { 4 };
        Class { name: name.into(), handler: "h".into(), own_kernel, available: None, overhead_mb: 0, memory_mb_min, runtime: None }
    }

    /// A node that offers these classes.
    pub(crate) fn node(name: &str, classes: &[&str]) -> Node {
        let resources = Resources { memory_mb: 1024, cpu_millicores: 1000, workloads: 10 };
        let started_at = Timestamp::parse("2026-01-01T00:00:00Z").expect("a time");
        Node {
            node_id: name.into(),
            ready: true,
            conditions: Vec::new(),
            runtime_classes: classes.iter().map(|name| class(name)).collect(),
            capacity: resources,
            allocated: Resources::default(),
            labels: [("zone".to_owned(), Value::from(name))].into_iter().collect(),
            version: "1".into(),
            features: Vec::new(),
            host_kernel: "6".into(),
            started_at,
            observed_at: None,
            stopping: 0,
            oldest_stopping_ms: 0,
        }
    }

    fn names(texts: &[&str]) -> Vec<Name> {
        texts.iter().map(|text| Name::new(text).expect("a name")).collect()
    }

    fn wish(classes: &[&str]) -> Choice {
        Choice { classes: names(classes), own_kernel: false }
    }

    /// `node/class (other: why; ..)`, or the misfit.
    fn placed(nodes: &[(&str, Option<&str>, Option<Node>)], choice: &Choice, body: &str) -> String {
        let ids = names(&nodes.iter().map(|n| n.0).collect::<Vec<_>>());
        let candidates: Vec<Candidate<'_>> =
            nodes.iter().zip(&ids).map(|(n, name)| Candidate { name, home: None, trouble: n.1, node: n.2.as_ref() }).collect();
        match place(&candidates, choice, &draft(body).spec) {
            Ok(Placement { node, class, rejected }) => {
                let why: Vec<String> = rejected.iter().map(|(name, why)| format!("{name}: {}", why.as_str().unwrap_or_default())).collect();
                format!("{node}/{class} ({})", why.join(", "))
            }
            Err(Misfit::NoNode(why)) => why.iter().map(|(name, why)| format!("{name}: {why}")).collect::<Vec<_>>().join(", "),
            Err(Misfit::UnknownClass { offered }) => format!("unknown, offered {}", offered.join(" ")),
        }
    }

    #[test]
    fn the_first_node_that_fits_gets_it_and_the_others_a_reason() {
        let busybox = r#"{"image":"busybox"}"#;
        let a = || ("a", None, Some(node("a", &["native"])));
        let b = || ("b", None, Some(node("b", &["gvisor", "edera-zone"])));
        let c = || ("c", Some("no answer"), Some(node("c", &["kata"])));
        let silent = || ("d", None, None);
        let check = |nodes: &[_], choice: &Choice, body: &str, expect: &str| assert_eq!(placed(nodes, choice, body), expect);
        check(&[a(), b()], &wish(&["native"]), busybox, "a/native (b: runtime_class: native is not on offer)");
        check(&[b(), b()], &wish(&["gvisor"]), busybox, "b/gvisor ()");
        check(
            &[a(), b(), c()],
            &wish(&["gvisor"]),
            busybox,
            "b/gvisor (a: runtime_class: gvisor is not on offer, c: not ready: no answer)",
        );
        check(&[a(), ("z", None, Some(node("z", &["native"])))], &wish(&["native"]), busybox, "a/native (z: fits too; a comes first)");
        check(
            &[a(), b()],
            &wish(&["edera-zone", "kata", "gvisor"]),
            busybox,
            "b/edera-zone (a: runtime_class: edera-zone is not on offer)",
        );
        // The second class of a profile is as allowed as the first.
        check(&[b()], &wish(&["edera-zone", "gvisor"]), r#"{"image":"a","memory_mb":299}"#, "b/gvisor ()");
        check(&[b()], &wish(&["edera-zone"]), r#"{"image":"a","memory_mb":299}"#, "b: memory: edera-zone needs at least 300, wants 299");
        check(
            &[a(), b()],
            &wish(&["gvisor"]),
            r#"{"image":"a","node_selector":{"zone":"a"}}"#,
            "a: runtime_class: gvisor is not on offer, b: node_selector: wants zone=a",
        );
        check(&[a(), c()], &wish(&["gvisor"]), busybox, "unknown, offered kata native");
        check(&[c()], &wish(&["kata", "edera-zone"]), busybox, "c: not ready: no answer");
        // As long as one node never said what it offers, no class is unknown.
        check(&[a(), silent()], &wish(&["gvisor"]), busybox, "a: runtime_class: gvisor is not on offer, d: not ready: it never answered");
        let new = || ("n", Some("just begun"), Some(node("n", &[])));
        check(&[a(), new()], &wish(&["gvisor"]), busybox, "a: runtime_class: gvisor is not on offer, n: not ready: just begun");
        check(&[], &wish(&["gvisor"]), busybox, "");
        let strict = Choice { own_kernel: true, ..wish(&["native"]) };
        check(&[a()], &strict, busybox, "a: runtime_class: native has no kernel of its own here");
        let mut gone = node("g", &["gvisor"]);
        gone.runtime_classes.iter_mut().for_each(|c| c.available = Some(false));
        check(
            &[("g", None, Some(gone))],
            &wish(&["gvisor"]),
            busybox,
            "g: runtime_class: the runtime does not offer the handler of gvisor",
        );
    }

    #[test]
    fn what_does_not_fit_goes_elsewhere_and_overhead_counts() {
        let with = |name: &str, capacity: u64, allocated: u64, overhead_mb: u64| {
            let mut node = node(name, &["kata"]);
            (node.capacity.memory_mb, node.allocated.memory_mb) = (capacity, allocated);
            node.runtime_classes.iter_mut().for_each(|class| class.overhead_mb = overhead_mb);
            node
        };
        let check = |nodes: &[(&str, Node)], memory_mb: u64, expect: &str| {
            let nodes: Vec<_> = nodes.iter().map(|(name, node)| (*name, None, Some(node.clone()))).collect();
            let body = format!(r#"{{"image":"a","memory_mb":{memory_mb},"cpu_millicores":1024000}}"#);
            assert_eq!(placed(&nodes, &wish(&["kata"]), &body), expect);
        };
        let (a, b) = (|taken| ("a", with("a", 1000, taken, 160)), || ("b", with("b", 1_000_000, 0, 160)));
        check(&[a(0)], 840, "a/kata ()");
        check(&[a(0)], 841, "a: memory: wants 841 and 160 of overhead, free 1000 of 1000");
        check(&[a(0), b()], 841, "b/kata (a: memory: wants 841 and 160 of overhead, free 1000 of 1000)");
        check(&[a(900), b()], 4, "b/kata (a: memory: wants 4 and 160 of overhead, free 100 of 1000)");
        // More than it has: what was adopted counts.
        check(&[a(1100)], 4, "a: memory: wants 4 and 160 of overhead, free 0 of 1000");
        check(&[("c", with("c", 1000, 500, 0))], 501, "c: memory: wants 501, free 500 of 1000");
        check(&[("c", with("c", 0, 0, 0))], 1_048_576, "c/kata ()");
        check(&[("c", with("c", u64::MAX, 0, u64::MAX))], 4, &format!("c: memory: wants 4 and {0} of overhead, free {0} of {0}", u64::MAX));
    }

    #[test]
    fn reasons_are_bounded() {
        let ids: Vec<Name> = (0..limits::NODES_MAX).map(|i| Name::new(&format!("n{i}")).expect("a name")).collect();
        let offers = node("n", &["gvisor"]);
        let nodes: Vec<Candidate<'_>> = ids.iter().map(|name| Candidate { name, home: None, trouble: None, node: Some(&offers) }).collect();
        let placement = place(&nodes, &wish(&["gvisor"]), &draft(r#"{"image":"a"}"#).spec).expect("a place");
        assert_eq!(placement.rejected.len(), limits::PLACEMENT_REASONS_MAX);
        let trouble = "x".repeat(limits::LINE_BYTES_MAX);
        let nodes: Vec<Candidate<'_>> = nodes.iter().map(|node| Candidate { trouble: Some(&trouble), ..*node }).collect();
        let longest = |placed: Result<Placement, Misfit>| match placed {
            Ok(placement) => placement.rejected.values().filter_map(Value::as_str).map(str::len).max(),
            Err(Misfit::NoNode(reasons)) => reasons.iter().map(|(_, why)| why.len()).max(),
            Err(Misfit::UnknownClass { .. }) => None,
        };
        let spec = draft(r#"{"image":"a"}"#).spec;
        let max = Some(limits::PLACEMENT_REASON_BYTES_MAX);
        assert_eq!(longest(place(&nodes, &wish(&["gvisor", "kata"]), &spec)), max);
        let one_is_well = [Candidate { trouble: None, ..nodes[0] }, nodes[1]];
        assert_eq!(longest(place(&one_is_well, &wish(&["gvisor"]), &spec)), max);
    }
}
