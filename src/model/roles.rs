use std::{collections::BTreeMap, fmt, str::FromStr};

use super::{id::InstanceId, input::excerpt};

/// What a replica of a database does, as the database itself says.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Nobody has said yet, or not for too long.
    #[default]
    Unknown,
    /// It takes the writes.
    Leader,
    /// It copies what the leader writes, and votes.
    Follower,
    /// It asks to be elected.
    Candidate,
    /// It copies, and has no vote.
    Learner,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Unknown, Self::Leader, Self::Follower, Self::Candidate, Self::Learner];

    /// Its name in requests and answers.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Leader => "leader",
            Self::Follower => "follower",
            Self::Candidate => "candidate",
            Self::Learner => "learner",
        }
    }
}

impl FromStr for Role {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let found = Self::ALL.into_iter().find(|role| role.as_str() == text);
        found.ok_or_else(|| {
            format!("{} is not a role: want leader, follower, candidate, learner or unknown", excerpt(text))
        })
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Which instance of a replicated service does what. A service that has roles is served as `NAME.leader` (none or one
/// instance), `NAME.followers` and `NAME.any`, too.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Roles {
    /// The term (epoch, configuration number) that the leader was elected for. It never gets smaller (rule N7).
    pub term: u64,
    /// The one leader; `None` while there is none, or nobody can tell which one it is.
    pub leader: Option<InstanceId>,
    /// What each of the others does. One that is not named here is taken for a follower.
    pub others: BTreeMap<InstanceId, Role>,
}

impl Roles {
    /// What an instance does.
    pub fn of(&self, id: &InstanceId) -> Role {
        if self.leader.as_ref() == Some(id) {
            return Role::Leader;
        }
        match self.others.get(id) {
            // Who is not the one leader is none, whatever it says of itself.
            None | Some(Role::Leader) => Role::Follower,
            Some(role) => *role,
        }
    }
}
