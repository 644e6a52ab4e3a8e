//! Which processes share the store, and which of them are alive.
//!
//! Each one keeps a record under `members/`, bound to it: the store drops it when the process is gone or was silent for
//! longer than its session lasts. A process that cannot be sure that its record is there counts itself as dead, because the
//! others may do so.

use std::{
    collections::{BTreeMap, BTreeSet},
    future,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use prost::Message as _;
use tokio::{sync::watch, time::Instant};

use crate::{
    model::{MemberId, Members, Revision},
    rt::{self, Backoff, Tasks},
    store::{Condition, Event, Key, Op, Session, Status, Store, StoreError, Watch},
};

pub(super) const MEMBERS: &str = "members/";

/// Waits between tries to join or to look at the others.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

/// A process that shares the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// What it is called.
    pub id: MemberId,
    /// What it does.
    pub roles: BTreeSet<String>,
    /// Where it listens for gRPC; empty: nowhere.
    pub grpc: String,
    /// Where it listens for HTTP; empty: nowhere.
    pub http: String,
    /// When it started.
    pub started_at: SystemTime,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Record {
    /// Tells two processes of one name apart.
    #[prost(uint64, tag = "1")]
    boot: u64,
    #[prost(string, repeated, tag = "2")]
    roles: Vec<String>,
    #[prost(string, tag = "3")]
    grpc: String,
    #[prost(string, tag = "4")]
    http: String,
    #[prost(message, optional, tag = "5")]
    started_at: Option<prost_types::Timestamp>,
}

/// Those that are alive, as this process sees it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Seen {
    members: BTreeMap<MemberId, (u64, Member)>,
    /// Whether this process is among them for certain.
    joined: bool,
}

/// The processes that share the store. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Membership {
    own: MemberId,
    seen: watch::Receiver<Seen>,
}

impl Membership {
    /// Joins as `me` and follows the others, for as long as the process runs. Returns at once.
    pub fn start(store: Arc<dyn Store>, me: Member, tasks: &Tasks) -> Self {
        let (sender, seen) = watch::channel(Seen::default());
        let own = me.id.clone();
        let boot = fastrand::u64(1..);
        let record = Record {
            boot,
            roles: me.roles.into_iter().collect(),
            grpc: me.grpc,
            http: me.http,
            started_at: Some(me.started_at.into()),
        };
        let joiner = Joiner {
            status: store.status(),
            store,
            key: format!("{MEMBERS}{own}").into(),
            own: own.clone(),
            boot,
            value: record.encode_to_vec().into(),
            bound: None,
            told: Revision::default(),
            seen: sender,
        };
        tasks.spawn_until_shutdown("membership", joiner.run());
        Self { own, seen }
    }

    /// Those that are alive, by id.
    pub fn latest(&self) -> Vec<Member> {
        self.seen.borrow().members.values().map(|(_, member)| member.clone()).collect()
    }

    /// Those with a role, now and as they come and go.
    pub fn with_role(&self, role: &'static str, tasks: &Tasks) -> watch::Receiver<Members> {
        let mut seen = self.seen.clone();
        let own = self.own.clone();
        let members = move |seen: &Seen| {
            let live = seen.members.values().filter(|(_, member)| member.roles.contains(role));
            let live = live.map(|(_, member)| member.id.clone()).filter(|id| seen.joined || *id != own);
            Members { own: own.clone(), live: live.collect() }
        };
        let (sender, receiver) = watch::channel(members(&seen.borrow_and_update()));
        tasks.spawn_until_shutdown("members", async move {
            while seen.changed().await.is_ok() {
                let now = members(&seen.borrow_and_update());
                sender.send_if_modified(|before| {
                    let changed = *before != now;
                    *before = now;
                    changed
                });
            }
        });
        receiver
    }

    /// Returns once this process has joined.
    pub async fn joined(&self) {
        let mut seen = self.seen.clone();
        if seen.wait_for(|seen| seen.joined).await.is_err() {
            future::pending::<()>().await;
        }
    }
}

/// Keeps this process's record in the store, and up with those of the others.
struct Joiner {
    store: Arc<dyn Store>,
    status: watch::Receiver<Status>,
    key: Key,
    own: MemberId,
    boot: u64,
    value: Bytes,
    /// The session that our record hangs on, and the commit that bound it.
    bound: Option<(Session, Revision)>,
    /// What the feed has told.
    told: Revision,
    seen: watch::Sender<Seen>,
}

impl Joiner {
    async fn run(mut self) {
        let mut backoff = Backoff::new(RETRY.0, RETRY.1);
        loop {
            match self.follow(&mut backoff).await {
                StoreError::Closed => return,
                error => tracing::warn!(%error, "the other nodes cannot be seen; trying again"),
            }
            self.tell();
            tokio::time::sleep(backoff.next_wait()).await;
        }
    }

    /// Follows the others until that fails.
    async fn follow(&mut self, backoff: &mut Backoff) -> StoreError {
        let (mut feed, others, told) = match self.look().await {
            Ok(looked) => looked,
            Err(error) => return error,
        };
        self.told = told;
        self.seen.send_modify(|seen| seen.members = others);
        loop {
            if let Err(error) = self.join().await {
                return error;
            }
            self.tell();
            let until = self.bound.and_then(|_| self.session()).and_then(|session| session.until);
            let certain = async {
                match until {
                    Some(until) if until > Instant::now() => tokio::time::sleep_until(until).await,
                    // Over: nothing to wait for but the store.
                    Some(_) | None => future::pending().await,
                }
            };
            tokio::select! {
                event = feed.next() => match event {
                    Ok(event) => {
                        backoff.reset();
                        self.apply(event);
                    }
                    Err(error) => return error,
                },
                () = changed(&mut self.status) => {}
                () = certain => {}
            }
        }
    }

    async fn look(
        &self,
    ) -> Result<(Box<dyn Watch>, BTreeMap<MemberId, (u64, Member)>, Revision), StoreError> {
        let listing = self.store.list(MEMBERS).await?;
        let feed = self.store.watch(MEMBERS, listing.revision).await?;
        let members = listing.entries.iter().filter_map(|entry| read(&entry.key, &entry.value));
        Ok((feed, members.collect(), listing.revision))
    }

    fn session(&self) -> Option<Session> {
        self.status.borrow().session
    }

    /// Binds our record to the present session, unless it is. A record of our name that somebody else wrote is left alone as
    /// long as it is there, once ours was.
    async fn join(&mut self) -> Result<(), StoreError> {
        let session = self.status.borrow_and_update().session;
        let Some(session) = session else { return Ok(()) };
        let same = self.bound.is_some_and(|(bound, _)| bound.id == session.id);
        if same && self.bound.is_some_and(|(_, at)| at > self.told) {
            // The feed is about to tell.
            return Ok(());
        }
        let present = self.seen.borrow().members.get(&self.own).map(|(boot, _)| *boot);
        match present {
            Some(boot) if boot == self.boot && same => return Ok(()),
            Some(boot) if boot != self.boot && self.bound.is_some() => {
                tracing::error!(
                    node = %self.own,
                    "another process joined under the name of this one, which does nothing from now on: give each its own \
                     `node`, and restart one of them"
                );
                return Ok(());
            }
            _ => {}
        }
        let ops =
            vec![Op::Bind { key: Arc::clone(&self.key), value: self.value.clone(), when: Condition::Always }];
        let revision = self.store.commit(ops).await?;
        self.bound = Some((session, revision));
        Ok(())
    }

    fn apply(&mut self, event: Event) {
        self.told = event.revision;
        self.seen.send_modify(|seen| {
            for (key, value) in event.changes {
                match value.as_ref().and_then(|value| read(&key, value)) {
                    Some((id, member)) => {
                        if seen.members.insert(id.clone(), member).is_none() && id != self.own {
                            tracing::info!(node = %id, "another node joined");
                        }
                    }
                    None => {
                        let id = key.strip_prefix(MEMBERS).and_then(|id| id.parse::<MemberId>().ok());
                        if let Some(id) = id.filter(|id| seen.members.remove(id).is_some()) {
                            tracing::warn!(node = %id, "a node is gone: what it kept is kept by others");
                        }
                    }
                }
            }
        });
    }

    /// Whether we are among those that are alive, for all who ask.
    fn tell(&self) {
        let session = self.session();
        let same = self.bound.zip(session).is_some_and(|((bound, _), now)| bound.id == now.id && now.holds());
        self.seen.send_if_modified(|seen| {
            let ours = seen.members.get(&self.own).is_some_and(|(boot, _)| *boot == self.boot);
            let joined = same && ours;
            if joined != seen.joined {
                if joined {
                    tracing::info!(node = %self.own, "joined");
                } else {
                    tracing::error!(
                        node = %self.own,
                        "the store may count this node as dead: others keep its leases until it is back"
                    );
                }
            }
            std::mem::replace(&mut seen.joined, joined) != joined
        });
    }
}

/// Returns when the status changed. That of a store which is always there never does.
pub(super) async fn changed(status: &mut watch::Receiver<Status>) {
    if status.changed().await.is_err() {
        future::pending().await
    }
}

fn read(key: &str, value: &Bytes) -> Option<(MemberId, (u64, Member))> {
    let id: MemberId = key.strip_prefix(MEMBERS)?.parse().ok()?;
    let Record { boot, roles, grpc, http, started_at } = Record::decode(value.clone()).ok()?;
    let started_at = started_at.and_then(|at| SystemTime::try_from(at).ok()).unwrap_or_else(rt::now);
    let member = Member { id: id.clone(), roles: roles.into_iter().collect(), grpc, http, started_at };
    Some((id, (boot, member)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::MemoryStore;

    fn member(id: &str, roles: &[&str]) -> Member {
        Member {
            id: id.parse().unwrap(),
            roles: roles.iter().map(ToString::to_string).collect(),
            grpc: "127.0.0.1:18000".into(),
            http: String::new(),
            started_at: SystemTime::UNIX_EPOCH,
        }
    }

    fn live(members: &Members) -> Vec<&str> {
        members.live.iter().map(MemberId::as_str).collect()
    }

    #[tokio::test]
    async fn members_see_each_other_come_and_go_by_role() {
        let store: Arc<dyn Store> = Arc::new(MemoryStore::default());
        let tasks = Tasks::default();
        let n1 = Membership::start(Arc::clone(&store), member("n1", &["registry", "xds"]), &tasks);
        n1.joined().await;
        let mut registries = n1.with_role("registry", &tasks);
        assert!(registries.borrow().is_member());
        let n2 = Membership::start(Arc::clone(&store), member("n2", &["registry"]), &tasks);
        let n3 = Membership::start(Arc::clone(&store), member("n3", &["xds"]), &tasks);
        n2.joined().await;
        n3.joined().await;
        registries.wait_for(|members| live(members) == ["n1", "n2"]).await.unwrap();
        assert!(!n3.with_role("registry", &tasks).borrow().is_member());
        assert_eq!(n2.latest().len(), 3);

        let gone = Op::Delete { key: "members/n2".into(), when: Condition::Always };
        store.commit(vec![gone]).await.unwrap();
        // Its own record is gone, so it comes back with a new one.
        let mut of_n2 = n2.with_role("registry", &tasks);
        of_n2.wait_for(|members| live(members) == ["n1", "n2"]).await.unwrap();
    }

    #[tokio::test]
    async fn of_two_with_one_name_the_later_one_is_it() {
        let store: Arc<dyn Store> = Arc::new(MemoryStore::default());
        let tasks = Tasks::default();
        let first = Membership::start(Arc::clone(&store), member("n1", &["registry"]), &tasks);
        first.joined().await;
        let mut as_first = first.with_role("registry", &tasks);
        let second = Membership::start(Arc::clone(&store), member("n1", &["registry"]), &tasks);
        second.joined().await;
        as_first.wait_for(|members| !members.is_member()).await.unwrap();
        assert!(second.with_role("registry", &tasks).borrow().is_member());
    }
}
