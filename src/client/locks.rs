use std::{net::SocketAddr, time::Duration};

use tokio::time::{Instant, timeout};
use tonic::{Code, Status};

use super::servers::{Link, Servers, describe};
use crate::{
    model::{Claim, LockName, Revision},
    proto::v1::{AcquireLockRequest, ReleaseLockRequest, RenewLockRequest, locks_client::LocksClient},
    rt::Backoff,
};

/// Longest first wait before all servers are tried again.
const FIRST_WAIT: Duration = Duration::from_millis(50);
/// Longest later wait.
const WAIT_CAP: Duration = Duration::from_secs(2);
/// How long one wait at a server lasts before it is asked for again. Pings tell of a lost server much sooner.
const WAIT: Duration = Duration::from_secs(60 * 60);
/// What a server gets to answer on top of the time that it was told to wait.
const ANSWER: Duration = Duration::from_secs(10);

/// Takes and renews locks at any of the servers, one after the other when they fail.
#[derive(Debug)]
pub struct Locks {
    servers: Servers,
    /// The server that answered last.
    current: usize,
    link: Option<LocksClient<Link>>,
}

/// Why there is no lock, or no more.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LockError {
    /// Another one holds it; or it is lost for good.
    #[error("{0}")]
    Held(String),
    /// The request is wrong, or not allowed; asking again does not help.
    #[error("{0}")]
    Refused(String),
    /// No server answered in time.
    #[error("no server answers: {0}")]
    Unreachable(String),
}

impl Locks {
    /// Nothing is asked yet.
    pub fn new(servers: Servers) -> Self {
        Self { servers, current: 0, link: None }
    }

    /// Takes the lock. Waits for it, and for servers, as long as it takes; with no patience it asks each server once. `news`
    /// takes what to tell people meanwhile. Cancel-safe: who cancels it may still be given the lock, until that expires.
    ///
    /// # Errors
    /// Without patience [`LockError::Held`] and [`LockError::Unreachable`]; always [`LockError::Refused`].
    pub async fn acquire(
        &mut self,
        claim: &Claim,
        patient: bool,
        news: impl Fn(&str),
    ) -> Result<Revision, LockError> {
        let mut backoff = Backoff::new(FIRST_WAIT, WAIT_CAP);
        let mut failed = 0;
        let wait = if patient { WAIT } else { Duration::ZERO };
        loop {
            let request = AcquireLockRequest {
                name: claim.name.to_string(),
                holder: claim.holder.clone(),
                ttl: prost_types::Duration::try_from(claim.ttl).ok(),
                wait: prost_types::Duration::try_from(wait).ok(),
                attempt: claim.attempt.clone(),
            };
            let error = match self.call(wait + ANSWER, async |client| client.acquire(request).await).await {
                Ok(answer) => return Ok(Revision(answer.lock.unwrap_or_default().token)),
                Err(error @ LockError::Refused(_)) => return Err(error),
                Err(error) => error,
            };
            failed += 1;
            match &error {
                LockError::Held(_) if !patient => return Err(error),
                LockError::Held(_) | LockError::Refused(_) => {}
                LockError::Unreachable(reason) => {
                    if !patient && failed >= self.servers.addresses().len() {
                        return Err(error);
                    }
                    news(reason);
                }
            }
            if failed % self.servers.addresses().len() == 0 {
                tokio::time::sleep(backoff.next_wait()).await;
            }
        }
    }

    /// Extends the lease of a lock once, at whichever server answers first within `limit`. The new lease runs from when this
    /// was called.
    ///
    /// # Errors
    /// [`LockError::Held`] and [`LockError::Refused`] when the lock is lost; [`LockError::Unreachable`] when that is not known.
    pub async fn renew(
        &mut self,
        name: &LockName,
        token: Revision,
        limit: Duration,
    ) -> Result<(), LockError> {
        let request = RenewLockRequest { name: name.to_string(), token: token.0 };
        self.each(limit, async |client| client.renew(request.clone()).await).await.map(drop)
    }

    /// Gives the lock back.
    ///
    /// # Errors
    /// As [`Locks::renew`]; the lock then ends with its lease.
    pub async fn release(
        &mut self,
        name: &LockName,
        token: Revision,
        limit: Duration,
    ) -> Result<(), LockError> {
        let request = ReleaseLockRequest { name: name.to_string(), token: token.0 };
        self.each(limit, async |client| client.release(request.clone()).await).await.map(drop)
    }

    /// Asks one server after the other until one answers or the time is up. A server that hangs gets its share of the time.
    async fn each<T>(
        &mut self,
        limit: Duration,
        ask: impl AsyncFn(&mut LocksClient<Link>) -> Result<tonic::Response<T>, Status>,
    ) -> Result<T, LockError> {
        let until = Instant::now() + limit;
        let share = limit / u32::try_from(self.servers.addresses().len() + 1).unwrap_or(u32::MAX);
        let mut backoff = Backoff::new(FIRST_WAIT, WAIT_CAP);
        let mut last = LockError::Unreachable("no time".to_owned());
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(last);
            }
            match self.call(left.min(share), async |client| ask(client).await).await {
                Err(error @ LockError::Unreachable(_)) => last = error,
                answer => return answer,
            }
            tokio::time::sleep(backoff.next_wait().min(left)).await;
        }
    }

    /// Asks the current server. When it does not do what it should the next one is the current one.
    async fn call<T>(
        &mut self,
        limit: Duration,
        ask: impl AsyncFnOnce(&mut LocksClient<Link>) -> Result<tonic::Response<T>, Status>,
    ) -> Result<T, LockError> {
        let address = self.address();
        let outcome = timeout(limit, async {
            let mut client = match self.link.take() {
                Some(link) => link,
                None => {
                    let link = self.servers.connect(address).await;
                    LocksClient::new(link.map_err(LockError::Unreachable)?)
                }
            };
            let answer = ask(&mut client).await.map_err(|status| {
                let message = describe(&status);
                match status.code() {
                    Code::NotFound | Code::Aborted | Code::FailedPrecondition => LockError::Held(message),
                    Code::InvalidArgument
                    | Code::PermissionDenied
                    | Code::Unauthenticated
                    | Code::Unimplemented => LockError::Refused(message),
                    _ => LockError::Unreachable(format!("{address}: {message}")),
                }
            })?;
            self.link = Some(client);
            Ok(answer.into_inner())
        });
        let outcome = outcome
            .await
            .unwrap_or_else(|_| Err(LockError::Unreachable(format!("{address}: no answer in time"))));
        if matches!(outcome, Err(LockError::Unreachable(_))) {
            self.current += 1;
        }
        outcome
    }

    fn address(&self) -> SocketAddr {
        let addresses = self.servers.addresses();
        addresses
            .get(self.current % addresses.len().max(1))
            .copied()
            .unwrap_or_else(|| unreachable!("there is at least one server"))
    }
}
