use std::{fmt, ops::Bound, sync::Arc};

use bytes::{BufMut, Bytes, BytesMut};
use imbl::OrdSet;
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint, key_len};
use tokio::time::Instant;
use xxhash_rust::xxh3::xxh3_64;

use super::{
    by_type::ByType,
    names::{GLOB, NameSet},
};
use crate::model::Revision;

/// The resource types that Disco generates, in the order in which changes are pushed: what is referred to before what
/// refers to it (make before break; xDS protocol, "Eventual consistency considerations").
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ResourceType {
    /// CDS.
    Cluster,
    /// EDS.
    Endpoints,
    /// LEDS: one endpoint each, in glob collections (rule L4). Delta only.
    LbEndpoint,
    /// LDS.
    Listener,
    /// RDS.
    Route,
    /// VHDS: the parts of a route table, each by itself; incremental only (rule L3).
    VirtualHost,
}

impl ResourceType {
    /// All, in push order.
    pub const ALL: [Self; 6] =
        [Self::Cluster, Self::Endpoints, Self::LbEndpoint, Self::Listener, Self::Route, Self::VirtualHost];

    /// The type URL on the wire.
    pub const fn url(self) -> &'static str {
        match self {
            Self::Cluster => "type.googleapis.com/envoy.config.cluster.v3.Cluster",
            Self::Endpoints => "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment",
            Self::LbEndpoint => "type.googleapis.com/envoy.config.endpoint.v3.LbEndpoint",
            Self::Listener => "type.googleapis.com/envoy.config.listener.v3.Listener",
            Self::Route => "type.googleapis.com/envoy.config.route.v3.RouteConfiguration",
            Self::VirtualHost => "type.googleapis.com/envoy.config.route.v3.VirtualHost",
        }
    }

    /// As people write it, e.g. in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cluster => "cluster",
            Self::Endpoints => "endpoints",
            Self::LbEndpoint => "lb-endpoint",
            Self::Listener => "listener",
            Self::Route => "route",
            Self::VirtualHost => "virtual_host",
        }
    }

    /// The type of a URL, `None` for one that Disco does not generate.
    pub fn from_url(url: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.url() == url)
    }
}

/// Names a content: equal for equal content on every replica and after every restart, different otherwise.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Version(pub u64);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A resource, encoded once; all streams share its bytes.
#[derive(Clone, PartialEq, Eq)]
pub struct Resource {
    /// Its type.
    pub kind: ResourceType,
    /// Its name, as subscribed to.
    pub name: Arc<str>,
    /// Hash of its content.
    pub version: Version,
    /// What a client waits for again with this resource: names of [`ResourceType::Endpoints`] with a changed cluster
    /// (rules O4, O6), and glob collections with the endpoints that it was waiting for (rule L4).
    pub needs: Arc<[Arc<str>]>,
    delta: Bytes,
    any_at: usize,
    body_len: usize,
}

impl fmt::Debug for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {}@{} ({} bytes)", self.kind, self.name, self.version, self.any().len())
    }
}

/// `resources` in DiscoveryResponse and in DeltaDiscoveryResponse, and `resource` in Resource: all field 2.
const RESOURCES: u32 = 2;

impl Resource {
    /// Encodes `message`, which must encode the same way each time: no protobuf map of more than one entry.
    pub fn new(
        kind: ResourceType,
        name: impl Into<Arc<str>>,
        message: &impl prost::Message,
        needs: impl IntoIterator<Item = Arc<str>>,
    ) -> Self {
        Self::from_body(kind, name, &message.encode_to_vec(), needs)
    }

    /// From the encoded message.
    pub fn from_body(
        kind: ResourceType,
        name: impl Into<Arc<str>>,
        body: &[u8],
        needs: impl IntoIterator<Item = Arc<str>>,
    ) -> Self {
        let name = name.into();
        let version = Version(xxh3_64(body));
        let text = version.to_string();

        // Any { type_url: 1, value: 2 }
        let any_len = field_len(1, kind.url().len()) + field_len(2, body.len());
        let framed_any_len = field_len(RESOURCES, any_len);
        // Resource { version: 1, resource: 2, name: 3 }; the Any goes last so that its frame is a suffix.
        let resource_len = field_len(1, text.len()) + field_len(3, name.len()) + framed_any_len;
        let mut delta = BytesMut::with_capacity(field_len(RESOURCES, resource_len));
        put_head(&mut delta, RESOURCES, resource_len);
        put_field(&mut delta, 1, text.as_bytes());
        put_field(&mut delta, 3, name.as_bytes());
        let any_at = delta.len();
        put_head(&mut delta, RESOURCES, any_len);
        put_field(&mut delta, 1, kind.url().as_bytes());
        put_field(&mut delta, 2, body);
        Self {
            kind,
            name,
            version,
            needs: needs.into_iter().collect(),
            delta: delta.freeze(),
            any_at,
            body_len: body.len(),
        }
    }

    /// The resource as a whole `resources` field of a DeltaDiscoveryResponse.
    pub fn delta_field(&self) -> Bytes {
        self.delta.clone()
    }

    /// The resource as a whole `resources` field of a DiscoveryResponse; a part of the same memory.
    pub fn sotw_field(&self) -> Bytes {
        self.delta.slice(self.any_at..)
    }

    /// The encoded message.
    pub fn body(&self) -> Bytes {
        self.delta.slice(self.delta.len() - self.body_len..)
    }

    /// The encoded `google.protobuf.Any`.
    pub fn any(&self) -> Bytes {
        let field = self.sotw_field();
        let mut rest = field.as_ref();
        // The field was framed by `from_body`: a one-byte key, then the length.
        let head = if prost::encoding::decode_key(&mut rest).is_ok()
            && prost::encoding::decode_varint(&mut rest).is_ok()
        {
            field.len() - rest.len()
        } else {
            0
        };
        field.slice(head..)
    }
}

pub(super) fn field_len(tag: u32, len: usize) -> usize {
    key_len(tag) + encoded_len_varint(len as u64) + len
}

pub(super) fn put_head(buffer: &mut BytesMut, tag: u32, len: usize) {
    encode_key(tag, WireType::LengthDelimited, buffer);
    encode_varint(len as u64, buffer);
}

pub(super) fn put_field(buffer: &mut BytesMut, tag: u32, value: &[u8]) {
    put_head(buffer, tag, value.len());
    buffer.put_slice(value);
}

/// A change to a [`ResourceSet`].
#[derive(Debug, Clone)]
pub enum Change {
    /// This is the content now. Equal content is no change.
    Put(Resource),
    /// There is no such resource any more.
    Remove(ResourceType, Arc<str>),
}

/// A resource and when it got its content.
#[derive(Debug, Clone)]
pub struct Entry {
    /// The resource.
    pub resource: Arc<Resource>,
    /// The revision at which it got this content.
    pub changed: Revision,
    /// The revision at which the name came into being, the last time.
    pub since: Revision,
    /// Likewise, the first time that is remembered: a stream that was before it never had the name.
    first: Revision,
}

/// A resource that was removed, with its last content: proxies keep it until nothing refers to it (rule O3).
#[derive(Debug, Clone)]
pub struct Gone {
    /// Its last content.
    pub last: Arc<Resource>,
    /// The revision at which it was removed.
    pub removed: Revision,
    /// The revision at which the name had first come into being: a stream that was before it never had the name.
    pub first: Revision,
}

/// Everything that proxies of one view are to hold, as of a revision. Immutable; a clone is cheap, and so is a changed
/// copy: it shares what did not change.
#[derive(Debug, Clone, Default)]
pub struct ResourceSet {
    revision: Revision,
    published: Option<Instant>,
    types: ByType<TypeSet>,
    /// Which history it belongs to.
    origin: u64,
}

#[derive(Debug, Clone, Default)]
struct TypeSet {
    live: imbl::OrdMap<Arc<str>, Entry>,
    gone: imbl::OrdMap<Arc<str>, Gone>,
    /// The names in `live`, which streams that subscribe to all of them share.
    names: NameSet,
    /// What changed, oldest first, so that a stream finds what is new to it without looking at everything.
    log: imbl::Vector<Logged>,
    /// The log holds every change after this.
    log_from: Revision,
    /// Removals, oldest first, to forget them in order. May name some that came back.
    removals: imbl::Vector<(Revision, Arc<str>)>,
    /// `gone` holds every removal after this.
    gone_from: Revision,
    /// Wrapping sum over name and version of all live resources: a hash of the set, kept up at the cost of the change.
    digest: u64,
    /// What the digest was since when, oldest first.
    digests: imbl::Vector<(Revision, u64)>,
}

/// A change that a set remembers.
#[derive(Debug, Clone)]
struct Logged {
    at: Revision,
    name: Arc<str>,
    /// By so much it changed the digest, wrapping.
    digest: u64,
}

/// Changes, and digests, that a set remembers, per type. A stream further behind looks at everything instead.
const LOG: usize = 4096;

/// Removed resources that a set remembers, per type. A stream further behind must reconnect and say what it holds.
const GONE: usize = 16_384;

impl ResourceSet {
    /// An empty set that begins a history. A client does not tell which members of a collection it holds when it reconnects,
    /// so names of collections must not mean the same in two histories: what went in between would stay in the client for ever.
    pub fn starting(origin: u64) -> Self {
        Self { origin, ..Self::default() }
    }

    /// Which history it belongs to.
    pub fn origin(&self) -> u64 {
        self.origin
    }

    /// The same set with all of a type, and its history, as another of the same origin has it.
    #[must_use]
    pub fn with(mut self, kind: ResourceType, other: &Self) -> Self {
        self.of_mut(kind).clone_from(other.of(kind));
        self
    }

    /// The members of a glob collection by name (rule X3).
    pub fn members<'a>(
        &'a self,
        kind: ResourceType,
        glob: &str,
    ) -> impl Iterator<Item = (&'a Arc<str>, &'a Entry)> + use<'a> {
        let prefix: Arc<str> = glob.strip_suffix(GLOB).unwrap_or(glob).into();
        let from = (Bound::Excluded(prefix.as_ref()), Bound::Unbounded);
        let rest = self.of(kind).live.range::<_, str>(from);
        rest.map(move |(name, entry)| (name.strip_prefix(prefix.as_ref()), name, entry))
            .take_while(|(part, ..)| part.is_some())
            // A longer path is another collection's.
            .filter(|(part, ..)| part.is_some_and(|part| !part.contains('/')))
            .map(|(_, name, entry)| (name, entry))
    }

    /// The revision that it reflects.
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// When it was published, if whoever published it said so; latency to the ACK counts from here.
    pub fn published(&self) -> Option<Instant> {
        self.published
    }

    /// The same set with the time of its publication.
    #[must_use]
    pub fn with_published(mut self, at: Instant) -> Self {
        self.published = Some(at);
        self
    }

    /// A resource by name.
    pub fn get(&self, kind: ResourceType, name: &str) -> Option<&Entry> {
        self.of(kind).live.get(name)
    }

    /// Each of these names, in order, with its resource.
    pub(super) fn get_each<'a>(
        &'a self,
        kind: ResourceType,
        names: &'a OrdSet<Arc<str>>,
    ) -> impl Iterator<Item = (&'a Arc<str>, Option<&'a Entry>)> {
        let live = &self.of(kind).live;
        // Both are in order: where most is asked for, going along costs less than looking up.
        let mut along = (live.len() / 8 <= names.len()).then(|| live.iter().peekable());
        names.iter().map(move |name| {
            let Some(along) = &mut along else { return (name, live.get(name)) };
            while along.next_if(|(there, _)| !Arc::ptr_eq(there, name) && *there < name).is_some() {}
            let found = along.next_if(|(there, _)| Arc::ptr_eq(there, name) || *there == name);
            (name, found.map(|(_, entry)| entry))
        })
    }

    /// A resource that was removed and not yet forgotten.
    pub fn gone(&self, kind: ResourceType, name: &str) -> Option<&Gone> {
        self.of(kind).gone.get(name)
    }

    /// All resources of a type by name.
    pub fn iter(&self, kind: ResourceType) -> impl Iterator<Item = (&Arc<str>, &Entry)> {
        self.of(kind).live.iter()
    }

    /// How many there are of a type.
    pub fn len(&self, kind: ResourceType) -> usize {
        self.of(kind).live.len()
    }

    /// The names of all resources of a type.
    pub(super) fn names(&self, kind: ResourceType) -> &NameSet {
        &self.of(kind).names
    }

    /// Everything removed of a type and not yet forgotten.
    pub fn iter_gone(&self, kind: ResourceType) -> impl Iterator<Item = (&Arc<str>, &Gone)> {
        self.of(kind).gone.iter()
    }

    /// One version for all resources of a type.
    pub fn digest(&self, kind: ResourceType) -> u64 {
        self.of(kind).digest
    }

    /// The last revision at which all resources of a type had this digest, if that is remembered.
    pub(super) fn revision_of(&self, kind: ResourceType, digest: u64) -> Option<Revision> {
        let digests = &self.of(kind).digests;
        let mut until = self.revision;
        for (since, known) in digests.iter().rev() {
            if *known == digest {
                return Some(until);
            }
            until = Revision(since.0.saturating_sub(1));
        }
        None
    }

    /// The part of a digest that one resource makes up; sum them, wrapping, for a subset's.
    pub fn digest_of(resource: &Resource) -> u64 {
        // Mixed together so that two resources that swap their contents change the sum.
        xxh3_64(resource.name.as_bytes()).rotate_left(32)
            ^ resource.version.0.wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }

    /// Names that were put or removed after `since`, newest first, some perhaps more than once; `None` when the set no longer knows: look at everything.
    pub fn changed_since(
        &self,
        kind: ResourceType,
        since: Revision,
    ) -> Option<impl Iterator<Item = &Arc<str>>> {
        Some(self.logged_since(kind, since)?.map(|logged| &logged.name))
    }

    /// Likewise, each change by itself, with the difference that it made to the sum of [`ResourceSet::digest_of`].
    pub(super) fn digests_since(
        &self,
        kind: ResourceType,
        since: Revision,
    ) -> Option<impl Iterator<Item = (&Arc<str>, u64)>> {
        Some(self.logged_since(kind, since)?.map(|logged| (&logged.name, logged.digest)))
    }

    fn logged_since(&self, kind: ResourceType, since: Revision) -> Option<impl Iterator<Item = &Logged>> {
        let set = self.of(kind);
        let known = since >= set.log_from;
        known.then(|| set.log.iter().rev().take_while(move |logged| logged.at > since))
    }

    /// Whether every removal after `since` is still known. If not, a stream that far behind must start anew.
    pub fn knows_removals_since(&self, kind: ResourceType, since: Revision) -> bool {
        since >= self.of(kind).gone_from
    }

    /// The set after `changes`, as of `revision`. What has equal content keeps its place.
    #[must_use]
    pub fn apply(&self, revision: Revision, changes: impl IntoIterator<Item = Change>) -> Self {
        let mut next = self.clone();
        next.revision = revision;
        next.published = None;
        for change in changes {
            match change {
                Change::Put(resource) => next.of_mut(resource.kind).put(revision, resource),
                Change::Remove(kind, name) => next.of_mut(kind).remove(revision, &name),
            }
        }
        for types in next.types.iter_mut() {
            types.note_digest(revision);
        }
        next
    }

    fn of(&self, kind: ResourceType) -> &TypeSet {
        self.types.of(kind)
    }

    fn of_mut(&mut self, kind: ResourceType) -> &mut TypeSet {
        self.types.of_mut(kind)
    }
}

impl TypeSet {
    fn put(&mut self, revision: Revision, resource: Resource) {
        let name = Arc::clone(&resource.name);
        let before = self.live.get(&name);
        let (since, first) = match (before, self.gone.get(&name)) {
            (Some(entry), _) => (entry.since, entry.first),
            (None, Some(gone)) => (revision, gone.first),
            (None, None) => (revision, revision),
        };
        if before.is_some_and(|entry| entry.resource.version == resource.version) {
            return;
        }
        let part_before = before.map_or(0, |before| ResourceSet::digest_of(&before.resource));
        let digest = ResourceSet::digest_of(&resource).wrapping_sub(part_before);
        self.gone.remove(&name);
        let entry = Entry { resource: Arc::new(resource), changed: revision, since, first };
        if self.live.insert(Arc::clone(&name), entry).is_none() {
            self.names.insert(Arc::clone(&name));
        }
        self.note(revision, name, digest);
    }

    fn remove(&mut self, revision: Revision, name: &Arc<str>) {
        let Some(before) = self.live.remove(name) else { return };
        self.names.remove(name);
        let digest = 0_u64.wrapping_sub(ResourceSet::digest_of(&before.resource));
        let gone = Gone { last: before.resource, removed: revision, first: before.first };
        self.gone.insert(Arc::clone(name), gone);
        self.removals.push_back((revision, Arc::clone(name)));
        while self.removals.len() > GONE {
            let Some((removed, oldest)) = self.removals.pop_front() else { break };
            self.gone_from = removed;
            if self.gone.get(&oldest).is_some_and(|gone| gone.removed == removed) {
                self.gone.remove(&oldest);
            }
        }
        self.note(revision, Arc::clone(name), digest);
    }

    fn note_digest(&mut self, revision: Revision) {
        if self.digests.last().map_or(0, |(_, digest)| *digest) != self.digest {
            self.digests.push_back((revision, self.digest));
            while self.digests.len() > LOG {
                self.digests.pop_front();
            }
        }
    }

    fn note(&mut self, at: Revision, name: Arc<str>, digest: u64) {
        self.digest = self.digest.wrapping_add(digest);
        self.log.push_back(Logged { at, name, digest });
        while self.log.len() > LOG {
            if let Some(dropped) = self.log.pop_front() {
                self.log_from = dropped.at;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use envoy_types::pb::envoy::{
        config::cluster::v3::Cluster,
        service::discovery::v3::{DeltaDiscoveryResponse, DiscoveryResponse},
    };
    use prost::Message as _;

    use super::*;

    fn cluster(name: &str, alt: &str) -> Resource {
        let message = Cluster { name: name.into(), alt_stat_name: alt.into(), ..Cluster::default() };
        Resource::new(ResourceType::Cluster, name, &message, [])
    }

    #[test]
    fn framed_bytes_decode_as_the_protocols_messages() {
        let resource = cluster("a", "x");
        let delta = DeltaDiscoveryResponse::decode(resource.delta_field()).unwrap();
        let sotw = DiscoveryResponse::decode(resource.sotw_field()).unwrap();
        assert_eq!(delta.resources[0].name, "a");
        assert_eq!(delta.resources[0].version, resource.version.to_string());
        assert_eq!(delta.resources[0].resource.as_ref(), sotw.resources.first());
        assert_eq!(sotw.resources[0].type_url, ResourceType::Cluster.url());
        assert_eq!(
            envoy_types::pb::google::protobuf::Any::decode(resource.any()).unwrap(),
            sotw.resources[0]
        );
        assert_eq!(Cluster::decode(sotw.resources[0].value.as_slice()).unwrap().alt_stat_name, "x");
    }

    #[test]
    fn equal_content_is_no_change_and_removal_is_remembered() {
        let one = ResourceSet::default()
            .apply(Revision(1), [Change::Put(cluster("a", "")), Change::Put(cluster("b", ""))]);
        let two = one.apply(Revision(2), [Change::Put(cluster("a", ""))]);
        assert_eq!(two.changed_since(ResourceType::Cluster, Revision(1)).unwrap().count(), 0);
        assert_eq!(one.digest(ResourceType::Cluster), two.digest(ResourceType::Cluster));
        let three = two.apply(Revision(3), [Change::Remove(ResourceType::Cluster, "a".into())]);
        assert!(three.get(ResourceType::Cluster, "a").is_none());
        assert_eq!(three.gone(ResourceType::Cluster, "a").unwrap().removed, Revision(3));
        let four = three.apply(Revision(4), [Change::Put(cluster("a", ""))]);
        assert_eq!(four.digest(ResourceType::Cluster), one.digest(ResourceType::Cluster));
        assert_eq!(four.get(ResourceType::Cluster, "a").unwrap().changed, Revision(4));
    }

    #[test]
    fn digest_sees_swapped_contents() {
        let one = ResourceSet::default()
            .apply(Revision(1), [Change::Put(cluster("a", "")), Change::Put(cluster("b", ""))]);
        let a = Resource { version: Version(1), ..cluster("a", "") };
        let b = Resource { version: Version(2), ..cluster("b", "") };
        let (a2, b2) =
            (Resource { version: Version(2), ..a.clone() }, Resource { version: Version(1), ..b.clone() });
        let x = one.apply(Revision(2), [Change::Put(a), Change::Put(b)]);
        let y = one.apply(Revision(2), [Change::Put(a2), Change::Put(b2)]);
        assert_ne!(x.digest(ResourceType::Cluster), y.digest(ResourceType::Cluster));
    }
}
