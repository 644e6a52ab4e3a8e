use std::{ops::Range, str};

use bytes::Bytes;
use envoy_types::pb::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DiscoveryRequest};
use prost::{
    DecodeError, Message,
    encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field},
};
use xxhash_rust::xxh3::xxh3_64;

use super::{ProtocolError, Version};

/// A request, with what it says the client holds.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Asked<T> {
    pub message: T,
    pub held: Versions,
}

/// Why bytes are no request.
#[derive(Debug, thiserror::Error)]
pub(super) enum Malformed {
    #[error(transparent)]
    Message(#[from] DecodeError),
    #[error("initial_resource_versions is cut short")]
    Short,
    #[error("a name in initial_resource_versions is not UTF-8")]
    Text,
    #[error("initial_resource_versions has more than {VERSIONS_MOST} names")]
    ManyVersions,
    #[error(transparent)]
    ManyNames(ProtocolError),
}

/// A request as it comes off the wire.
pub(super) trait Decode: Message + Default + 'static {
    /// # Errors
    /// What is wrong with the bytes, or that there are more than `names` to subscribe to: that is known before anything is made
    /// of them, which for a million takes so long that others would wait.
    fn decode(bytes: Bytes, names: usize) -> Result<Asked<Self>, Malformed>;
}

/// Counts the fields of a message by tag: lists of names are all that comes often.
#[derive(Debug, Default)]
struct Counts([usize; 16]);

impl Counts {
    fn saw(&mut self, tag: u32) {
        if let Some(count) = self.0.get_mut(tag as usize) {
            *count += 1;
        }
    }

    fn check(self, limit: usize) -> Result<(), Malformed> {
        let names = self.0.into_iter().max().unwrap_or_default();
        if names > limit {
            Err(Malformed::ManyNames(ProtocolError::ManyNames { names, limit }))
        } else {
            Ok(())
        }
    }
}

impl Decode for DiscoveryRequest {
    fn decode(bytes: Bytes, names: usize) -> Result<Asked<Self>, Malformed> {
        // Each takes two bytes at least.
        if bytes.len() / 2 > names {
            let (mut rest, mut count) = (bytes.as_ref(), Counts::default());
            while !rest.is_empty() {
                let (tag, wire) = decode_key(&mut rest)?;
                count.saw(tag);
                skip_field(wire, tag, &mut rest, DecodeContext::default())?;
            }
            count.check(names)?;
        }
        Ok(Asked { message: Message::decode(bytes)?, held: Versions::default() })
    }
}

/// The field of the versions.
const VERSIONS: u32 = 5;

/// So many versions are taken in: each takes some memory until it was compared.
const VERSIONS_MOST: usize = 1_000_000;

/// The versions are taken out first and stay in the memory of the request: two strings for each are most of what it would cost
/// to let a proxy in that comes back.
impl Decode for DeltaDiscoveryRequest {
    fn decode(bytes: Bytes, names: usize) -> Result<Asked<Self>, Malformed> {
        let (mut rest, mut count) = (bytes.as_ref(), Counts::default());
        let mut entries = Vec::new();
        let mut others: Vec<Range<usize>> = Vec::new();
        while !rest.is_empty() {
            let start = bytes.len() - rest.len();
            let (tag, wire) = decode_key(&mut rest)?;
            // Whatever the wire type says: prost reads a map like this, and each request is to mean one thing.
            if tag == VERSIONS {
                let entry = take(&mut rest)?;
                entries.push(Entry::decode(entry, bytes.len() - rest.len() - entry.len())?);
                if entries.len() > VERSIONS_MOST {
                    return Err(Malformed::ManyVersions);
                }
                continue;
            }
            count.saw(tag);
            skip_field(wire, tag, &mut rest, DecodeContext::default())?;
            let end = bytes.len() - rest.len();
            match others.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => others.push(start..end),
            }
        }
        count.check(names)?;
        let message = match others.as_slice() {
            [all] => Message::decode(bytes.slice(all.clone()))?,
            parts => {
                let parts: Vec<&[u8]> = parts.iter().filter_map(|part| bytes.get(part.clone())).collect();
                Message::decode(parts.concat().as_slice())?
            }
        };
        Ok(Asked { message, held: Versions::new(bytes, entries) })
    }
}

/// The content of a field with a length.
fn take<'a>(rest: &mut &'a [u8]) -> Result<&'a [u8], Malformed> {
    let len = usize::try_from(decode_varint(rest)?).map_err(|_| Malformed::Short)?;
    let (content, after) = rest.split_at_checked(len).ok_or(Malformed::Short)?;
    *rest = after;
    Ok(content)
}

/// Versions by name that a client says it holds (rule D9). They stay in the memory of the request, so keep them only until they
/// have been compared.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Versions {
    bytes: Bytes,
    /// By hash, then by name; of one name the last counts.
    entries: Vec<Entry>,
    /// How many there are that were not taken out.
    len: usize,
}

#[derive(Debug, Clone, PartialEq)]
struct Entry {
    hash: u64,
    name: Range<usize>,
    /// `None` if it is none of ours.
    version: Option<Version>,
    there: bool,
}

impl Entry {
    /// From an entry of the map, which stands at `at` in the request.
    fn decode(entry: &[u8], at: usize) -> Result<Self, Malformed> {
        let (mut name, mut version) = (at..at, &[][..]);
        let mut text = &[][..];
        let mut rest = entry;
        while !rest.is_empty() {
            match decode_key(&mut rest)? {
                (1, WireType::LengthDelimited) => {
                    text = take(&mut rest)?;
                    let end = at + entry.len() - rest.len();
                    name = end - text.len()..end;
                }
                (2, WireType::LengthDelimited) => version = take(&mut rest)?,
                (tag, wire) => skip_field(wire, tag, &mut rest, DecodeContext::default())?,
            }
        }
        str::from_utf8(text).map_err(|_| Malformed::Text)?;
        Ok(Self { hash: xxh3_64(text), name, version: version_of(version), there: true })
    }
}

/// A version as Disco writes it.
fn version_of(text: &[u8]) -> Option<Version> {
    let text = str::from_utf8(text).ok().filter(|text| text.len() == 16)?;
    u64::from_str_radix(text, 16).ok().map(Version)
}

impl Versions {
    fn new(bytes: Bytes, mut entries: Vec<Entry>) -> Self {
        if entries.is_empty() {
            return Self::default();
        }
        let name = |entry: &Entry| bytes.get(entry.name.clone());
        let key = |entry: &Entry| (entry.hash, name(entry));
        entries.sort_by(|a, b| key(a).cmp(&key(b)));
        // The last of equal ones stands first after this.
        entries.reverse();
        entries.dedup_by(|a, b| key(a) == key(b));
        entries.reverse();
        let len = entries.len();
        Self { bytes, entries, len }
    }

    /// How many names there are.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Whether the client said of nothing that it holds it.
    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    fn find(&self, name: &str) -> Option<usize> {
        let hash = xxh3_64(name.as_bytes());
        let key = (hash, Some(name.as_bytes()));
        let found =
            self.entries.binary_search_by(|entry| (entry.hash, self.bytes.get(entry.name.clone())).cmp(&key));
        found.ok().filter(|at| self.entries.get(*at).is_some_and(|entry| entry.there))
    }

    /// Whether the client holds the name, and if so, which version; `None` for one that Disco never gave out.
    pub(super) fn get(&self, name: &str) -> Option<Option<Version>> {
        Some(self.entries.get(self.find(name)?)?.version)
    }

    /// The client does not hold it any more.
    pub(super) fn remove(&mut self, name: &str) {
        let at = self.find(name);
        if let Some(entry) = at.and_then(|at| self.entries.get_mut(at)) {
            entry.there = false;
            self.len -= 1;
        }
    }

    /// Whatever it holds is to be sent again.
    pub(super) fn distrust(&mut self) {
        self.entries.iter_mut().for_each(|entry| entry.version = None);
    }

    /// All names, in no order that means anything.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        let there = self.entries.iter().filter(|entry| entry.there);
        there.filter_map(|entry| str::from_utf8(self.bytes.get(entry.name.clone())?).ok())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashMap};

    use proptest::{collection::vec, option, prelude::*};
    use prost::encoding::{encode_key, encode_varint};

    use super::*;
    use crate::xds::testing::{node, random};

    /// As prost has it.
    fn plain(bytes: &[u8]) -> Result<DeltaDiscoveryRequest, DecodeError> {
        <DeltaDiscoveryRequest as Message>::decode(bytes)
    }

    fn check(bytes: Vec<u8>) {
        let ours = <DeltaDiscoveryRequest as Decode>::decode(bytes.clone().into(), usize::MAX);
        let theirs = plain(&bytes);
        let (mut ours, mut theirs) = match (ours, theirs) {
            (Ok(ours), Ok(theirs)) => (ours, theirs),
            // A version that is not text is none of ours, which is no reason to end a stream.
            (Ok(_), Err(error)) => {
                return assert!(error.to_string().contains("UTF-8"), "{error} in {bytes:?}");
            }
            (Err(_), Err(_)) => return,
            (Err(error), Ok(theirs)) => panic!("{error}, but it is {theirs:?}"),
        };
        let versions: HashMap<String, String> = std::mem::take(&mut theirs.initial_resource_versions);
        assert_eq!(ours.message, theirs);
        let want: BTreeMap<&str, _> =
            versions.iter().map(|(name, text)| (name.as_str(), version_of(text.as_bytes()))).collect();
        let have: BTreeMap<&str, _> =
            ours.held.names().map(|name| (name, ours.held.get(name).unwrap())).collect();
        assert_eq!(have, want);
        assert_eq!((ours.held.len(), ours.held.get("never")), (want.len(), None));
        if let Some(name) = versions.keys().next() {
            ours.held.remove(name);
            ours.held.remove(name);
            assert_eq!((ours.held.get(name), ours.held.len()), (None, versions.len() - 1));
        }
    }

    /// Map entries as some encoder may write them: parts missing, twice, in another order.
    fn entry(parts: Vec<(u8, Vec<u8>)>) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (tag, text) in parts {
            encode_key(u32::from(tag), WireType::LengthDelimited, &mut bytes);
            encode_varint(text.len() as u64, &mut bytes);
            bytes.extend(text);
        }
        bytes
    }

    #[test]
    fn d9_requests_are_read_as_prost_reads_them() {
        let text = prop_oneof![
            vec(prop::sample::select(b"ab".as_slice()), 0..3),
            Just(b"00000000000000ff".to_vec()),
            vec(any::<u8>(), 0..3),
        ];
        let parts = vec((1..4_u8, text), 0..4);
        let piece = prop_oneof![
            4 => parts.prop_map(Some),
            1 => Just(None),
        ];
        let flips = vec(any::<(u16, u8)>(), 0..2);
        random(2000, (vec(piece, 0..6), option::of(0..40_usize), flips), |(pieces, cut, flips)| {
            let mut bytes = Vec::new();
            for piece in pieces {
                match piece {
                    Some(parts) => {
                        let entry = entry(parts);
                        encode_key(VERSIONS, WireType::LengthDelimited, &mut bytes);
                        encode_varint(entry.len() as u64, &mut bytes);
                        bytes.extend(entry);
                    }
                    None => {
                        let other = DeltaDiscoveryRequest {
                            node: Some(node("n")),
                            resource_names_subscribe: vec!["a".into(), "b".into()],
                            ..Default::default()
                        };
                        bytes.extend(other.encode_to_vec());
                    }
                }
            }
            for (place, byte) in flips {
                let len = bytes.len().max(1);
                if let Some(there) = bytes.get_mut(usize::from(place) % len) {
                    *there = byte;
                }
            }
            bytes.truncate(cut.unwrap_or(bytes.len()));
            check(bytes);
        });
    }
}
