use std::sync::Arc;

use imbl::OrdSet;
use xxhash_rust::xxh3::xxh3_64;

/// What the name of a glob collection ends with.
pub(super) const GLOB: char = '*';

/// Whether a name is that of a glob collection (rule X3).
pub(super) fn is_glob(name: &str) -> bool {
    name.ends_with("/*") && is_collected(name)
}

/// The glob collection that a resource is in, by its name: the last part of the path stands for all.
pub(super) fn collection(name: &str) -> Option<String> {
    if !is_collected(name) || is_glob(name) {
        return None;
    }
    let (path, _) = name.rsplit_once('/')?;
    Some(format!("{path}/{GLOB}"))
}

/// Whether it is an xdstp name of the one type that comes in collections: the type is part of the name (rule X2).
fn is_collected(name: &str) -> bool {
    let path = name.strip_prefix("xdstp://").and_then(|rest| rest.split_once('/'));
    path.is_some_and(|(_, path)| path.starts_with("envoy.config.endpoint.v3.LbEndpoint/"))
}

/// A set of names that knows a hash of itself, so that equal large sets can be told from each other at no cost and share
/// their memory. A clone costs nothing.
#[derive(Debug, Clone, Default)]
pub(super) struct NameSet {
    names: OrdSet<Arc<str>>,
    /// Wrapping sum of the names' hashes.
    digest: u64,
}

impl NameSet {
    pub(super) fn as_set(&self) -> &OrdSet<Arc<str>> {
        &self.names
    }

    pub(super) fn get(&self, name: &str) -> Option<&Arc<str>> {
        self.names.get(name)
    }

    pub(super) fn contains(&self, name: &str) -> bool {
        self.names.contains(name)
    }

    pub(super) fn len(&self) -> usize {
        self.names.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// False if it was there.
    pub(super) fn insert(&mut self, name: Arc<str>) -> bool {
        let digest = xxh3_64(name.as_bytes());
        let new = self.names.insert(name).is_none();
        if new {
            self.digest = self.digest.wrapping_add(digest);
        }
        new
    }

    pub(super) fn remove(&mut self, name: &str) -> Option<Arc<str>> {
        let removed = self.names.remove(name)?;
        self.digest = self.digest.wrapping_sub(xxh3_64(removed.as_bytes()));
        Some(removed)
    }

    /// Takes the memory of `other` if it has the same names.
    pub(super) fn share(&mut self, other: &Self) {
        if self.names.len() == other.names.len()
            && self.digest == other.digest
            && !self.names.ptr_eq(&other.names)
        {
            self.clone_from(other);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(names: &[&str]) -> NameSet {
        let mut set = NameSet::default();
        for name in names {
            set.insert((*name).into());
        }
        set
    }

    #[test]
    fn x2_x3_a_collection_is_named_by_the_path_of_its_members() {
        let glob = |name: &str| collection(&format!("xdstp://{name}"));
        let of = |name: &str| Some(format!("xdstp://{name}"));
        const LEDS: &str = "envoy.config.endpoint.v3.LbEndpoint";
        assert_eq!(glob(&format!("/{LEDS}/a/b:1")), of(&format!("/{LEDS}/a/*")));
        assert_eq!(glob(&format!("x/{LEDS}/a/b/c")), of(&format!("x/{LEDS}/a/b/*")));
        assert_eq!(glob(&format!("/{LEDS}/a/*")), None);
        assert_eq!(glob("/envoy.config.cluster.v3.Cluster/a"), None);
        assert_eq!(collection("a/b"), None);
        for (name, is) in [(format!("/{LEDS}/a/*"), true), (format!("/{LEDS}/a"), false), ("*".into(), false)]
        {
            assert_eq!(is_glob(&format!("xdstp://{name}")), is, "{name}");
        }
    }

    #[test]
    fn equal_sets_share_memory_and_others_do_not() {
        let mut other = set(&["a", "b", "x"]);
        other.remove("x");
        let mut same = set(&["b", "a", "a"]);
        same.share(&other);
        assert!(same.as_set().ptr_eq(other.as_set()));
        let mut different = set(&["a", "c"]);
        different.share(&other);
        assert!(different.contains("c") && !different.contains("b"));
    }
}
