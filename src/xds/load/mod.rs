//! Load reports (LRS, rules C2 to C4): what clients count of the calls that they make, summed by service and locality.
//!
//! `report` reads one message and `totals` sums those of all streams: both are plain code, and the caller says what time it
//! is. `server` is the thin async edge. What a report may be about is asked of [`Reportable`], so that a client can make the
//! server keep nothing but known services and localities in use.

mod report;
mod server;
#[cfg(test)]
mod tests;
mod totals;

pub use report::{Load, Reportable, Traffic};
pub use server::LoadReports;
pub use totals::Loads;
