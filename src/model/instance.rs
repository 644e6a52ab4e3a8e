use std::{
    collections::BTreeMap,
    net::IpAddr,
    num::{NonZeroU16, NonZeroU32},
    sync::Arc,
    time::{Duration, SystemTime},
};

use super::{
    health::{Check, Health},
    id::{Incarnation, InstanceKey, Revision},
    members::MemberId,
};

/// Where an instance or a proxy runs, from the widest to the narrowest. Empty parts are unknown.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Locality {
    /// E.g. `eu-west`.
    pub region: Arc<str>,
    /// E.g. `eu-west-1a`.
    pub zone: Arc<str>,
    /// E.g. a rack.
    pub sub_zone: Arc<str>,
}

/// Whether an instance takes new calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum State {
    /// It does.
    Serving,
    /// It finishes what it has and takes no new calls; it stays known.
    Draining,
}

/// How long a registration lasts without news of its owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lease {
    /// Until this long after the last renewal.
    Ttl(Duration),
    /// Until the session that registered it ends.
    Session,
}

/// One running copy of a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instance {
    /// What identifies it.
    pub key: InstanceKey,
    /// Which run of that id this is.
    pub incarnation: Incarnation,
    /// Where it listens: an IP address, never a host name.
    pub address: IpAddr,
    /// The port that takes its calls.
    pub port: NonZeroU16,
    /// Where it runs.
    pub locality: Locality,
    /// Share of the calls relative to the other instances of the service.
    pub weight: NonZeroU32,
    /// What its owner says of it. Not sent to proxies.
    pub metadata: BTreeMap<String, String>,
    /// Whether it takes new calls.
    pub state: State,
    /// Who checks whether it works; `None`: nobody, and it is taken to work.
    pub check: Option<Arc<Check>>,
    /// The verdict of the checks.
    pub health: Health,
    /// What keeps it registered.
    pub lease: Lease,
    /// The Disco process that counts its lease. While that is dead another one does.
    pub owner: Option<MemberId>,
    /// The change that last touched it, other than its health.
    pub revision: Revision,
    /// When this incarnation was registered.
    pub registered_at: SystemTime,
    /// Set while nobody vouches for it any more and it is kept all the same. Boxed: hardly any instance has it.
    pub stale: Option<Box<Stale>>,
    /// Set while proxies are not told of it because it comes and goes. Boxed: hardly any instance has it.
    pub damped: Option<Box<Damped>>,
}

/// Why proxies are not told of an instance that came and went too often of late. They are when nobody else is left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damped {
    /// Proxies are told when it has lasted until then.
    pub until: SystemTime,
    /// How often it went.
    pub reason: String,
}

/// Why an instance is kept although its lease is over: too many went at once to be believed, and it did not refuse a
/// connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stale {
    /// When its lease was found to be over.
    pub since: SystemTime,
    /// What ended, and what the instance answered.
    pub reason: String,
}

impl Instance {
    /// Whether proxies may know of it, unless it is damped: one that is checked has to pass once first.
    pub fn is_published(&self) -> bool {
        self.check.is_none() || self.health.passed
    }
}
