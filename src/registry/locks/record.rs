//! What the store keeps of a lock, and its wire form.

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use prost::Message as _;

use crate::{
    model::{Lock, LockName, Revision},
    proto::v1,
    registry::Error,
    store::{Entry, Key},
};

pub(super) const LOCKS: &str = "locks/";

pub(super) fn key(name: &LockName) -> Key {
    format!("{LOCKS}{name}").into()
}

/// The stored form. A lock that is being taken has no token yet: its commit will be that.
pub(super) fn encode(lock: &Lock) -> Bytes {
    let kept = v1::Lock { name: String::new(), revision: 0, ..lock_to_proto(lock, 0) };
    let record = v1::LockRecord { lock: Some(kept), attempt: lock.attempt.clone(), run: lock.run };
    record.encode_to_vec().into()
}

/// The name that a key of the store stands for.
pub(super) fn name(key: &Key) -> Result<LockName, Error> {
    let name = key.strip_prefix(LOCKS).unwrap_or(key);
    name.parse().map_err(|reason| Error::Record { key: key.to_string(), reason })
}

pub(super) fn decode(entry: &Entry) -> Result<Lock, Error> {
    let Entry { key, value, revision } = entry;
    let wrong = |reason: String| Error::Record { key: key.to_string(), reason };
    let name = name(key)?;
    let record = v1::LockRecord::decode(value.clone()).map_err(|e| wrong(e.to_string()))?;
    let lock = record.lock.ok_or_else(|| wrong("it holds no lock".to_owned()))?;
    let ttl = lock.ttl.ok_or_else(|| wrong("ttl: is missing".to_owned()))?;
    let since = lock.since.map_or(Ok(SystemTime::UNIX_EPOCH), SystemTime::try_from);
    Ok(Lock {
        name,
        token: if lock.token == 0 { *revision } else { Revision(lock.token) },
        holder: lock.holder,
        attempt: record.attempt,
        ttl: Duration::try_from(ttl).map_err(|e| wrong(format!("ttl: {e}")))?,
        since: since.map_err(|e| wrong(format!("since: {e}")))?,
        owner: lock.node.parse().map_err(|e| wrong(format!("node: {e}")))?,
        run: record.run,
        revoked: lock.revoked,
        revision: *revision,
    })
}

/// The wire form of a lock that so many wait for.
pub fn lock_to_proto(lock: &Lock, waiting: usize) -> v1::Lock {
    let Lock { name, token, holder, attempt: _, ttl, since, owner, run: _, revoked, revision } = lock;
    v1::Lock {
        name: name.to_string(),
        token: token.0,
        holder: holder.clone(),
        // A TTL is bounded to an hour, far within the range of the message.
        ttl: Some(prost_types::Duration::try_from(*ttl).unwrap_or_default()),
        since: Some((*since).into()),
        node: owner.to_string(),
        revoked: *revoked,
        revision: revision.0,
        waiting: u32::try_from(waiting).unwrap_or(u32::MAX),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_reads_back_as_it_was_and_the_first_commit_is_the_token() {
        let mut lock = Lock {
            name: "nightly".parse().unwrap(),
            token: Revision(0),
            holder: "host 7".into(),
            attempt: "x".into(),
            ttl: Duration::from_millis(1500),
            since: SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000),
            owner: "n1".parse().unwrap(),
            run: u64::MAX,
            revoked: true,
            revision: Revision(9),
        };
        let read = |lock: &Lock| {
            decode(&Entry { key: key(&lock.name), value: encode(lock), revision: Revision(9) }).unwrap()
        };
        assert_eq!(read(&lock).token, Revision(9));
        lock.token = Revision(7);
        assert_eq!(read(&lock), lock);
        let junk = Entry { key: key(&lock.name), value: Bytes::from_static(b"\xff"), revision: Revision(1) };
        assert!(decode(&junk).is_err());
    }
}
