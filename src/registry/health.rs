//! Verdicts of the checks: written when one changes, many in one commit.

use std::sync::Arc;

use futures_util::{StreamExt as _, TryStreamExt as _, stream};

use super::{Error, Inner, Registry, history::What, leave::BY, record, write::contended};
use crate::{
    model::{Check, Health, HealthReport, InstanceKey, Revision},
    rt,
    store::{Condition, Op},
};

/// Most verdicts of one commit, each with a line of history. etcd takes 128 operations at once.
const BATCH: usize = 60;

/// Commits under way at once.
const AT_ONCE: usize = 8;

/// Tries of one commit. Each loss is an instance that somebody changed meanwhile.
const ATTEMPTS: usize = BATCH;

impl Registry {
    /// Notes verdicts of the server's own checks. What is so already, or is about a run that is over or not checked by the
    /// server any more, is passed over.
    ///
    /// # Errors
    /// [`Error::Store`]; some may be written then. Reporting all again is right.
    pub async fn set_health(&self, reports: Vec<HealthReport>) -> Result<Revision, Error> {
        let batches: Vec<Arc<[HealthReport]>> = reports.chunks(BATCH).map(Into::into).collect();
        let commits = batches.into_iter().map(|batch| {
            let inner = Arc::clone(&self.inner);
            self.detached(async move {
                inner.set_verdicts(&batch, |check| matches!(check, Check::Server(_))).await
            })
        });
        let commits = stream::iter(commits).buffer_unordered(AT_ONCE);
        let newest = commits.try_fold(Revision::default(), |a, b| async move { Ok(a.max(b)) }).await?;
        Ok(newest.max(self.inner.catalog.latest().revision()))
    }

    /// Notes the verdict of an owner who checks its instance itself; without an incarnation, on the present run.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::Conflict`] when another incarnation is registered, or when not the owner checks it;
    /// [`Error::Store`].
    pub async fn report_health(&self, report: HealthReport) -> Result<Revision, Error> {
        let HealthReport { key, incarnation, .. } = &report;
        let snapshot = self.inner.catalog.latest();
        let present = snapshot.instance(key).ok_or_else(|| Error::NotFound(key.clone()))?;
        super::write::expect_incarnation(present, Some(*incarnation))?;
        if present.check.as_deref() != Some(&Check::Owner) {
            let message = format!(
                "instance {key} is not checked by its owner: register it with the check `owner` to report its health"
            );
            return Err(Error::conflict("health", message));
        }
        let inner = Arc::clone(&self.inner);
        self.detached(async move { inner.set_verdicts(&[report], |check| *check == Check::Owner).await })
            .await
    }
}

impl Inner {
    async fn set_verdicts(
        &self,
        reports: &[HealthReport],
        by: impl Fn(&Check) -> bool,
    ) -> Result<Revision, Error> {
        for _ in 0..ATTEMPTS {
            let snapshot = self.catalog.latest();
            let now = rt::now();
            let ops: Vec<Op> = reports
                .iter()
                .filter_map(|report| {
                    let present = snapshot.instance(&report.key)?;
                    let checked = present.check.as_deref().is_some_and(&by);
                    let news =
                        present.incarnation == report.incarnation && present.health.verdict != report.verdict;
                    (checked && news).then(|| {
                        let why = format!("{}: {}", report.verdict.name(), report.kept_reason());
                        let judged = self.history.note(present, What::Judged, BY, &why);
                        let health = Health {
                            verdict: report.verdict,
                            since: now,
                            reason: report.kept_reason(),
                            passed: present.health.passed || report.verdict.works(),
                            revision: Revision::default(),
                        };
                        let verdict = Op::Put {
                            key: record::health_key(&report.key),
                            value: record::encode_health(&health, report.incarnation),
                            // The record goes with the instance, so this is no verdict on one that was removed.
                            when: Condition::Unchanged(present.health.revision),
                        };
                        [Some(verdict), judged]
                    })
                })
                .flatten()
                .flatten()
                .collect();
            if ops.is_empty() {
                return Ok(snapshot.revision());
            }
            match self.commit(ops, snapshot.revision()).await {
                Ok(revision) => return Ok(revision),
                Err(Some(error)) => return Err(error),
                Err(None) => {}
            }
        }
        let key: Option<&InstanceKey> = reports.first().map(|report| &report.key);
        key.map_or(Ok(Revision::default()), |key| Err(contended(key)))
    }
}
