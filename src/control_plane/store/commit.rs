//! The thread `store`: takes what waits, finds out what becomes of it, makes that last with one commit, and publishes it.
//!
//! A panic of the disk is an error of the disk: it is noted, told, and tried again. A panic of anything else here leaves an index that
//! nobody vouches for and a process that looks alive and takes nothing: it ends, and the next start reads what is on disk.
//!
//! While a commit is under way the next batch gathers, so that those who ask at the same time share its syncs.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, select};

use super::disk::{self, Batch, Disk};
use super::{Error, Index, Record, Shared, Wish};
use crate::failpoint;
use crate::limits;
use crate::metrics;
use crate::report::Chain;
use crate::workload::WorkloadId;

/// What is asked of the store.
#[derive(Debug)]
pub(super) enum Act {
    /// Its agent says that it ended so.
    End(Box<Record>),
    Insert(Box<Record>),
    Remove {
        id: WorkloadId,
        born: u64,
    },
    Wish {
        id: WorkloadId,
        born: u64,
        wish: Wish,
    },
}

/// What became of it.
#[derive(Debug)]
pub(super) enum Outcome {
    /// There is this one, as it was.
    Existing(Arc<Record>),
    /// There is none.
    Gone,
    /// There is this one now.
    Inserted(Arc<Record>),
    /// It would break a bound.
    Refused,
}

/// An act, and who waits for it.
#[derive(Debug)]
pub(super) struct Order {
    pub(super) act: Act,
    pub(super) answer: Sender<Result<Outcome, Error>>,
}

/// Makes the first commit, which reserves revisions, and starts the thread; that ends when nobody can send orders any more, and all
/// is written.
pub(super) fn start(
    disk: impl Disk + 'static,
    shared: Arc<Shared>,
    orders: Receiver<Order>,
    poked: Receiver<()>,
    is_done: Sender<()>,
) -> io::Result<JoinHandle<()>> {
    let mut writer = Writer { disk, shared, pause_ms: limits::STORE_LAZY_MS };
    // A disk that takes nothing is no reason not to show what is on it.
    writer.work(Vec::new());
    let body = move || {
        // Dropped with the thread, whichever way it ends, and after the disk.
        let _is_done = is_done;
        let _end = EndOnPanic;
        let mut writer = writer;
        writer.run(&orders, &poked);
    };
    thread::Builder::new().name("store".into()).stack_size(limits::STORE_STACK_BYTES).spawn(body)
}

/// Ends the process when the thread that holds it panics.
struct EndOnPanic;

impl Drop for EndOnPanic {
    fn drop(&mut self) {
        if thread::panicking() {
            log::error!("thread store panicked; the process ends, so that the next one reads what is on disk");
            process::abort();
        }
    }
}

struct Writer<D> {
    disk: D,
    shared: Arc<Shared>,
    /// How long what agents said waits for company.
    pause_ms: u64,
}

/// What a batch makes of records; `None` where one goes.
type Plan = BTreeMap<WorkloadId, Option<Record>>;

impl<D: Disk> Writer<D> {
    fn run(&mut self, orders: &Receiver<Order>, poked: &Receiver<()>) {
        let mut is_over = false;
        while !is_over {
            let first = select! {
                recv(orders) -> order => order.map_err(|_| RecvTimeoutError::Disconnected),
                recv(poked) -> _ => orders.recv_timeout(Duration::from_millis(self.pause_ms)),
            };
            is_over = matches!(first, Err(RecvTimeoutError::Disconnected));
            let mut batch: Vec<Order> = first.into_iter().collect();
            batch.extend(orders.try_iter().take(limits::STORE_BATCH_MAX.saturating_sub(batch.len())));
            self.work(batch);
        }
    }

    fn work(&mut self, mut orders: Vec<Order>) {
        let (plan, dirty, reserved, revision) = {
            let mut index = self.shared.lock();
            let mut plan = Plan::new();
            for order in &mut orders {
                evaluate(&mut index, &mut plan, &mut order.act);
            }
            let dirty = std::mem::take(&mut index.dirty);
            for id in &dirty {
                let published = || index.records.get(id).map(|record| record.as_ref().clone());
                plan.entry(id.clone()).or_insert_with(published);
            }
            (plan, dirty, index.reserved, reservation(&index))
        };
        if plan.is_empty() && revision == reserved {
            return self.publish(orders);
        }
        let rows = plan.into_iter().map(|(id, record)| (id, record.map(|record| record.stored().to_json()))).collect();
        let batch = Batch { rows, revision };
        let kinds = kinds(&orders, &dirty);
        kinds.iter().for_each(|kind| failpoint::pass(&format!("control_plane-{kind}-before")));
        // Whatever the disk was amidst of, it opens its file anew before it writes again.
        let result = catch_unwind(AssertUnwindSafe(|| self.disk.commit(&batch)));
        match result.unwrap_or(Err(disk::Error::Panicked)) {
            Ok(()) => {
                kinds.iter().for_each(|kind| failpoint::pass(&format!("control_plane-{kind}-after")));
                metrics::STORE_COMMITS.add_one();
                self.pause_ms = limits::STORE_LAZY_MS;
                let mut index = self.shared.lock();
                index.reserved = batch.revision;
                if index.trouble.take().is_some() {
                    log::info!("the store's disk takes changes again");
                }
                drop(index);
                self.publish(orders);
            }
            Err(error) => {
                metrics::STORE_FAILURES.add_one();
                let text = Chain(&error).to_string();
                let mut index = self.shared.lock();
                // Some of it may be on disk all the same: the next commit writes these rows as they are published.
                index.dirty.extend(dirty);
                index.dirty.extend(batch.rows.into_iter().map(|(id, _)| id));
                if index.trouble.replace(text.clone()).as_ref() != Some(&text) {
                    log::error!("the store's disk does not take changes: {text}");
                }
                drop(index);
                self.pause_ms = limits::STORE_RETRY_MS;
                self.shared.poke();
                let error = Error::Disk(Arc::new(error));
                answer(orders, |_| Err(error.clone()));
            }
        }
    }

    /// Does in the index what was planned, and answers.
    fn publish(&self, orders: Vec<Order>) {
        if orders.is_empty() {
            return;
        }
        let mut index = self.shared.lock();
        let outcomes: Vec<Outcome> = orders.iter().map(|order| apply(&mut index, &order.act)).collect();
        drop(index);
        self.shared.changed.notify_all();
        let mut outcomes = outcomes.into_iter();
        answer(orders, |_| outcomes.next().ok_or(Error::Closed));
    }
}

fn answer(orders: Vec<Order>, mut result: impl FnMut(&Act) -> Result<Outcome, Error>) {
    for Order { act, answer } in orders {
        // Whoever asked may have given up waiting.
        let _ = answer.try_send(result(&act));
    }
}

/// The kinds of writes in a batch, for tests that let the process die at one.
fn kinds(orders: &[Order], dirty: &BTreeSet<WorkloadId>) -> Vec<&'static str> {
    let kind = |order: &Order| match order.act {
        Act::End(_) => "end",
        Act::Insert(_) => "insert",
        Act::Remove { .. } => "remove",
        Act::Wish { wish: Wish::Delete, .. } => "delete",
        Act::Wish { wish: Wish::Labels(_), .. } => "labels",
        Act::Wish { wish: Wish::Stop, .. } => "stop",
    };
    let known = (!dirty.is_empty()).then_some("known");
    orders.iter().map(kind).chain(known).collect()
}

/// Up to which revision is to be reserved: half of a reservation is always left, for what is published while a commit is under way.
fn reservation(index: &Index) -> u64 {
    let left = index.reserved.saturating_sub(index.revision);
    if left < limits::REVISIONS_RESERVED / 2 { index.revision.saturating_add(limits::REVISIONS_RESERVED) } else { index.reserved }
}

/// Plans one act on top of those before it. [`apply`] will do the same: nobody else inserts, removes or wishes meanwhile.
fn evaluate(index: &mut Index, plan: &mut Plan, act: &mut Act) {
    let (id, next) = match act {
        Act::End(ended) => {
            let id = ended.workload.id.clone();
            let next = planned(index, plan, &id).and_then(|record| ended_as(record, ended));
            (id, next.map(Some))
        }
        Act::Insert(record) => {
            index.revision += 1;
            record.born = index.revision;
            let id = record.workload.id.clone();
            let is_free = planned(index, plan, &id).is_none() && count(index, plan) < limits::STORE_WORKLOADS_MAX;
            (id, is_free.then(|| Some(record.as_ref().clone())))
        }
        Act::Remove { id, born } => {
            let is_there = planned(index, plan, id).is_some_and(|record| record.born == *born);
            (id.clone(), is_there.then_some(None))
        }
        Act::Wish { id, born, wish } => {
            let current = planned(index, plan, id).filter(|record| record.born == *born);
            (id.clone(), current.and_then(|record| wish.apply(record).ok().flatten()).map(Some))
        }
    };
    if let Some(next) = next {
        plan.insert(id, next);
    }
}

/// The record, ended so: what clients wished meanwhile stays, and so does what its agent has yet to be told of that. `None` when it is
/// another one, or over already.
fn ended_as(record: &Record, ended: &Record) -> Option<Record> {
    let Record { workload, node, desired, has_new_labels, born, revision, .. } = record.clone();
    let is_it = record.born == ended.born && !record.state.is_terminal();
    is_it.then(|| Record { workload, node, desired, has_new_labels, born, revision, ..ended.clone() })
}

fn planned<'a>(index: &'a Index, plan: &'a Plan, id: &WorkloadId) -> Option<&'a Record> {
    match plan.get(id) {
        Some(planned) => planned.as_ref(),
        None => index.records.get(id).map(AsRef::as_ref),
    }
}

/// How many records there will be.
fn count(index: &Index, plan: &Plan) -> usize {
    let (mut more, mut fewer) = (0, 0);
    for (id, planned) in plan {
        match (index.records.contains_key(id), planned.is_some()) {
            (false, true) => more += 1,
            (true, false) => fewer += 1,
            (true, true) | (false, false) => {}
        }
    }
    (index.records.len() + more).saturating_sub(fewer)
}

/// Publishes one act.
fn apply(index: &mut Index, act: &Act) -> Outcome {
    let existing = |index: &Index, id: &WorkloadId| index.records.get(id).map(Arc::clone);
    let born_at = |index: &Index, id: &WorkloadId, born: u64| existing(index, id).filter(|record| record.born == born);
    let published = |record: Option<Arc<Record>>| record.map_or(Outcome::Gone, Outcome::Inserted);
    match act {
        Act::End(ended) => {
            let id = &ended.workload.id;
            match born_at(index, id, ended.born) {
                None => Outcome::Gone,
                Some(current) => match ended_as(&current, ended) {
                    None => Outcome::Existing(current),
                    Some(next) => published(index.publish(id, Some(next))),
                },
            }
        }
        Act::Insert(record) => {
            let id = &record.workload.id;
            match existing(index, id) {
                Some(existing) => Outcome::Existing(existing),
                None if index.records.len() >= limits::STORE_WORKLOADS_MAX => Outcome::Refused,
                None => published(index.publish(id, Some(record.as_ref().clone()))),
            }
        }
        Act::Remove { id, born } => {
            if born_at(index, id, *born).is_some() {
                index.publish(id, None);
            }
            Outcome::Gone
        }
        Act::Wish { id, born, wish } => match born_at(index, id, *born) {
            None => Outcome::Gone,
            Some(current) => match wish.apply(&current) {
                Err(_) => Outcome::Refused,
                Ok(None) => Outcome::Existing(current),
                Ok(Some(next)) => published(index.publish(id, Some(next))),
            },
        },
    }
}
