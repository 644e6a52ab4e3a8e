//! Which process counts the lease of which instance.
//!
//! Renewals and sessions come to one process, the instance's owner, and cost the store nothing. When the owner is dead, one of
//! the others counts the lease in its place, whole from then on, until the instance's owner comes to some process: that one
//! becomes the owner, with one write.

use std::{fmt, future, sync::Arc};

use super::{Inner, Registry};
use crate::{
    catalog::{Changes, Snapshot},
    model::{Instance, InstanceKey, Lease, MemberId, Members},
};
use tokio::time::Instant;

/// Whether the process that sees these members counts the lease of `name`, which has this owner.
pub(super) fn keeps(members: &Members, owner: Option<&MemberId>, name: impl fmt::Display) -> bool {
    match owner {
        Some(owner) if members.live.contains(owner) => *owner == members.own,
        _ => members.is_mine(&name.to_string()),
    }
}

impl Inner {
    pub(super) fn keeps(&self, instance: &Instance) -> bool {
        keeps(&self.members.borrow(), instance.owner.as_ref(), &instance.key)
    }

    fn adopt<'a>(&self, instances: impl IntoIterator<Item = &'a Instance>) {
        let leases = instances.into_iter().map(|instance| {
            let ttl = match instance.lease {
                Lease::Ttl(ttl) => Some(ttl),
                Lease::Session => None,
            };
            (&instance.key, instance.incarnation, ttl)
        });
        self.leases.adopt(leases, Instant::now());
    }

    /// Counts the leases that it keeps, and no others. That of a stale instance is over, unless a store that went back does not
    /// know that its owner vouches for it again.
    pub(super) fn settle_all(&self, snapshot: &Snapshot) {
        let members = self.members.borrow().clone();
        let mut adopted = Vec::new();
        for instance in snapshot.services().flat_map(|service| service.instances()) {
            if !keeps(&members, instance.owner.as_ref(), &instance.key) {
                self.leases.cede(&instance.key);
            } else if instance.stale.is_none() {
                adopted.push(&**instance);
            } else if self.leases.held(&instance.key, instance.incarnation) {
                self.held.revived((instance.key.clone(), instance.incarnation));
            }
        }
        self.adopt(adopted);
    }

    fn settle(&self, snapshot: &Snapshot, key: &InstanceKey) {
        let Some(instance) = snapshot.instance(key) else { return };
        let members = self.members.borrow().clone();
        if !keeps(&members, instance.owner.as_ref(), &instance.key) {
            self.leases.cede(key);
        } else if instance.owner.as_ref() != Some(&members.own) && instance.stale.is_none() {
            // What it owns itself it counts since the write. If that lease is over, a change must not bring it back.
            self.adopt([&**instance]);
        }
    }
}

impl Registry {
    /// Follows the members and the owners, and counts how often an instance goes; `known` is what this process has looked at.
    pub(super) async fn keep_leases(self, mut known: Arc<Snapshot>) {
        let mut seen = known.revision();
        let mut members = self.inner.members.clone();
        let mut members_changed = async || {
            if members.changed().await.is_err() {
                future::pending::<()>().await;
            }
        };
        loop {
            let (snapshot, changes) = tokio::select! {
                next = self.inner.catalog.newer_than(seen) => match next {
                    Some(next) => next,
                    None => return,
                },
                () = members_changed() => (self.inner.catalog.latest(), Changes::Resync),
            };
            seen = snapshot.revision();
            let now = Instant::now();
            match changes {
                Changes::Resync => self.inner.settle_all(&snapshot),
                Changes::Touched(touched) => {
                    for (service, id) in touched {
                        if let Some(id) = id {
                            let key = InstanceKey { service, id };
                            self.inner.settle(&snapshot, &key);
                            if let Some(before) = known.instance(&key) {
                                self.inner.flaps.note(
                                    before,
                                    snapshot.instance(&key).map(AsRef::as_ref),
                                    now,
                                );
                            }
                        }
                    }
                }
            }
            known = snapshot;
        }
    }
}
