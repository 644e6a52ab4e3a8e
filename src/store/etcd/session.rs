//! The session of this process in etcd: one lease, kept by one task, which also finds out whether etcd answers.

use std::time::Duration;

use futures_util::stream;
use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};
use tonic::{Request, Response, Status as GrpcStatus, transport::Channel};

use super::{
    Inner,
    client::{self, Failure},
};
use crate::{
    proto::etcd::{
        LeaseGrantRequest, LeaseGrantResponse, LeaseKeepAliveRequest, LeaseKeepAliveResponse,
        LeaseRevokeRequest, LeaseRevokeResponse, lease_client::LeaseClient,
    },
    rt::{self, Backoff},
    store::{Fault, Session, Status},
};

/// Waits between tries while etcd does not answer.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(1));

impl Inner {
    /// Keeps the session until the store is closed.
    pub(super) async fn keep_session(&self) {
        let mut backoff = Backoff::new(RETRY.0, RETRY.1);
        let mut lost = self.lost.subscribe();
        loop {
            let pause = match self.keep_once().await {
                Ok(()) => {
                    backoff.reset();
                    self.answered();
                    self.ttl / 3
                }
                Err(failure) => {
                    self.failed(failure, "the session is not kept");
                    RETRY.0 / 4 + backoff.next_wait()
                }
            };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                _ = lost.changed() => {}
            }
        }
    }

    /// Grants or renews the lease and looks whether etcd is still what it was.
    async fn keep_once(&self) -> Result<(), Failure> {
        let deadline = self.client.deadline();
        self.verify(deadline).await?;
        let held = self.status.borrow().session.map(|session| session.id);
        let lost = *self.lost.borrow();
        if let Some(lease) = held.map(u64::cast_signed).filter(|lease| *lease != lost) {
            #[cfg(test)]
            if self.frozen.load(std::sync::atomic::Ordering::SeqCst) {
                return Ok(());
            }
            let sent = Instant::now();
            let kept = self.client.call(deadline, LeaseKeepAliveRequest { id: lease }, keep_alive).await;
            match kept {
                // 0: there is no such lease any more.
                Ok(response) if response.ttl > 0 => {
                    self.holds(lease, sent, response.ttl);
                    return Ok(());
                }
                Ok(_) => {}
                Err(Failure::Refused(status)) if client::is_lease_gone(&status) => {}
                Err(failure) => return Err(failure),
            }
        }
        if let Some(lease) = held {
            tracing::warn!(
                lease = format_args!("{lease:016x}"),
                "the session in etcd is over; what was bound to it is gone. Starting another one"
            );
            self.status.send_modify(|status| status.session = None);
        }
        let ttl = i64::try_from(self.ttl.as_secs()).unwrap_or(i64::MAX).max(1);
        let sent = Instant::now();
        let granted = self.client.call(deadline, LeaseGrantRequest { ttl, id: 0 }, grant).await?;
        tracing::debug!(lease = format_args!("{:016x}", granted.id), granted.ttl, "a session in etcd");
        self.holds(granted.id, sent, granted.ttl);
        Ok(())
    }

    pub(super) fn holds(&self, lease: i64, sent: Instant, ttl: i64) {
        let until = sent + Duration::from_secs(u64::try_from(ttl).unwrap_or_default());
        let session = Session { id: lease.cast_unsigned(), until: Some(until) };
        self.status.send_if_modified(|status| {
            // That it holds again after it may have been over is news, too.
            let known = status.session.filter(|known| known.id == session.id && known.holds());
            status.session = Some(session);
            known.is_none()
        });
    }

    /// The lease of the session; waits for one.
    pub(super) async fn lease(&self, deadline: Instant) -> Option<i64> {
        let lost = *self.lost.borrow();
        let lease = |status: &Status| {
            let lease = status.session.map(|session| session.id.cast_signed());
            lease.filter(|lease| *lease != lost)
        };
        if let Some(lease) = lease(&self.status.borrow()) {
            return Some(lease);
        }
        let mut status: watch::Receiver<Status> = self.status.subscribe();
        let found =
            timeout_at(deadline, status.wait_for(|status| lease(status).is_some())).await.ok()?.ok()?;
        lease(&found)
    }

    /// etcd says that the lease is gone.
    pub(super) fn lost_lease(&self, lease: i64) {
        self.lost.send_if_modified(|lost| std::mem::replace(lost, lease) != lease);
    }

    /// Ends the session, so that what is bound to it goes at once.
    pub(super) async fn end_session(&self) {
        let Some(session) = self.status.borrow().session else { return };
        let request = LeaseRevokeRequest { id: session.id.cast_signed() };
        let deadline = Instant::now() + self.client.patience();
        if let Err(failure) = self.client.call(deadline, request, revoke).await {
            tracing::debug!(?failure, "the session was not ended; it ends by itself");
        }
    }

    /// etcd answered.
    pub(super) fn answered(&self) {
        if self.status.borrow().fault.is_none() {
            return;
        }
        self.status.send_if_modified(|status| match status.fault.take() {
            Some(fault) => {
                tracing::info!(since = %jiff::Timestamp::try_from(fault.since).unwrap_or_default(), "etcd answers again");
                true
            }
            None => false,
        });
    }

    /// etcd does not answer, or refuses this process as such.
    pub(super) fn at_fault(&self, reason: String) {
        self.status.send_if_modified(|status| match &mut status.fault {
            Some(fault) if fault.reason == reason => false,
            Some(fault) => {
                fault.reason = reason;
                true
            }
            None => {
                tracing::warn!(reason, "etcd does not answer; what is known stays");
                status.fault = Some(Fault { since: rt::now(), reason });
                true
            }
        });
    }
}

async fn grant(
    channel: Channel,
    request: Request<LeaseGrantRequest>,
) -> Result<Response<LeaseGrantResponse>, GrpcStatus> {
    LeaseClient::new(channel).lease_grant(request).await
}

async fn revoke(
    channel: Channel,
    request: Request<LeaseRevokeRequest>,
) -> Result<Response<LeaseRevokeResponse>, GrpcStatus> {
    LeaseClient::new(channel).lease_revoke(request).await
}

/// One renewal on a stream of its own: a few a minute are no burden, and it moves on from a silent endpoint as every call.
async fn keep_alive(
    channel: Channel,
    request: Request<LeaseKeepAliveRequest>,
) -> Result<Response<LeaseKeepAliveResponse>, GrpcStatus> {
    let (metadata, extensions, message) = request.into_parts();
    let request = Request::from_parts(metadata, extensions, stream::iter([message]));
    let mut responses = LeaseClient::new(channel).lease_keep_alive(request).await?.into_inner();
    let response = responses.message().await?;
    response.map(Response::new).ok_or_else(|| GrpcStatus::unavailable("no answer to a renewal"))
}
