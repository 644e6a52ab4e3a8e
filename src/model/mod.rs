//! The words of the domain as types: services, instances, leases, revisions, and what is wrong with an input.
//!
//! Data only: no IO, no async, no wire format. A value of these types is valid by construction; whatever comes from
//! outside passes through [`Registration::check`] or [`FromStr`](std::str::FromStr) and is refused with the field's
//! name, what is wrong, and what would be right.

mod health;
mod id;
mod input;
mod instance;
mod lock;
mod members;
mod registration;
mod roles;
mod upstream;

pub use health::{Check, Health, HealthReport, Probe, RawCheck, RawKind, ServerCheck, Statuses, Verdict};
pub use id::{Incarnation, InstanceId, InstanceKey, MAX_INSTANCE_ID, MAX_LABEL, Revision, ServiceId};
pub use input::{Fields, Node, Position, Problem, Problems, Value, excerpt, nearest};
pub use instance::{Damped, Instance, Lease, Locality, Stale, State};
pub use lock::{Claim, Lock, LockName};
pub use members::{MemberId, Members};
pub use registration::{
    Limits, RawRegistration, Registration, Update, check_metadata, format_duration, parse_duration,
};
pub use roles::{Role, Roles};
pub use upstream::{Group, Upstream};
