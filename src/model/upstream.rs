use std::{borrow::Borrow, fmt, str::FromStr, sync::Arc};

use super::{id::ServiceId, input::excerpt, roles::Role};

/// Some of the instances of a service that has roles, served as `SERVICE.GROUP` beside the service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Group {
    /// Whoever can vote: the leader, followers, candidates, and those of whom nobody knows.
    Any,
    /// Those that follow the leader.
    Followers,
    /// The leader, as long as there is one.
    Leader,
}

impl Group {
    /// All of them, by name.
    pub const ALL: [Self; 3] = [Self::Any, Self::Followers, Self::Leader];

    /// The last part of its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Any => "any",
            Self::Followers => "followers",
            Self::Leader => "leader",
        }
    }

    /// Whether an instance with this role belongs to it.
    pub fn has(self, role: Role) -> bool {
        match self {
            Self::Any => role != Role::Learner,
            Self::Followers => role == Role::Follower,
            Self::Leader => role == Role::Leader,
        }
    }

    /// Its name as a part of `service`: its cluster and EDS name, and the `:authority` that callers use.
    pub fn of(self, service: &ServiceId) -> Arc<str> {
        format!("{service}.{}", self.as_str()).into()
    }

    /// The service and the group that a name stands for, unless a service of that very name is registered.
    pub fn parse(name: &str) -> Option<(ServiceId, Self)> {
        let (service, last) = name.rsplit_once('.')?;
        let group = Self::ALL.into_iter().find(|group| group.as_str() == last)?;
        Some((service.parse().ok()?, group))
    }
}

/// What a caller calls: a service, or a [`Group`] of one. `db.leader` can be either; a service that is registered under such a name
/// comes first.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Upstream(Arc<str>);

impl Upstream {
    /// The full name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The service of this name, if it can be one.
    pub fn service(&self) -> Option<ServiceId> {
        self.0.parse().ok()
    }

    /// The group of this name, if it can be one.
    pub fn group(&self) -> Option<(ServiceId, Group)> {
        Group::parse(&self.0)
    }
}

impl FromStr for Upstream {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.parse::<ServiceId>() {
            Ok(id) => Ok(Self(id.shared())),
            Err(_) if Group::parse(text).is_some() => Ok(Self(text.into())),
            Err(error) if text.matches('.').count() < 2 => Err(error),
            Err(_) => {
                let groups = Group::ALL.map(Group::as_str).join(", ");
                Err(format!(
                    "{} is not a service name: want `name`, `name.namespace`, or one of these and its part: {groups}",
                    excerpt(text)
                ))
            }
        }
    }
}

impl Borrow<str> for Upstream {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Upstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_by_case() {
        for (name, service, group) in [
            ("db", Some("db"), None),
            ("db.eu", Some("db.eu"), None),
            ("db.leader", Some("db.leader"), Some(("db", Group::Leader))),
            ("db.eu.followers", None, Some(("db.eu", Group::Followers))),
            ("any.any", Some("any.any"), Some(("any", Group::Any))),
            ("leader", Some("leader"), None),
        ] {
            let upstream: Upstream = name.parse().unwrap();
            assert_eq!(upstream.as_str(), name);
            assert_eq!(upstream.service().map(|id| id.to_string()).as_deref(), service, "{name}");
            let got = upstream.group();
            assert_eq!(got.as_ref().map(|(id, group)| (id.as_str(), *group)), group, "{name}");
        }
        for bad in
            ["", ".leader", "db..leader", "db.eu.west", "db.eu.west.leader", "DB.leader", "db.eu.leaders"]
        {
            let error = bad.parse::<Upstream>().unwrap_err();
            assert!(error.contains("not a service name"), "{bad}: {error}");
        }
    }

    #[test]
    fn who_belongs_to_which_group() {
        use Role::{Candidate, Follower, Leader, Learner, Unknown};
        for (group, want) in [
            (Group::Leader, &[Leader] as &[Role]),
            (Group::Followers, &[Follower]),
            (Group::Any, &[Unknown, Leader, Follower, Candidate]),
        ] {
            let has: Vec<_> = Role::ALL.into_iter().filter(|role| group.has(*role)).collect();
            assert_eq!(has, want, "{group:?}");
            assert!(!group.has(Learner));
        }
    }
}
