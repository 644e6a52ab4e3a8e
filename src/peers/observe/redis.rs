//! Redis with Sentinel. An instance that calls itself a master is believed only when a majority of the sentinels names it:
//! an old master that returns is a writable one until they have caught it.

use std::{collections::BTreeMap, net::SocketAddr};

use super::{
    resp::Value,
    said::{Said, Whom},
};
use crate::model::Role;

/// What a sentinel says of the master.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Word {
    pub(super) master: SocketAddr,
    pub(super) epoch: u64,
}

/// Reads `ROLE`.
pub(super) fn role(answer: &Value) -> Result<Said, String> {
    let Value::List(fields) = answer else { return Err(unexpected("ROLE", answer)) };
    let offset = |value: Option<&Value>| match value {
        Some(Value::Number(offset)) => u64::try_from(*offset).unwrap_or(0),
        _ => 0,
    };
    match fields.first().and_then(Value::text) {
        Some("master") => {
            let applied = offset(fields.get(1));
            Ok(Said { role: Role::Leader, leader: Some(Whom::Own), applied, ..Said::default() })
        }
        Some("slave") => {
            let host = fields.get(1).and_then(Value::text).and_then(|host| host.parse().ok());
            let port = match fields.get(2) {
                Some(Value::Number(port)) => u16::try_from(*port).ok(),
                _ => None,
            };
            // While it takes the whole data of its master anew it has none to be read.
            let copying = fields.get(3).and_then(Value::text) == Some("sync");
            Ok(Said {
                role: if copying { Role::Unknown } else { Role::Follower },
                leader: host.zip(port).map(|(host, port)| Whom::At(SocketAddr::new(host, port))),
                applied: offset(fields.get(4)),
                ..Said::default()
            })
        }
        Some("sentinel") => Err("this is a sentinel, not a replica".to_owned()),
        _ => Err(unexpected("ROLE", answer)),
    }
}

/// Reads `SENTINEL GET-MASTER-ADDR-BY-NAME` and `SENTINEL MASTER`. The address comes from the first: while the sentinel that
/// leads a failover reconfigures the others, only that has the new one, and the second the new epoch.
pub(super) fn word(address: &Value, details: &Value) -> Result<Word, String> {
    let unexpected_address = || unexpected("SENTINEL GET-MASTER-ADDR-BY-NAME", address);
    let Value::List(pair) = address else { return Err(unexpected_address()) };
    let [host, port] = pair.as_slice() else { return Err(unexpected_address()) };
    let host = host.text().and_then(|host| host.parse().ok());
    let port = port.text().and_then(|port| port.parse().ok());
    let (Some(host), Some(port)) = (host, port) else { return Err(unexpected_address()) };
    let Value::List(fields) = details else { return Err(unexpected("SENTINEL MASTER", details)) };
    let field = fields.as_chunks::<2>().0.iter().find(|[name, _]| name.text() == Some("config-epoch"));
    let epoch = field.and_then(|[_, epoch]| epoch.text()?.parse().ok());
    let epoch = epoch.ok_or_else(|| unexpected("SENTINEL MASTER", details))?;
    Ok(Word { master: SocketAddr::new(host, port), epoch })
}

fn unexpected(command: &str, answer: &Value) -> String {
    match answer {
        Value::Error(said) => format!("{command} was answered with: {}", crate::model::excerpt(said)),
        Value::Null => format!("{command} was answered with nothing: is the master known by that name?"),
        _ => format!("{command} was answered in an unknown form"),
    }
}

/// What more than half of all sentinels say, those included that say nothing.
pub(super) fn majority(words: &[Option<Word>]) -> Option<Word> {
    let mut counts: BTreeMap<Word, usize> = BTreeMap::new();
    for word in words.iter().flatten() {
        *counts.entry(*word).or_default() += 1;
    }
    counts.into_iter().find(|(_, count)| *count > words.len() / 2).map(|(word, _)| word)
}

/// What the instance that listens `at` these addresses is, by its own words and those of the sentinels.
pub(super) fn judge(said: &Said, at: &[SocketAddr], word: Option<Word>) -> Said {
    let mut judged = said.clone();
    judged.term = word.map_or(0, |word| word.epoch);
    match (said.role, word) {
        (Role::Leader, Some(word)) if at.contains(&word.master) => {}
        // It is a master for itself only.
        (Role::Leader, _) => {
            judged.role = Role::Unknown;
            judged.leader = None;
        }
        // It copies one that is no master any more.
        (Role::Follower, Some(word)) if said.leader != Some(Whom::At(word.master)) => {
            judged.role = Role::Unknown;
        }
        _ => {}
    }
    judged
}
