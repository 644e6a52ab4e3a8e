//! `RULES.md` is whole and true.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

const TABLE: &str = include_str!("RULES.md");

/// Groups of rules and how many each has.
const GROUPS: [(&str, usize); 13] = [
    ("G", 10),
    ("S", 12),
    ("W", 12),
    ("S-E", 9),
    ("D", 19),
    ("T", 6),
    ("O", 13),
    ("L", 5),
    ("X", 8),
    ("E", 7),
    ("K", 9),
    ("C", 5),
    ("P", 34),
];

/// How many rows the list of conformance has.
const CONFORMANCE: usize = 19;

/// Rule and what holds it.
fn rows() -> Vec<(&'static str, &'static str)> {
    let cells = TABLE.lines().filter_map(|line| {
        let cells: Vec<_> = line.strip_prefix("| ")?.strip_suffix(" |")?.split(" | ").collect();
        Some((cells[0], *cells.get(2)?))
    });
    cells.filter(|(rule, _)| *rule != "rule").collect()
}

fn tests_in(text: &str) -> impl Iterator<Item = &str> {
    let quoted = text.split('`').skip(1).step_by(2);
    quoted.filter(|name| name.contains('_') && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_'))
}

#[test]
fn every_rule_is_in_the_table_once_with_a_test_or_a_reason() {
    let groups = GROUPS.into_iter().chain([("Q", CONFORMANCE)]);
    let want: BTreeSet<String> =
        groups.flat_map(|(group, count)| (1..=count).map(move |n| format!("{group}{n}"))).collect();
    let mut have = BTreeMap::new();
    for (rule, text) in rows() {
        assert_eq!(have.insert(rule.to_owned(), text), None, "{rule} is there twice");
        let reason = text.strip_prefix("n/a").is_some_and(|reason| reason.len() > 5);
        assert!(reason || tests_in(text).next().is_some(), "{rule} has neither a test nor a reason");
    }
    assert_eq!(have.into_keys().collect::<BTreeSet<_>>(), want);
}

#[test]
fn every_test_in_the_table_exists() {
    let mut sources = String::new();
    for folder in ["src", "tests"] {
        read(&Path::new(env!("CARGO_MANIFEST_DIR")).join(folder), &mut sources);
    }
    for (rule, text) in rows() {
        for name in tests_in(text) {
            assert!(sources.contains(&format!("fn {name}(")), "{rule} names {name}, which does not exist");
        }
    }
}

#[test]
fn every_pitfall_has_a_test_of_its_number() {
    for (rule, text) in rows() {
        let Some(Ok(number)) = rule.strip_prefix('P').map(str::parse::<usize>) else { continue };
        let own = format!("pitfall_{number:02}_");
        assert!(text.starts_with("n/a") || tests_in(text).any(|name| name.starts_with(&own)), "{rule}");
    }
}

fn read(folder: &Path, sources: &mut String) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            read(&path, sources);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            sources.push_str(&fs::read_to_string(path).unwrap());
        }
    }
}
