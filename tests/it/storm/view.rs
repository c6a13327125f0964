//! What store, agents and runtimes say when the weather is fair, which must be one and the same. But for [`View::of`], pure.

use std::collections::BTreeMap;

use kakuri::cri::proto::{ContainerState, PodSandboxState};
use kakuri::cri::runtime::{LABEL_NODE, LABEL_WORKLOAD};
use kakuri::wire::status::Status;
use kakuri::workload::{Phase, Reason, State};

use super::client::{Presence, Slot, read};
use super::model::is_restarting;
use super::weather::World;
use crate::harness::place::soon;

type Said = (State, Status);

/// The views that must be one.
#[derive(Clone, Debug, Default)]
pub struct View {
    /// The agents' nodes.
    nodes: Vec<String>,
    /// What the control plane says.
    pub stored: BTreeMap<String, Said>,
    /// What each agent says.
    pub known: Vec<BTreeMap<String, Said>>,
    /// Sandboxes of each agent's node: workload, sandbox, ready.
    sandboxes: Vec<Vec<(String, String, bool)>>,
    /// Containers of each agent's node: workload, container, state.
    containers: Vec<Vec<(String, String, ContainerState)>>,
}

impl View {
    /// Looks everywhere; `None` where somebody does not answer yet.
    pub fn of(world: &World<'_>) -> Option<Self> {
        let mut view = Self { nodes: world.agents.iter().map(|agent| agent.node.clone()).collect(), ..Self::default() };
        let mut after = String::new();
        loop {
            let page = world.plane.get(&format!("/workloads?limit=500{after}")).json();
            for item in page["items"].as_array()? {
                view.stored.insert(item["id"].as_str()?.to_owned(), read(item).ok()?);
            }
            match page["continue"].as_str() {
                Some(token) => after = format!("&continue={token}"),
                None => break,
            }
        }
        let of = |labels: &BTreeMap<String, String>, name: &str| labels.get(name).cloned().unwrap_or_default();
        for agent in &world.agents {
            let said = |object: kakuri::wire::agent::Object| {
                (object.spec["id"].as_str().unwrap_or_default().to_owned(), (object.state, *object.status))
            };
            view.known.push(agent.try_list().ok()?.into_iter().map(said).collect());
            let cri = world.places.iter().find(|p| agent.node.starts_with(&p.node))?.cri();
            let all = cri.list_pod_sandbox(Default::default(), soon()).ok()?;
            let mine = all.into_iter().filter(|s| of(&s.labels, LABEL_NODE) == agent.node);
            let ready = PodSandboxState::SandboxReady;
            view.sandboxes.push(mine.map(|s| (of(&s.labels, LABEL_WORKLOAD), s.id.clone(), s.state() == ready)).collect());
            let all = cri.list_containers(Default::default(), soon()).ok()?;
            let mine = all.into_iter().filter(|c| of(&c.labels, LABEL_NODE) == agent.node);
            view.containers.push(mine.map(|c| (of(&c.labels, LABEL_WORKLOAD), c.id.clone(), c.state())).collect());
        }
        Some(view)
    }

    /// How often what is restarted for ever was, so far.
    pub fn restarts(&self) -> BTreeMap<String, u32> {
        let going_on = self.known.iter().flatten().filter(|(id, (state, _))| is_restarting(id) && !state.is_terminal());
        going_on.map(|(id, (_, status))| (id.clone(), status.restarts)).collect()
    }

    /// What whoever was asked for it says of a workload.
    pub fn said(&self, slot: &Slot) -> Option<&Said> {
        slot.home.map_or_else(|| self.stored.get(&slot.id), |at| self.known.get(at)?.get(&slot.id))
    }

    /// Whether all fits together, and with what the clients know. `restarts` are those when the calm began.
    ///
    /// # Errors
    /// What does not.
    pub fn check(&self, slots: &[Slot], restarts: &BTreeMap<String, u32>) -> Result<(), String> {
        slots.iter().try_for_each(|slot| self.check_slot(slot))?;
        self.stored.iter().try_for_each(|(id, said)| self.check_stored(id, said))?;
        for (at, known) in self.known.iter().enumerate() {
            known.iter().try_for_each(|(id, said)| self.check_known(at, id, said, restarts.get(id).copied()))?;
            let sandboxes = self.sandboxes[at].iter().map(|(id, sandbox, _)| (id, "sandbox", sandbox));
            let containers = self.containers[at].iter().map(|(id, container, _)| (id, "container", container));
            if let Some((id, what, name)) = sandboxes.chain(containers).find(|(id, ..)| !known.contains_key(*id)) {
                return Err(format!("{what} {name} of {id} is wanted by nobody"));
            }
        }
        Ok(())
    }

    /// What a client was told against what is there.
    fn check_slot(&self, slot: &Slot) -> Result<(), String> {
        let id = &slot.id;
        let said = self.said(slot);
        match slot.presence {
            Presence::Present if said.is_none() => return Err(format!("{id} was accepted and is not there")),
            Presence::Leaving { is_accepted: true } | Presence::Absent if said.is_some() && !slot.is_late() => {
                return Err(format!("{id} was deleted and is there: {said:?}"));
            }
            _ => {}
        }
        if let Some(home) = slot.home {
            if (0..self.known.len()).any(|at| at != home && self.known[at].contains_key(id)) || self.stored.contains_key(id) {
                return Err(format!("{id} is with somebody who was never asked for it"));
            }
        }
        match said {
            Some((state, status)) if !state.is_terminal() && slot.is_to_end(status) => {
                Err(format!("{id} is to end and has not: {state} {status:?}"))
            }
            _ => Ok(()),
        }
    }

    /// What the control plane says of a workload against what its agent says.
    fn check_stored(&self, id: &str, (state, status): &Said) -> Result<(), String> {
        let node = status.node.as_deref().unwrap_or_default();
        let Some(at) = self.nodes.iter().position(|n| n == node) else { return Err(format!("{id} is on {node:?}, which is none")) };
        let outline = |(state, s): &Said| {
            let end = (*state, s.reason, s.exit_code, s.oom_killed, s.finished_at);
            (end, s.restarts, s.attempt, s.sandbox_id.clone(), s.container_id.clone())
        };
        let stored = (*state, status.clone());
        match self.known[at].get(id) {
            // It is on the way from one run to the next, and what was asked for first is the older news.
            Some((now, known)) if is_restarting(id) && !now.is_terminal() => {
                let is_behind = (status.restarts, status.attempt) <= (known.restarts, known.attempt);
                (is_behind && !state.is_terminal())
                    .then_some(())
                    .ok_or_else(|| format!("{id} in the store: {stored:?}; at its agent: {known:?}"))
            }
            Some(known) if outline(known) != outline(&stored) => Err(format!("{id} in the store: {stored:?}; at its agent: {known:?}")),
            // The client may have asked for the end before the agent ever heard of it.
            None if *state == State::Failed
                && status.reason == Some(Reason::Stopped)
                && (&status.container_id, status.started_at, status.exit_code) == (&None, None, None) =>
            {
                Ok(())
            }
            None => Err(format!("{id} is in the store and not at its agent: {stored:?}")),
            Some(_) if status.phase == Some(Phase::Stopping) => Err(format!("{id} is still stopping: {stored:?}")),
            Some(_) => Ok(()),
        }
    }

    /// What an agent says of a workload against what the others have.
    fn check_known(&self, at: usize, id: &str, (state, status): &Said, restarts: Option<u32>) -> Result<(), String> {
        let said = format!("{state} {status:?}");
        let stored = self.stored.get(id);
        if id.starts_with('h') && stored.is_none() {
            return Err(format!("{id} is at an agent and not in the store: {said}"));
        }
        if stored.is_some_and(|(_, stored)| stored.node.as_ref() != self.nodes.get(at)) {
            return Err(format!("{id} is at an agent that is not its own: {said}"));
        }
        let sandboxes: Vec<_> = self.sandboxes[at].iter().filter(|(of, ..)| of == id).collect();
        let containers: Vec<_> = self.containers[at].iter().filter(|(of, ..)| of == id).collect();
        let ready = sandboxes.iter().filter(|(.., is_ready)| *is_ready).count();
        let running = containers.iter().filter(|(.., state)| *state == ContainerState::ContainerRunning).count();
        let at_runtime = format!("at the runtime: {sandboxes:?} {containers:?}");
        if ready > 1 || running > 1 {
            return Err(format!("{id} is there {ready} times and runs {running} times; {at_runtime}"));
        }
        if status.phase == Some(Phase::Stopping) {
            return Err(format!("{id} is still stopping: {said}"));
        }
        let fits = match state {
            // Between one run and the next there may be anything; but there must be a next.
            State::Pending | State::Running if is_restarting(id) => {
                let goes_on = restarts.is_none_or(|before| status.restarts > before);
                return if goes_on { Ok(()) } else { Err(format!("{id} is not restarted any more: {said}")) };
            }
            State::Pending => return Err(format!("{id} is still pending: {said}")),
            State::Running => {
                let (sandbox, container) = (status.sandbox_id.as_ref(), status.container_id.as_ref());
                matches!(sandboxes.as_slice(), [(_, s, true)] if sandbox == Some(s))
                    && matches!(containers.as_slice(), [(_, c, ContainerState::ContainerRunning)] if container == Some(c))
            }
            State::Succeeded | State::Failed => {
                // What was made and not started before its sandbox was stopped cannot be started any more.
                let is_over = |state| match state {
                    ContainerState::ContainerExited => true,
                    ContainerState::ContainerCreated => !sandboxes.is_empty(),
                    ContainerState::ContainerRunning | ContainerState::ContainerUnknown => false,
                };
                sandboxes.len() <= 1 && ready == 0 && containers.iter().all(|(.., state)| is_over(*state))
            }
        };
        if fits { Ok(()) } else { Err(format!("{id} at its agent: {said}; {at_runtime}")) }
    }

    /// Whatever is left anywhere.
    pub fn left(&self) -> String {
        let stored: Vec<_> = self.stored.keys().collect();
        let known: Vec<_> = self.known.iter().flat_map(BTreeMap::keys).collect();
        let sandboxes: Vec<_> = self.sandboxes.iter().flatten().collect();
        let containers: Vec<_> = self.containers.iter().flatten().collect();
        if stored.is_empty() && known.is_empty() && sandboxes.is_empty() && containers.is_empty() {
            return String::new();
        }
        format!("store {stored:?}, agents {known:?}, runtimes {sandboxes:?} {containers:?}")
    }
}

mod tests {
    use super::*;
    use crate::storm::model::Fate;
    use ContainerState::{ContainerExited as Over, ContainerRunning as Runs};

    const RESTARTS: Fate = Fate::Restarts { code: 0, most: None };

    fn status(reason: Option<Reason>, exit_code: Option<i32>) -> Status {
        Status { reason, exit_code, ..Status::accepted(Some("a".into())) }
    }

    fn running(name: &str) -> Said {
        (State::Running, Status { sandbox_id: Some(format!("s{name}")), container_id: Some(format!("c{name}")), ..status(None, None) })
    }

    /// Two nodes where all is well: on the first a workload that runs, one that ended, one that is restarted, and one of its agent's
    /// own; in the store one that was stopped before its agent ever heard of it.
    fn fair() -> (View, Vec<Slot>) {
        let ended = (State::Failed, status(Some(Reason::Error), Some(7)));
        let stopped = (State::Failed, status(Some(Reason::Stopped), None));
        let again = (State::Pending, Status { restarts: 3, ..status(Some(Reason::Completed), None) });
        let later = (State::Running, Status { restarts: 4, ..running("3").1 });
        let text = |s: &str| s.to_owned();
        let both = [("h0-1", running("1")), ("h0-2", ended)];
        let known = both.iter().cloned().chain([("h0-3r", later), ("l0-1", running("4"))]);
        let stored = both.iter().cloned().chain([("h0-3r", again), ("h0-4", stopped.clone())]);
        let view = View {
            nodes: vec![text("a"), text("b")],
            stored: stored.map(|(id, said)| (text(id), said)).collect(),
            known: vec![known.map(|(id, said)| (text(id), said)).collect(), BTreeMap::new()],
            sandboxes: vec![
                [("h0-1", "s1", true), ("h0-2", "s2", false), ("h0-3r", "s3", true), ("l0-1", "s4", true)]
                    .map(|(id, name, is_ready)| (text(id), text(name), is_ready))
                    .to_vec(),
                Vec::new(),
            ],
            containers: vec![
                [("h0-1", "c1", Runs), ("h0-2", "c2", Over), ("h0-3r", "c3", Runs), ("l0-1", "c4", Runs)]
                    .map(|(id, name, state)| (text(id), text(name), state))
                    .to_vec(),
                Vec::new(),
            ],
        };
        let slots = vec![
            Slot::sample("h0-1", None, Presence::Present, Fate::Forever),
            Slot::sample("h0-2", None, Presence::Present, Fate::Exits(7)),
            Slot::sample("h0-3r", None, Presence::Present, RESTARTS),
            Slot::sample("h0-4", None, Presence::Present, Fate::Exits(0)).stopped(stopped.1.created_at),
            Slot::sample("l0-1", Some(0), Presence::Present, Fate::Forever),
            Slot::sample("h0-5", None, Presence::Absent, Fate::Forever),
        ];
        (view, slots)
    }

    #[test]
    fn a_view_shows_what_it_is_there_to_show() {
        let check = |expect: &str, plant: &dyn Fn(&mut View, &mut Vec<Slot>)| {
            let (mut view, mut slots) = fair();
            let restarts = BTreeMap::from([("h0-3r".to_owned(), 3)]);
            plant(&mut view, &mut slots);
            match (view.check(&slots, &restarts), expect) {
                (result, "") => assert_eq!(result, Ok(())),
                (result, rule) => assert!(result.as_ref().is_err_and(|error| error.contains(rule)), "{rule}: {result:?}"),
            }
        };
        fn at<'a>(all: &'a mut BTreeMap<String, Said>, id: &str) -> &'a mut Said {
            all.get_mut(id).expect("planted")
        }
        fn everywhere(view: &mut View, id: &str, change: impl Fn(&mut Said)) {
            view.stored.get_mut(id).into_iter().chain(view.known[0].get_mut(id)).for_each(change);
        }
        check("", &|_, _| {});
        // Lost.
        check("h0-1 was accepted and is not there", &|v, _| drop(v.stored.remove("h0-1")));
        check("l0-1 was accepted and is not there", &|v, _| drop(v.known[0].remove("l0-1")));
        check("h0-1 is in the store and not at its agent", &|v, _| drop(v.known[0].remove("h0-1")));
        check("h0-2 is in the store and not at its agent", &|v, _| drop(v.known[0].remove("h0-2")));
        check("h0-4 is in the store and not at its agent", &|v, _| at(&mut v.stored, "h0-4").1.reason = Some(Reason::CreateFailed));
        check("h0-4 is in the store and not at its agent", &|v, _| at(&mut v.stored, "h0-4").1.container_id = Some("c".into()));
        check("h0-1 at its agent", &|v, _| v.containers[0].retain(|(id, ..)| id != "h0-1"));
        check("h0-1 at its agent", &|v, _| v.containers[0][0].2 = Over);
        check("h0-1 at its agent", &|v, _| v.sandboxes[0][0].1 = "another".into());
        // Deleted, and there.
        check("h0-1 was deleted and is there", &|_, s| s[0].presence = Presence::Leaving { is_accepted: true });
        check("h0-1 was deleted and is there", &|_, s| s[0].presence = Presence::Absent);
        check("", &|_, s| s[0].presence = Presence::Leaving { is_accepted: false });
        check("l0-1 was deleted and is there", &|_, s| s[4].presence = Presence::Leaving { is_accepted: true });
        // Doubled.
        check("h0-1 is there 2 times and runs 1", &|v, _| v.sandboxes[0].push(("h0-1".into(), "s9".into(), true)));
        check("h0-1 is there 1 times and runs 2", &|v, _| v.containers[0].push(("h0-1".into(), "c9".into(), Runs)));
        check("h0-3r is there 2 times", &|v, _| v.sandboxes[0].push(("h0-3r".into(), "s9".into(), true)));
        check("h0-3r is there 1 times and runs 2", &|v, _| v.containers[0].push(("h0-3r".into(), "c9".into(), Runs)));
        check("h0-1 is at an agent that is not its own", &|v, _| drop(v.known[1].insert("h0-1".into(), running("1"))));
        check("l0-1 is with somebody who was never asked", &|v, _| drop(v.known[1].insert("l0-1".into(), running("4"))));
        check("l0-1 is with somebody who was never asked", &|v, _| drop(v.stored.insert("l0-1".into(), running("4"))));
        // Leaked.
        check("sandbox s9 of h9-9 is wanted by nobody", &|v, _| v.sandboxes[1].push(("h9-9".into(), "s9".into(), false)));
        check("container c9 of h9-9 is wanted by nobody", &|v, _| v.containers[1].push(("h9-9".into(), "c9".into(), Over)));
        check("h9-9 is at an agent and not in the store", &|v, _| drop(v.known[0].insert("h9-9".into(), running("9"))));
        check("h0-2 at its agent", &|v, _| v.sandboxes[0][1].2 = true);
        check("h0-2 at its agent", &|v, _| v.containers[0][1].2 = Runs);
        check("h0-2 at its agent", &|v, _| v.containers[0][1].2 = ContainerState::ContainerUnknown);
        check("", &|v, _| v.containers[0][1].2 = ContainerState::ContainerCreated);
        check("h0-2 at its agent", &|v, _| {
            (v.sandboxes[0][1].2, v.containers[0][1].2) = (true, ContainerState::ContainerCreated);
        });
        check("h0-2 at its agent", &|v, _| {
            v.sandboxes[0].remove(1);
            v.containers[0][1].2 = ContainerState::ContainerCreated;
        });
        check("is on \"c\", which is none", &|v, _| at(&mut v.stored, "h0-1").1.node = Some("c".into()));
        // Stuck.
        check("h0-1 is to end and has not", &|v, s| s[0] = s[0].clone().stopped(v.stored["h0-1"].1.created_at));
        check("", &|_, s| s[0] = s[0].clone().stopped(kakuri::deadline::Timestamp::now().plus_ms(1)));
        check("l0-1 is to end and has not", &|v, s| s[4] = s[4].clone().stopped(v.known[0]["l0-1"].1.created_at));
        for fate in [Fate::Ttl { ms: 1 }, Fate::Exits(0), Fate::Oom, Fate::NoImage, Fate::Sick] {
            check("h0-1 is to end and has not", &|_, s| s[0].wish.fate = fate);
        }
        check("h0-3r is to end and has not", &|_, s| s[2].wish.fate = Fate::Restarts { code: 7, most: Some(4) });
        check("h0-3r is not restarted any more", &|v, _| everywhere(v, "h0-3r", |said| said.1.restarts = 3));
        check("h0-1 is still pending", &|v, _| everywhere(v, "h0-1", |said| said.0 = State::Pending));
        check("h0-1 is still stopping", &|v, _| at(&mut v.stored, "h0-1").1.phase = Some(Phase::Stopping));
        check("l0-1 is still stopping", &|v, _| at(&mut v.known[0], "l0-1").1.phase = Some(Phase::Stopping));
        // Two truths.
        check("h0-2 in the store", &|v, _| at(&mut v.stored, "h0-2").1.exit_code = Some(8));
        check("h0-2 in the store", &|v, _| at(&mut v.stored, "h0-2").1.reason = Some(Reason::Stopped));
        check("h0-2 in the store", &|v, _| at(&mut v.stored, "h0-2").0 = State::Succeeded);
        check("h0-1 in the store", &|v, _| at(&mut v.stored, "h0-1").1.attempt = 1);
        check("h0-3r in the store", &|v, _| at(&mut v.stored, "h0-3r").0 = State::Failed);
        check("h0-3r in the store", &|v, _| at(&mut v.stored, "h0-3r").1.restarts = 5);
    }

    #[test]
    fn whatever_is_left_is_named() {
        assert_eq!(View::default().left(), "");
        let text = || "x".to_owned();
        let left = [
            View { stored: [(text(), running("1"))].into(), ..View::default() },
            View { known: vec![[(text(), running("1"))].into()], ..View::default() },
            View { sandboxes: vec![vec![(text(), text(), false)]], ..View::default() },
            View { containers: vec![vec![(text(), text(), Over)]], ..View::default() },
        ];
        for view in left {
            assert!(view.left().contains('x'), "{view:?}");
        }
    }
}
