use std::sync::Arc;

use futures_util::{StreamExt as _, stream};

use super::{
    Error, Inner,
    history::What,
    record,
    write::{ATTEMPTS, removal},
};
use crate::{
    model::{Incarnation, Instance, InstanceKey, Revision},
    store::{Condition, Op},
};

/// Most instances in one commit: each is up to four operations, and stores bound those (etcd: 128).
const CHUNK: usize = 30;

/// Commits of one batch under way at the same time.
const COMMITS: usize = 16;

/// One run of an instance.
pub(super) type Run = (InstanceKey, Incarnation);

/// What becomes of an instance.
#[derive(Debug)]
pub(super) enum Edit {
    Put(Box<Instance>),
    Remove,
}

/// What the history says of an edit.
#[derive(Debug)]
pub(super) struct Note {
    pub(super) what: What,
    pub(super) by: Arc<str>,
    pub(super) why: String,
}

/// What became of a batch.
#[derive(Debug, Default)]
pub(super) struct Written {
    /// The newest of its changes; 0 when there was none.
    pub(super) revision: Revision,
    /// What each was before.
    pub(super) done: Vec<Arc<Instance>>,
    /// Those that could not be written.
    pub(super) failed: Vec<Run>,
    /// Why.
    pub(super) error: Option<Error>,
}

impl Written {
    fn add(mut self, other: Self) -> Self {
        self.revision = self.revision.max(other.revision);
        self.done.extend(other.done);
        self.failed.extend(other.failed);
        self.error = other.error.or(self.error);
        self
    }
}

impl Inner {
    /// Writes many instances in few commits. `edit` sees each run that is still there and leaves it with `None`; it sees it
    /// again when somebody else wrote it meanwhile.
    pub(super) async fn write_each(
        &self,
        runs: Vec<Run>,
        edit: impl Fn(&Arc<Instance>) -> Option<(Edit, Note)>,
    ) -> Written {
        let edit = &edit;
        let chunks: Vec<Vec<Run>> = runs.chunks(CHUNK).map(<[Run]>::to_vec).collect();
        let chunks = chunks.into_iter().map(|chunk| self.write_chunk(chunk, edit));
        let written = stream::iter(chunks).buffer_unordered(COMMITS);
        written.fold(Written::default(), async |all, some| all.add(some)).await
    }

    async fn write_chunk(
        &self,
        runs: Vec<Run>,
        edit: &impl Fn(&Arc<Instance>) -> Option<(Edit, Note)>,
    ) -> Written {
        if let Some(written) = self.try_chunk(&runs, edit).await {
            return written;
        }
        // Somebody wrote one of them; that should not hold up the others.
        let mut all = Written::default();
        for run in runs {
            let mut written = None;
            for _ in 0..ATTEMPTS {
                written = self.try_chunk(std::slice::from_ref(&run), edit).await;
                if written.is_some() {
                    break;
                }
            }
            all = all.add(written.unwrap_or_else(|| Written { failed: vec![run], ..Written::default() }));
        }
        all
    }

    /// `None` when it lost a race.
    async fn try_chunk(
        &self,
        runs: &[Run],
        edit: &impl Fn(&Arc<Instance>) -> Option<(Edit, Note)>,
    ) -> Option<Written> {
        let snapshot = self.catalog.latest();
        let mut written = Written::default();
        let mut ops = Vec::with_capacity(2 * runs.len());
        for (key, incarnation) in runs {
            let present = snapshot.instance(key).filter(|present| present.incarnation == *incarnation);
            let Some(present) = present else { continue };
            let Some((edit, Note { what, by, why })) = edit(present) else { continue };
            match edit {
                Edit::Put(next) => {
                    let (key, when) = (record::instance_key(key), Condition::Unchanged(present.revision));
                    ops.push(Op::Put { key, value: record::encode(&next), when });
                    ops.extend(self.history.note(&next, what, &by, &why));
                }
                Edit::Remove => {
                    ops.extend(removal(present));
                    ops.extend(self.unsay(&present.key));
                    ops.extend(self.history.note(present, what, &by, &why));
                }
            }
            written.done.push(Arc::clone(present));
        }
        if ops.is_empty() {
            return Some(written);
        }
        match self.commit(ops, snapshot.revision()).await {
            Ok(revision) => Some(Written { revision, ..written }),
            Err(Some(error)) => {
                let failed = written.done.iter().map(|it| (it.key.clone(), it.incarnation)).collect();
                Some(Written { failed, error: Some(error), ..Written::default() })
            }
            Err(None) => None,
        }
    }
}
