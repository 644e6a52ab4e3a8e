//! Watches: one gRPC stream each, opened again where it broke off, wherever etcd answers.
//!
//! A stream begins at the last revision that was told, which is then told again and left out: so etcd itself says whether
//! everything since then is still there. Before it begins etcd is asked whether it went back.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::{StreamExt as _, future::BoxFuture, stream};
use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};
use tonic::Streaming;

use super::{
    Inner,
    client::{Failure, MESSAGE, range_end},
};
use crate::{
    model::Revision,
    proto::etcd::{
        self as pb, WatchCreateRequest, WatchRequest, WatchResponse, event::EventType,
        watch_client::WatchClient, watch_request::RequestUnion,
    },
    rt::Backoff,
    store::{Event, Key, StoreError, Watch},
};

/// Waits before a stream is opened again that could not be opened.
const RETRY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// How long a closed store still tells what comes in, since the last that came.
const LAST_WORDS: Duration = Duration::from_millis(250);

/// One reader of a prefix.
#[derive(Debug)]
pub(super) struct Follower {
    store: Arc<Inner>,
    /// As etcd has it.
    prefix: String,
    offset: u64,
    /// The last revision of etcd that was told in full.
    seen: i64,
    /// Changes when the endpoint is given up.
    endpoint: watch::Receiver<usize>,
    /// Changes when etcd went back.
    epoch: watch::Receiver<u64>,
    stream: Option<Streaming<WatchResponse>>,
    /// Of a revision that is not whole yet.
    fragments: Vec<pb::Event>,
    ready: VecDeque<Event>,
    /// Why it is over.
    over: Option<StoreError>,
    backoff: Backoff,
}

impl Follower {
    pub(super) async fn new(store: Arc<Inner>, prefix: &str, after: Revision) -> Result<Self, StoreError> {
        store.refuse_closed()?;
        let deadline = store.client.deadline();
        let failed = |failure| store.failed(failure, "changes cannot be watched");
        let epoch = store.epoch(deadline).await.map_err(failed)?;
        let Some(seen) = epoch.etcd(after) else {
            return Err(StoreError::Reset(Revision(epoch.offset)));
        };
        let mut follower = Self {
            prefix: format!("{}data/{prefix}", store.prefix),
            offset: epoch.offset,
            seen,
            endpoint: store.client.current(),
            epoch: store.epochs.changes(),
            stream: None,
            fragments: Vec::new(),
            ready: VecDeque::new(),
            over: None,
            backoff: Backoff::new(RETRY.0, RETRY.1),
            store: Arc::clone(&store),
        };
        loop {
            match follower.open().await {
                Ok(()) => return Ok(follower),
                Err(Failure::Refused(status)) => {
                    return Err(store.failed(Failure::Refused(status), "changes cannot be watched"));
                }
                Err(failure) if Instant::now() >= deadline => {
                    return Err(store.failed(failure, "changes cannot be watched"));
                }
                Err(Failure::Unanswered(_)) => tokio::time::sleep(follower.backoff.next_wait()).await,
            }
        }
    }

    /// Opens the stream where the one before broke off.
    async fn open(&mut self) -> Result<(), Failure> {
        let deadline = Instant::now() + self.store.client.patience();
        let epoch = self.store.verify(deadline).await?;
        if epoch.offset != self.offset {
            self.over = Some(StoreError::Reset(Revision(epoch.offset)));
            return Ok(());
        }
        let index = *self.endpoint.borrow_and_update();
        let create = WatchCreateRequest {
            key: Bytes::copy_from_slice(self.prefix.as_bytes()),
            range_end: range_end(&self.prefix).into(),
            start_revision: self.seen.max(1),
            progress_notify: true,
            fragment: true,
        };
        let request = WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) };
        // The stream of requests stays open: its end would end the watch.
        let requests = stream::iter([request]).chain(stream::pending());
        let (channel, request) = self.store.client.stream_request(deadline, index, requests).await?;
        let mut client = WatchClient::new(channel).max_decoding_message_size(MESSAGE);
        let refused = match timeout_at(deadline, client.watch(request)).await {
            Ok(Ok(response)) => {
                self.fragments.clear();
                self.stream = Some(response.into_inner());
                return Ok(());
            }
            Ok(Err(status)) => status.message().to_owned(),
            Err(_) => "no answer to a watch in time".to_owned(),
        };
        self.store.client.leave(index);
        Err(Failure::Unanswered(refused))
    }

    /// Takes a message in.
    fn take(&mut self, response: WatchResponse) -> Result<(), StoreError> {
        if response.compact_revision > 0 {
            let compacted = u64::try_from(response.compact_revision).unwrap_or_default();
            let error = StoreError::Compacted(Revision(self.offset + compacted));
            self.over = Some(error.clone());
            return Err(error);
        }
        if response.canceled {
            self.stream = None;
            if !response.cancel_reason.contains("permission denied") {
                self.broken(&response.cancel_reason);
                return Ok(());
            }
            let status = tonic::Status::permission_denied(response.cancel_reason);
            return Err(self.store.failed(Failure::Refused(status), "changes cannot be watched"));
        }
        let progress = response.events.is_empty() && !response.created && !response.fragment;
        self.fragments.extend(response.events);
        if response.fragment {
            return Ok(());
        }
        let told = std::mem::take(&mut self.fragments);
        for event in told {
            let Some(entry) = event.kv.as_ref() else { continue };
            if entry.mod_revision <= self.seen {
                continue;
            }
            let Some(key) = self.store.key_of(&entry.key) else { continue };
            let value = (event.r#type() == EventType::Put).then(|| entry.value.clone());
            self.push(entry.mod_revision, key, value);
        }
        if let Some(last) = self.ready.back() {
            self.seen = i64::try_from(last.revision.0 - self.offset).unwrap_or(self.seen).max(self.seen);
        }
        // Everything up to there was told.
        if let Some(header) = response.header.filter(|_| progress) {
            self.seen = self.seen.max(header.revision);
        }
        Ok(())
    }

    fn push(&mut self, at: i64, key: Key, value: Option<Bytes>) {
        let revision = Revision(self.offset + u64::try_from(at).unwrap_or_default());
        match self.ready.back_mut() {
            Some(event) if event.revision == revision => event.changes.push((key, value)),
            _ => self.ready.push_back(Event { revision, changes: vec![(key, value)] }),
        }
    }

    /// The stream broke off.
    fn broken(&mut self, reason: &str) {
        tracing::debug!(
            reason,
            prefix = self.prefix,
            seen = self.seen,
            "a watch of etcd broke off and goes on"
        );
        self.stream = None;
    }

    async fn advance(&mut self) -> Result<(), StoreError> {
        let Some(stream) = self.stream.as_mut() else {
            if self.store.closed.started() {
                return Err(self.end(StoreError::Closed));
            }
            return match self.open().await {
                Ok(()) => {
                    self.backoff.reset();
                    Ok(())
                }
                Err(Failure::Refused(status)) => {
                    tokio::time::sleep(self.backoff.next_wait()).await;
                    Err(self.store.failed(Failure::Refused(status), "changes cannot be watched"))
                }
                Err(Failure::Unanswered(reason)) => {
                    self.broken(&reason);
                    tokio::time::sleep(self.backoff.next_wait()).await;
                    Ok(())
                }
            };
        };
        if self.store.closed.started() {
            return match tokio::time::timeout(LAST_WORDS, stream.message()).await {
                Ok(Ok(Some(response))) => self.take(response),
                _ => Err(self.end(StoreError::Closed)),
            };
        }
        tokio::select! {
            biased;
            message = stream.message() => match message {
                Ok(Some(response)) => self.take(response),
                Ok(None) => {
                    self.broken("etcd ended it");
                    Ok(())
                }
                Err(status) => {
                    self.broken(status.message());
                    // The receiver is read before the sender is locked.
                    let index = *self.endpoint.borrow();
                    self.store.client.leave(index);
                    Ok(())
                }
            },
            _ = self.endpoint.changed() => {
                self.broken("its endpoint is given up");
                Ok(())
            }
            _ = self.epoch.changed() => {
                let offset = *self.epoch.borrow_and_update();
                if offset == self.offset {
                    return Ok(());
                }
                Err(self.end(StoreError::Reset(Revision(offset))))
            }
            () = self.store.closed.wait() => Ok(()),
        }
    }

    fn end(&mut self, error: StoreError) -> StoreError {
        self.stream = None;
        self.over = Some(error.clone());
        error
    }
}

impl Watch for Follower {
    fn next(&mut self) -> BoxFuture<'_, Result<Event, StoreError>> {
        Box::pin(async move {
            loop {
                if let Some(event) = self.ready.pop_front() {
                    return Ok(event);
                }
                if let Some(error) = &self.over {
                    return Err(error.clone());
                }
                self.advance().await?;
            }
        })
    }
}
