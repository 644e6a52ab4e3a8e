//! Finds out what each replica of a database does, by asking it.
//!
//! Each set is at work on one of the Disco nodes ([`Observer`]); when that one dies another takes over. Every replica is asked by a
//! task of its own, over a connection that is kept. What comes back goes through a pure parser for the database's language and
//! into `Hearing`, which decides what is known at a moment; that goes to [`Peers::observed`]. Nothing here decides who leads: that
//! is [`PeerSet::roles`].
//!
//! Three ends of knowledge are told apart. A replica that **refuses** a connection does not run: what it said is void at once.
//! One that is **silent** or answers nonsense has said nothing after a second ([`SILENCE`]): the holder of a lock that is frozen
//! leads no more, though nobody else can either. But when **all** are silent at once it is rather this node that is cut off, and what
//! was known stays for as long as that lasts: a Disco that cannot see is to do no more harm than one that is
//! dead, under which proxies go on with what they have. Any answer, a refusal too, ends that, and then who stays silent for
//! a second more is dropped.

mod adapter;
mod ask;
mod etcd;
mod generic;
mod link;
mod nats;
mod observer;
mod patroni;
mod redis;
mod resp;
mod said;
mod sight;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod wire_tests;

pub use adapter::Adapter;
pub use observer::Observer;
pub use sight::SILENCE;

#[cfg(doc)]
use super::{PeerSet, Peers};
