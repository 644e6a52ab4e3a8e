#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    net::SocketAddr,
    sync::Arc,
    time::SystemTime,
};

use tokio::time::Instant;

use super::{
    Entry, Protocol, ProxyStatus, Rejection, Resource, ResourceSet, ResourceType, TypeStatus,
    names::{collection, is_glob},
};
use crate::{model::Revision, rt};

/// What of a type is not acknowledged though the revisions do not tell it. Empty most of the time.
#[derive(Debug, Clone, Default)]
pub(super) struct Flight {
    /// Since when an answer is waited for, and what the last response was about.
    pub unanswered: Option<(Instant, Arc<Vec<Arc<str>>>)>,
    /// Names that are still to be sent.
    pub due: Vec<Arc<str>>,
    /// Names whose removal is still to be sent.
    pub held: Vec<Arc<str>>,
    /// Changes up to here have been sent or are in `due`; `None` while everything is still to be sent.
    pub considered: Option<Revision>,
}

/// Whom a revision concerns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Concern {
    /// Everybody, with all that they asked for.
    All,
    /// Whoever is sent the endpoints of one of these names, and only this type of theirs.
    Endpoints(Vec<Arc<str>>),
    /// Whoever is sent a resource that the change made or removed.
    Change {
        /// The services that it touched, and the other names of their instances.
        services: BTreeSet<Arc<str>>,
        /// One of them came or went: resources that list services have changed too.
        listed: bool,
    },
}

impl Concern {
    /// The endpoints of this name, or all.
    #[cfg(test)]
    pub(super) fn of(endpoints: Option<&str>) -> Self {
        endpoints.map_or(Self::All, |name| Self::Endpoints(vec![name.into()]))
    }
}

/// What a stream lacks of a revision.
#[derive(Debug, Clone)]
pub struct Lack {
    /// Who it says it is.
    pub node_id: String,
    /// The other end of its connection.
    pub peer: Option<SocketAddr>,
    /// Which form of the protocol it speaks.
    pub protocol: Protocol,
    /// Since when it has been connected.
    pub connected_at: SystemTime,
    /// The type that it has not acknowledged.
    pub kind: ResourceType,
    /// Why.
    pub why: Why,
}

/// Why a stream lacks something.
#[derive(Debug, Clone)]
pub enum Why {
    /// It is still to be sent.
    NotSent,
    /// A response has not been answered since then.
    NotAnswered(SystemTime),
    /// The client rejected it.
    Rejected(Arc<Rejection>),
}

type Lacks = Vec<(ResourceType, Why)>;

/// Names by type.
type About = Vec<(ResourceType, Vec<Arc<str>>)>;

/// Says of each stream what it lacks of a revision, looking at each resource set once.
pub(super) struct Relevant<'a> {
    revision: Revision,
    concern: &'a Concern,
    /// Names by type that the change is about, by the address of the set, which is kept so that it stays the set's.
    known: BTreeMap<usize, (Arc<ResourceSet>, About)>,
}

impl<'a> Relevant<'a> {
    pub(super) fn new(revision: Revision, concern: &'a Concern) -> Self {
        Self { revision, concern, known: BTreeMap::new() }
    }

    /// What a stream with these types, served from `set`, which nothing concerned up to `quiet` since, lacks; `None` if the
    /// revision does not concern it.
    pub(super) fn lacks(
        &mut self,
        types: &[TypeStatus],
        set: Option<&Arc<ResourceSet>>,
        quiet: Revision,
    ) -> Option<Lacks> {
        let revision = self.revision;
        match self.concern {
            Concern::All => {
                let behind = types.iter().filter(|of| !of.has(revision, None, quiet));
                Some(behind.map(|of| (of.kind, of.why(None))).collect())
            }
            Concern::Endpoints(names) => {
                let of = types.iter().find(|of| of.kind == ResourceType::Endpoints)?;
                let names: Vec<_> = names.iter().filter(|name| of.subscription.covers(name)).collect();
                if names.is_empty() {
                    return None;
                }
                let mut lacks: Lacks = of.lack(revision, names.iter().copied(), quiet).into_iter().collect();
                // They may be in collections: then the change is in one of these.
                let entries = names.iter().filter_map(|name| set?.get(ResourceType::Endpoints, name));
                let globs: Vec<_> = entries.map(|entry| Arc::clone(&entry.resource.needs)).collect();
                if let Some(of) = types.iter().find(|of| of.kind == ResourceType::LbEndpoint) {
                    let globs = globs.iter().flat_map(|globs| globs.iter());
                    let globs = globs.filter(|glob| of.subscription.covers(glob));
                    lacks.extend(of.lack(revision, globs, quiet));
                }
                Some(lacks)
            }
            Concern::Change { services, listed } => {
                let about = match set {
                    Some(set) => {
                        let at = Arc::as_ptr(set).addr();
                        let (_, names) = self
                            .known
                            .entry(at)
                            .or_insert_with(|| (Arc::clone(set), about(set, revision, services, *listed)));
                        names
                    }
                    // Not known yet what it is to be sent: it lacks whatever it asks for.
                    None => {
                        &ResourceType::ALL.map(|kind| (kind, services.iter().cloned().collect())).to_vec()
                    }
                };
                let mut concerned = false;
                let mut lacks = Lacks::new();
                for of in types {
                    let names =
                        about.iter().filter(|(kind, _)| *kind == of.kind).flat_map(|(_, names)| names);
                    let names: Vec<_> = names.filter(|name| of.subscription.covers(name)).collect();
                    concerned |= !names.is_empty();
                    lacks.extend(of.lack(revision, names, quiet));
                }
                concerned.then_some(lacks)
            }
        }
    }
}

/// Names by type that are in `set` because of the change that was `revision`, or of a later one to the same service.
fn about(set: &ResourceSet, revision: Revision, services: &BTreeSet<Arc<str>>, listed: bool) -> About {
    let before = Revision(revision.0.saturating_sub(1));
    // What their endpoints are in, if these are in collections.
    let globs: BTreeSet<Arc<str>> = services
        .iter()
        .filter_map(|service| set.get(ResourceType::Endpoints, service))
        .flat_map(|entry| entry.resource.needs.iter().cloned())
        .collect();
    let newer = |kind, name: &str| match set.get(kind, name) {
        Some(entry) => entry.changed >= revision,
        None => set.gone(kind, name).is_some_and(|gone| gone.removed >= revision),
    };
    ResourceType::ALL
        .into_iter()
        .map(|kind| {
            // A set that has not come that far yet is about to.
            let behind = set.revision() < revision;
            let own = services.iter().filter(|name| behind || newer(kind, name));
            let mut names: BTreeSet<Arc<str>> = own.cloned().collect();
            if kind == ResourceType::LbEndpoint {
                let theirs = |name: &&Arc<str>| {
                    collection(name).is_some_and(|glob| globs.contains(glob.as_str())) && newer(kind, name)
                };
                names = match set.changed_since(kind, before) {
                    _ if behind || globs.is_empty() => globs.clone(),
                    Some(changed) => changed.filter(theirs).cloned().collect(),
                    None => set.iter(kind).map(|(name, _)| name).filter(theirs).cloned().collect(),
                };
            }
            let listing =
                !matches!(kind, ResourceType::Cluster | ResourceType::Endpoints | ResourceType::LbEndpoint);
            if listed && listing {
                let no_service = |name: &&Arc<str>| set.get(ResourceType::Cluster, name).is_none();
                match set.changed_since(kind, before) {
                    Some(changed) => names.extend(changed.filter(no_service).cloned()),
                    None => {
                        let changed = set.iter(kind).filter(|(name, _)| newer(kind, name));
                        names.extend(changed.map(|(name, _)| name).filter(no_service).cloned());
                    }
                }
            }
            (kind, names.into_iter().collect())
        })
        .collect()
}

impl TypeStatus {
    /// What it lacks of `revision` as far as these names go.
    fn lack<'a>(
        &self,
        revision: Revision,
        names: impl IntoIterator<Item = &'a Arc<str>>,
        quiet: Revision,
    ) -> Option<(ResourceType, Why)> {
        let lacked: Vec<_> =
            names.into_iter().filter(|name| !self.has(revision, Some(name), quiet)).collect();
        let rejected = lacked.iter().find(|name| self.is_rejected(name)).copied();
        lacked.first().map(|first| (self.kind, self.why(Some(rejected.unwrap_or(first)))))
    }

    /// Whether it was in a rejected response, or anything of it if it is a collection.
    pub(super) fn is_rejected(&self, name: &str) -> bool {
        let is_meant = |of: &Arc<str>| collection(of).is_some_and(|glob| glob == name);
        self.unaccepted
            .iter()
            .any(|group| if is_glob(name) { group.iter().any(is_meant) } else { group.contains(name) })
    }

    /// Why it lacks a name, or anything.
    fn why(&self, name: Option<&str>) -> Why {
        let rejected = match name {
            Some(name) => self.is_rejected(name),
            None => !self.unaccepted.is_empty(),
        };
        match (self.rejections.last(), &self.flight.unanswered) {
            (Some(last), _) if rejected => Why::Rejected(Arc::clone(last)),
            (_, Some((since, _))) => Why::NotAnswered(rt::at(*since)),
            (_, None) => Why::NotSent,
        }
    }
}

/// A resource as one stream has it.
#[derive(Debug, Clone)]
pub struct Held {
    /// Its type.
    pub kind: ResourceType,
    /// Its name.
    pub name: Arc<str>,
    /// What the stream is to hold; what it last was to hold if it was removed; `None` if there is no such thing.
    pub resource: Option<Arc<Resource>>,
    /// The revision at which it got this content or was removed; 0 if there is no such thing.
    pub changed: Revision,
    /// It was removed: the stream is to hold it no longer.
    pub removed: bool,
    /// How far it got.
    pub delivery: Delivery,
    /// Whether the stream has acknowledged an earlier content of it.
    pub earlier: bool,
}

/// How far a resource got on its way to a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Delivery {
    /// The client has it.
    Acknowledged,
    /// It was sent and is not answered.
    Sent,
    /// It is still to be sent.
    Pending,
    /// The client rejected the response that it was in, and nothing that has it was accepted since.
    Rejected,
    /// The client asks for it, but there is no such thing.
    Absent,
}

impl ProxyStatus {
    /// The resources of a type that it asked for, by name, each with how far it got; removed ones only until the client
    /// has acknowledged that.
    pub fn holds(&self, kind: ResourceType) -> Vec<Held> {
        let Some(of) = self.types.iter().find(|of| of.kind == kind) else { return Vec::new() };
        let asked = of.subscription.names();
        let Some(set) = &self.set else {
            return asked.iter().map(|name| absent(kind, name, Delivery::Pending)).collect();
        };
        let look = Look::of(of, set);
        let mut names: BTreeSet<&Arc<str>> = asked.iter().collect();
        if of.subscription.is_wildcard() {
            names.extend(set.iter(kind).map(|(name, _)| name));
        }
        names.extend(look.sent.iter().chain(&look.due));
        for glob in asked.iter().filter(|name| is_glob(name)) {
            let before = names.len();
            names.extend(set.members(kind, glob).map(|(name, _)| name));
            // An empty one is shown as such.
            if names.len() > before {
                names.remove(glob);
            }
        }
        names.into_iter().filter_map(|name| look.at(name)).collect()
    }

    /// One resource that it asked for and that there is.
    pub fn holding(&self, kind: ResourceType, name: &str) -> Option<Held> {
        let of = self.types.iter().find(|of| of.kind == kind && of.subscription.covers(name))?;
        let set = self.set.as_ref()?;
        Look::of(of, set).at(&set.get(kind, name)?.resource.name)
    }
}

fn absent(kind: ResourceType, name: &Arc<str>, delivery: Delivery) -> Held {
    Held {
        kind,
        name: Arc::clone(name),
        resource: None,
        changed: Revision(0),
        removed: false,
        delivery,
        earlier: false,
    }
}

/// A look at one type of one stream.
struct Look<'a> {
    of: &'a TypeStatus,
    set: &'a ResourceSet,
    sent: HashSet<&'a Arc<str>>,
    due: HashSet<&'a Arc<str>>,
    /// Collections that are due as a whole.
    globs: HashSet<&'a str>,
}

impl<'a> Look<'a> {
    fn of(of: &'a TypeStatus, set: &'a ResourceSet) -> Self {
        let unanswered = of.flight.unanswered.iter().flat_map(|(_, names)| names.iter());
        let due = of.flight.due.iter().chain(&of.flight.held);
        let due: HashSet<_> = due.collect();
        let globs = due.iter().copied().filter(|name| is_glob(name)).map(AsRef::as_ref).collect();
        Self { of, set, sent: unanswered.collect(), due, globs }
    }

    fn at(&self, name: &Arc<str>) -> Option<Held> {
        let kind = self.of.kind;
        if let Some(Entry { resource, changed, since, .. }) = self.set.get(kind, name) {
            return Some(Held {
                kind,
                name: Arc::clone(name),
                resource: Some(Arc::clone(resource)),
                changed: *changed,
                removed: false,
                delivery: self.delivery(name, *changed),
                earlier: *since <= self.of.settled && since < changed,
            });
        }
        let delivery = match (self.sent.contains(name), self.due.contains(name)) {
            (true, _) => Delivery::Sent,
            (false, true) => Delivery::Pending,
            (false, false) => Delivery::Absent,
        };
        match self.set.gone(kind, name) {
            Some(gone) if delivery != Delivery::Absent => Some(Held {
                kind,
                name: Arc::clone(name),
                resource: Some(Arc::clone(&gone.last)),
                changed: gone.removed,
                removed: true,
                delivery,
                earlier: true,
            }),
            _ => self.of.subscription.names().contains(name).then(|| absent(kind, name, Delivery::Absent)),
        }
    }

    fn delivery(&self, name: &Arc<str>, changed: Revision) -> Delivery {
        if self.sent.contains(name) {
            Delivery::Sent
        } else if self.of.flight.considered.is_none_or(|considered| changed > considered)
            || self.due.contains(name)
            || (!self.globs.is_empty()
                && collection(name).is_some_and(|glob| self.globs.contains(glob.as_str())))
        {
            Delivery::Pending
        } else if self.of.is_rejected(name) {
            Delivery::Rejected
        } else if changed > self.of.settled {
            // In a response that a later one superseded before it was answered, or in a part of one that is not whole.
            Delivery::Sent
        } else {
            Delivery::Acknowledged
        }
    }
}
