//! Start-up: reads the newest snapshot and the logs since, cuts a torn tail, refuses a damaged middle.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::{
    Cut, Damage, Loss, OpenError, Recovery, compact,
    format::{self, HEADER, Header, Kind, Payload},
    log::{self, FileError, Log, Segments, at},
};
use crate::{model::Revision, store::state::State};

/// A directory's state, and the log to go on with.
#[derive(Debug)]
pub(super) struct Recovered {
    pub(super) state: State,
    pub(super) log: Log,
    /// Bytes of log since the snapshot.
    pub(super) logged: u64,
    pub(super) recovery: Recovery,
}

/// Reads a directory that is locked. `used` tells that it has held a store before.
pub(super) fn recover(dir: &Path, used: bool, accept_loss: bool) -> Result<Recovered, OpenError> {
    let segments = Segments::list(dir)?;
    for path in &segments.temporary {
        fs::remove_file(path).map_err(at(path))?;
    }
    let mut replay = Replay::new(dir, &segments);
    let (state, log) = match replay.run(used) {
        Ok(end) => {
            let log = replay.go_on(end)?;
            if let Some(base) = segments.snapshots.last() {
                compact::remove_older(dir, *base)?;
            }
            (replay.state, log)
        }
        Err(Stop::Failed(error)) => return Err(error.into()),
        Err(Stop::Damaged(damage)) if accept_loss => replay.salvage(damage)?,
        Err(Stop::Damaged(damage)) => return Err(OpenError::Damaged(damage)),
    };
    replay.recovery.revision = state.revision();
    replay.recovery.keys = state.len();
    Ok(Recovered { state, log, logged: replay.logged, recovery: replay.recovery })
}

/// Why the replay did not reach the end.
#[derive(Debug)]
enum Stop {
    Failed(FileError),
    Damaged(Damage),
}

impl From<FileError> for Stop {
    fn from(error: FileError) -> Self {
        Self::Failed(error)
    }
}

/// Where a replay ended: the newest log and how far it is good.
#[derive(Debug)]
enum End {
    /// There is no segment.
    Nothing,
    /// No whole header: a log without a record.
    Headless,
    Log(PathBuf, Header, usize),
}

#[derive(Debug)]
struct Replay<'a> {
    dir: &'a Path,
    state: State,
    recovery: Recovery,
    /// What is to be read, in order: the newest snapshot and the logs from it on.
    chain: Vec<(Kind, Revision)>,
    /// How much of the chain is read and good.
    good: usize,
    /// Bytes of logs read.
    logged: u64,
}

impl<'a> Replay<'a> {
    fn new(dir: &'a Path, segments: &Segments) -> Self {
        let snapshot = segments.snapshots.last().copied();
        let logs = segments.logs.iter().filter(|base| Some(**base) >= snapshot);
        let chain = snapshot
            .map(|base| (Kind::Snapshot, base))
            .into_iter()
            .chain(logs.map(|base| (Kind::Log, *base)))
            .collect();
        Self { dir, state: State::default(), recovery: Recovery::default(), chain, good: 0, logged: 0 }
    }

    fn run(&mut self, used: bool) -> Result<End, Stop> {
        let mut end = End::Nothing;
        for (index, (kind, base)) in self.chain.clone().into_iter().enumerate() {
            let path = log::path(self.dir, kind, base);
            let newest = index + 1 == self.chain.len();
            match kind {
                Kind::Snapshot => self.read_snapshot(&path, base)?,
                Kind::Log if base == self.state.revision() => end = self.read_log(path, base, newest)?,
                Kind::Log if base > self.state.revision() => return Err(self.missing(Some((&path, base)))),
                Kind::Log => {
                    let what = format!(
                        "it begins after revision {base}, but the files before it already hold revision {}",
                        self.state.revision()
                    );
                    return Err(Stop::Damaged(Damage { file: path, offset: 0, what }));
                }
            }
            self.good = index + 1;
        }
        match (&end, self.chain.is_empty()) {
            // A log is created before the snapshot that it follows.
            (End::Nothing, false) => Err(self.missing(None)),
            (End::Nothing, true) if used => Err(self.missing(None)),
            _ => Ok(end),
        }
    }

    /// What should come next is not there, but `next` is.
    fn missing(&self, next: Option<(&Path, Revision)>) -> Stop {
        let what = match next {
            Some((next, _)) => format!("the file is missing, and {} comes after it", next.display()),
            None => "the file is missing".to_owned(),
        };
        let file = match next {
            // A directory begins with a snapshot or with the first log.
            Some((_, base)) if self.good == 0 => log::path(self.dir, Kind::Snapshot, base),
            _ => log::path(self.dir, Kind::Log, self.state.revision()),
        };
        Stop::Damaged(Damage { file, offset: 0, what })
    }

    fn read(&mut self, path: &Path) -> Result<Vec<u8>, FileError> {
        let file = fs::read(path).map_err(at(path))?;
        self.recovery.bytes += file.len() as u64;
        Ok(file)
    }

    fn read_snapshot(&mut self, path: &Path, base: Revision) -> Result<(), Stop> {
        let damaged = |offset: usize, what: &str| {
            Stop::Damaged(Damage { file: path.to_owned(), offset: offset as u64, what: what.to_owned() })
        };
        let file = self.read(path)?;
        // The revision is taken even when the records are not to be read.
        self.state.skip_to(base);
        let header = Header::decode(Kind::Snapshot, &file)
            .filter(|header| header.base == base)
            .ok_or_else(|| damaged(0, "its header is not whole"))?;
        let mut offset = HEADER;
        loop {
            let (payload, next) = format::frame_at(&file, offset, header.marker)
                .ok_or_else(|| damaged(offset, "a part of the snapshot is not whole"))?;
            match format::decode(payload) {
                Some(Payload::Records(records)) => {
                    for (key, record) in records {
                        self.state.insert(key, record);
                    }
                }
                Some(Payload::End(count)) if count == self.state.len() as u64 && next == file.len() => {
                    return Ok(());
                }
                _ => return Err(damaged(offset, "a part of the snapshot is not what belongs there")),
            }
            offset = next;
        }
    }

    fn read_log(&mut self, path: PathBuf, base: Revision, newest: bool) -> Result<End, Stop> {
        let file = self.read(&path)?;
        self.logged += file.len() as u64;
        let Some(header) = Header::decode(Kind::Log, &file).filter(|header| header.base == base) else {
            if newest && file.len() <= HEADER {
                self.cut(&path, 0, file.len());
                return Ok(End::Headless);
            }
            let what = "its header is not whole".to_owned();
            return Err(Stop::Damaged(Damage { file: path, offset: 0, what }));
        };
        let mut offset = HEADER;
        while let Some((payload, next)) = format::frame_at(&file, offset, header.marker) {
            let wanted = Revision(self.state.revision().0 + 1);
            match format::decode(payload) {
                Some(Payload::Commits { first, commits }) if first == wanted => {
                    self.recovery.records += commits.len() as u64;
                    for (revision, ops) in (first.0..).map(Revision).zip(commits) {
                        self.state.apply(revision, ops);
                    }
                }
                Some(Payload::Skip(to)) if to >= wanted => self.state.skip_to(to),
                _ => {
                    let what = format!("a whole record there is not that of revision {wanted}");
                    return Err(Stop::Damaged(Damage { file: path, offset: offset as u64, what }));
                }
            }
            offset = next;
        }
        if offset < file.len() {
            let later = format::find_frame(&file, offset + 1, header.marker);
            let what = match later {
                Some(later) => format!("the record there is not whole, and the one at byte {later} is"),
                None if newest => {
                    self.cut(&path, offset, file.len());
                    return Ok(End::Log(path, header, offset));
                }
                None => "the record there is not whole, and there is a later log".to_owned(),
            };
            return Err(Stop::Damaged(Damage { file: path, offset: offset as u64, what }));
        }
        Ok(End::Log(path, header, offset))
    }

    fn cut(&mut self, path: &Path, offset: usize, len: usize) {
        let cut = Cut { file: path.to_owned(), offset: offset as u64, bytes: (len - offset) as u64 };
        tracing::warn!(
            file = %cut.file.display(),
            offset = cut.offset,
            bytes = cut.bytes,
            "cut the torn end of the log: a write that was not finished"
        );
        self.recovery.cut = Some(cut);
    }

    fn go_on(&self, end: End) -> Result<Log, FileError> {
        match end {
            End::Nothing | End::Headless => Log::create(self.dir, self.state.revision()),
            End::Log(path, header, len) => Log::reopen(path, header, len as u64),
        }
    }

    /// Keeps what is good before the damage as a new generation and puts the rest aside.
    fn salvage(&mut self, damage: Damage) -> Result<(State, Log), OpenError> {
        let kept = self.state.revision();
        let mut taken = kept;
        let mut aside = Vec::new();
        for (kind, base) in self.chain.get(self.good..).unwrap_or_default() {
            let path = log::path(self.dir, *kind, *base);
            taken = taken.max(last_revision(&path, *kind)?).max(*base);
            aside.push(put_aside(&path)?);
        }
        // Revisions that were given out are not given out again, and the new names are free.
        let mut state = std::mem::take(&mut self.state);
        state.skip_to(Revision(taken.0 + 1));
        let log = Log::create(self.dir, state.revision())?;
        self.logged = 0;
        compact::compact(self.dir, &state)?;
        let loss = Loss { damage, kept, aside };
        tracing::error!(
            file = %loss.damage.file.display(),
            offset = loss.damage.offset,
            kept = loss.kept.0,
            aside = ?loss.aside,
            "accepted the loss of changes: went on with what was before the damage"
        );
        self.recovery.loss = Some(loss);
        Ok((state, log))
    }
}

/// The last revision that a damaged log shows.
fn last_revision(path: &Path, kind: Kind) -> Result<Revision, FileError> {
    let file = fs::read(path).map_err(at(path))?;
    let mut last = Revision(0);
    let Some(header) = Header::decode(kind, &file) else { return Ok(last) };
    let mut from = HEADER;
    while let Some(found) = format::find_frame(&file, from, header.marker) {
        let Some((payload, next)) = format::frame_at(&file, found, header.marker) else { break };
        match format::decode(payload) {
            Some(Payload::Commits { first, commits }) => {
                last = last.max(Revision(first.0 + commits.len() as u64));
            }
            Some(Payload::Skip(to)) => last = last.max(to),
            Some(Payload::Records(_) | Payload::End(_)) | None => {}
        }
        from = next;
    }
    Ok(last)
}

/// Copies a file to a free name beside it, so that somebody can look into it later.
fn put_aside(path: &Path) -> Result<PathBuf, FileError> {
    let name = |n: u32| path.with_extension(format!("damaged-{n}"));
    let aside = (1..).map(name).find(|aside| !aside.exists()).unwrap_or_else(|| name(0));
    fs::copy(path, &aside).map_err(at(&aside))?;
    fs::File::open(&aside).and_then(|file| file.sync_all()).map_err(at(&aside))?;
    Ok(aside)
}
