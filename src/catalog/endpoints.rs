use std::{borrow::Cow, net::IpAddr, num::NonZeroU16, sync::Arc};

use super::Service;
use crate::model::{Instance, InstanceId, Locality, State, Verdict};

/// What part an instance has in load balancing, the most useful first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// It takes calls.
    Serving,
    /// It takes calls when nobody serves.
    Degraded,
    /// Its checks fail.
    Unhealthy,
    /// It finishes what it has.
    Draining,
}

impl Part {
    fn of(instance: &Instance) -> Self {
        match (instance.state, instance.health.verdict) {
            (State::Draining, _) => Self::Draining,
            (State::Serving, Verdict::Unknown | Verdict::Healthy) => Self::Serving,
            (State::Serving, Verdict::Degraded) => Self::Degraded,
            (State::Serving, Verdict::Unhealthy) => Self::Unhealthy,
        }
    }
}

/// The addresses of a service, each with the instance that it stands for: of those that claim one, the most useful (a successor on
/// the port of a draining or dead one), then the first by id. Not of an instance that has yet to pass its check for the first time,
/// and of one that is damped only while all that are not drain.
///
/// As long as one instance works, the others get no calls. When none does, those that are degraded serve; when all fail their
/// checks, all serve again that do not drain: a check that is wrong about everybody (its own fault, or that of something behind
/// all of them) must not take a service away that may still answer.
#[derive(Debug, Clone, Default)]
pub struct Endpoints {
    addresses: imbl::OrdMap<(IpAddr, NonZeroU16), Claims>,
    localities: imbl::OrdMap<Locality, Parts>,
    all: Parts,
    weight: u64,
    /// Those that are damped.
    spare: imbl::OrdMap<InstanceId, Arc<Instance>>,
    /// They have endpoints, because nobody else serves.
    spare_serve: bool,
    /// Those that are not damped and do not drain.
    regular: usize,
}

/// How many have each part.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Parts {
    serving: usize,
    degraded: usize,
    unhealthy: usize,
    draining: usize,
}

impl Parts {
    fn of(&mut self, part: Part) -> &mut usize {
        match part {
            Part::Serving => &mut self.serving,
            Part::Degraded => &mut self.degraded,
            Part::Unhealthy => &mut self.unhealthy,
            Part::Draining => &mut self.draining,
        }
    }

    /// The best that somebody has who does not drain.
    fn best(self) -> Part {
        let Self { serving, degraded, unhealthy, .. } = self;
        match (serving, degraded, unhealthy) {
            (0, 0, 0) | (1.., ..) => Part::Serving,
            (0, 1.., _) => Part::Degraded,
            (0, 0, 1..) => Part::Unhealthy,
        }
    }
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

    /// The endpoints of some of its instances, as if there were no others.
    pub fn endpoints_of(&self, wanted: impl Fn(&Instance) -> bool) -> Endpoints {
        let mut some = Endpoints::default();
        let wanted = self.instances.values().filter(|instance| wanted(instance));
        wanted.for_each(|instance| some.insert(Arc::clone(instance)));
        some
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
        self.endpoints_of(|_| true)
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

    /// The part that an instance has among the others.
    pub fn part(&self, instance: &Instance) -> Part {
        let part = Part::of(instance);
        if part == self.all.best() { Part::Serving } else { part }
    }

    /// The part of those that serve, seen by themselves: when it changes, so do the parts of many.
    pub fn best(&self) -> Part {
        self.all.best()
    }

    /// Whether some are degraded or unhealthy while others work.
    pub fn some_are_ill(&self) -> bool {
        let Parts { degraded, unhealthy, .. } = self.all;
        match self.all.best() {
            Part::Serving => degraded + unhealthy > 0,
            Part::Degraded => unhealthy > 0,
            Part::Unhealthy | Part::Draining => false,
        }
    }

    /// Where they are, and how many there serve.
    pub fn localities(&self) -> impl Iterator<Item = (&Locality, usize)> {
        let best = self.all.best();
        self.localities.iter().map(move |(locality, parts)| (locality, *parts.clone().of(best)))
    }

    /// The sum of their weights.
    pub fn weight(&self) -> u64 {
        self.weight
    }

    /// Whether those that are damped serve, because nobody else does.
    pub fn spare_serve(&self) -> bool {
        self.spare_serve
    }

    fn insert(&mut self, instance: Arc<Instance>) {
        if !instance.is_published() {
            return;
        }
        let is_spare = instance.damped.is_some();
        self.regular += usize::from(is_regular(&instance));
        if is_spare {
            self.spare.insert(instance.key.id.clone(), Arc::clone(&instance));
        }
        if !is_spare || self.spare_serve {
            self.claim(instance);
        }
        self.settle_spare();
    }

    fn remove(&mut self, instance: &Instance) {
        if !instance.is_published() {
            return;
        }
        let is_spare = instance.damped.is_some();
        self.regular -= usize::from(is_regular(instance));
        if is_spare {
            self.spare.remove(&instance.key.id);
        }
        if !is_spare || self.spare_serve {
            self.leave(instance);
        }
        self.settle_spare();
    }

    /// Those that are damped serve as long as nobody else does.
    fn settle_spare(&mut self) {
        let serve = self.regular == 0 && !self.spare.is_empty();
        if serve == self.spare_serve {
            return;
        }
        self.spare_serve = serve;
        for instance in self.spare.clone().values() {
            if serve {
                self.claim(Arc::clone(instance));
            } else {
                self.leave(instance);
            }
        }
    }

    fn claim(&mut self, instance: Arc<Instance>) {
        let at = (instance.address, instance.port);
        let mut claims: Vec<_> = self.claims(instance.address, instance.port).cloned().collect();
        let before = claims.first().cloned();
        let place = claims.partition_point(|other| rank(other) < rank(&instance));
        claims.insert(place, instance);
        self.settle(at, before, claims);
    }

    fn leave(&mut self, instance: &Instance) {
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
        let (weight, part) = (u64::from(instance.weight.get()), Part::of(instance));
        let mut here = self.localities.get(&instance.locality).copied().unwrap_or_default();
        let step = |count: &mut usize| if comes { *count += 1 } else { *count -= 1 };
        step(here.of(part));
        step(self.all.of(part));
        if comes {
            self.weight += weight;
        } else {
            self.weight -= weight;
        }
        if here == Parts::default() {
            self.localities.remove(&instance.locality);
        } else {
            self.localities.insert(instance.locality.clone(), here);
        }
    }
}

fn is_regular(instance: &Instance) -> bool {
    instance.damped.is_none() && instance.state == State::Serving
}

fn rank(instance: &Instance) -> (Part, &InstanceId) {
    (Part::of(instance), &instance.key.id)
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, time::SystemTime};

    use proptest::prelude::*;

    use super::*;
    use crate::{
        catalog::{Change, Snapshot},
        model::{Check, Health, Incarnation, InstanceKey, Lease, Revision},
    };

    fn put(id: usize, port: u16, zone: u8, weight: u32, part: u8) -> Change {
        let verdict = [Verdict::Healthy, Verdict::Degraded, Verdict::Unhealthy, Verdict::Unknown];
        let verdict = verdict[usize::from(part) % 4];
        let health = Health { verdict, passed: part < 4, ..Health::unchecked(SystemTime::UNIX_EPOCH) };
        Change::PutInstance(Instance {
            key: key(id),
            incarnation: Incarnation(1),
            address: [127, 0, 0, 1].into(),
            port: port.try_into().unwrap(),
            locality: Locality { zone: zone.to_string().into(), ..Locality::default() },
            weight: weight.try_into().unwrap(),
            metadata: BTreeMap::new(),
            state: if part % 5 == 4 { State::Draining } else { State::Serving },
            check: Some(Arc::new(Check::Owner)),
            health,
            stale: None,
            damped: None,
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
    fn show(service: &Service, of: &Endpoints) -> (Vec<String>, u64, bool, Vec<(Locality, usize)>) {
        let claims = service.instances().map(|instance| {
            let claims = of.claims(instance.address, instance.port).map(|claim| claim.key.id.to_string());
            let claims = claims.collect::<Vec<_>>().join(" ");
            format!("{} {} {:?} {claims}", instance.key.id, of.has(instance), of.part(instance))
        });
        let localities = of.localities().map(|(place, serving)| (place.clone(), serving));
        (claims.collect(), of.weight(), of.some_are_ill(), localities.collect())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        /// What a large service keeps up is what would be made of it anew, and an address stands for who serves before who drains.
        #[test]
        fn kept_up_is_made_anew(
            history in proptest::collection::vec(
                (0..40_usize, 1..30_u16, 0..3_u8, 1..4_u32, 0..8_u8, any::<bool>()), 1..60
            ),
            size in prop::sample::select(vec![256_usize, 400]),
        ) {
            let start = (100..100 + size).map(|id| put(id, u16::try_from(id).unwrap(), 0, 1, 0));
            let mut snapshot = Snapshot::default().apply(Revision(1), start);
            for (n, (id, port, zone, weight, part, gone)) in history.into_iter().enumerate() {
                let change =
                    if gone { Change::RemoveInstance(key(id)) } else { put(id, port, zone, weight, part) };
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
