//! The catalog on disk, for a process that starts while its store cannot be reached: old but better than nothing.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Write as _},
    path::PathBuf,
    time::{Duration, SystemTime},
};

use prost::Message as _;
use xxhash_rust::xxh3::xxh3_64;

use super::record::{decode_roles, encode_roles, instance_from_proto, instance_to_proto};
use crate::{
    catalog::{Change, Reader, Snapshot},
    model::{InstanceKey, Revision},
    proto::v1,
    rt,
};

/// What the file begins with; a checksum of the rest, little-endian, and the message follow.
const MAGIC: &[u8; 8] = b"DISCOCC1";

/// The least time between two writes, and the longest: its date tells how old it may be.
const PACE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(300));

/// A file that holds a copy of the catalog.
#[derive(Debug, Clone)]
pub struct Cache {
    path: PathBuf,
}

/// What the file held.
#[derive(Debug)]
pub(super) struct Cached {
    pub(super) revision: Revision,
    pub(super) taken_at: SystemTime,
    pub(super) changes: Vec<Change>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Record {
    #[prost(uint64, tag = "1")]
    revision: u64,
    #[prost(message, optional, tag = "2")]
    taken_at: Option<prost_types::Timestamp>,
    #[prost(string, repeated, tag = "3")]
    services: Vec<String>,
    #[prost(message, repeated, tag = "4")]
    instances: Vec<v1::Instance>,
    /// By service, as they are in the store.
    #[prost(btree_map = "string, bytes", tag = "5")]
    roles: BTreeMap<String, Vec<u8>>,
}

impl Cache {
    /// A cache at `path`; its directory is made when it is missing.
    pub fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// What is there; `None` when there is no file.
    pub(super) fn load(&self) -> io::Result<Option<Cached>> {
        let bytes = match fs::read(&self.path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        read(&bytes).map(Some).map_err(|reason| io::Error::new(io::ErrorKind::InvalidData, reason))
    }

    /// Writes the catalog down now and then, for as long as it is as fresh as the store.
    pub(super) async fn follow(self, catalog: Reader) {
        let mut seen = Revision::default();
        loop {
            if let Ok(None) = tokio::time::timeout(PACE.1, catalog.newer_than(seen)).await {
                return;
            }
            let snapshot = catalog.latest();
            seen = snapshot.revision();
            if catalog.stale().is_none() && seen > Revision::default() {
                let (cache, taken_at) = (self.clone(), rt::now());
                let written = tokio::task::spawn_blocking(move || cache.write(&snapshot, taken_at)).await;
                if let Ok(Err(error)) = written {
                    tracing::warn!(%error, path = %self.path.display(), "the copy of the catalog could not be written");
                }
            }
            tokio::time::sleep(PACE.0).await;
        }
    }

    fn write(&self, snapshot: &Snapshot, taken_at: SystemTime) -> io::Result<()> {
        let instances = snapshot.services().flat_map(|service| service.instances());
        let registered = snapshot.services().filter(|service| service.is_registered());
        let roles = snapshot.services().filter_map(|service| {
            Some((service.id.to_string(), encode_roles(service.roles.as_ref()?).into()))
        });
        let record = Record {
            revision: snapshot.revision().0,
            taken_at: Some(taken_at.into()),
            services: registered.map(|service| service.id.to_string()).collect(),
            instances: instances.map(|instance| instance_to_proto(instance)).collect(),
            roles: roles.collect(),
        };
        let body = record.encode_to_vec();
        if let Some(directory) = self.path.parent() {
            fs::create_dir_all(directory)?;
        }
        let temporary = self.path.with_extension("new");
        let mut file = File::create(&temporary)?;
        file.write_all(MAGIC)?;
        file.write_all(&xxh3_64(&body).to_le_bytes())?;
        file.write_all(&body)?;
        file.sync_all()?;
        fs::rename(&temporary, &self.path)
    }
}

fn read(bytes: &[u8]) -> Result<Cached, String> {
    let rest = bytes.strip_prefix(MAGIC).ok_or("it is not a copy of a catalog of this version")?;
    let (checksum, body) = rest.split_first_chunk().ok_or("it is cut off")?;
    if xxh3_64(body) != u64::from_le_bytes(*checksum) {
        return Err("it is damaged: its checksum is wrong".to_owned());
    }
    let Record { revision, taken_at, services, instances, roles } =
        Record::decode(body).map_err(|error| error.to_string())?;
    let mut changes = Vec::with_capacity(services.len() + instances.len());
    for service in services {
        changes.push(Change::PutService(service.parse()?));
    }
    for message in instances {
        let key = InstanceKey { service: message.service.parse()?, id: message.id.parse()? };
        let revision = Revision(message.revision);
        changes.push(Change::PutInstance(instance_from_proto(key, message, revision)?));
    }
    for (service, roles) in roles {
        changes.push(Change::PutRoles(service.parse()?, decode_roles(&roles.into())?.into()));
    }
    let taken_at = taken_at.and_then(|at| SystemTime::try_from(at).ok()).ok_or("it has no date")?;
    Ok(Cached { revision: Revision(revision), taken_at, changes })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{catalog::catalog, model::Roles};

    #[test]
    fn it_reads_back_and_damage_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::new(folder.path().join("deeper/catalog.cache"));
        assert!(cache.load().unwrap().is_none());

        let (mut writer, reader) = catalog();
        let roles = Roles { term: 3, leader: Some("n1".parse().unwrap()), ..Roles::default() };
        let changes = vec![
            Change::PutService("empty".parse().unwrap()),
            Change::PutRoles("db".parse().unwrap(), roles.clone().into()),
        ];
        writer.apply(Revision(7), changes);
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        cache.write(&reader.latest(), at).unwrap();
        let cached = cache.load().unwrap().unwrap();
        assert_eq!((cached.revision, cached.taken_at, cached.changes.len()), (Revision(7), at, 2));
        let known = Snapshot::default().apply(Revision(7), cached.changes);
        let db = known.service(&"db".parse().unwrap()).unwrap();
        assert_eq!((db.roles.as_deref(), db.is_registered()), (Some(&roles), false));

        let good = fs::read(&cache.path).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            if let Some(byte) = bad.get_mut(at) {
                *byte ^= 1;
            }
            assert!(read(&bad).is_err(), "a changed byte at {at}");
            assert!(read(good.get(..at).unwrap()).is_err(), "cut at {at}");
        }
    }
}
