use std::{fmt, process::ExitCode};

use crate::{app, client::HttpError, config};

/// It did not work.
pub(super) const FAILED: u8 = 1;
/// Not yet, or the time was up.
pub(super) const NOT_YET: u8 = 2;
/// The command line is wrong.
pub(super) const USAGE: u8 = 64;
/// The input is wrong: a file, a value that the server refused.
pub(super) const BAD_DATA: u8 = 65;
/// A check ran and found problems.
pub(super) const FINDINGS: u8 = 79;

/// Why a command did not do what it was asked, for the person who asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// The exit code of the process: one of the constants of this module.
    pub code: u8,
    /// What went wrong and what to do next. May have several lines; nothing is printed when it is empty.
    pub message: String,
}

impl Failure {
    /// Exit code 1: it did not work.
    pub fn failed(message: impl Into<String>) -> Self {
        Self { code: FAILED, message: message.into() }
    }

    /// Exit code 2: not yet, or the time was up.
    pub fn not_yet(message: impl Into<String>) -> Self {
        Self { code: NOT_YET, message: message.into() }
    }

    /// Exit code 64: the command line is wrong.
    pub fn usage(message: impl Into<String>) -> Self {
        Self { code: USAGE, message: message.into() }
    }

    /// Exit code 65: a file or a value is wrong.
    pub fn bad_data(message: impl Into<String>) -> Self {
        Self { code: BAD_DATA, message: message.into() }
    }

    /// Exit code 79: a check ran and found problems.
    pub fn findings(message: impl Into<String>) -> Self {
        Self { code: FINDINGS, message: message.into() }
    }

    /// The exit code of the process.
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(self.code)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

impl From<HttpError> for Failure {
    fn from(error: HttpError) -> Self {
        let message = error.to_string();
        match error {
            HttpError::Settings(_) => Self::usage(message),
            HttpError::TimedOut { .. } | HttpError::Refused { status: 425 | 503, .. } => {
                Self::not_yet(message)
            }
            HttpError::Refused { status: 400 | 413 | 422, .. } => Self::bad_data(message),
            HttpError::Refused { .. } | HttpError::Unreachable { .. } | HttpError::NotDisco { .. } => {
                Self::failed(message)
            }
        }
    }
}

impl From<config::ConfigError> for Failure {
    fn from(error: config::ConfigError) -> Self {
        // Each problem says `error:` for itself; so does the command line for every failure.
        let message = error.to_string();
        Self::bad_data(message.strip_prefix("error: ").unwrap_or(&message))
    }
}

impl From<app::Error> for Failure {
    fn from(error: app::Error) -> Self {
        Self::failed(error.to_string())
    }
}
