use std::{sync::Arc, time::Duration};

use super::{Event, Listing, Store, StoreError, Watch};
use crate::rt::Backoff;

/// Waits between tries to list a store that does not answer.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// What is told of a prefix that is followed.
#[derive(Debug)]
pub enum News {
    /// Everything that is there, at the start and whenever the feed was lost.
    Listed(Listing),
    /// A change.
    Changed(Event),
    /// The store cannot be read; it is tried again, and what is known stays.
    Silent(StoreError),
}

/// Follows what is under a prefix, listing it again whenever the feed is lost.
#[derive(Debug)]
pub struct Follower {
    store: Arc<dyn Store>,
    prefix: &'static str,
    feed: Option<Box<dyn Watch>>,
    backoff: Backoff,
    wait: Duration,
}

impl Follower {
    /// Follows `prefix` of `store`.
    pub fn new(store: Arc<dyn Store>, prefix: &'static str) -> Self {
        let (backoff, wait) = (Backoff::new(RETRY.0, RETRY.1), Duration::ZERO);
        Self { store, prefix, feed: None, backoff, wait }
    }

    /// What comes next; `None` when the store is closed. Cancel-safe.
    pub async fn next(&mut self) -> Option<News> {
        if let Some(feed) = &mut self.feed {
            match feed.next().await {
                Ok(event) => return Some(News::Changed(event)),
                Err(StoreError::Closed) => return None,
                Err(error) => {
                    tracing::warn!(prefix = self.prefix, %error, "the feed was lost; listing again");
                    self.feed = None;
                }
            }
        }
        tokio::time::sleep(self.wait).await;
        match list(&*self.store, self.prefix).await {
            Ok((listing, feed)) => {
                self.backoff.reset();
                self.wait = Duration::ZERO;
                self.feed = Some(feed);
                Some(News::Listed(listing))
            }
            Err(StoreError::Closed) => None,
            Err(error) => {
                self.wait = self.backoff.next_wait();
                Some(News::Silent(error))
            }
        }
    }
}

async fn list(store: &dyn Store, prefix: &str) -> Result<(Listing, Box<dyn Watch>), StoreError> {
    let listing = store.list(prefix).await?;
    let feed = store.watch(prefix, listing.revision).await?;
    Ok((listing, feed))
}
