//! Small general things: named tasks with an owner, backoff, readiness, connections that note a hang-up, the wall clock.

mod backoff;
mod boot;
mod hangup;
mod ready;
mod seldom;
mod task;

pub use backoff::Backoff;
pub use boot::{boot_time, sleep_until_boot};
pub use hangup::{Fate, Hangup, Watched};
pub use ready::{Gate, Readiness};
pub use seldom::Seldom;
pub use task::{Leave, Shutdown, Tasks};

use std::{error::Error, time::SystemTime};

/// The wall clock, for what people read. Durations are measured with [`tokio::time::Instant`].
#[allow(clippy::disallowed_methods, reason = "the one place that reads the wall clock")]
pub fn now() -> SystemTime {
    // Where a test moves the time on, this clock goes with it.
    #[cfg(test)]
    return SystemTime::now()
        + tokio::time::Instant::now().into_std().saturating_duration_since(std::time::Instant::now());
    #[cfg(not(test))]
    SystemTime::now()
}

/// The wall clock at `instant`, as it is set now.
pub fn at(instant: tokio::time::Instant) -> SystemTime {
    let now = tokio::time::Instant::now();
    match now.checked_duration_since(instant) {
        Some(ago) => self::now() - ago,
        None => self::now() + instant.duration_since(now),
    }
}

/// The innermost error, which is the one that tells something: the outer ones read "transport error".
pub fn root_cause(error: &dyn Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}
