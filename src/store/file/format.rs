//! The bytes of a segment. A file is a header and then frames; all numbers are little-endian.
//!
//! ```text
//! header   magic 8 | base revision 8 | marker 8 | checksum of the 24 bytes before 8
//! frame    marker 8 | checksum of the rest 8 | payload length 4 | payload
//! payload  of a log       1 | first revision 8 | commits 4 | commits: operations 4 | operations: 1 key value or 2 key
//!          of a snapshot  2 | records 4 | records: revision 8 | key | value     and at its end     3 | records in all 8
//!          of a log       4 | revision 8, up to which the numbers are taken
//! key and value: length 4 | bytes
//! ```
//!
//! A value that is bound to the process is never written: the log has a removal of its key in its place.
//!
//! One frame is one group commit: what a crash tears is then always the last frame, and a whole frame behind a broken
//! one proves that the broken one was once whole. The marker is random per file and seeds the checksums, so that no value
//! that a client sends can look like a frame when frames are looked for behind a damage.

use std::sync::Arc;

use bytes::Bytes;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::{
    model::Revision,
    store::{Condition, Key, Op, state::Record},
};

/// Bytes of a file's header.
pub(super) const HEADER: usize = 32;

/// Bytes of a frame beside its payload.
pub(super) const FRAME: usize = 20;

/// No commit joins a frame that is longer than this.
pub(super) const FULL: usize = 8 << 20;

/// The longest commit in bytes, far above what a registry writes.
pub(super) const MAX_COMMIT: usize = 64 << 20;

/// The longest payload: a frame that is not yet full, and the longest commit.
const MAX_PAYLOAD: usize = FULL + MAX_COMMIT;

/// How much memory a frame keeps for the next one at most.
const KEPT: usize = 16 << 20;

const COMMITS: u8 = 1;
const RECORDS: u8 = 2;
const END: u8 = 3;
const SKIP: u8 = 4;

const PUT: u8 = 1;
const DELETE: u8 = 2;

/// What a file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Log,
    Snapshot,
}

impl Kind {
    fn magic(self) -> [u8; 8] {
        match self {
            Self::Log => *b"DISCOLG1",
            Self::Snapshot => *b"DISCOSN1",
        }
    }
}

/// The first bytes of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) kind: Kind,
    /// A log holds the commits after it, a snapshot the state at it.
    pub(super) base: Revision,
    /// What each frame of the file begins with.
    pub(super) marker: u64,
}

impl Header {
    /// A header for a new file.
    pub(super) fn new(kind: Kind, base: Revision) -> Self {
        // Never 0, which is what a file system leaves where nothing was written.
        Self { kind, base, marker: fastrand::u64(1..) }
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER);
        bytes.extend_from_slice(&self.kind.magic());
        bytes.extend_from_slice(&self.base.0.to_le_bytes());
        bytes.extend_from_slice(&self.marker.to_le_bytes());
        let checksum = xxh3_64_with_seed(&bytes, 0);
        bytes.extend_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// `None` when these are not the first bytes of a whole file of the kind.
    pub(super) fn decode(kind: Kind, bytes: &[u8]) -> Option<Self> {
        let checked = bytes.get(..HEADER - 8)?;
        let mut fields = Fields(bytes);
        let magic = fields.take(8)?;
        let (base, marker, checksum) = (fields.u64()?, fields.u64()?, fields.u64()?);
        (magic == kind.magic() && checksum == xxh3_64_with_seed(checked, 0)).then_some(Self {
            kind,
            base: Revision(base),
            marker,
        })
    }
}

/// How many bytes a commit takes within a frame.
pub(super) fn encoded_len(ops: &[Op]) -> usize {
    let len = |op: &Op| match op {
        Op::Put { key, value, .. } => 1 + 4 + key.len() + 4 + value.len(),
        Op::Bind { key, .. } | Op::Delete { key, .. } => 1 + 4 + key.len(),
    };
    4 + ops.iter().map(len).sum::<usize>()
}

/// Builds one frame.
#[derive(Debug)]
pub(super) struct Frame {
    bytes: Vec<u8>,
    marker: u64,
    count: u32,
}

impl Frame {
    /// For files with this marker.
    pub(super) fn new(marker: u64) -> Self {
        Self { bytes: Vec::new(), marker, count: 0 }
    }

    /// Starts a frame of commits, the first of which is `first`.
    pub(super) fn begin_commits(&mut self, first: Revision) {
        self.begin(COMMITS);
        self.bytes.extend_from_slice(&first.0.to_le_bytes());
        self.bytes.extend_from_slice(&[0; 4]);
    }

    /// Starts a frame of records.
    pub(super) fn begin_records(&mut self) {
        self.begin(RECORDS);
        self.bytes.extend_from_slice(&[0; 4]);
    }

    fn begin(&mut self, kind: u8) {
        self.count = 0;
        self.bytes.clear();
        // One huge commit does not hold its memory for ever.
        self.bytes.shrink_to(KEPT);
        self.bytes.extend_from_slice(&self.marker.to_le_bytes());
        // For the checksum and the length.
        self.bytes.extend_from_slice(&[0; 12]);
        self.bytes.push(kind);
    }

    /// Adds a commit. Conditions are not kept: they held.
    pub(super) fn push_commit(&mut self, ops: &[Op]) {
        self.count += 1;
        self.bytes.extend_from_slice(&(ops.len() as u32).to_le_bytes());
        for op in ops {
            match op {
                Op::Put { key, value, .. } => {
                    self.bytes.push(PUT);
                    self.push(key.as_bytes());
                    self.push(value);
                }
                Op::Bind { key, .. } | Op::Delete { key, .. } => {
                    self.bytes.push(DELETE);
                    self.push(key.as_bytes());
                }
            }
        }
    }

    /// Adds a record.
    pub(super) fn push_record(&mut self, key: &Key, record: &Record) {
        self.count += 1;
        self.bytes.extend_from_slice(&record.revision.0.to_le_bytes());
        self.push(key.as_bytes());
        self.push(&record.value);
    }

    fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
        self.bytes.extend_from_slice(bytes);
    }

    /// How many commits or records it has.
    pub(super) fn count(&self) -> u32 {
        self.count
    }

    /// How many bytes it has so far.
    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// The frame of commits, ready to be written.
    pub(super) fn finish_commits(&mut self) -> &[u8] {
        self.finish(FRAME + 1 + 8)
    }

    /// The frame of records, ready to be written.
    pub(super) fn finish_records(&mut self) -> &[u8] {
        self.finish(FRAME + 1)
    }

    /// The last frame of a snapshot of `records` records.
    pub(super) fn end(&mut self, records: u64) -> &[u8] {
        self.begin(END);
        self.bytes.extend_from_slice(&records.to_le_bytes());
        self.seal()
    }

    /// A frame that says that the revisions up to `to` are taken.
    pub(super) fn skip(&mut self, to: Revision) -> &[u8] {
        self.begin(SKIP);
        self.bytes.extend_from_slice(&to.0.to_le_bytes());
        self.seal()
    }

    fn finish(&mut self, count_at: usize) -> &[u8] {
        self.patch(count_at, &self.count.to_le_bytes());
        self.seal()
    }

    fn seal(&mut self) -> &[u8] {
        let length = (self.bytes.len() - FRAME) as u32;
        self.patch(16, &length.to_le_bytes());
        let checksum = xxh3_64_with_seed(self.bytes.get(16..).unwrap_or_default(), self.marker);
        self.patch(8, &checksum.to_le_bytes());
        &self.bytes
    }

    fn patch(&mut self, at: usize, with: &[u8]) {
        if let Some(place) = self.bytes.get_mut(at..at + with.len()) {
            place.copy_from_slice(with);
        }
    }
}

/// What a frame holds.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Payload {
    /// Commits of a log, with consecutive revisions from `first` on.
    Commits { first: Revision, commits: Vec<Vec<Op>> },
    /// Records of a snapshot.
    Records(Vec<(Key, Record)>),
    /// The end of a snapshot, with how many records it has.
    End(u64),
    /// The revisions up to this one are taken.
    Skip(Revision),
}

/// The payload of the whole frame at `offset`, and where the next frame begins. `None` when there is no whole frame.
pub(super) fn frame_at(file: &[u8], offset: usize, marker: u64) -> Option<(&[u8], usize)> {
    let mut fields = Fields(file.get(offset..)?);
    if fields.u64()? != marker {
        return None;
    }
    let checksum = fields.u64()?;
    let sealed = fields.0;
    let length = usize::try_from(fields.u32()?).ok().filter(|length| *length <= MAX_PAYLOAD)?;
    let payload = fields.take(length)?;
    (xxh3_64_with_seed(sealed.get(..4 + length)?, marker) == checksum)
        .then_some((payload, offset + FRAME + length))
}

/// Where the first whole frame at or after `from` begins.
pub(super) fn find_frame(file: &[u8], mut from: usize, marker: u64) -> Option<usize> {
    let wanted = marker.to_le_bytes();
    loop {
        from += file.get(from..)?.windows(wanted.len()).position(|window| window == wanted)?;
        if frame_at(file, from, marker).is_some() {
            return Some(from);
        }
        from += 1;
    }
}

/// Reads a payload. `None` when it is whole by its checksum but not of this format.
pub(super) fn decode(payload: &[u8]) -> Option<Payload> {
    let mut fields = Fields(payload);
    let decoded = match fields.u8()? {
        COMMITS => {
            let first = Revision(fields.u64()?);
            let commits = (0..fields.u32()?).map(|_| fields.commit()).collect::<Option<Vec<_>>>()?;
            Payload::Commits { first, commits }
        }
        RECORDS => Payload::Records((0..fields.u32()?).map(|_| fields.record()).collect::<Option<_>>()?),
        END => Payload::End(fields.u64()?),
        SKIP => Payload::Skip(Revision(fields.u64()?)),
        _ => return None,
    };
    fields.0.is_empty().then_some(decoded)
}

/// Takes fields off the front.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn u8(&mut self) -> Option<u8> {
        self.take(1)?.first().copied()
    }

    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(*self.take(4)?.first_chunk()?))
    }

    fn u64(&mut self) -> Option<u64> {
        Some(u64::from_le_bytes(*self.take(8)?.first_chunk()?))
    }

    fn bytes(&mut self) -> Option<&'a [u8]> {
        let length = usize::try_from(self.u32()?).ok()?;
        self.take(length)
    }

    fn key(&mut self) -> Option<Key> {
        Some(Arc::from(str::from_utf8(self.bytes()?).ok()?))
    }

    /// Copied, so that one small value does not keep a whole file in memory.
    fn value(&mut self) -> Option<Bytes> {
        Some(Bytes::copy_from_slice(self.bytes()?))
    }

    fn commit(&mut self) -> Option<Vec<Op>> {
        (0..self.u32()?).map(|_| self.op()).collect()
    }

    fn op(&mut self) -> Option<Op> {
        match self.u8()? {
            PUT => Some(Op::Put { key: self.key()?, value: self.value()?, when: Condition::Always }),
            DELETE => Some(Op::Delete { key: self.key()?, when: Condition::Always }),
            _ => None,
        }
    }

    fn record(&mut self) -> Option<(Key, Record)> {
        let revision = Revision(self.u64()?);
        Some((self.key()?, Record { value: self.value()?, revision, bound: false }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(key: &str, value: &[u8]) -> Op {
        Op::Put { key: key.into(), value: Bytes::copy_from_slice(value), when: Condition::Always }
    }

    fn delete(key: &str) -> Op {
        Op::Delete { key: key.into(), when: Condition::Always }
    }

    fn commits(marker: u64, first: u64, commits: &[Vec<Op>]) -> Vec<u8> {
        let mut frame = Frame::new(marker);
        frame.begin_commits(Revision(first));
        for ops in commits {
            frame.push_commit(ops);
        }
        frame.finish_commits().to_vec()
    }

    #[test]
    fn what_is_written_is_read() {
        let written = [vec![put("a/b", b"1"), delete("c")], vec![], vec![put("", b"")]];
        let bytes = commits(7, 41, &written);
        let (payload, next) = frame_at(&bytes, 0, 7).unwrap();
        assert_eq!(next, bytes.len());
        assert_eq!(
            decode(payload),
            Some(Payload::Commits { first: Revision(41), commits: written.to_vec() })
        );

        let record = Record { value: Bytes::from_static(b"x"), revision: Revision(3), bound: false };
        let mut frame = Frame::new(7);
        frame.begin_records();
        frame.push_record(&"k".into(), &record);
        let bytes = frame.finish_records().to_vec();
        let (payload, _) = frame_at(&bytes, 0, 7).unwrap();
        assert_eq!(decode(payload), Some(Payload::Records(vec![("k".into(), record)])));

        let bytes = frame.end(9).to_vec();
        assert_eq!(decode(frame_at(&bytes, 0, 7).unwrap().0), Some(Payload::End(9)));
        let bytes = frame.skip(Revision(9)).to_vec();
        assert_eq!(decode(frame_at(&bytes, 0, 7).unwrap().0), Some(Payload::Skip(Revision(9))));
    }

    #[test]
    fn headers_are_of_their_kind_and_whole() {
        let header = Header::new(Kind::Log, Revision(12));
        let bytes = header.encode();
        assert_eq!(bytes.len(), HEADER);
        assert_eq!(Header::decode(Kind::Log, &bytes), Some(header));
        assert_eq!(Header::decode(Kind::Snapshot, &bytes), None);
        for at in 0..HEADER {
            let mut flipped = bytes.clone();
            flipped[at] ^= 1;
            assert_eq!(Header::decode(Kind::Log, &flipped), None, "byte {at}");
            assert_eq!(Header::decode(Kind::Log, &bytes[..at]), None, "length {at}");
        }
    }

    #[test]
    fn no_damaged_frame_is_taken_for_a_whole_one() {
        let bytes = commits(0x0123_4567_89ab_cdef, 1, &[vec![put("key", b"value")]]);
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut flipped = bytes.clone();
                flipped[at] ^= 1 << bit;
                assert_eq!(frame_at(&flipped, 0, 0x0123_4567_89ab_cdef), None, "byte {at} bit {bit}");
            }
            assert_eq!(frame_at(&bytes[..at], 0, 0x0123_4567_89ab_cdef), None, "length {at}");
        }
    }

    #[test]
    fn a_frame_is_found_behind_garbage_and_not_in_a_value() {
        let inner = commits(5, 9, &[vec![put("x", b"y")]]);
        let outer = commits(6, 1, &[vec![put("k", &inner)]]);
        let mut file = vec![6; 37];
        file.extend_from_slice(&6u64.to_le_bytes());
        let at = file.len();
        file.extend_from_slice(&outer);
        assert_eq!(find_frame(&file, 0, 6), Some(at));
        assert_eq!(find_frame(&file, at + 1, 6), None);
        assert_eq!(find_frame(&[0; 4096], 0, 6), None);
    }
}
