use std::{borrow::Cow, net::IpAddr, num::NonZeroU16, sync::Arc};

use super::Service;
use crate::model::{Instance, InstanceId, Locality, State};

/// The addresses of a service, each with the instance that it stands for: of those that claim one, the first that serves (a
/// successor on the port of a draining or dead one), by id.
#[derive(Debug, Clone, Default)]
pub struct Endpoints {
    addresses: imbl::OrdMap<(IpAddr, NonZeroU16), Claims>,
    /// How many there are, and how many of them serve.
    localities: imbl::OrdMap<Locality, (usize, usize)>,
    weight: u64,
}

#[derive(Debug, Clone)]
struct Claims {
    first: Arc<Instance>,
    /// In order; seldom any.
    others: Option<Arc<[Arc<Instance>]>>,
}

/// From so many instances on, a service keeps its endpoints up; they are made when asked for otherwise.
const KEPT_FROM: usize = 256;

impl Service {
    /// Its endpoints: at no cost for a large service, made anew for a small one.
    pub fn endpoints(&self) -> Cow<'_, Endpoints> {
        match &self.endpoints {
            Some(kept) => Cow::Borrowed(kept),
            None => Cow::Owned(self.count()),
        }
    }

    /// Takes in that an instance came, changed or went.
    pub(super) fn follow(&mut self, before: Option<&Instance>, after: Option<&Arc<Instance>>) {
        let many = self.instances.len();
        if let Some(kept) = &mut self.endpoints {
            before.into_iter().for_each(|before| kept.remove(before));
            after.into_iter().for_each(|after| kept.insert(Arc::clone(after)));
            if many < KEPT_FROM / 2 {
                self.endpoints = None;
            }
        } else if many >= KEPT_FROM {
            self.endpoints = Some(Box::new(self.count()));
        }
    }

    fn count(&self) -> Endpoints {
        let mut all = Endpoints::default();
        self.instances.values().for_each(|instance| all.insert(Arc::clone(instance)));
        all
    }
}

impl Endpoints {
    /// Who claims an address; it stands for the first.
    pub fn claims(&self, address: IpAddr, port: NonZeroU16) -> impl Iterator<Item = &Arc<Instance>> {
        let claims = self.addresses.get(&(address, port));
        claims.into_iter().flat_map(|claims| {
            let others = claims.others.iter().flat_map(|others| others.iter());
            std::iter::once(&claims.first).chain(others)
        })
    }

    /// Whether its address stands for this instance.
    pub fn has(&self, instance: &Instance) -> bool {
        let first = self.claims(instance.address, instance.port).next();
        first.is_some_and(|first| first.key.id == instance.key.id)
    }

    /// Where they are, and how many there serve.
    pub fn localities(&self) -> impl Iterator<Item = (&Locality, usize)> {
        self.localities.iter().map(|(locality, (_, serving))| (locality, *serving))
    }

    /// The sum of their weights.
    pub fn weight(&self) -> u64 {
        self.weight
    }

    fn insert(&mut self, instance: Arc<Instance>) {
        let at = (instance.address, instance.port);
        let mut claims: Vec<_> = self.claims(instance.address, instance.port).cloned().collect();
        let before = claims.first().cloned();
        let place = claims.partition_point(|other| rank(other) < rank(&instance));
        claims.insert(place, instance);
        self.settle(at, before, claims);
    }

    fn remove(&mut self, instance: &Instance) {
        let at = (instance.address, instance.port);
        let mut claims: Vec<_> = self.claims(instance.address, instance.port).cloned().collect();
        let before = claims.first().cloned();
        claims.retain(|other| other.key.id != instance.key.id);
        self.settle(at, before, claims);
    }

    /// Sets who claims an address, which stood for `before`.
    fn settle(
        &mut self,
        at: (IpAddr, NonZeroU16),
        before: Option<Arc<Instance>>,
        claims: Vec<Arc<Instance>>,
    ) {
        let mut claims = claims.into_iter();
        let after = claims.next();
        if let Some(before) = &before {
            self.count(before, false);
        }
        if let Some(after) = &after {
            self.count(after, true);
        }
        match after {
            Some(first) => {
                let others: Arc<[_]> = claims.collect();
                self.addresses.insert(at, Claims { first, others: (!others.is_empty()).then_some(others) });
            }
            None => {
                self.addresses.remove(&at);
            }
        }
    }

    fn count(&mut self, instance: &Instance, comes: bool) {
        let weight = u64::from(instance.weight.get());
        let serves = usize::from(instance.state == State::Serving);
        let (all, serving) = self.localities.get(&instance.locality).copied().unwrap_or_default();
        let (all, serving) = if comes {
            self.weight += weight;
            (all + 1, serving + serves)
        } else {
            self.weight -= weight;
            (all - 1, serving - serves)
        };
        if all == 0 {
            self.localities.remove(&instance.locality);
        } else {
            self.localities.insert(instance.locality.clone(), (all, serving));
        }
    }
}

fn rank(instance: &Instance) -> (State, &InstanceId) {
    (instance.state, &instance.key.id)
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, time::SystemTime};

    use proptest::prelude::*;

    use super::*;
    use crate::{
        catalog::{Change, Snapshot},
        model::{Incarnation, InstanceKey, Lease, Revision},
    };

    fn put(id: usize, port: u16, zone: u8, weight: u32, serving: bool) -> Change {
        Change::PutInstance(Instance {
            key: key(id),
            incarnation: Incarnation(1),
            address: [127, 0, 0, 1].into(),
            port: port.try_into().unwrap(),
            locality: Locality { zone: zone.to_string().into(), ..Locality::default() },
            weight: weight.try_into().unwrap(),
            metadata: BTreeMap::new(),
            state: if serving { State::Serving } else { State::Draining },
            lease: Lease::Session,
            owner: None,
            revision: Revision(1),
            registered_at: SystemTime::UNIX_EPOCH,
        })
    }

    fn key(id: usize) -> InstanceKey {
        InstanceKey { service: "a".parse().unwrap(), id: format!("i{id}").parse().unwrap() }
    }

    /// Everything that can be asked of it.
    fn show(service: &Service, of: &Endpoints) -> (Vec<String>, u64, Vec<(Locality, usize)>) {
        let claims = service.instances().map(|instance| {
            let claims = of.claims(instance.address, instance.port).map(|claim| claim.key.id.to_string());
            format!("{} {} {}", instance.key.id, of.has(instance), claims.collect::<Vec<_>>().join(" "))
        });
        let localities = of.localities().map(|(place, serving)| (place.clone(), serving));
        (claims.collect(), of.weight(), localities.collect())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        /// What a large service keeps up is what would be made of it anew, and an address stands for who serves before who drains.
        #[test]
        fn kept_up_is_made_anew(
            history in proptest::collection::vec(
                (0..40_usize, 1..30_u16, 0..3_u8, 1..4_u32, any::<bool>(), any::<bool>()), 1..60
            ),
            size in prop::sample::select(vec![256_usize, 400]),
        ) {
            let start = (100..100 + size).map(|id| put(id, u16::try_from(id).unwrap(), 0, 1, true));
            let mut snapshot = Snapshot::default().apply(Revision(1), start);
            for (n, (id, port, zone, weight, serving, gone)) in history.into_iter().enumerate() {
                let change =
                    if gone { Change::RemoveInstance(key(id)) } else { put(id, port, zone, weight, serving) };
                snapshot = snapshot.apply(Revision(n as u64 + 2), [change]);
                let service = snapshot.service(&key(0).service).unwrap();
                prop_assert!(service.endpoints.is_some());
                prop_assert_eq!(show(service, &service.endpoints()), show(service, &service.count()));
            }
            let service = snapshot.service(&key(0).service).unwrap();
            let endpoints = service.endpoints();
            for instance in service.instances().filter(|instance| endpoints.has(instance)) {
                let mut others = endpoints.claims(instance.address, instance.port);
                prop_assert!(others.all(|other| rank(instance) <= rank(other)));
            }
            // Few are not worth it.
            let all = (100..100 + size).map(|id| Change::RemoveInstance(key(id)));
            let few = snapshot.apply(Revision(1000), all);
            let service = few.service(&key(0).service).unwrap();
            prop_assert!(service.endpoints.is_none());
            show(service, &service.endpoints());
        }
    }
}
