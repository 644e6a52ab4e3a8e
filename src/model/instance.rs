use std::{
    collections::BTreeMap,
    net::IpAddr,
    num::{NonZeroU16, NonZeroU32},
    sync::Arc,
    time::{Duration, SystemTime},
};

use super::{
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
    /// What keeps it registered.
    pub lease: Lease,
    /// The Disco process that counts its lease. While that is dead another one does.
    pub owner: Option<MemberId>,
    /// The change that last touched it.
    pub revision: Revision,
    /// When this incarnation was registered.
    pub registered_at: SystemTime,
}
