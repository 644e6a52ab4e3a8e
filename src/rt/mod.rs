//! Small general things: named tasks with an owner, backoff, readiness, the wall clock.

mod backoff;
mod ready;
mod task;

pub use backoff::Backoff;
pub use ready::{Gate, Readiness};
pub use task::{Shutdown, Tasks};

use std::time::SystemTime;

/// The wall clock, for what people read. Durations are measured with [`tokio::time::Instant`].
#[allow(clippy::disallowed_methods, reason = "the one place that reads the wall clock")]
pub fn now() -> SystemTime {
    SystemTime::now()
}
