//! Snapshots: the state at one revision in a file, so that the logs before it can go.
//!
//! The order makes a crash at any point safe: the log that begins at the snapshot's revision is there before the
//! snapshot gets its name, and older files go after that. Until then the older snapshot and all logs since are the
//! truth; from then on the new one and the logs from it.

use std::{fs, io::Write as _, path::Path};

use super::{
    format::{Frame, Header, Kind},
    log::{self, FileError, Segments, at},
};
use crate::{model::Revision, store::state::State};

/// Bytes of records in one frame. Each is synced by itself, so that the log's own syncs never wait for a whole snapshot.
const CHUNK: usize = 2 << 20;

/// Writes the snapshot of `state`, then removes the files that it makes superfluous.
pub(super) fn compact(dir: &Path, state: &State) -> Result<(), FileError> {
    write_snapshot(dir, state)?;
    remove_older(dir, state.revision())
}

pub(super) fn write_snapshot(dir: &Path, state: &State) -> Result<(), FileError> {
    let header = Header::new(Kind::Snapshot, state.revision());
    let path = log::path(dir, Kind::Snapshot, state.revision());
    log::create(&path, |file| {
        file.write_all(&header.encode())?;
        let mut frame = Frame::new(header.marker);
        frame.begin_records();
        let mut records = 0;
        for (key, record) in state.iter().filter(|(_, record)| !record.bound) {
            records += 1;
            frame.push_record(key, record);
            if frame.len() >= CHUNK {
                file.write_all(frame.finish_records())?;
                file.sync_data()?;
                frame.begin_records();
            }
        }
        if frame.count() > 0 {
            file.write_all(frame.finish_records())?;
        }
        file.write_all(frame.end(records))
    })?;
    Ok(())
}

/// Removes the segments that the snapshot at `base` makes superfluous. What a crash leaves goes at the next start.
pub(super) fn remove_older(dir: &Path, base: Revision) -> Result<(), FileError> {
    let segments = Segments::list(dir)?;
    let logs = segments.logs.into_iter().map(|revision| (Kind::Log, revision));
    let snapshots = segments.snapshots.into_iter().map(|revision| (Kind::Snapshot, revision));
    for (kind, revision) in logs.chain(snapshots).filter(|(_, revision)| *revision < base) {
        let path = log::path(dir, kind, revision);
        fs::remove_file(&path).map_err(at(&path))?;
    }
    log::sync_dir(dir)
}
