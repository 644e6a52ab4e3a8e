//! What all processes over one store let go without evidence: each writes down what it is about to remove, in turn, so that
//! together they keep to the share.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use prost::Message as _;

use super::guard::Elsewhere;
use crate::{
    model::{Revision, ServiceId},
    rt,
    store::{Condition, Entry, Key, Op},
};

/// `guards/services/{service}`, and [`ALL`].
pub(super) const LOSSES: &str = "guards/";
const ALL: &str = "guards/all";

/// For how long what another process let go may still be shown.
const SETTLES: Duration = Duration::from_secs(5);

/// Records of services that lost nothing for a window, removed with one write.
const CLEANED: usize = 20;

#[derive(Clone, PartialEq, prost::Message)]
struct Losses {
    #[prost(message, repeated, tag = "1")]
    losses: Vec<Loss>,
}

#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
struct Loss {
    /// The process.
    #[prost(uint64, tag = "1")]
    boot: u64,
    /// Seconds since 1970, by its clock.
    #[prost(uint64, tag = "2")]
    at: u64,
    #[prost(uint64, tag = "3")]
    count: u64,
}

/// What is written down, as one process reads it.
#[derive(Debug, Default)]
pub(super) struct Written {
    boot: u64,
    now: u64,
    records: BTreeMap<Key, (Revision, Losses)>,
    outdated: Vec<(Key, Revision)>,
}

fn key(service: &ServiceId) -> Key {
    format!("{LOSSES}services/{service}").into()
}

fn seconds(at: SystemTime) -> u64 {
    at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

impl Written {
    pub(super) fn read(boot: u64, entries: Vec<Entry>, window: Duration) -> Self {
        let now = seconds(rt::now());
        let mut written = Self { boot, now, ..Self::default() };
        for Entry { key, value, revision } in entries {
            // What cannot be read is written anew.
            let mut losses = Losses::decode(value).unwrap_or_default();
            losses.losses.retain(|loss| loss.at.saturating_add(window.as_secs()) > now);
            if losses.losses.is_empty() {
                written.outdated.push((key.clone(), revision));
            }
            written.records.insert(key, (revision, losses));
        }
        written
    }

    /// Of a service; of all without one.
    pub(super) fn elsewhere(&self, service: Option<&ServiceId>) -> Elsewhere {
        let key = service.map_or_else(|| ALL.into(), key);
        let mut elsewhere = Elsewhere::default();
        for loss in self.records.get(&key).iter().flat_map(|(_, losses)| &losses.losses) {
            if loss.boot != self.boot {
                let count = usize::try_from(loss.count).unwrap_or(usize::MAX);
                elsewhere.lost += count;
                elsewhere.going += if loss.at + SETTLES.as_secs() > self.now { count } else { 0 };
            }
        }
        elsewhere
    }

    /// Writes down what goes now, if nobody wrote meanwhile.
    pub(super) fn ops(&self, going: &[(&ServiceId, usize)]) -> Vec<Op> {
        let all: usize = going.iter().map(|(_, count)| count).sum();
        let mut ops: Vec<Op> = going.iter().map(|(service, count)| self.put(key(service), *count)).collect();
        let outdated = self.outdated.iter().filter(|(key, _)| !ops.iter().any(|op| op.key() == key));
        let outdated = outdated.filter(|(key, _)| &**key != ALL).take(CLEANED);
        let delete = |(key, revision): &(Key, Revision)| Op::Delete {
            key: key.clone(),
            when: Condition::Unchanged(*revision),
        };
        let outdated: Vec<Op> = outdated.map(delete).collect();
        ops.push(self.put(ALL.into(), all));
        ops.extend(outdated);
        ops
    }

    fn put(&self, key: Key, count: usize) -> Op {
        let (when, mut losses) = match self.records.get(&key) {
            Some((revision, losses)) => (Condition::Unchanged(*revision), losses.clone()),
            None => (Condition::Absent, Losses::default()),
        };
        let count = count as u64;
        match losses.losses.iter_mut().find(|loss| loss.boot == self.boot && loss.at == self.now) {
            Some(loss) => loss.count += count,
            None => losses.losses.push(Loss { boot: self.boot, at: self.now, count }),
        }
        Op::Put { key, value: losses.encode_to_vec().into(), when }
    }
}
