//! Files of a store directory: their names, how one comes to be, and the log that commits are appended to.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use super::format::{HEADER, Header, Kind};
use crate::model::Revision;

/// An operation on a file that failed.
#[derive(Debug, thiserror::Error)]
#[error("{}: {cause}", path.display())]
pub struct FileError {
    /// The file or directory.
    pub path: PathBuf,
    /// What the system said.
    pub cause: io::Error,
}

/// Names the file in an error.
pub(super) fn at(path: &Path) -> impl FnOnce(io::Error) -> FileError {
    move |cause| FileError { path: path.to_owned(), cause }
}

/// Names the file that is being written until it is whole.
const TEMPORARY: &str = "tmp";

/// The path of a segment. Revisions are padded, so that names sort.
pub(super) fn path(dir: &Path, kind: Kind, base: Revision) -> PathBuf {
    dir.join(match kind {
        Kind::Log => format!("log-{:020}", base.0),
        Kind::Snapshot => format!("snapshot-{:020}", base.0),
    })
}

/// The segments of a directory by kind, in order.
#[derive(Debug, Default)]
pub(super) struct Segments {
    pub(super) snapshots: Vec<Revision>,
    pub(super) logs: Vec<Revision>,
    /// Files that a crash left half written.
    pub(super) temporary: Vec<PathBuf>,
}

impl Segments {
    pub(super) fn list(dir: &Path) -> Result<Self, FileError> {
        let mut segments = Self::default();
        for entry in fs::read_dir(dir).map_err(at(dir))? {
            let path = entry.map_err(at(dir))?.path();
            let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
            let base = |prefix| Some(Revision(name.strip_prefix(prefix)?.parse().ok()?));
            if let Some(base) = base("log-") {
                segments.logs.push(base);
            } else if let Some(base) = base("snapshot-") {
                segments.snapshots.push(base);
            } else if path.extension().is_some_and(|extension| extension == TEMPORARY) {
                segments.temporary.push(path);
            }
        }
        segments.snapshots.sort_unstable();
        segments.logs.sort_unstable();
        Ok(segments)
    }
}

/// Creates a file that is either absent or whole after a crash: written under another name, synced, renamed.
pub(super) fn create(
    path: &Path,
    write: impl FnOnce(&mut File) -> io::Result<()>,
) -> Result<File, FileError> {
    let temporary = path.with_extension(TEMPORARY);
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)
        .map_err(at(&temporary))?;
    let written = write(&mut file).and_then(|()| file.sync_all()).and_then(|()| fs::rename(&temporary, path));
    if let Err(cause) = written {
        // Room for the log matters more than the half of a file. What stays is removed at the next start.
        let _ = fs::remove_file(&temporary);
        return Err(FileError { path: path.to_owned(), cause });
    }
    if let Err(error) = sync_dir(path.parent().unwrap_or(Path::new("."))) {
        // Nobody counts on it, so it must not be found at the next start either.
        let _ = fs::remove_file(path);
        return Err(error);
    }
    Ok(file)
}

/// Makes creations, renames and removals in a directory durable.
pub(super) fn sync_dir(dir: &Path) -> Result<(), FileError> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(at(dir))
}

/// The log that commits are appended to.
#[derive(Debug)]
pub(super) struct Log {
    path: PathBuf,
    file: File,
    marker: u64,
    /// Everything before is durable; nothing after counts.
    len: u64,
    /// Whether the file ends at `len`. When not, a write failed and what it left is not yet cut.
    clean: bool,
    #[cfg(test)]
    faults: super::Faults,
}

impl Log {
    /// A new log for the commits after `base`.
    pub(super) fn create(dir: &Path, base: Revision) -> Result<Self, FileError> {
        let path = path(dir, Kind::Log, base);
        let header = Header::new(Kind::Log, base);
        let file = create(&path, |file| file.write_all(&header.encode()))?;
        Ok(Self::new(path, file, header, HEADER as u64))
    }

    /// Goes on with an existing log that is good up to `len`; what is behind it is cut.
    pub(super) fn reopen(path: PathBuf, header: Header, len: u64) -> Result<Self, FileError> {
        let file = OpenOptions::new().write(true).open(&path).map_err(at(&path))?;
        let clean = file.metadata().map_err(at(&path))?.len() == len;
        let mut log = Self::new(path, file, header, len);
        log.clean = clean;
        log.repair().map_err(at(&log.path))?;
        Ok(log)
    }

    fn new(path: PathBuf, file: File, header: Header, len: u64) -> Self {
        Self {
            path,
            file,
            marker: header.marker,
            len,
            clean: true,
            #[cfg(test)]
            faults: super::Faults::default(),
        }
    }

    #[cfg(test)]
    pub(super) fn with_faults(self, faults: super::Faults) -> Self {
        Self { faults, ..self }
    }

    #[cfg(test)]
    pub(super) fn faults(&self) -> super::Faults {
        self.faults.clone()
    }

    pub(super) fn marker(&self) -> u64 {
        self.marker
    }

    /// Appends a frame; it is durable on return. After an error the log is as before: what the failed write left is cut,
    /// now or, when that fails too, before the next append, so that nothing is ever acknowledged behind it.
    pub(super) fn append(&mut self, frame: &[u8]) -> Result<(), FileError> {
        let appended = self.repair().and_then(|()| {
            self.clean = false;
            self.write(frame)?;
            self.sync()
        });
        match appended {
            Ok(()) => {
                self.clean = true;
                self.len += frame.len() as u64;
                Ok(())
            }
            Err(cause) => {
                let _ = self.repair();
                Err(FileError { path: self.path.clone(), cause })
            }
        }
    }

    fn write(&self, frame: &[u8]) -> io::Result<()> {
        #[cfg(test)]
        if self.faults.has(super::Faults::WRITE) {
            self.file.write_all_at(&frame[..frame.len() / 2], self.len)?;
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.file.write_all_at(frame, self.len)
    }

    fn sync(&self) -> io::Result<()> {
        #[cfg(test)]
        if self.faults.has(super::Faults::SYNC) {
            return Err(io::Error::other("input/output error"));
        }
        self.file.sync_data()
    }

    fn repair(&mut self) -> io::Result<()> {
        if self.clean {
            return Ok(());
        }
        #[cfg(test)]
        if self.faults.has(super::Faults::REPAIR) {
            return Err(io::Error::other("input/output error"));
        }
        self.file.set_len(self.len)?;
        self.file.sync_all()?;
        self.clean = true;
        Ok(())
    }
}
