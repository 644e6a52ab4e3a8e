//! What is kept in the store, and the wire form of an instance. The same message serves both.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use prost::Message as _;

use super::{
    Error,
    check::{health_from_proto, health_to_proto, stored_check},
};
use crate::{
    catalog::{Change, Live},
    client::check_to_proto,
    model::{
        Damped, Health, Incarnation, Instance, InstanceKey, Lease, Locality, Revision, Role, Roles,
        ServiceId, Stale, State,
    },
    proto::v1,
    store::Key,
};

/// Everything that makes the catalog, and nothing else: what processes list and watch all the time.
pub(super) const CATALOG: &str = "catalog/";
pub(super) const SERVICES: &str = "catalog/services/";
pub(super) const INSTANCES: &str = "catalog/instances/";
pub(super) const LIVE: &str = "catalog/live/";
/// The verdict on each instance that is checked, apart, so that it changes without the instance's record.
pub(super) const HEALTH: &str = "catalog/health/";

/// What the instances of a replicated service do; written by whoever asks the database.
pub(super) const ROLES: &str = "catalog/roles/";

pub(super) fn service_key(id: &ServiceId) -> Key {
    format!("{SERVICES}{id}").into()
}

pub(super) fn instance_key(key: &InstanceKey) -> Key {
    format!("{INSTANCES}{key}").into()
}

pub(super) fn roles_key(id: &ServiceId) -> Key {
    format!("{ROLES}{id}").into()
}

pub(super) fn encode_roles(roles: &Roles) -> Bytes {
    let Roles { term, leader, others } = roles;
    let wire = |role: &Role| match role {
        Role::Unknown => v1::Role::Unknown,
        Role::Leader => v1::Role::Leader,
        Role::Follower => v1::Role::Follower,
        Role::Candidate => v1::Role::Candidate,
        Role::Learner => v1::Role::Learner,
    };
    let message = v1::RolesRecord {
        term: *term,
        leader: leader.as_ref().map(ToString::to_string).unwrap_or_default(),
        others: others.iter().map(|(id, role)| (id.to_string(), wire(role).into())).collect(),
    };
    message.encode_to_vec().into()
}

pub(super) fn decode_roles(value: &Bytes) -> Result<Roles, String> {
    let v1::RolesRecord { term, leader, others } =
        v1::RolesRecord::decode(value.clone()).map_err(|e| e.to_string())?;
    let model = |role: i32| match v1::Role::try_from(role) {
        // A role of a later version.
        Ok(v1::Role::Unknown) | Err(_) => Role::Unknown,
        Ok(v1::Role::Leader) => Role::Leader,
        Ok(v1::Role::Follower) => Role::Follower,
        Ok(v1::Role::Candidate) => Role::Candidate,
        Ok(v1::Role::Learner) => Role::Learner,
    };
    let leader = (!leader.is_empty()).then(|| leader.parse()).transpose();
    let others = others.into_iter().map(|(id, role)| Ok((id.parse()?, model(role))));
    Ok(Roles {
        term,
        leader: leader.map_err(|e| format!("leader: {e}"))?,
        others: others.collect::<Result<_, String>>().map_err(|e| format!("others: {e}"))?,
    })
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

pub(super) fn health_key(key: &InstanceKey) -> Key {
    format!("{HEALTH}{key}").into()
}

/// The stored form of a verdict. The revision is not in it, as of an instance.
pub(super) fn encode_health(health: &Health, incarnation: Incarnation) -> Bytes {
    let message = v1::Health { incarnation: incarnation.0, revision: 0, ..health_to_proto(health) };
    message.encode_to_vec().into()
}

/// The stored form, without its health. What the store keeps of it is not in it: key and revision.
pub(super) fn encode(instance: &Instance) -> Bytes {
    v1::Instance { health: None, ..without_key(instance) }.encode_to_vec().into()
}

/// The wire form, for a place that has the key and the revision already. Where nothing is checked there is no verdict in it.
pub(super) fn without_key(instance: &Instance) -> v1::Instance {
    let message = instance_to_proto(instance);
    let health = message.health.filter(|_| instance.check.is_some());
    v1::Instance { service: String::new(), id: String::new(), revision: 0, health, ..message }
}

/// What a change in the store means for the catalog; `None` for keys of others.
pub(super) fn decode(key: &Key, value: Option<&Bytes>, revision: Revision) -> Result<Option<Change>, Error> {
    let wrong = |reason: String| Error::Record { key: key.to_string(), reason };
    if let Some(name) = key.strip_prefix(SERVICES) {
        let id: ServiceId = name.parse().map_err(wrong)?;
        return Ok(Some(if value.is_some() { Change::PutService(id) } else { Change::RemoveService(id) }));
    }
    if let Some(name) = key.strip_prefix(ROLES) {
        let id: ServiceId = name.parse().map_err(wrong)?;
        let Some(value) = value else { return Ok(Some(Change::RemoveRoles(id))) };
        return Ok(Some(Change::PutRoles(id, Arc::new(decode_roles(value).map_err(wrong)?))));
    }
    let instance_key = |path: &str| {
        let (service, id) =
            path.split_once('/').ok_or_else(|| wrong("the key names no instance".to_owned()))?;
        Ok(InstanceKey { service: service.parse().map_err(wrong)?, id: id.parse().map_err(wrong)? })
    };
    if let Some(path) = key.strip_prefix(HEALTH) {
        let key = instance_key(path)?;
        // It goes with its instance, or with the check: what is known of the instance then says so.
        let Some(value) = value else { return Ok(None) };
        let message = v1::Health::decode(value.clone()).map_err(|e| wrong(e.to_string()))?;
        let (incarnation, health) = health_from_proto(message, revision).map_err(wrong)?;
        return Ok(Some(Change::PutHealth(key, incarnation, health)));
    }
    if let Some(path) = key.strip_prefix(LIVE) {
        let key = instance_key(path)?;
        let Some(value) = value else { return Ok(Some(Change::RemoveLive(key))) };
        let message = v1::Live::decode(value.clone()).map_err(|e| wrong(e.to_string()))?;
        let published_at = wire_time(message.published_at, "published_at").map_err(wrong)?;
        let live = Live {
            incarnation: Incarnation(message.incarnation),
            entries: message.entries,
            published_at: published_at.unwrap_or(SystemTime::UNIX_EPOCH),
            revision,
        };
        return Ok(Some(Change::PutLive(key, live)));
    }
    let Some(path) = key.strip_prefix(INSTANCES) else { return Ok(None) };
    let instance_key = instance_key(path)?;
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
        check,
        health,
        lease,
        owner,
        revision,
        registered_at,
        stale,
        damped,
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
        stale: stale
            .as_ref()
            .map(|stale| v1::Stale { since: Some(stale.since.into()), reason: stale.reason.clone() }),
        damped: damped
            .as_ref()
            .map(|damped| v1::Damped { until: Some(damped.until.into()), reason: damped.reason.clone() }),
        owner: owner.as_ref().map(ToString::to_string).unwrap_or_default(),
        check: check.as_deref().map(check_to_proto),
        health: Some(health_to_proto(health)),
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
    let registered_at = wire_time(message.registered_at, "registered_at")?.unwrap_or(SystemTime::UNIX_EPOCH);
    // A stored instance has its verdict apart; one that was copied whole has it with it.
    let health = match message.health {
        Some(health) => {
            let revision = Revision(health.revision);
            health_from_proto(health, revision)?.1
        }
        None => Health::unchecked(registered_at),
    };
    Ok(Instance {
        key,
        incarnation: Incarnation(message.incarnation),
        address: message.address.parse().map_err(|e| format!("address: {e}"))?,
        port: u16::try_from(message.port)
            .ok()
            .and_then(|port| port.try_into().ok())
            .ok_or("port: out of range")?,
        locality: Locality {
            region: shared(locality.region),
            zone: shared(locality.zone),
            sub_zone: shared(locality.sub_zone),
        },
        weight: message.weight.try_into().map_err(|_| "weight: is 0")?,
        metadata: message.metadata,
        state,
        check: stored_check(message.check)?,
        health,
        lease,
        owner,
        revision,
        registered_at,
        stale: match message.stale {
            Some(v1::Stale { since, reason }) => {
                let since = wire_time(since, "stale.since")?.unwrap_or(SystemTime::UNIX_EPOCH);
                Some(Box::new(Stale { since, reason }))
            }
            None => None,
        },
        damped: match message.damped {
            Some(v1::Damped { until, reason }) => {
                let until = wire_time(until, "damped.until")?.unwrap_or(SystemTime::UNIX_EPOCH);
                Some(Box::new(Damped { until, reason }))
            }
            None => None,
        },
    })
}

/// Most localities are empty, and those need no memory of their own.
fn shared(text: String) -> Arc<str> {
    if text.is_empty() { Arc::default() } else { text.into() }
}

pub(super) fn wire_time(
    time: Option<prost_types::Timestamp>,
    field: &str,
) -> Result<Option<SystemTime>, String> {
    time.map(|at| SystemTime::try_from(at).map_err(|e| format!("{field}: {e}"))).transpose()
}

pub(super) fn duration_to_proto(duration: Duration) -> prost_types::Duration {
    // Those of this room are bounded to hours, far within the range of the message.
    prost_types::Duration::try_from(duration).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Check, Probe, ServerCheck, Statuses, Verdict};

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
            check: None,
            health: Health::unchecked(SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_123)),
            lease,
            owner: Some("n1".parse().unwrap()),
            revision: Revision(9),
            registered_at: SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_123),
            stale: Some(Box::new(Stale {
                since: SystemTime::UNIX_EPOCH + Duration::from_millis(1_800_000_000_123),
                reason: "silent".to_owned(),
            })),
            damped: Some(Box::new(Damped {
                until: SystemTime::UNIX_EPOCH + Duration::from_millis(1_900_000_000_123),
                reason: "comes and goes".to_owned(),
            })),
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

    /// What was written before instances could be damped; then the same with a field that a later version may add.
    #[test]
    fn records_of_other_versions_are_read() {
        let old = Instance { damped: None, ..instance(Lease::Session) };
        let hex = "0a0b677265657465722e7061791203613a31188080808080808080102207666430303a3a3128bb0332060a017212017a380742060a016b\
                   120176480252021200620b0880e2cfaa0610c0a9d33a7a026e318201150a0b0880a4a7da0610c0a9d33a120673696c656e74";
        let byte = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
        let bytes: Vec<u8> = (0..hex.len()).step_by(2).map(byte).collect();
        let later = [&bytes[..], b"\xfa\x3e\x05later"].concat();
        for bytes in [bytes, later] {
            let read = decode(&instance_key(&old.key), Some(&bytes.into()), Revision(9)).unwrap();
            let Some(Change::PutInstance(read)) = read else { panic!("not an instance") };
            assert_eq!(read, old);
        }
    }

    #[test]
    fn checks_and_verdicts_read_back_as_they_were() {
        let statuses = |ranges: &[(i128, i128)]| Statuses::check(ranges).unwrap();
        let http = Probe::Http {
            path: "/h".into(),
            expect: statuses(&[(200, 204)]),
            degraded: statuses(&[(429, 429), (503, 504)]),
        };
        let server = |probe| {
            Check::Server(ServerCheck {
                probe,
                port: 9.try_into().ok(),
                interval: Duration::from_millis(200),
                timeout: Duration::from_millis(100),
                healthy_threshold: 7.try_into().unwrap(),
                unhealthy_threshold: 1.try_into().unwrap(),
                jitter: 0,
            })
        };
        for check in
            [Check::Owner, server(Probe::Tcp), server(http), server(Probe::Grpc { service: "a.B".into() })]
        {
            let instance = Instance { check: Some(check.into()), ..instance(Lease::Session) };
            let key = instance_key(&instance.key);
            let read = decode(&key, Some(&encode(&instance)), Revision(9)).unwrap();
            let Some(Change::PutInstance(read)) = read else { panic!("not an instance") };
            assert_eq!(read, instance);

            for verdict in [Verdict::Unknown, Verdict::Healthy, Verdict::Degraded, Verdict::Unhealthy] {
                let revision = Revision(10);
                let health = Health { verdict, reason: "so".into(), revision, ..instance.health.clone() };
                let value = encode_health(&health, instance.incarnation);
                let read = decode(&health_key(&instance.key), Some(&value), revision).unwrap();
                let Some(Change::PutHealth(key, incarnation, read)) = read else { panic!("no verdict") };
                assert_eq!((key, incarnation, read), (instance.key.clone(), instance.incarnation, health));
            }
        }
    }

    #[test]
    fn roles_read_back_as_they_were() {
        let others = Role::ALL.into_iter().zip(["a", "b", "c", "d", "e"]);
        let others = others.map(|(role, id)| (id.parse().unwrap(), role)).collect();
        let elected = Roles { term: 7, leader: Some("n1".parse().unwrap()), others };
        for roles in [elected, Roles { term: 8, ..Roles::default() }] {
            let service: ServiceId = "db.pay".parse().unwrap();
            let read = decode(&roles_key(&service), Some(&encode_roles(&roles)), Revision(9)).unwrap();
            let Some(Change::PutRoles(of, read)) = read else { panic!("no roles") };
            assert_eq!((of, &*read), (service, &roles));
        }
    }

    #[test]
    fn what_is_not_ours_is_refused_or_left() {
        let bytes = Bytes::from_static(b"\xff\xff\xff");
        assert!(decode(&"locks/a".into(), Some(&bytes), Revision(1)).unwrap().is_none());
        for key in [
            "instances/greeter/a",
            "instances/greeter",
            "instances/Bad Name/a",
            "services/a b",
            "health/greeter",
            "health/greeter/a",
            "roles/greeter",
            "roles/a/b",
        ] {
            let key = format!("{CATALOG}{key}");
            assert!(decode(&key.as_str().into(), Some(&bytes), Revision(1)).is_err(), "{key}");
        }
    }
}
