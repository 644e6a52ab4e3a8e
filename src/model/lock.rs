use std::time::{Duration, SystemTime};

use super::{
    id::{Revision, name},
    input::{Problems, excerpt},
    members::MemberId,
    registration::format_duration,
};

/// Longest text that a holder may give of itself, in bytes.
const MAX_HOLDER: usize = 256;

/// Longest text that marks an attempt, in bytes.
const MAX_ATTEMPT: usize = 64;

/// Shortest and longest TTL of a lock.
const TTL: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60 * 60));

name! {
    /// The name of a lock: what at most one holder does at a time.
    LockName, "the name of a lock"
}

/// A lock that is held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lock {
    /// What is locked.
    pub name: LockName,
    /// The fencing token: the revision of the commit that took the lock. Each later holder has a greater one, for ever.
    pub token: Revision,
    /// What the holder says of itself.
    pub holder: String,
    /// What marks the attempt that took it; empty when nothing did.
    pub attempt: String,
    /// How long the holder may go on after its last renewal.
    pub ttl: Duration,
    /// Since when it has been held.
    pub since: SystemTime,
    /// The Disco process that counts its lease.
    pub owner: MemberId,
    /// Which run of that process: a random number.
    pub run: u64,
    /// It is renewed no more: somebody asked for its end.
    pub revoked: bool,
    /// The change that last touched it.
    pub revision: Revision,
}

impl Lock {
    /// How long a holder's work has to end once its TTL is over, before it is killed. A quarter of the TTL, at most 10 s.
    pub fn stop_grace(ttl: Duration) -> Duration {
        (ttl / 4).min(Duration::from_secs(10))
    }

    /// How long after the last renewal that a server received the lock goes to the next holder. The work of the one before has
    /// been killed by then, `ttl` and [`Lock::stop_grace`] after it *sent* that renewal; what is left is for the killing
    /// and for clocks that run at different rates.
    pub fn expiry(ttl: Duration) -> Duration {
        ttl + Self::stop_grace(ttl) + ttl / 100 + Duration::from_millis(500)
    }
}

/// Somebody's wish to hold a lock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// Which lock.
    pub name: LockName,
    /// What the claimant says of itself, for people.
    pub holder: String,
    /// Marks the attempt, so that asking again after a lost answer is given the same lock, and does not wait for its own.
    pub attempt: String,
    /// How long it may go on after its last renewal.
    pub ttl: Duration,
}

impl Claim {
    /// The TTL where none is asked for.
    pub const DEFAULT_TTL: Duration = Duration::from_secs(10);

    /// Checks a claim from outside. Notes all that is wrong.
    pub fn check_into(
        name: &str,
        holder: String,
        attempt: String,
        ttl: Option<Duration>,
        problems: &mut Problems,
    ) -> Option<Self> {
        let name = problems.take("name", name.parse());
        let mut bounded = |field: &str, text: &str, most: usize| {
            if text.len() > most || text.chars().any(char::is_control) {
                let message =
                    format!("{} is not: want at most {most} bytes without control characters", excerpt(text));
                problems.add(field, message);
            }
        };
        bounded("holder", &holder, MAX_HOLDER);
        bounded("attempt", &attempt, MAX_ATTEMPT);
        if holder.is_empty() {
            problems.add("holder", "is missing: want a text that says to people who holds the lock");
        }
        let ttl = ttl.unwrap_or(Self::DEFAULT_TTL);
        if let Err(message) = Self::check_ttl(ttl) {
            problems.add("ttl", message);
        }
        Some(Self { name: name?, holder, attempt, ttl }).filter(|_| problems.is_empty())
    }

    /// Whether a lock may have this TTL; the error says what would be right.
    pub fn check_ttl(ttl: Duration) -> Result<Duration, String> {
        let (least, most) = TTL;
        if (least..=most).contains(&ttl) {
            return Ok(ttl);
        }
        let [ttl, least, most] = [ttl, least, most].map(format_duration);
        Err(format!("{ttl} is out of range: want {least} to {most}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claim_is_checked_whole() {
        let check = |name: &str, holder: &str, attempt: &str, ttl| {
            let mut problems = Problems::default();
            let claim = Claim::check_into(name, holder.into(), attempt.into(), ttl, &mut problems);
            assert_eq!(claim.is_none(), !problems.is_empty());
            problems.0.into_iter().map(|problem| problem.field).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(check("nightly.report", "host 7", "", None), "");
        assert_eq!(check("a/b", "", "\n", Some(Duration::ZERO)), "name attempt holder ttl");
        assert_eq!(check("a", &"x".repeat(257), "", Some(Duration::from_secs(3601))), "holder ttl");
    }

    #[test]
    fn a_server_lets_go_after_the_holder_has_been_killed() {
        for seconds in [1, 2, 10, 60, 3600] {
            let ttl = Duration::from_secs(seconds);
            let left = Lock::expiry(ttl) - (ttl + Lock::stop_grace(ttl));
            assert!(left >= Duration::from_millis(500) + ttl / 100, "{ttl:?}: {left:?}");
        }
    }
}
