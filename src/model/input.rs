//! Untrusted input as a tree, and the reader that reports all its problems at once.
//!
//! JSON bodies and YAML files become a [`Node`] first; [`Fields`] then takes typed values out of it by name. A wrong
//! type, a value out of range or an unknown key becomes a [`Problem`] and reading goes on.

use std::fmt;

/// A place in a text, both from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    /// Line, from 1.
    pub line: usize,
    /// Column, from 1.
    pub column: usize,
}

/// One thing that is wrong with an input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Path of the field, e.g. `locality.zone`; empty for the input as a whole.
    pub field: String,
    /// What is wrong and what would be right, in one sentence without a full stop.
    pub message: String,
    /// Where it stands, if the input was a text.
    pub at: Option<Position>,
    /// What is wrong is the name of the field, not its value.
    pub about_name: bool,
}

impl Problem {
    /// A problem of a field's value.
    pub fn new(field: impl Into<String>, message: impl Into<String>, at: Option<Position>) -> Self {
        Self { field: field.into(), message: message.into(), at, about_name: false }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.field.is_empty() {
            return f.write_str(&self.message);
        }
        write!(f, "{}: {}", self.field, self.message)
    }
}

/// All that is wrong with an input, in the order found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Problems(pub Vec<Problem>);

impl Problems {
    /// Notes a problem of `field`.
    pub fn add(&mut self, field: impl Into<String>, message: impl Into<String>) {
        self.add_at(field, message, None);
    }

    /// Notes a problem of `field` that stands at a place in a text.
    pub fn add_at(&mut self, field: impl Into<String>, message: impl Into<String>, at: Option<Position>) {
        self.0.push(Problem::new(field, message, at));
    }

    /// Keeps the value, or notes why there is none.
    pub fn take<T>(&mut self, field: &str, result: Result<T, String>) -> Option<T> {
        result.map_err(|message| self.add(field, message)).ok()
    }

    /// True when nothing is wrong.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, problem) in self.0.iter().enumerate() {
            write!(f, "{}{problem}", if i == 0 { "" } else { "; " })?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}

/// A value of an untrusted input.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Nothing; read as an absent field.
    Null,
    /// `true` or `false`.
    Bool(bool),
    /// A whole number.
    Int(i128),
    /// Any other number.
    Float(f64),
    /// Text.
    Text(String),
    /// A list.
    List(Vec<Node>),
    /// Fields in the order written; a duplicate is the parser's to refuse.
    Map(Vec<(String, Node)>),
}

impl Value {
    fn kind(&self) -> &'static str {
        match self {
            Value::Null => "nothing",
            Value::Bool(_) => "a boolean",
            Value::Int(_) => "a whole number",
            Value::Float(_) => "a fraction",
            Value::Text(_) => "text",
            Value::List(_) => "a list",
            Value::Map(_) => "a map",
        }
    }
}

/// A value and where it stands.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    /// The value.
    pub value: Value,
    /// Where it stands, if it came from a text whose lines matter to its author.
    pub at: Option<Position>,
}

/// Reads the fields of a map by name, noting every problem; [`Fields::finish`] reports the keys that nobody read.
#[derive(Debug)]
pub struct Fields<'a> {
    path: String,
    at: Option<Position>,
    entries: Vec<(&'a str, &'a Node)>,
    known: Vec<&'static str>,
}

impl<'a> Fields<'a> {
    /// Reads `node` as a map. Anything else is a problem, and then all fields are absent.
    pub fn of(node: &'a Node, path: &str, problems: &mut Problems) -> Self {
        let entries = match &node.value {
            Value::Map(entries) => entries.iter().map(|(key, value)| (key.as_str(), value)).collect(),
            Value::Null => Vec::new(),
            other => {
                problems.add_at(path, format!("is {}: want a map of fields", other.kind()), node.at);
                Vec::new()
            }
        };
        Self { path: path.to_owned(), at: node.at, entries, known: Vec::new() }
    }

    /// The full path of one of its fields.
    pub fn path(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    /// Where the map stands.
    pub fn at(&self) -> Option<Position> {
        self.at
    }

    /// The raw field, `None` when absent or null.
    pub fn node(&mut self, name: &'static str) -> Option<&'a Node> {
        self.known.push(name);
        let (_, node) = self.entries.iter().find(|(key, _)| *key == name)?;
        (node.value != Value::Null).then_some(*node)
    }

    fn wrong(&self, name: &str, node: &Node, want: &str, problems: &mut Problems) {
        problems.add_at(self.path(name), format!("is {}: want {want}", node.value.kind()), node.at);
    }

    /// A text.
    pub fn text(&mut self, name: &'static str, problems: &mut Problems) -> Option<&'a str> {
        let node = self.node(name)?;
        if let Value::Text(text) = &node.value {
            return Some(text);
        }
        self.wrong(name, node, "text", problems);
        None
    }

    /// A text, or a whole number as it was written, that parses as `T`; the parser's message should say what would be
    /// right.
    pub fn parse<T, E: fmt::Display>(
        &mut self,
        name: &'static str,
        problems: &mut Problems,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> Option<T> {
        let node = self.node(name)?;
        let parsed = match &node.value {
            Value::Text(text) => parse(text),
            Value::Int(number) => parse(&number.to_string()),
            _ => {
                self.wrong(name, node, "text", problems);
                return None;
            }
        };
        parsed.map_err(|e| problems.add_at(self.path(name), e.to_string(), node.at)).ok()
    }

    /// A whole number within `range`.
    pub fn integer(
        &mut self,
        name: &'static str,
        range: std::ops::RangeInclusive<i128>,
        problems: &mut Problems,
    ) -> Option<i128> {
        let node = self.node(name)?;
        let want = || format!("a whole number from {} to {}", range.start(), range.end());
        match node.value {
            Value::Int(number) if range.contains(&number) => Some(number),
            Value::Int(number) => {
                problems.add_at(
                    self.path(name),
                    format!("{number} is out of range: want {}", want()),
                    node.at,
                );
                None
            }
            _ => {
                self.wrong(name, node, &want(), problems);
                None
            }
        }
    }

    /// A boolean.
    pub fn boolean(&mut self, name: &'static str, problems: &mut Problems) -> Option<bool> {
        let node = self.node(name)?;
        if let Value::Bool(value) = node.value {
            return Some(value);
        }
        self.wrong(name, node, "true or false", problems);
        None
    }

    /// A nested map.
    pub fn fields(&mut self, name: &'static str, problems: &mut Problems) -> Option<Fields<'a>> {
        let node = self.node(name)?;
        Some(Fields::of(node, &self.path(name), problems))
    }

    /// A list.
    pub fn list(&mut self, name: &'static str, problems: &mut Problems) -> Option<&'a [Node]> {
        let node = self.node(name)?;
        if let Value::List(items) = &node.value {
            return Some(items);
        }
        self.wrong(name, node, "a list", problems);
        None
    }

    /// A map from text to text.
    pub fn texts(&mut self, name: &'static str, problems: &mut Problems) -> Option<Vec<(&'a str, &'a str)>> {
        let node = self.node(name)?;
        let Value::Map(entries) = &node.value else {
            self.wrong(name, node, "a map of texts", problems);
            return None;
        };
        let mut texts = Vec::with_capacity(entries.len());
        for (key, value) in entries {
            match &value.value {
                Value::Text(text) => texts.push((key.as_str(), text.as_str())),
                other => problems.add_at(
                    format!("{}.{}", self.path(name), key_text(key)),
                    format!("is {}: want text", other.kind()),
                    value.at,
                ),
            }
        }
        Some(texts)
    }

    /// Reports every key that nobody asked for, with the nearest known one.
    pub fn finish(self, problems: &mut Problems) {
        for (key, node) in &self.entries {
            if self.known.contains(key) {
                continue;
            }
            let hint = match nearest(key, self.known.iter().copied()) {
                Some(near) => format!("did you mean `{near}`?"),
                None => format!("known here: {}", self.known.join(", ")),
            };
            problems.0.push(Problem {
                field: self.path(&key_text(key)),
                message: format!("is not a known field; {hint}"),
                at: node.at,
                about_name: true,
            });
        }
    }
}

/// A key as it stands in a path: plain words as they are, anything else as an [`excerpt`].
fn key_text(key: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-');
    if (1..=64).contains(&key.len()) && key.bytes().all(plain) { key.to_owned() } else { excerpt(key) }
}

/// A piece of untrusted text that is safe to show: quoted, without control characters, at most 64 characters.
pub fn excerpt(text: &str) -> String {
    const SHOWN: usize = 64;
    let mut shown: String = text.chars().take(SHOWN).flat_map(char::escape_debug).collect();
    if text.chars().nth(SHOWN).is_some() {
        shown.push('…');
    }
    format!("\"{shown}\"").replace("\"\"", "an empty text")
}

/// The word nearest to `word` by edit distance, if it is near enough to be a slip.
pub fn nearest<'a>(word: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let limit = 1 + word.len().min(12) / 4;
    known.map(|k| (distance(word, k), k)).filter(|(d, _)| *d <= limit).min().map(|(_, k)| k)
}

fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.bytes().take(64).enumerate() {
        let mut diagonal = i;
        let mut left = i + 1;
        for (cell, cb) in row.iter_mut().skip(1).zip(b.bytes()) {
            let best = (diagonal + usize::from(ca != cb)).min(left + 1).min(*cell + 1);
            diagonal = *cell;
            *cell = best;
            left = best;
        }
        if let Some(first) = row.first_mut() {
            *first = i + 1;
        }
    }
    row.last().copied().unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(value: Value) -> Node {
        Node { value, at: None }
    }

    #[test]
    fn all_problems_are_reported_at_once() {
        let input = node(Value::Map(vec![
            ("port".into(), node(Value::Int(70_000))),
            ("adress".into(), node(Value::Text("10.0.0.1".into()))),
            ("weight".into(), node(Value::Text("3".into()))),
            ("zone".into(), node(Value::Null)),
        ]));
        let mut problems = Problems::default();
        let mut fields = Fields::of(&input, "", &mut problems);
        assert_eq!(fields.text("address", &mut problems), None);
        assert_eq!(fields.integer("port", 1..=65535, &mut problems), None);
        assert_eq!(fields.integer("weight", 1..=100, &mut problems), None);
        assert_eq!(fields.text("zone", &mut problems), None);
        fields.finish(&mut problems);
        assert_eq!(
            problems.to_string(),
            "port: 70000 is out of range: want a whole number from 1 to 65535; \
             weight: is text: want a whole number from 1 to 100; \
             adress: is not a known field; did you mean `address`?"
        );
    }

    #[test]
    fn distances() {
        for (a, b, want) in
            [("", "", 0), ("a", "", 1), ("", "ab", 2), ("kitten", "sitting", 3), ("abc", "abc", 0)]
        {
            assert_eq!(distance(a, b), want, "{a} {b}");
        }
    }
}
