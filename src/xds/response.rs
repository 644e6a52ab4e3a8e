use bytes::{BufMut, Bytes, BytesMut};

use super::resource::{field_len, put_field, put_head};
use super::{Protocol, ResourceType};
use crate::model::Revision;

/// A response as it goes on the wire: a few bytes of its own and the shared bytes of its resources, in any order that
/// protobuf allows.
#[derive(Debug, Clone)]
pub struct Response {
    /// The type, `None` for one that Disco does not generate.
    pub kind: Option<ResourceType>,
    /// Which response of the stream it is.
    pub nonce: u64,
    /// The state that it brings the client to, as far as this response goes.
    pub revision: Revision,
    /// Resources in it.
    pub resources: usize,
    /// Removals in it; delta only.
    pub removed: usize,
    pub(super) head: Bytes,
    pub(super) body: Vec<Bytes>,
}

impl Response {
    /// Its length on the wire in bytes, without the gRPC frame.
    #[allow(clippy::len_without_is_empty, reason = "a response is never empty: it has a nonce")]
    pub fn len(&self) -> usize {
        self.head.len() + self.body.iter().map(Bytes::len).sum::<usize>()
    }

    /// Writes it.
    pub fn encode(&self, buffer: &mut impl BufMut) {
        buffer.put_slice(&self.head);
        for part in &self.body {
            buffer.put_slice(part);
        }
    }
}

/// The fields of a response that are not resources.
pub(super) struct Head<'a> {
    pub protocol: Protocol,
    /// `version_info` of SotW, `system_version_info` of delta; field 1 in both.
    pub version: &'a str,
    pub type_url: &'a str,
    pub nonce: &'a str,
    pub identifier: &'a str,
}

impl Head<'_> {
    pub(super) fn encode(&self) -> Bytes {
        let control_plane = match self.protocol {
            Protocol::Delta => 7,
            Protocol::Sotw => 6,
        };
        let identifier_len = field_len(1, self.identifier.len());
        let mut buffer = BytesMut::with_capacity(
            field_len(1, self.version.len())
                + field_len(4, self.type_url.len())
                + field_len(5, self.nonce.len())
                + field_len(control_plane, identifier_len),
        );
        put_field(&mut buffer, 1, self.version.as_bytes());
        put_field(&mut buffer, 4, self.type_url.as_bytes());
        put_field(&mut buffer, 5, self.nonce.as_bytes());
        put_head(&mut buffer, control_plane, identifier_len);
        put_field(&mut buffer, 1, self.identifier.as_bytes());
        buffer.freeze()
    }
}

/// A `resources` field of a DeltaDiscoveryResponse without content, by name and alias: there is nothing behind the alias.
pub(super) fn bodyless_field(name: &str) -> Bytes {
    const RESOURCES: u32 = 2;
    let mut resource = BytesMut::with_capacity(field_len(3, name.len()) + field_len(4, name.len()));
    put_field(&mut resource, 3, name.as_bytes());
    put_field(&mut resource, 4, name.as_bytes());
    let mut buffer = BytesMut::with_capacity(field_len(RESOURCES, resource.len()));
    put_field(&mut buffer, RESOURCES, &resource);
    buffer.freeze()
}

/// `removed_resources` of a DeltaDiscoveryResponse.
pub(super) fn removed_field<'a>(names: impl Iterator<Item = &'a str> + Clone) -> Bytes {
    const REMOVED: u32 = 6;
    let len = names.clone().map(|name| field_len(REMOVED, name.len())).sum();
    let mut buffer = BytesMut::with_capacity(len);
    for name in names {
        put_field(&mut buffer, REMOVED, name.as_bytes());
    }
    buffer.freeze()
}
