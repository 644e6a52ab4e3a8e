//! The endpoints of a large service one by one (LEDS, rule L4): what a change costs does not grow with the service. For each
//! locality there is a glob collection, and the load assignment, which names these, changes only when a locality comes, goes or
//! changes its level. Members are the same for all views: who is near decides levels, not endpoints.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use envoy_types::pb::envoy::config::endpoint::v3::{
    ClusterLoadAssignment, LbEndpoint, LedsClusterLocalityConfig, LocalityLbEndpoints,
    lb_endpoint::HostIdentifier, locality_lb_endpoints::LbConfig,
};
use prost::Message as _;
use xxhash_rust::xxh3::Xxh3;

use super::{
    View,
    endpoints::{self, endpoint, policy, priorities, proto_locality, scale, scaled, socket_of},
    names::Source,
    wire::{ads, number},
};
use crate::{
    catalog::{Endpoints, Service},
    model::{Instance, InstanceId, Locality},
    xds::{Change, Resource, ResourceSet, ResourceType},
};

/// What of a service changed.
#[derive(Debug, Clone, Copy)]
pub(super) enum Touched<'a> {
    /// Anything.
    All,
    /// These instances.
    Only(&'a BTreeSet<&'a InstanceId>),
}

/// Whether the service's endpoints are to be in collections. One that is stays so until it has lost a quarter of the instances that it
/// takes, so that it does not change back and forth.
fn is_due(old: &ResourceSet, service: &Service, view: &View) -> bool {
    let (count, from) = (service.instances().len(), view.leds_from);
    if from == 0 {
        return false;
    }
    let is = !globs(old, service.id.as_str()).is_empty();
    count >= from || (is && count >= from - (from / 4).max(1))
}

/// The endpoints of a name, one by one or all together; those of a group always together. With `twin`, a set that has come as far and that all members are to be
/// taken from, in the form that it has them, and without the members.
pub(super) fn changes(
    old: &ResourceSet,
    twin: Option<&ResourceSet>,
    name: &Arc<str>,
    source: Source<'_>,
    touched: Touched<'_>,
    view: &View,
) -> Vec<Change> {
    let mut out = Vec::new();
    let is_due =
        |service| twin.map_or_else(|| is_due(old, service, view), |twin| !globs(twin, name).is_empty());
    if let Source::Service(service) = source
        && is_due(service)
    {
        let of = Collections::new(old.origin(), service);
        out.push(Change::Put(of.assignment(service, view)));
        if twin.is_none() {
            of.members(old, service, touched, &mut out);
        }
    } else {
        out.push(Change::Put(endpoints::for_envoy(name, source, view)));
        if twin.is_none() {
            remove(old, name, &mut out);
        }
    }
    out
}

/// The collections that a service's endpoints are in, in a set.
fn globs(set: &ResourceSet, service: &str) -> Arc<[Arc<str>]> {
    let entry = set.get(ResourceType::Endpoints, service);
    entry.map(|entry| Arc::clone(&entry.resource.needs)).unwrap_or_default()
}

/// The name of an instance's endpoint in a collection.
pub fn member(glob: &str, instance: &InstanceId) -> String {
    format!("{}{instance}", glob.strip_suffix('*').unwrap_or(glob))
}

/// Removes all collections of a service.
pub(super) fn remove(old: &ResourceSet, service: &str, out: &mut Vec<Change>) {
    globs(old, service).iter().for_each(|glob| remove_all(old, glob, out));
}

fn remove_all(old: &ResourceSet, glob: &str, out: &mut Vec<Change>) {
    let members = old.members(ResourceType::LbEndpoint, glob);
    out.extend(members.map(|(name, _)| Change::Remove(ResourceType::LbEndpoint, Arc::clone(name))));
}

/// How the endpoints of a service are collected.
struct Collections<'a> {
    endpoints: Cow<'a, Endpoints>,
    scale: u32,
    /// The collection of each locality.
    globs: BTreeMap<Locality, Arc<str>>,
}

impl<'a> Collections<'a> {
    fn new(origin: u64, service: &'a Service) -> Self {
        let endpoints = service.endpoints();
        let scale = scale(endpoints.weight());
        let of_all = [scale, endpoints.best() as u32 * 2 + u32::from(endpoints.spare_serve())];
        let globs =
            endpoints.localities().map(|(place, _)| (place.clone(), glob(origin, service, of_all, place)));
        Self { globs: globs.collect(), scale, endpoints }
    }

    fn assignment(&self, service: &Service, view: &View) -> Resource {
        let serving = self.endpoints.localities().filter(|(_, serving)| *serving > 0);
        let priority = priorities(serving.map(|(place, _)| place), view);
        let by_level: BTreeMap<(u32, &Locality), &Arc<str>> =
            self.globs.iter().map(|(place, glob)| ((priority(place), place), glob)).collect();
        let endpoints = by_level.iter().map(|((priority, place), glob)| LocalityLbEndpoints {
            locality: Some(proto_locality(place)),
            // Envoy looks at the weights of the endpoints; a sum of these would change with each of them.
            load_balancing_weight: number(1),
            priority: *priority,
            lb_config: Some(LbConfig::LedsClusterLocalityConfig(LedsClusterLocalityConfig {
                leds_config: ads(),
                leds_collection_name: glob.to_string(),
            })),
            ..LocalityLbEndpoints::default()
        });
        let message = ClusterLoadAssignment {
            cluster_name: service.id.to_string(),
            endpoints: endpoints.collect(),
            policy: policy(self.endpoints.some_are_ill()),
            ..ClusterLoadAssignment::default()
        };
        let needs = by_level.values().map(|glob| Arc::clone(glob));
        Resource::new(ResourceType::Endpoints, service.id.shared(), &message, needs)
    }

    /// The collection that an instance's endpoint is in, if it has one.
    fn of(&self, instance: &Instance) -> Option<&Arc<str>> {
        self.globs.get(&instance.locality).filter(|_| self.endpoints.has(instance))
    }

    fn member(&self, glob: &str, instance: &Instance) -> Change {
        let part = self.endpoints.part(instance);
        let message = endpoint(instance, part, scaled(instance, self.scale));
        Change::Put(Resource::new(ResourceType::LbEndpoint, member(glob, &instance.key.id), &message, []))
    }

    /// What changed of the members.
    fn members(&self, old: &ResourceSet, service: &Service, touched: Touched<'_>, out: &mut Vec<Change>) {
        let before = globs(old, service.id.as_str());
        let (known, now): (BTreeSet<_>, BTreeSet<_>) =
            (before.iter().collect(), self.globs.values().collect());
        known.difference(&now).for_each(|glob| remove_all(old, glob, out));
        let is_new = |glob: &Arc<str>| matches!(touched, Touched::All) || !known.contains(glob);
        if now.iter().any(|glob| is_new(glob)) {
            for instance in service.instances() {
                if let Some(glob) = self.of(instance).filter(|glob| is_new(glob)) {
                    out.push(self.member(glob, instance));
                }
            }
        }
        let both = || known.intersection(&now).copied();
        let touched: BTreeSet<InstanceId> = match touched {
            // Whoever was there.
            Touched::All => {
                let members = both().flat_map(|glob| old.members(ResourceType::LbEndpoint, glob));
                members.filter_map(|(name, _)| name.rsplit_once('/')?.1.parse().ok()).collect()
            }
            Touched::Only(ids) => {
                ids.iter().flat_map(|id| self.concerned(old, &before, service, id)).collect()
            }
        };
        for id in touched {
            let instance = service.instance(&id);
            let its = instance.and_then(|instance| self.of(instance));
            let others = both().filter(|glob| Some(*glob) != its);
            let there = others.filter_map(|glob| old.get(ResourceType::LbEndpoint, &member(glob, &id)));
            out.extend(
                there.map(|it| Change::Remove(ResourceType::LbEndpoint, Arc::clone(&it.resource.name))),
            );
            if let (Some(instance), Some(glob)) = (instance, its.filter(|glob| !is_new(glob))) {
                out.push(self.member(glob, instance));
            }
        }
    }

    /// An instance, and those that have claimed the same address or do now: whom it stands for may have changed.
    fn concerned(
        &self,
        old: &ResourceSet,
        before: &[Arc<str>],
        service: &Service,
        id: &InstanceId,
    ) -> Vec<InstanceId> {
        let was = before.iter().filter_map(|glob| old.get(ResourceType::LbEndpoint, &member(glob, id)));
        let was = was.filter_map(|entry| {
            let message = LbEndpoint::decode(entry.resource.body()).ok()?;
            match message.host_identifier? {
                HostIdentifier::Endpoint(endpoint) => socket_of(endpoint.address.as_ref()?),
                HostIdentifier::EndpointName(_) => None,
            }
        });
        let now = service.instance(id).map(|instance| (instance.address, instance.port));
        let claims = was.chain(now).flat_map(|(address, port)| self.endpoints.claims(address, port));
        std::iter::once(id.clone()).chain(claims.map(|instance| instance.key.id.clone())).collect()
    }
}

/// The name of a collection; names make up most of what is sent, so it is short. What `of_all` are changes every endpoint, and
/// the name with them.
fn glob(origin: u64, service: &Service, of_all: [u32; 2], place: &Locality) -> Arc<str> {
    const DIGITS: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";
    let mut hasher = Xxh3::new();
    hasher.update(&origin.to_le_bytes());
    of_all.iter().for_each(|number| hasher.update(&number.to_le_bytes()));
    for part in [&place.region, &place.zone, &place.sub_zone] {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    }
    let hash = hasher.digest();
    let digits = (0..10).map(|n| usize::try_from(hash >> (5 * n) & 31).unwrap_or_default());
    let text: String = digits.filter_map(|digit| DIGITS.get(digit)).map(|digit| char::from(*digit)).collect();
    format!("xdstp:///envoy.config.endpoint.v3.LbEndpoint/{}/{text}/*", service.id).into()
}
