use std::sync::Arc;

use futures_util::future::BoxFuture;

use super::{Entry, Listing, Op, Store, StoreError, Watch, feed::Readable, state::State};
use crate::model::Revision;

/// How many commits are remembered for watchers.
const HISTORY: usize = 16_384;

/// A store that forgets everything when the process ends: for tests, and for trying Disco without a directory.
#[derive(Debug)]
pub struct Memory {
    readable: Arc<Readable>,
}

impl Default for Memory {
    fn default() -> Self {
        Self::with_history(HISTORY)
    }
}

impl Memory {
    /// An empty store that remembers the last `history` commits for watchers.
    pub fn with_history(history: usize) -> Self {
        Self { readable: Readable::new(State::default(), history) }
    }
}

impl Store for Memory {
    fn commit(&self, ops: Vec<Op>) -> BoxFuture<'_, Result<Revision, StoreError>> {
        Box::pin(async move { self.readable.commit(ops) })
    }

    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Entry>, StoreError>> {
        Box::pin(async move { self.readable.get(key) })
    }

    fn list<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Listing, StoreError>> {
        Box::pin(async move { self.readable.list(prefix) })
    }

    fn watch<'a>(
        &'a self,
        prefix: &'a str,
        after: Revision,
    ) -> BoxFuture<'a, Result<Box<dyn Watch>, StoreError>> {
        Box::pin(async move { self.readable.watch(prefix, after) })
    }

    fn advance(&self, to: Revision) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async move { self.readable.advance(to) })
    }

    fn close(&self) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async move {
            self.readable.close();
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::conformance::{Place, conforms};

    #[derive(Debug)]
    struct Nowhere;

    impl Place for Nowhere {
        fn open(&self) -> BoxFuture<'_, Arc<dyn Store>> {
            Box::pin(async { Arc::new(Memory::with_history(self.history())) as Arc<dyn Store> })
        }

        fn durable(&self) -> bool {
            false
        }
    }

    #[tokio::test]
    async fn memory_conforms() {
        conforms(|| Nowhere).await;
    }
}
