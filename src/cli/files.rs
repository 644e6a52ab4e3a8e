//! Files that others read while they are written.

use std::{
    fs::{self, OpenOptions, Permissions},
    io::{self, Write as _},
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::Path,
};

use rustix::fs::{CWD, RenameFlags, renameat_with};

/// What to do with a file that is there already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Present {
    /// It is replaced, and keeps who may read it.
    Replace,
    /// It stays: an error of the kind `AlreadyExists`.
    Keep,
}

/// Writes a file so that it is there whole or not at all, also after a crash of the machine. `mode` is for one that is new.
pub(super) fn write_whole(file: &Path, bytes: &[u8], mode: u32, present: Present) -> io::Result<()> {
    let mut name = std::ffi::OsString::from(".");
    name.push(file.file_name().unwrap_or_default());
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = file.with_file_name(name);
    // What an earlier run with the same number left behind.
    let _ = fs::remove_file(&temporary);
    let (flags, kept) = match present {
        Present::Replace => (RenameFlags::empty(), fs::metadata(file).ok()),
        Present::Keep => (RenameFlags::NOREPLACE, None),
    };
    let written = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&temporary)
        .and_then(|mut open| {
            if let Some(kept) = kept {
                open.set_permissions(Permissions::from_mode(kept.permissions().mode()))?;
            }
            open.write_all(bytes)?;
            open.sync_all()
        })
        .and_then(|()| Ok(renameat_with(CWD, &temporary, CWD, file, flags)?));
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
        return written;
    }
    let folder = file.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_whole_or_kept() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("list");
        write_whole(&file, b"one", 0o640, Present::Keep).unwrap();
        let mode = || fs::metadata(&file).unwrap().permissions().mode() & 0o777;
        assert_eq!((fs::read(&file).unwrap(), mode()), (b"one".to_vec(), 0o640));
        let error = write_whole(&file, b"two", 0o600, Present::Keep).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&file).unwrap(), b"one");
        write_whole(&file, b"two", 0o600, Present::Replace).unwrap();
        assert_eq!((fs::read(&file).unwrap(), mode()), (b"two".to_vec(), 0o640));
        let error = write_whole(&folder.path().join("no/list"), b"x", 0o600, Present::Replace);
        assert!(error.is_err());
        let left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["list"], "nothing else is left");
    }
}
