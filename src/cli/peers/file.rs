//! A list of peers in a file that a database reads.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use crate::{
    cli::{
        Failure,
        files::{Present, write_whole},
    },
    peers::render::Format,
};

/// A list as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::cli) struct Text {
    /// All of it.
    pub(in crate::cli) text: String,
    /// The set's revision, for people.
    pub(in crate::cli) set_revision: u64,
    /// Of the founding list.
    pub(in crate::cli) digest: String,
}

/// The file. Where the format has comments, its first line says which founding and revision the list is of; else a file beside it,
/// with `.disco` after its name.
#[derive(Debug, Clone)]
pub(in crate::cli) struct ListFile {
    path: PathBuf,
    comments: bool,
    theirs: bool,
}

/// What became of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::cli) enum Written {
    /// It has another list now.
    Changed,
    /// It had this list already.
    Same,
    /// It was there, and the database owns it.
    Theirs,
}

impl ListFile {
    /// `None`: what a template makes.
    pub(in crate::cli) fn new(path: PathBuf, format: Option<Format>) -> Self {
        Self {
            path,
            comments: format.is_some_and(|format| format.comment().is_some()),
            theirs: format.is_some_and(Format::is_theirs),
        }
    }

    pub(in crate::cli) fn path(&self) -> &Path {
        &self.path
    }

    /// Writes the list whole, unless it is there already.
    ///
    /// # Errors
    /// The file cannot be written, or holds the list of another founding: what uses it belongs to another database.
    pub(in crate::cli) fn write(&self, list: &Text) -> Result<Written, Failure> {
        let shown = self.path.display();
        let failed =
            |error: &dyn std::fmt::Display| Failure::failed(format!("cannot write {shown}: {error}"));
        let present = match fs::read_to_string(&self.path) {
            Ok(_) if self.theirs => return Ok(Written::Theirs),
            Ok(text) => Some(text),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(failed(&error)),
        };
        if let Some(present) = &present {
            if let Some(digest) = self.digest(present)
                && digest != list.digest
            {
                return Err(Failure::failed(format!(
                    "{shown} has the list of another founding (digest {digest}) than the set has now ({}): it is left as it is, and \
                     what was started with it has to be stopped. Remove the file when the database is given up",
                    list.digest
                )));
            }
            if self.plain(present) == self.plain(&list.text) {
                return Ok(Written::Same);
            }
        }
        if !self.comments {
            let line = format!("revision {}, digest {}\n", list.set_revision, list.digest);
            write_whole(&self.beside(), line.as_bytes(), 0o644, Present::Replace)
                .map_err(|error| failed(&error))?;
        }
        let how = if self.theirs { Present::Keep } else { Present::Replace };
        match write_whole(&self.path, list.text.as_bytes(), 0o644, how) {
            Ok(()) => Ok(Written::Changed),
            Err(error) if self.theirs && error.kind() == io::ErrorKind::AlreadyExists => Ok(Written::Theirs),
            Err(error) => Err(failed(&error)),
        }
    }

    /// Of the founding list that the present file is of, if it says.
    fn digest(&self, present: &str) -> Option<String> {
        let beside = (!self.comments).then(|| fs::read_to_string(self.beside()).unwrap_or_default());
        let line = beside.as_deref().unwrap_or(present).lines().next()?;
        let digest = line.rsplit_once("digest ")?.1.trim();
        let hex = digest.len() == 64 && digest.bytes().all(|b| b.is_ascii_hexdigit());
        hex.then(|| digest.to_owned())
    }

    /// Without what changes with every revision.
    fn plain<'a>(&self, text: &'a str) -> &'a str {
        match text.split_once('\n') {
            Some((_, rest)) if self.comments => rest,
            _ => text,
        }
    }

    fn beside(&self) -> PathBuf {
        let mut name = self.path.file_name().unwrap_or_default().to_owned();
        name.push(".disco");
        self.path.with_file_name(name)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    fn list(format: Format, revision: u64, body: &str, digest: char) -> Text {
        let digest = digest.to_string().repeat(64);
        let text = match format.comment() {
            Some(mark) => format!("{mark} disco: set db, revision {revision}, digest {digest}\n{body}"),
            None => body.to_owned(),
        };
        Text { text, set_revision: revision, digest }
    }

    #[test]
    fn a_list_is_written_when_it_is_another_one() {
        for format in [Format::NatsRoutes, Format::TigerBeetle] {
            let folder = tempfile::tempdir().unwrap();
            let file = ListFile::new(folder.path().join("peers"), Some(format));
            let write = |revision, body| file.write(&list(format, revision, body, 'a')).unwrap();
            assert_eq!(write(1, "one\n"), Written::Changed);
            let inode = || fs::metadata(file.path()).unwrap().ino();
            let first = inode();
            assert_eq!(write(2, "one\n"), Written::Same, "only the revision is another one");
            assert_eq!(inode(), first);
            assert_eq!(write(3, "two\n"), Written::Changed);
            assert_ne!(inode(), first, "renamed into place");
            assert_eq!(fs::read_to_string(file.path()).unwrap(), list(format, 3, "two\n", 'a').text);
            assert_eq!(folder.path().join("peers.disco").exists(), format.comment().is_none());
        }
    }

    /// N2.
    #[test]
    fn the_list_of_another_founding_replaces_nothing() {
        for format in [Format::EtcdEnv, Format::Flamed] {
            let folder = tempfile::tempdir().unwrap();
            let file = ListFile::new(folder.path().join("peers"), Some(format));
            file.write(&list(format, 1, "one\n", 'a')).unwrap();
            let before = fs::read(file.path()).unwrap();
            let failure = file.write(&list(format, 9, "two\n", 'b')).unwrap_err();
            assert!(failure.message.contains("another founding"), "{}", failure.message);
            assert_eq!(fs::read(file.path()).unwrap(), before);
        }
    }

    #[test]
    fn what_the_database_owns_is_written_once() {
        let folder = tempfile::tempdir().unwrap();
        let file = ListFile::new(folder.path().join("fdb.cluster"), Some(Format::FdbCluster));
        assert_eq!(file.write(&list(Format::FdbCluster, 1, "a:b@1\n", 'a')).unwrap(), Written::Changed);
        fs::write(file.path(), "a:c@2\n").unwrap();
        assert_eq!(file.write(&list(Format::FdbCluster, 2, "a:b@1\n", 'a')).unwrap(), Written::Theirs);
        assert_eq!(fs::read_to_string(file.path()).unwrap(), "a:c@2\n");
    }
}
