use std::sync::Arc;

use imbl::OrdSet;

use super::{
    Config, ProtocolError, ResourceSet, ResourceType,
    names::{NameSet, collection},
};

/// The name that stands for all resources of a type (rule W2).
const WILDCARD: &str = "*";

/// What a stream asked for, of one type. Names that do not exist are remembered (rule W7); a clone costs nothing.
#[derive(Debug, Clone, Default)]
pub struct Subscription {
    wildcard: bool,
    /// Whether any name was ever sent: from then on an empty list is no wildcard (rule W3).
    named: bool,
    names: NameSet,
}

/// What a request changed.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Delta {
    /// All resources were asked for.
    pub everything: bool,
    /// Names that were asked for: in delta again, too.
    pub added: Vec<Arc<str>>,
    /// Names that were given up and had been subscribed to.
    pub removed: Vec<Arc<str>>,
    /// The wildcard was given up.
    pub wildcard_off: bool,
}

/// What a subscription must respect.
#[derive(Debug, Clone, Copy)]
pub(super) struct Terms<'a> {
    pub kind: ResourceType,
    pub config: &'a Config,
    /// Whether an empty first request means everything (rules W3, W10).
    pub legacy_wildcard: bool,
    /// Names that the stream has in its other subscriptions.
    pub elsewhere: usize,
    /// Where to find names to share.
    pub set: Option<&'a ResourceSet>,
}

impl Terms<'_> {
    /// Rule W1: only listeners and clusters have the wildcard that is not spelled out; and virtual hosts, whose first request is
    /// empty in Envoy, which spells the wildcard out when it comes back.
    fn empty_is_wildcard(&self) -> bool {
        use ResourceType::{Cluster, Listener, VirtualHost};
        self.legacy_wildcard && matches!(self.kind, Cluster | Listener | VirtualHost)
    }

    fn check(&self, name: &str) -> Result<(), ProtocolError> {
        let (len, limit) = (name.len(), self.config.name_bytes);
        if len > limit {
            return Err(ProtocolError::LongName { len, limit, start: name.chars().take(32).collect() });
        }
        Ok(())
    }

    fn check_count(&self, names: usize) -> Result<(), ProtocolError> {
        let (names, limit) = (names + self.elsewhere, self.config.names_per_stream);
        if names > limit {
            return Err(ProtocolError::ManyNames { names, limit });
        }
        Ok(())
    }

    /// The name, in the set's own memory if it is there.
    fn share(&self, name: &str) -> Arc<str> {
        let known = self.set.and_then(|set| set.get(self.kind, name));
        known.map_or_else(|| name.into(), |entry| Arc::clone(&entry.resource.name))
    }

    /// All names of the set, if these are among the `wanted`.
    fn all_of(&self, wanted: &[String]) -> Option<NameSet> {
        let all = self.set?.names(self.kind);
        if all.is_empty() || wanted.len() < all.len() {
            return None;
        }
        let found = real(wanted).filter_map(|name| all.get(name));
        let mut found: Vec<usize> = found.map(|name| Arc::as_ptr(name).addr()).collect();
        found.sort_unstable();
        found.dedup();
        (found.len() == all.len()).then(|| all.clone())
    }

    /// All names of the set are one and the same set for all streams, however many streams there are.
    fn share_all(&self, names: &mut NameSet) {
        if let Some(set) = self.set {
            names.share(set.names(self.kind));
        }
    }
}

impl Subscription {
    /// Whether everything is subscribed to.
    pub fn is_wildcard(&self) -> bool {
        self.wildcard
    }

    /// Whether everything is subscribed to, and no name was ever sent.
    pub(super) fn is_legacy_wildcard(&self) -> bool {
        self.wildcard && !self.named
    }

    /// The names that were asked for by name.
    pub fn names(&self) -> &OrdSet<Arc<str>> {
        self.names.as_set()
    }

    /// Whether nothing is subscribed to.
    pub fn is_empty(&self) -> bool {
        !self.wildcard && self.names.is_empty()
    }

    /// Whether `name` is subscribed to: by name, by wildcard, or with the glob collection that it is in (rule X3).
    pub fn covers(&self, name: &str) -> bool {
        self.wildcard
            || self.names.contains(name)
            || collection(name).is_some_and(|glob| self.names.contains(&glob))
    }

    /// Whether both are the same down to their memory. False may be wrong.
    pub(super) fn shares(&self, other: &Self) -> bool {
        (self.wildcard, self.named) == (other.wildcard, other.named) && self.names().ptr_eq(other.names())
    }

    /// A request of SotW, which states everything that is subscribed to (rule W5).
    pub(super) fn replace(&mut self, names: &[String], terms: Terms<'_>) -> Result<Delta, ProtocolError> {
        // Before anything is made of them.
        terms.check_count(real(names).count())?;
        let had_wildcard = self.wildcard;
        if names.is_empty() {
            // Rule W3: legacy wildcard until a name was ever sent.
            self.wildcard = !self.named && terms.empty_is_wildcard();
        } else {
            self.named = true;
            self.wildcard = names.iter().any(|name| name == WILDCARD);
        }
        let mut next = NameSet::default();
        let mut added = Vec::new();
        for name in real(names) {
            terms.check(name)?;
            let before = self.names.get(name);
            let shared = before.map_or_else(|| terms.share(name), Arc::clone);
            if next.insert(Arc::clone(&shared)) && before.is_none() {
                added.push(shared);
            }
        }
        let removed = self.names().iter().filter(|name| !next.contains(name)).cloned().collect();
        self.names = next;
        terms.share_all(&mut self.names);
        Ok(Delta {
            everything: self.wildcard && !had_wildcard,
            added,
            removed,
            wildcard_off: had_wildcard && !self.wildcard,
        })
    }

    /// A request of delta, which states what is added and what is given up, in this order (rule D3). Giving up what was
    /// not subscribed to does nothing (rule D8).
    pub(super) fn update(
        &mut self,
        subscribe: &[String],
        unsubscribe: &[String],
        first: bool,
        terms: Terms<'_>,
    ) -> Result<Delta, ProtocolError> {
        // Before anything is made of them.
        terms.check_count(subscribe.len())?;
        let mut delta = Delta::default();
        if first && subscribe.is_empty() && terms.empty_is_wildcard() {
            self.wildcard = true;
            delta.everything = true;
        }
        self.named |= !subscribe.is_empty();
        if subscribe.iter().any(|name| name == WILDCARD) {
            self.wildcard = true;
            delta.everything = true;
        }
        if let Some(all) = terms.all_of(subscribe).filter(|_| self.names.is_empty()) {
            // What a proxy that comes back asks for: it costs little and shares its memory.
            self.names = all;
        }
        for name in real(subscribe) {
            terms.check(name)?;
            let shared = match self.names.get(name) {
                Some(known) => Arc::clone(known),
                None => {
                    let shared = terms.share(name);
                    self.names.insert(Arc::clone(&shared));
                    shared
                }
            };
            delta.added.push(shared);
        }
        terms.check_count(self.names.len())?;
        for name in real(unsubscribe) {
            delta.removed.extend(self.names.remove(name));
        }
        terms.share_all(&mut self.names);
        if self.wildcard && unsubscribe.iter().any(|name| name == WILDCARD) {
            self.wildcard = false;
            delta.everything = false;
            delta.wildcard_off = true;
        }
        if !delta.removed.is_empty() {
            delta.added.retain(|name| self.names.contains(name));
        }
        Ok(delta)
    }
}

/// The names that can name a resource: not the wildcard, and not the empty string that some clients send to unsubscribe
/// (rule W11).
fn real(names: &[String]) -> impl Iterator<Item = &String> {
    names.iter().filter(|name| !name.is_empty() && *name != WILDCARD)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        model::Revision,
        xds::{Change, testing::resource},
    };

    fn names(list: &[&str]) -> Vec<String> {
        list.iter().map(|name| (*name).to_owned()).collect()
    }

    fn terms(config: &Config, kind: ResourceType) -> Terms<'_> {
        Terms { kind, config, legacy_wildcard: true, elsewhere: 0, set: None }
    }

    fn show(subscription: &Subscription) -> Vec<&str> {
        let wildcard = subscription.is_wildcard().then_some("*");
        wildcard.into_iter().chain(subscription.names().iter().map(AsRef::as_ref)).collect()
    }

    /// Each request and what is subscribed to after it.
    fn check_sotw(kind: ResourceType, steps: &[(&[&str], &[&str])]) {
        let config = Config::default();
        let mut subscription = Subscription::default();
        for (request, want) in steps {
            subscription.replace(&names(request), terms(&config, kind)).unwrap();
            assert_eq!(show(&subscription), *want, "after {request:?} of {steps:?}");
        }
    }

    /// Each request (subscribe, unsubscribe) and what is subscribed to after it.
    fn check_delta(kind: ResourceType, steps: &[(&[&str], &[&str], &[&str])]) {
        let config = Config::default();
        let mut subscription = Subscription::default();
        for (index, (add, remove, want)) in steps.iter().enumerate() {
            subscription.update(&names(add), &names(remove), index == 0, terms(&config, kind)).unwrap();
            assert_eq!(show(&subscription), *want, "after +{add:?} -{remove:?} of {steps:?}");
        }
    }

    #[test]
    fn w4_walk_sotw() {
        check_sotw(
            ResourceType::Cluster,
            &[(&[], &["*"]), (&["*", "A"], &["*", "A"]), (&["A"], &["A"]), (&[], &[])],
        );
    }

    #[test]
    fn w4_walk_delta() {
        check_delta(
            ResourceType::Cluster,
            &[
                (&[], &[], &["*"]),
                (&["A"], &[], &["*", "A"]),
                (&[], &["*"], &["A"]),
                (&[], &["A"], &[]),
                (&[], &[], &[]),
            ],
        );
    }

    #[test]
    fn w3_empty_is_wildcard_only_until_a_name_was_sent() {
        check_sotw(ResourceType::Listener, &[(&[], &["*"]), (&[], &["*"]), (&["A"], &["A"]), (&[], &[])]);
        check_sotw(ResourceType::Listener, &[(&["*"], &["*"]), (&[], &[])]);
        check_delta(ResourceType::Listener, &[(&["A"], &[], &["A"]), (&[], &["A"], &[]), (&[], &[], &[])]);
        check_delta(ResourceType::Listener, &[(&["*"], &[], &["*"]), (&[], &["*"], &[]), (&[], &[], &[])]);
    }

    #[test]
    fn w1_empty_is_no_wildcard_for_endpoints_and_routes() {
        for kind in [ResourceType::Endpoints, ResourceType::Route] {
            check_sotw(kind, &[(&[], &[])]);
            check_delta(kind, &[(&[], &[], &[])]);
        }
    }

    #[test]
    fn w10_empty_is_nothing_where_the_policy_says_so() {
        let config = Config::default();
        let terms = Terms { legacy_wildcard: false, ..terms(&config, ResourceType::Cluster) };
        let mut subscription = Subscription::default();
        subscription.replace(&[], terms).unwrap();
        assert!(subscription.is_empty());
        subscription.update(&[], &[], true, terms).unwrap();
        assert!(subscription.is_empty());
    }

    #[test]
    fn w11_d8_odd_names_are_harmless() {
        check_sotw(ResourceType::Cluster, &[(&["A", "A"], &["A"]), (&[""], &[])]);
        check_delta(
            ResourceType::Cluster,
            &[(&["A", "A", ""], &[], &["A"]), (&[], &["B", "", "*"], &["A"]), (&["C"], &["C"], &["A"])],
        );
    }

    #[test]
    fn d3_w5_changes_are_told() {
        let config = Config::default();
        let terms = terms(&config, ResourceType::Cluster);
        let mut sotw = Subscription::default();
        sotw.replace(&names(&["A", "B"]), terms).unwrap();
        let change = sotw.replace(&names(&["B", "C"]), terms).unwrap();
        assert_eq!((change.added, change.removed), (vec!["C".into()], vec!["A".into()]));
        let mut delta = Subscription::default();
        delta.update(&names(&["A", "B"]), &[], true, terms).unwrap();
        let change = delta.update(&names(&["A", "C"]), &names(&["B"]), false, terms).unwrap();
        assert_eq!((change.added, change.removed), (vec!["A".into(), "C".into()], vec!["B".into()]));
    }

    #[test]
    fn w12_limits_are_named() {
        let config = Config { names_per_stream: 3, name_bytes: 8, ..Config::default() };
        let terms = Terms { elsewhere: 2, ..terms(&config, ResourceType::Cluster) };
        let many = Subscription::default().replace(&names(&["A", "B"]), terms).unwrap_err();
        assert_eq!(many, ProtocolError::ManyNames { names: 4, limit: 3 });
        assert!(many.to_string().contains("names_per_stream"), "{many}");
        let long = Subscription::default().update(&names(&["123456789"]), &[], true, terms).unwrap_err();
        assert!(long.to_string().contains("name_bytes"), "{long}");
    }
    #[test]
    fn whoever_asks_for_all_and_more_shares_the_memory_of_all() {
        let put = |name: &str| Change::Put(resource(ResourceType::Endpoints, name, ""));
        let all: Vec<String> = (0..200).map(|n| format!("name {n}")).collect();
        let set = ResourceSet::default().apply(Revision(1), all.iter().map(|name| put(name)));
        let config = Config::default();
        let terms = Terms { set: Some(&set), ..terms(&config, ResourceType::Endpoints) };
        let ask = |names: &[String]| {
            let mut subscription = Subscription::default();
            let delta = subscription.update(names, &[], true, terms).unwrap();
            assert_eq!(delta.added.len(), names.len());
            let want: OrdSet<Arc<str>> = names.iter().map(|name| Arc::from(name.as_str())).collect();
            assert_eq!(*subscription.names(), want);
            subscription.names().ptr_eq(set.names(ResourceType::Endpoints).as_set())
        };
        assert!(ask(&all));
        assert!(!ask(&[all.clone(), names(&["one more"])].concat()));
        assert!(!ask(&all[1..]));
        // As many, but not all.
        assert!(!ask(&[&all[1..], &all[1..2]].concat()));
    }
}
