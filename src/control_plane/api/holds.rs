//! Requests that take their time: waits, logs and commands. Each holds a connection here, and one to its agent but for waits; so there
//! are only so many, and what is quick finds both ends open.
//!
//! Invariant: holds <= `HOLDS_MAX`, and of one node <= `NODE_HOLDS_MAX`.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::limits;
use crate::workload::Name;

/// Who holds, by node.
#[derive(Debug, Default)]
pub(super) struct Holds(Mutex<BTreeMap<Name, usize>>);

/// A place among them; given back when dropped.
#[derive(Debug)]
pub(super) struct Hold {
    holds: Arc<Holds>,
    node: Name,
}

impl Holds {
    /// A place for a request about a workload of `node`; `None` when there are as many as there may be.
    pub(super) fn take(self: &Arc<Self>, node: &Name) -> Option<Hold> {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (all, here) = (counts.values().sum::<usize>(), counts.get(node).copied().unwrap_or_default());
        if all >= limits::HOLDS_MAX || here >= limits::NODE_HOLDS_MAX {
            return None;
        }
        counts.insert(node.clone(), here + 1);
        Some(Hold { holds: Arc::clone(self), node: node.clone() })
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut counts = self.holds.0.lock().unwrap_or_else(PoisonError::into_inner);
        match counts.get_mut(&self.node) {
            Some(here) if *here > 1 => *here -= 1,
            _ => drop(counts.remove(&self.node)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_has_so_many_and_all_together_have_so_many() {
        let holds = Arc::<Holds>::default();
        let name = |i: usize| Name::new(&format!("n{i}")).expect("a name");
        let mut held: Vec<Hold> = std::iter::from_fn(|| holds.take(&name(0))).collect();
        assert_eq!(held.len(), limits::NODE_HOLDS_MAX);
        held.extend((1..).map_while(|i| holds.take(&name(i))));
        assert_eq!(held.len(), limits::HOLDS_MAX);
        held.pop();
        assert!(holds.take(&name(0)).is_none() && holds.take(&name(1)).is_some());
        held.clear();
        assert!(holds.0.lock().expect("not poisoned").is_empty());
    }
}
