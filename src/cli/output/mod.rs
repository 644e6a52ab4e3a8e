//! How answers are printed: tables for people, JSON and YAML for programs.

mod table;
mod text;
mod watch;

use std::io::{IsTerminal as _, Write as _};

use clap::{Args, ValueEnum};
use serde_json::Value;

pub(super) use table::{Column, render};
pub(super) use text::{age, cell, clean, clean_lines, count, number, some_of};
pub(super) use watch::{Refresh, list};

use super::failure::{FAILED, Failure};
use crate::rt;

/// Columns of a table when the terminal does not say.
const WIDTH: usize = 80;

/// How an answer is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    /// Fits the terminal; long names are shortened
    Table,
    /// Every column, nothing shortened
    Wide,
    /// The server's JSON
    Json,
    /// The same as YAML
    Yaml,
    /// One line of JSON for each item
    Jsonl,
}

/// Options of a command that shows one thing.
#[derive(Debug, Clone, Args)]
pub(super) struct ShowOptions {
    /// How to print
    #[arg(short, long, value_enum, default_value = "table", hide_possible_values = true, value_name = FORMATS)]
    pub(super) output: Format,
}

/// Options of a command that lists things.
#[derive(Debug, Clone, Args)]
pub(super) struct ListOptions {
    /// How to print
    #[arg(short, long, value_enum, default_value = "table", hide_possible_values = true, value_name = FORMATS)]
    pub(super) output: Format,
    /// Stay, and print again whenever something changes
    #[arg(short, long)]
    pub(super) watch: bool,
}

const FORMATS: &str = "table|wide|json|yaml|jsonl";

/// One answer, ready to be printed in every format.
#[derive(Debug)]
pub(super) struct View {
    /// The document for programs.
    pub(super) document: Value,
    /// The field of the document that is the list, if it is one.
    pub(super) items: Option<&'static str>,
    /// What people see. `None` as the width asks for everything.
    pub(super) table: fn(&Value, Option<usize>) -> String,
    /// What to tell people when the list is empty.
    pub(super) empty: &'static str,
}

impl View {
    /// What is listed; the document itself when it is no list.
    fn content(&self) -> &Value {
        self.items.and_then(|items| self.document.get(items)).unwrap_or(&self.document)
    }

    fn text(&self, format: Format) -> Result<String, Failure> {
        let broken =
            |error: &dyn std::fmt::Display| Failure::failed(format!("cannot write the answer: {error}"));
        let json = |value: &Value| safe_json(&value.to_string());
        Ok(match format {
            Format::Table => (self.table)(&self.document, Some(terminal_width())),
            Format::Wide => (self.table)(&self.document, None),
            Format::Json => {
                let text = serde_json::to_string_pretty(&self.document).map_err(|e| broken(&e))?;
                safe_json(&text) + "\n"
            }
            Format::Yaml => serde_saphyr::to_string(&self.document).map_err(|e| broken(&e))?,
            Format::Jsonl => match self.content() {
                Value::Array(items) => items.iter().map(|item| json(item) + "\n").collect(),
                other => json(other) + "\n",
            },
        })
    }

    /// Prints it.
    pub(super) fn print(&self, format: Format) -> Result<(), Failure> {
        if let Some(stale) = self.document.get("stale").filter(|stale| stale.is_object()) {
            note(&format!(
                "this is what was known {} ago; the server has not heard of changes since: {}",
                age(stale, "/since", rt::now()),
                cell(stale, "/reason")
            ));
        }
        let nothing = self.content().as_array().is_some_and(Vec::is_empty);
        let whole = self.document.get("unknown").is_none();
        if nothing && whole && matches!(format, Format::Table | Format::Wide) {
            note(self.empty);
            return Ok(());
        }
        print(&self.text(format)?)
    }
}

/// Control characters stand in JSON only within texts, where this is the same text.
fn safe_json(json: &str) -> String {
    let mut safe = String::with_capacity(json.len());
    for c in json.chars() {
        if c.is_control() && c != '\n' {
            safe.push_str(&format!("\\u{:04x}", u32::from(c)));
        } else {
            safe.push(c);
        }
    }
    safe
}

fn terminal_width() -> usize {
    let stdout = std::io::stdout();
    if !stdout.is_terminal() {
        return WIDTH;
    }
    rustix::termios::tcgetwinsize(&stdout).map_or(WIDTH, |size| usize::from(size.ws_col).max(WIDTH))
}

/// Writes to standard output.
///
/// # Errors
/// It cannot be written. Silent when its reader has gone, as `head` does.
pub(super) fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(|error| {
        let message = match error.kind() {
            std::io::ErrorKind::BrokenPipe => String::new(),
            _ => format!("cannot write to standard output: {error}"),
        };
        Failure { code: FAILED, message }
    })
}

/// Shows a line on the terminal behind standard error in place of the one that was shown last; empty takes it away.
pub(super) fn status_line(text: &str) {
    // Nobody is left to tell when this fails.
    let shown: String = clean(text).chars().take(WIDTH - 1).collect();
    let _ = write!(std::io::stderr(), "\r\u{1b}[2K{shown}");
}

/// Writes a line for people to standard error, so that scripts do not read it as an answer.
pub(super) fn note(text: &str) {
    // Nobody is left to tell when this fails.
    let _ = writeln!(std::io::stderr(), "{}", clean_lines(text));
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn view(document: Value) -> View {
        View { document, items: Some("things"), table: |_, _| "table\n".to_owned(), empty: "none" }
    }

    #[test]
    fn formats_for_programs() {
        let view = view(json!({"revision": 3, "things": [{"name": "a"}, {"name": "b\u{9b}1m\n"}]}));
        let read = |text: &str| serde_json::from_str::<Value>(text).unwrap();
        let json = view.text(Format::Json).unwrap();
        assert_eq!(read(&json), view.document);
        let lines = view.text(Format::Jsonl).unwrap();
        assert_eq!(lines.lines().map(read).collect::<Vec<_>>(), *view.content().as_array().unwrap());
        let yaml = view.text(Format::Yaml).unwrap();
        assert_eq!(serde_saphyr::from_str::<Value>(&yaml).unwrap(), view.document);
        for text in [json, lines, yaml] {
            assert!(text.chars().all(|c| c == '\n' || !c.is_control()), "{text:?}");
        }
    }
}
