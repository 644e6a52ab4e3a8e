//! The store in etcd, shared by the processes of one Disco cluster.
//!
//! The client is our own, on code generated from `proto/etcd` at build time: the crate `etcd-client` builds with protoc
//! only, so a bare machine could not `cargo install` Disco, and what it has no part in is most of what stands here: watches
//! that resume, a session that is granted again, transactions whose answer was lost, a cluster that went back.
//!
//! | key | holds |
//! |---|---|
//! | `<prefix>data/<key>` | the store's keys |
//! | `<prefix>meta/offset` | what is added to etcd's revisions, see [`epoch`] |
//! | `<prefix>meta/commits/<lease>/<n>` | marks of commits under way, see [`commit`] |
//!
//! A commit is one transaction and so one revision of etcd. A process holds one lease, which it renews three times in its
//! time to live; everything bound to the process hangs on that one. Nobody compacts here: that is for etcd's own
//! `--auto-compaction-retention`, and who fell behind it lists again.
//!
//! Every call goes to one endpoint, with a deadline; when it does not answer, all calls and watches move to the next.

mod client;
mod commit;
mod epoch;
mod session;
#[cfg(test)]
mod tests;
mod watch;
mod wire;

use std::{io, path::PathBuf, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use tokio::sync::watch as latest;

use self::{
    client::{Client, Failure},
    commit::Slots,
    epoch::Epochs,
    watch::Follower,
};
use super::{Entry, Key, Listing, Op, Status, Store, StoreError, Watch};
use crate::{
    model::Revision,
    proto::etcd::{KeyValue, RangeRequest},
    rt::{Shutdown, Tasks},
};

/// Entries that one call of a listing asks for.
const PAGE: i64 = 20_000;

/// Which etcd, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdConfig {
    /// `http://HOST:PORT` or `https://HOST:PORT` of its members; at least one.
    pub endpoints: Vec<String>,
    /// What all keys start with; ends with `/`. Default `/disco/`.
    pub prefix: String,
    /// Who we are, if etcd asks.
    pub user: Option<EtcdUser>,
    /// For endpoints with `https`.
    pub tls: Option<EtcdTls>,
    /// How long a call may take in all; a third of it is how long one endpoint is waited for. Default 5 s.
    pub timeout: Duration,
    /// How long what is bound to this process outlives it, in whole seconds. Default 10 s.
    pub session_ttl: Duration,
}

impl Default for EtcdConfig {
    fn default() -> Self {
        Self {
            endpoints: Vec::new(),
            prefix: "/disco/".to_owned(),
            user: None,
            tls: None,
            timeout: Duration::from_secs(5),
            session_ttl: Duration::from_secs(10),
        }
    }
}

/// A user of etcd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdUser {
    /// The name.
    pub name: String,
    /// The file with the password; read at each login, so it may change. A line break at its end does not count.
    pub password_file: PathBuf,
}

/// How connections to etcd are secured. Files of PEM, read at the start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdTls {
    /// Who may vouch for etcd.
    pub ca: PathBuf,
    /// Our own certificate and its key, for an etcd with `--client-cert-auth`.
    pub identity: Option<(PathBuf, PathBuf)>,
}

/// Why an [`EtcdStore`] did not open.
#[derive(Debug, thiserror::Error)]
pub enum EtcdError {
    /// There is nobody to speak to.
    #[error("store.etcd.endpoints names no endpoint")]
    NoEndpoint,
    /// An endpoint cannot be used.
    #[error("store.etcd.endpoints: {endpoint} cannot be used: {reason}")]
    Endpoint {
        /// Which.
        endpoint: String,
        /// Why.
        reason: String,
    },
    /// A file of `store.etcd.tls` cannot be read.
    #[error("store.etcd.tls: {} cannot be read: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The store in etcd.
#[derive(Debug)]
pub struct EtcdStore {
    inner: Arc<Inner>,
    tasks: Tasks,
}

/// What calls, watches and the session share.
#[derive(Debug)]
struct Inner {
    client: Client,
    prefix: String,
    ttl: Duration,
    epochs: Epochs,
    slots: Slots,
    status: latest::Sender<Status>,
    /// The last lease that etcd said is gone.
    lost: latest::Sender<i64>,
    closed: Shutdown,
    /// The lease is not renewed, as if the process stood still.
    #[cfg(test)]
    frozen: std::sync::atomic::AtomicBool,
}

impl EtcdStore {
    /// Starts to speak to etcd, and does not wait for an answer: [`Store::status`] tells.
    ///
    /// # Errors
    /// What is wrong with the configuration.
    pub fn open(config: &EtcdConfig) -> Result<Self, EtcdError> {
        let inner = Arc::new(Inner {
            client: Client::new(config)?,
            prefix: config.prefix.clone(),
            ttl: config.session_ttl,
            epochs: Epochs::default(),
            slots: Slots::default(),
            status: latest::Sender::new(Status { fault: None, session: None }),
            lost: latest::Sender::default(),
            closed: Shutdown::default(),
            #[cfg(test)]
            frozen: false.into(),
        });
        let tasks = Tasks::new(inner.closed.clone());
        let keeper = Arc::clone(&inner);
        tasks.spawn_until_shutdown("etcd-session", async move { keeper.keep_session().await });
        Ok(Self { inner, tasks })
    }
}

impl Drop for EtcdStore {
    fn drop(&mut self) {
        self.inner.closed.start();
    }
}

impl Inner {
    /// The key as etcd has it.
    fn data(&self, key: &str) -> Bytes {
        Bytes::from([self.prefix.as_str(), "data/", key].concat())
    }

    /// A key of our own.
    fn meta(&self, key: &str) -> Bytes {
        Bytes::from([self.prefix.as_str(), "meta/", key].concat())
    }

    /// The store's key of one of etcd's.
    fn key_of(&self, key: &[u8]) -> Option<Key> {
        let key = str::from_utf8(key).ok()?;
        Some(Key::from(key.strip_prefix(self.prefix.as_str())?.strip_prefix("data/")?))
    }

    fn refuse_closed(&self) -> Result<(), StoreError> {
        if self.closed.started() { Err(StoreError::Closed) } else { Ok(()) }
    }

    /// What a failure is to the caller; `so` says what became of what was asked.
    fn failed(&self, failure: Failure, so: &str) -> StoreError {
        match failure {
            Failure::Unanswered(reason) => self.unanswered(&reason, so),
            Failure::Refused(status) => {
                let reason = self.client.explain(&status, &self.prefix);
                if client::concerns_all(&status) {
                    self.at_fault(reason.clone());
                }
                StoreError::Failed(format!("{reason}; {so}"))
            }
        }
    }

    fn unanswered(&self, reason: &str, so: &str) -> StoreError {
        if self.closed.started() {
            return StoreError::Closed;
        }
        let reason = self.client.unanswered(reason);
        self.at_fault(reason.clone());
        StoreError::Failed(format!("{reason}; {so}"))
    }

    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        self.refuse_closed()?;
        let deadline = self.client.deadline();
        let failed = |failure| self.failed(failure, "nothing was read");
        let epoch = self.epoch(deadline).await.map_err(failed)?;
        let request = RangeRequest { key: self.data(key), ..RangeRequest::default() };
        let response = self.client.call(deadline, request, wire::range).await.map_err(failed)?;
        self.answered();
        let epoch = self.settle(deadline, epoch, response.header.as_ref()).await.map_err(failed)?;
        Ok(response.kvs.into_iter().next().and_then(|entry| self.entry(&epoch, entry)))
    }

    fn entry(&self, epoch: &epoch::Epoch, entry: KeyValue) -> Option<Entry> {
        let key = self.key_of(&entry.key)?;
        Some(Entry { key, value: entry.value, revision: epoch.revision(entry.mod_revision) })
    }

    async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
        self.refuse_closed()?;
        loop {
            if let Some(listing) = self.list_once(prefix).await? {
                return Ok(listing);
            }
        }
    }

    /// Page after page at the revision of the first. `None` when that was compacted or the epoch ended meanwhile.
    async fn list_once(&self, prefix: &str) -> Result<Option<Listing>, StoreError> {
        let failed = |failure| self.failed(failure, "nothing was read");
        let asked = self.epoch(self.client.deadline()).await.map_err(failed)?;
        let whole = format!("{}data/{prefix}", self.prefix);
        let mut request = RangeRequest {
            range_end: client::range_end(&whole).into(),
            key: whole.into(),
            limit: PAGE,
            ..RangeRequest::default()
        };
        let mut entries = Vec::new();
        loop {
            // Each page may take as long as one call; a listing of many is not bounded by one of few.
            let deadline = self.client.deadline();
            let page = match self.client.call(deadline, request.clone(), wire::range).await {
                Ok(page) => page,
                Err(Failure::Refused(status)) if status.code() == tonic::Code::OutOfRange => return Ok(None),
                Err(failure) => return Err(failed(failure)),
            };
            self.answered();
            let epoch = self.settle(deadline, asked, page.header.as_ref()).await.map_err(failed)?;
            if request.revision == 0 {
                request.revision = page.header.map_or(0, |header| header.revision);
            }
            if epoch.offset != asked.offset {
                return Ok(None);
            }
            if let Some(last) = page.kvs.last().filter(|_| page.more) {
                // The least key after it.
                request.key = [&last.key, &b"\0"[..]].concat().into();
            }
            let more = page.more;
            entries.extend(page.kvs.into_iter().filter_map(|entry| self.entry(&asked, entry)));
            if !more {
                return Ok(Some(Listing { revision: epoch.revision(request.revision), entries }));
            }
        }
    }
}

impl Store for EtcdStore {
    fn commit(&self, ops: Vec<Op>) -> BoxFuture<'_, Result<Revision, StoreError>> {
        Box::pin(async move { self.inner.commit(&ops).await })
    }

    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Entry>, StoreError>> {
        Box::pin(self.inner.get(key))
    }

    fn list<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Listing, StoreError>> {
        Box::pin(self.inner.list(prefix))
    }

    fn watch<'a>(
        &'a self,
        prefix: &'a str,
        after: Revision,
    ) -> BoxFuture<'a, Result<Box<dyn Watch>, StoreError>> {
        Box::pin(async move {
            let follower = Follower::new(Arc::clone(&self.inner), prefix, after).await?;
            Ok(Box::new(follower) as Box<dyn Watch>)
        })
    }

    fn advance(&self, to: Revision) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async move {
            self.inner.refuse_closed()?;
            let advanced = self.inner.advance(self.inner.client.deadline(), to).await;
            advanced.map_err(|failure| self.inner.failed(failure, "the revisions may not have moved on"))
        })
    }

    fn status(&self) -> latest::Receiver<Status> {
        self.inner.status.subscribe()
    }

    fn close(&self) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async move {
            if !self.inner.closed.started() {
                self.inner.closed.start();
                self.tasks.join(Duration::from_secs(1)).await;
                self.inner.end_session().await;
            }
            Ok(())
        })
    }
}
