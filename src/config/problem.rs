use std::fmt;

use crate::model::{Problem, Problems};

/// Why there is no configuration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("error: {file}: cannot be read: {reason}")]
    Unreadable {
        /// Its name.
        file: String,
        /// What the system said.
        reason: String,
    },
    /// The file was read and is wrong. Shown as one block a problem, with the line it is about.
    #[error("{}", Report { file, text, problems })]
    Invalid {
        /// The name of the file.
        file: String,
        /// What it says.
        text: String,
        /// Everything that is wrong, in the order of the lines.
        problems: Problems,
    },
}

impl ConfigError {
    pub(super) fn invalid(file: &str, text: &str, mut problems: Problems) -> Self {
        problems.0.sort_by_key(|problem| problem.at);
        Self::Invalid { file: file.to_owned(), text: text.to_owned(), problems }
    }
}

struct Report<'a> {
    file: &'a str,
    text: &'a str,
    problems: &'a Problems,
}

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, problem) in self.problems.0.iter().enumerate() {
            if i > 0 {
                writeln!(f)?;
            }
            self.one(f, problem)?;
        }
        Ok(())
    }
}

impl Report<'_> {
    /// Longest part of a source line that is shown, in characters.
    const SHOWN: usize = 120;

    fn one(&self, f: &mut fmt::Formatter<'_>, problem: &Problem) -> fmt::Result {
        let Some(at) = problem.at else {
            return write!(f, "error: {}: {problem}", self.file);
        };
        write!(f, "error: {}:{}:{}: {problem}", self.file, at.line, at.column)?;
        let Some(line) = self.text.lines().nth(at.line - 1).filter(|_| at.column <= Self::SHOWN) else {
            return Ok(());
        };
        let shown: String =
            line.chars().take(Self::SHOWN).map(|c| if c.is_control() { ' ' } else { c }).collect();
        let gutter = at.line.to_string();
        let caret = at.column;
        write!(f, "\n{gutter} | {}\n{:width$} | {:>caret$}", shown.trim_end(), "", "^", width = gutter.len())
    }
}
