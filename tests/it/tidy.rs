//! The law of the house, read off the sources: who may use whom, how long a file may be, what must not stand in it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use crate::harness::sibling;

/// A room uses only rooms of a lower layer.
const LAYERS: &[(&str, u8)] = &[
    ("proto", 0),
    ("rt", 0),
    ("telemetry", 0),
    ("model", 1),
    ("catalog", 2),
    ("store", 2),
    ("security", 2),
    ("xds", 2),
    ("client", 2),
    ("registry", 3),
    ("discovery", 3),
    ("health", 3),
    ("federation", 3),
    ("resources", 3),
    ("peers", 3),
    ("api", 4),
    ("config", 5),
    ("app", 6),
    ("cli", 7),
];

/// Lines of a file without its tests.
const LONGEST: usize = 800;

#[test]
fn rooms_use_only_lower_layers() {
    check(|file| {
        let room = file.room()?;
        let Some(own) = layer(room) else {
            return Some(file.at(0, &format!("{room} has no layer in LAYERS")));
        };
        let faults = uses(&file.code).into_iter().filter_map(|(place, used)| {
            let allowed = used == room || layer(used).is_some_and(|layer| layer < own);
            let theirs = layer(used).map_or("no layer".to_owned(), |layer| layer.to_string());
            (!allowed).then(|| file.at(place, &format!("{room} ({own}) may not use {used} ({theirs})")))
        });
        joined(faults)
    });
}

#[test]
fn paths_are_plain() {
    check(|file| {
        let mut banned = vec!["use crate::*", "super::super"];
        if file.is_room_root() {
            // There `super` is the crate, which the import law would not see.
            banned.push("super::");
        }
        joined(banned.into_iter().flat_map(|text| {
            file.code
                .match_indices(text)
                .map(move |(place, _)| file.at(place, &format!("`{text}` hides a room")))
        }))
    });
}

#[test]
fn files_are_short_and_rooms_explained() {
    check(|file| {
        let lines = file.code.lines().filter(|line| !line.trim().is_empty()).count();
        let long =
            (lines > LONGEST).then(|| file.at(0, &format!("{lines} lines; split it, {LONGEST} is the most")));
        let bare = (file.path.ends_with("mod.rs") && file.room().is_some() && file.is_room_root())
            && !file.text.starts_with("//!");
        joined(
            long.into_iter().chain(bare.then(|| file.at(0, "does not start with `//!`: what is this room?"))),
        )
    });
}

#[test]
fn text_is_clean() {
    check(|file| {
        joined(file.text.lines().enumerate().flat_map(|(n, line)| {
            let faults = [
                (line.contains('\t'), "a tab"),
                (line.ends_with(' '), "a space at the end"),
                (
                    ["TODO", "FIXME"].iter().any(|word| line.contains(word)),
                    "an open end; do it or write an issue",
                ),
            ];
            let faults = faults.into_iter().filter(|(found, _)| *found);
            faults.map(move |(_, what)| format!("{}:{}: {what}", file.path.display(), n + 1))
        }))
    });
}

#[test]
fn example_configurations_load() {
    let examples = top().join("examples");
    let files = fs::read_dir(examples).unwrap().map(|entry| entry.unwrap().path());
    for file in files.filter(|file| file.extension().is_some_and(|extension| extension == "yaml")) {
        let check =
            Command::new(sibling("disco").unwrap()).args(["config", "check"]).arg(&file).output().unwrap();
        assert!(check.status.success(), "{}\n{}", file.display(), String::from_utf8_lossy(&check.stderr));
    }
}

#[test]
fn the_law_sees_what_it_should() {
    let text = "use crate::{\n    model::{Id, Name},\n    rt,\n};\nuse crate::store::Store; // crate::cli\n\
                const A: &str = \"crate::app\";\nfn f<'a>(c: char) -> bool { c == '\"' || crate::xds::x() }\n\
                #[cfg(test)]\nmod tests {\n    use crate::api;\n}\n";
    let found: Vec<_> = uses(&strip(text)).into_iter().map(|(_, room)| room.to_owned()).collect();
    assert_eq!(found, ["model", "rt", "store", "xds"]);
}

struct Source {
    path: PathBuf,
    text: String,
    /// The text with comments, strings and test modules blanked, so that places are the same.
    code: String,
}

impl Source {
    /// The room it belongs to; none for the two roots of the crate.
    fn room(&self) -> Option<&str> {
        let inside = self.path.strip_prefix("src").unwrap();
        let first = Path::new(inside.components().next()?.as_os_str());
        let room = first.file_stem()?.to_str()?;
        (!["lib", "main"].contains(&room)).then_some(room)
    }

    /// True for `src/<room>/mod.rs` and `src/<room>.rs`.
    fn is_room_root(&self) -> bool {
        let depth = self.path.components().count();
        depth == 2 || (depth == 3 && self.path.ends_with("mod.rs"))
    }

    fn at(&self, place: usize, what: &str) -> String {
        format!("{}:{}: {what}", self.path.display(), self.code[..place].matches('\n').count() + 1)
    }
}

/// Fails with all that `find` finds in the sources outside tests.
fn check(find: impl Fn(&Source) -> Option<String>) {
    let mut files = Vec::new();
    collect(&top().join("src"), &mut files);
    assert!(files.len() > 5, "where are the sources?");
    let faults: Vec<_> = files.iter().filter_map(find).collect();
    assert!(faults.is_empty(), "\n{}\n", faults.join("\n"));
}

fn collect(folder: &Path, files: &mut Vec<Source>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let is_test = path.file_stem().is_some_and(|stem| stem == "tests");
        if path.is_dir() && !is_test {
            collect(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") && !is_test {
            let text = fs::read_to_string(&path).unwrap();
            let code = strip(&text);
            files.push(Source { path: path.strip_prefix(top()).unwrap().to_owned(), text, code });
        }
    }
    files.sort_by(|a, b| a.path.cmp(&b.path));
}

fn top() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn layer(room: &str) -> Option<u8> {
    LAYERS.iter().find(|(name, _)| *name == room).map(|(_, layer)| *layer)
}

fn joined(faults: impl Iterator<Item = String>) -> Option<String> {
    Some(faults.collect::<Vec<_>>().join("\n")).filter(|faults| !faults.is_empty())
}

/// Every `crate::<room>`, also within `crate::{…}`, with its place.
fn uses(code: &str) -> Vec<(usize, &str)> {
    let mut found = Vec::new();
    for (place, path) in code.match_indices("crate::") {
        let start = place + path.len();
        if code[..place].ends_with(|before: char| before == '$' || is_word(before)) {
            continue;
        }
        if !code[start..].starts_with('{') {
            found.push((place, word(&code[start..])));
            continue;
        }
        let (mut depth, mut expecting) = (0, false);
        for (offset, c) in code[start..].char_indices() {
            match c {
                '{' => {
                    depth += 1;
                    expecting = depth == 1;
                }
                '}' => depth -= 1,
                ',' => expecting = depth == 1,
                _ if expecting && is_word(c) => {
                    found.push((start + offset, word(&code[start + offset..])));
                    expecting = false;
                }
                _ => {}
            }
            if depth == 0 {
                break;
            }
        }
    }
    found
}

fn word(text: &str) -> &str {
    text.split(|c| !is_word(c)).next().unwrap_or_default()
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Blanks comments, the insides of strings, and modules under `#[cfg(test)]`; keeps line ends.
fn strip(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let blank = match c {
            '/' if rest.starts_with("//") => rest.find('\n').unwrap_or(rest.len()),
            '/' if rest.starts_with("/*") => rest.find("*/").map_or(rest.len(), |end| end + 2),
            '"' => string(rest),
            'r' if !code.ends_with(is_word) => raw_string(rest),
            '\'' => character(rest),
            _ => 0,
        };
        let taken = if blank == 0 { c.len_utf8() } else { blank };
        if blank == 0 {
            code.push(c);
        } else {
            blank_into(&mut code, &rest[..blank]);
        }
        rest = &rest[taken..];
    }
    const TESTS: &str = "#[cfg(test)]\nmod ";
    while let Some(start) = code.find(TESTS) {
        let body = start + code[start..].find(['{', ';']).unwrap_or(code.len() - start);
        let mut depth = 0;
        let end = code[body..].char_indices().find_map(|(offset, c)| {
            depth += match c {
                '{' => 1,
                '}' => -1,
                _ => 0,
            };
            (depth == 0).then_some(body + offset + 1)
        });
        let end = end.unwrap_or(code.len());
        let mut blanked = String::new();
        blank_into(&mut blanked, &code[start..end]);
        code.replace_range(start..end, &blanked);
    }
    code
}

/// One space for each byte, so that places in the text stay.
fn blank_into(code: &mut String, text: &str) {
    code.extend(text.bytes().map(|byte| if byte == b'\n' { '\n' } else { ' ' }));
}

/// Length of the string that `text` starts with.
fn string(text: &str) -> usize {
    let mut escaped = false;
    for (place, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return place + 1,
            _ => {}
        }
    }
    text.len()
}

/// Length of the raw string that `text` starts with, or 0.
fn raw_string(text: &str) -> usize {
    let hashes = text[1..].bytes().take_while(|byte| *byte == b'#').count();
    let start = 1 + hashes;
    if !text[start..].starts_with('"') {
        return 0;
    }
    let end = format!("\"{}", "#".repeat(hashes));
    text[start + 1..].find(&end).map_or(text.len(), |at| start + 1 + at + end.len())
}

/// Length of the character literal that `text` starts with, or 0 when it is a lifetime.
fn character(text: &str) -> usize {
    let mut chars = text.char_indices().skip(1);
    match chars.next() {
        Some((_, '\\')) => {
            text[2..].char_indices().skip(1).find(|(_, c)| *c == '\'').map_or(0, |(at, _)| at + 3)
        }
        _ => chars.next().filter(|(_, c)| *c == '\'').map_or(0, |(at, _)| at + 1),
    }
}
