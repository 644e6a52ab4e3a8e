//! What is kept in the store, and the wire form of an instance. The same message serves both.

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use prost::Message as _;

use super::Error;
use crate::{
    catalog::{Change, Live},
    model::{Incarnation, Instance, InstanceKey, Lease, Locality, Revision, ServiceId, State},
    proto::v1,
    store::Key,
};

pub(super) const SERVICES: &str = "services/";
pub(super) const INSTANCES: &str = "instances/";
pub(super) const LIVE: &str = "live/";
/// Everything of ours in the store.
pub(super) const ALL: &str = "";

pub(super) fn service_key(id: &ServiceId) -> Key {
    format!("{SERVICES}{id}").into()
}

pub(super) fn instance_key(key: &InstanceKey) -> Key {
    format!("{INSTANCES}{key}").into()
}

pub(super) fn live_key(key: &InstanceKey) -> Key {
    format!("{LIVE}{key}").into()
}

pub(super) fn encode_live(live: &Live) -> Bytes {
    live_to_proto(None, live).encode_to_vec().into()
}

/// The wire form of what an instance says of itself.
pub fn live_to_proto(key: Option<&InstanceKey>, live: &Live) -> v1::Live {
    let Live { incarnation, entries, published_at, revision } = live;
    v1::Live {
        instance: key.map(|key| v1::InstanceRef {
            service: key.service.to_string(),
            id: key.id.to_string(),
            incarnation: incarnation.0,
        }),
        incarnation: incarnation.0,
        entries: entries.clone(),
        published_at: Some((*published_at).into()),
        revision: revision.0,
    }
}

/// The stored form. The revision is not in it: the store keeps that.
pub(super) fn encode(instance: &Instance) -> Bytes {
    let mut message = instance_to_proto(instance);
    message.revision = 0;
    message.encode_to_vec().into()
}

/// What a change in the store means for the catalog; `None` for keys of others.
pub(super) fn decode(key: &Key, value: Option<&Bytes>, revision: Revision) -> Result<Option<Change>, Error> {
    let wrong = |reason: String| Error::Record { key: key.to_string(), reason };
    if let Some(name) = key.strip_prefix(SERVICES) {
        let id: ServiceId = name.parse().map_err(wrong)?;
        return Ok(Some(if value.is_some() { Change::PutService(id) } else { Change::RemoveService(id) }));
    }
    let (path, is_live) = match (key.strip_prefix(INSTANCES), key.strip_prefix(LIVE)) {
        (Some(path), _) => (path, false),
        (None, Some(path)) => (path, true),
        (None, None) => return Ok(None),
    };
    let (service, id) = path.split_once('/').ok_or_else(|| wrong("the key names no instance".to_owned()))?;
    let instance_key =
        InstanceKey { service: service.parse().map_err(wrong)?, id: id.parse().map_err(wrong)? };
    if is_live {
        let Some(value) = value else { return Ok(Some(Change::RemoveLive(instance_key))) };
        let message = v1::Live::decode(value.clone()).map_err(|e| wrong(e.to_string()))?;
        let published_at = message.published_at.and_then(|at| SystemTime::try_from(at).ok());
        let live = Live {
            incarnation: Incarnation(message.incarnation),
            entries: message.entries,
            published_at: published_at.unwrap_or(SystemTime::UNIX_EPOCH),
            revision,
        };
        return Ok(Some(Change::PutLive(instance_key, live)));
    }
    let Some(value) = value else { return Ok(Some(Change::RemoveInstance(instance_key))) };
    let message = v1::Instance::decode(value.clone()).map_err(|e| wrong(e.to_string()))?;
    let instance = instance_from_proto(instance_key, message, revision).map_err(wrong)?;
    Ok(Some(Change::PutInstance(instance)))
}

/// The wire form of a lease.
pub fn lease_to_proto(lease: Lease) -> v1::Lease {
    v1::Lease {
        kind: Some(match lease {
            Lease::Ttl(ttl) => v1::lease::Kind::Ttl(duration_to_proto(ttl)),
            Lease::Session => v1::lease::Kind::Session(v1::SessionLease {}),
        }),
    }
}

/// The wire form of an instance.
pub fn instance_to_proto(instance: &Instance) -> v1::Instance {
    let Instance {
        key,
        incarnation,
        address,
        port,
        locality,
        weight,
        metadata,
        state,
        lease,
        owner,
        revision,
        registered_at,
    } = instance;
    v1::Instance {
        service: key.service.to_string(),
        id: key.id.to_string(),
        incarnation: incarnation.0,
        address: address.to_string(),
        port: port.get().into(),
        locality: Some(v1::Locality {
            region: locality.region.to_string(),
            zone: locality.zone.to_string(),
            sub_zone: locality.sub_zone.to_string(),
        }),
        weight: weight.get(),
        metadata: metadata.clone(),
        state: match state {
            State::Serving => v1::InstanceState::Serving,
            State::Draining => v1::InstanceState::Draining,
        }
        .into(),
        lease: Some(lease_to_proto(*lease)),
        revision: revision.0,
        registered_at: Some((*registered_at).into()),
        owner: owner.as_ref().map(ToString::to_string).unwrap_or_default(),
    }
}

pub(super) fn instance_from_proto(
    key: InstanceKey,
    message: v1::Instance,
    revision: Revision,
) -> Result<Instance, String> {
    let state = match message.state() {
        v1::InstanceState::Draining => State::Draining,
        v1::InstanceState::Serving | v1::InstanceState::Unspecified => State::Serving,
    };
    let lease = match message.lease.and_then(|lease| lease.kind) {
        Some(v1::lease::Kind::Ttl(ttl)) => {
            Lease::Ttl(Duration::try_from(ttl).map_err(|e| format!("lease: {e}"))?)
        }
        Some(v1::lease::Kind::Session(_)) => Lease::Session,
        None => return Err("it has no lease".to_owned()),
    };
    let owner = match message.owner.as_str() {
        "" => None,
        owner => Some(owner.parse().map_err(|e| format!("owner: {e}"))?),
    };
    let locality = message.locality.unwrap_or_default();
    Ok(Instance {
        key,
        incarnation: Incarnation(message.incarnation),
        address: message.address.parse().map_err(|e| format!("address: {e}"))?,
        port: u16::try_from(message.port)
            .ok()
            .and_then(|port| port.try_into().ok())
            .ok_or("port: out of range")?,
        locality: Locality {
            region: locality.region.into(),
            zone: locality.zone.into(),
            sub_zone: locality.sub_zone.into(),
        },
        weight: message.weight.try_into().map_err(|_| "weight: is 0")?,
        metadata: message.metadata,
        state,
        lease,
        owner,
        revision,
        registered_at: message.registered_at.map_or(Ok(SystemTime::UNIX_EPOCH), |at| {
            SystemTime::try_from(at).map_err(|e| format!("registered_at: {e}"))
        })?,
    })
}

fn duration_to_proto(duration: Duration) -> prost_types::Duration {
    // A TTL is bounded to hours, far within the range of the message.
    prost_types::Duration::try_from(duration).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instance(lease: Lease) -> Instance {
        Instance {
            key: InstanceKey { service: "greeter.pay".parse().unwrap(), id: "a:1".parse().unwrap() },
            incarnation: Incarnation(1 << 60),
            address: "fd00::1".parse().unwrap(),
            port: 443.try_into().unwrap(),
            locality: Locality { region: "r".into(), zone: "z".into(), sub_zone: "".into() },
            weight: 7.try_into().unwrap(),
            metadata: [("k".to_owned(), "v".to_owned())].into(),
            state: State::Draining,
            lease,
            owner: Some("n1".parse().unwrap()),
            revision: Revision(9),
            registered_at: SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_123),
        }
    }

    #[test]
    fn a_record_reads_back_as_it_was() {
        for lease in [Lease::Session, Lease::Ttl(Duration::from_millis(1500))] {
            let instance = instance(lease);
            let key = instance_key(&instance.key);
            let Some(Change::PutInstance(read)) =
                decode(&key, Some(&encode(&instance)), Revision(9)).unwrap()
            else {
                panic!("not an instance")
            };
            assert_eq!(read, instance);
        }
    }

    #[test]
    fn what_is_not_ours_is_refused_or_left() {
        let bytes = Bytes::from_static(b"\xff\xff\xff");
        assert!(decode(&"locks/a".into(), Some(&bytes), Revision(1)).unwrap().is_none());
        for key in ["instances/greeter/a", "instances/greeter", "instances/Bad Name/a", "services/a b"] {
            assert!(decode(&key.into(), Some(&bytes), Revision(1)).is_err(), "{key}");
        }
    }
}
