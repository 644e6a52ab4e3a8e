//! A dated copy of everything that a store holds, as one file with a checksum.
//!
//! ```text
//! magic 8 | head: length 4, message | entries: length 4, message | 0 4 | how many entries 8 | checksum of all before 8
//! ```
//!
//! Numbers are little-endian. A file that is cut, or changed anywhere, is refused as a whole.

use std::time::SystemTime;

use bytes::Bytes;
use prost::Message as _;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::{Entry, Listing};
use crate::model::Revision;

const MAGIC: &[u8; 8] = b"DISCOBK1";

/// Bytes behind the entries: no length, the count, the checksum.
const END: usize = 4 + 8 + 8;

/// Everything that a store held at one revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backup {
    /// When it was taken.
    pub taken_at: SystemTime,
    /// What was held, at which revision.
    pub listing: Listing,
}

/// Why a file is no backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BackupError {
    /// It is something else.
    #[error("it is not a Disco snapshot: it does not begin like one")]
    Other,
    /// Bytes are missing or changed.
    #[error(
        "the snapshot is not whole: its checksum does not match, so it was cut or changed after it was taken; use another one"
    )]
    Damaged,
    /// Whole, but not understood.
    #[error("the snapshot was written by a version of Disco that this one does not understand")]
    Unknown,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Head {
    #[prost(uint64, tag = "1")]
    revision: u64,
    #[prost(message, optional, tag = "2")]
    taken_at: Option<prost_types::Timestamp>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Record {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(bytes = "bytes", tag = "2")]
    value: Bytes,
    #[prost(uint64, tag = "3")]
    revision: u64,
}

impl Backup {
    /// The bytes of the file, in parts, so that a large one is not in memory twice.
    pub fn into_parts(self) -> impl Iterator<Item = Bytes> + Send {
        let head = Head { revision: self.listing.revision.0, taken_at: Some(self.taken_at.into()) };
        let mut first = MAGIC.to_vec();
        push(&mut first, &head);
        let count = self.listing.entries.len() as u64;
        let entries = self.listing.entries.into_iter().map(|Entry { key, value, revision }| {
            let mut bytes = Vec::with_capacity(key.len() + value.len() + 24);
            push(&mut bytes, &Record { key: key.to_string(), value, revision: revision.0 });
            bytes
        });
        let mut checksum = Xxh3::new();
        let mut end = [&0u32.to_le_bytes()[..], &count.to_le_bytes()].concat();
        let parts = std::iter::once(first).chain(entries).map(Some).chain([None]);
        parts.map(move |part| {
            let part = part.unwrap_or_else(|| {
                checksum.update(&end);
                end.extend_from_slice(&checksum.digest().to_le_bytes());
                std::mem::take(&mut end)
            });
            checksum.update(&part);
            Bytes::from(part)
        })
    }

    /// Reads a whole file.
    ///
    /// # Errors
    /// [`BackupError`]; nothing of it is used then.
    pub fn read(file: &Bytes) -> Result<Self, BackupError> {
        let mut rest = file.strip_prefix(MAGIC.as_slice()).ok_or(BackupError::Other)?;
        let (body, checksum) = file.split_last_chunk::<8>().ok_or(BackupError::Damaged)?;
        if file.len() < MAGIC.len() + END || xxh3_64(body) != u64::from_le_bytes(*checksum) {
            return Err(BackupError::Damaged);
        }
        let mut next = || -> Option<Option<Bytes>> {
            let (length, behind) = rest.split_first_chunk::<4>()?;
            let length = usize::try_from(u32::from_le_bytes(*length)).ok()?;
            let (message, behind) = behind.split_at_checked(length)?;
            rest = behind;
            Some((length > 0).then(|| file.slice_ref(message)))
        };
        let mut read = || -> Option<Self> {
            let head = Head::decode(next()??).ok()?;
            let mut entries = Vec::new();
            while let Some(message) = next()? {
                // Copied, so that one small value does not keep the whole file in memory.
                let Record { key, value, revision } = Record::decode(message).ok()?;
                let value = Bytes::copy_from_slice(&value);
                entries.push(Entry { key: key.into(), value, revision: Revision(revision) });
            }
            let taken_at = SystemTime::try_from(head.taken_at?).ok()?;
            Some(Self { taken_at, listing: Listing { revision: Revision(head.revision), entries } })
        };
        read().ok_or(BackupError::Unknown)
    }
}

fn push(bytes: &mut Vec<u8>, message: &impl prost::Message) {
    // An entry is bounded by the largest commit of a store.
    let length = u32::try_from(message.encoded_len()).unwrap_or(u32::MAX);
    bytes.extend_from_slice(&length.to_le_bytes());
    message.encode_raw(bytes);
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn file(backup: &Backup) -> Vec<u8> {
        backup.clone().into_parts().flat_map(|part| part.to_vec()).collect()
    }

    #[test]
    fn a_file_reads_back_and_every_changed_or_missing_byte_is_noticed() {
        let entry = |key: &str, value: &'static [u8], revision| Entry {
            key: key.into(),
            value: Bytes::from_static(value),
            revision: Revision(revision),
        };
        let entries = vec![entry("a/b", b"1", 3), entry("services/x", b"", 7)];
        for entries in [entries, vec![]] {
            let taken_at = SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_123);
            let backup = Backup { taken_at, listing: Listing { revision: Revision(9), entries } };
            let whole = file(&backup);
            assert_eq!(Backup::read(&whole.clone().into()), Ok(backup));
            for at in 0..whole.len() {
                let mut flipped = whole.clone();
                flipped[at] ^= 4;
                assert!(Backup::read(&flipped.into()).is_err(), "byte {at}");
                assert!(Backup::read(&whole[..at].to_vec().into()).is_err(), "length {at}");
            }
            assert!(Backup::read(&[whole, vec![0]].concat().into()).is_err());
        }
        assert_eq!(Backup::read(&Bytes::from_static(b"{}")), Err(BackupError::Other));
    }
}
