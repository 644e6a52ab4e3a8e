//! A registration that is held by an open stream.

mod worker;

use tokio::sync::{mpsc, oneshot, watch};

use super::servers::Servers;
use crate::{
    model::{Registration, Revision, Update, Verdict},
    rt::{Shutdown, Tasks},
};
use worker::Worker;

/// Most requests without an answer.
const QUEUE: usize = 16;

/// A registration that lasts as long as this value: a stream to one of several servers, opened again at another when
/// it breaks. Dropping it ends the stream, upon which the server removes the instance.
///
/// Each new stream registers the same incarnation in its present state, so a draining instance goes on draining.
/// Requests wait while there is no server and are sent when there is one; whoever does not want to wait drops the
/// future. A drain whose future was dropped is carried out all the same.
#[derive(Debug)]
pub struct Session {
    commands: mpsc::Sender<Command>,
    health: watch::Sender<Option<Report>>,
    state: watch::Receiver<SessionState>,
    end: Shutdown,
}

/// How a session stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SessionState {
    /// No server has answered yet, and none has failed.
    Connecting,
    /// The instance is registered; `revision` is the last change that the session made.
    Connected {
        /// The last accepted change.
        revision: Revision,
    },
    /// No server holds the instance at present; trying them in turn.
    Reconnecting {
        /// What the last one tried did.
        error: String,
    },
    /// The registration is wrong, or collides with another; trying again would not help. The session is over.
    Refused {
        /// The server's reason.
        message: String,
    },
}

/// Why a request on a session was not carried out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// The server refused the request; the session goes on.
    #[error("{0}")]
    Refused(String),
    /// The session is over: the registration was refused, or the program is ending.
    #[error("the session has ended")]
    Ended,
}

/// The owner's verdict on its instance.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Report {
    verdict: Verdict,
    reason: String,
}

#[derive(Debug)]
struct Command {
    change: Change,
    reply: oneshot::Sender<Result<Revision, SessionError>>,
}

#[derive(Debug)]
enum Change {
    Update(Update),
    Drain,
    Deregister,
}

impl Session {
    /// Starts to register `registration`, whose incarnation the caller chooses once for all reconnections. Returns at
    /// once; [`Session::state`] tells how it went.
    pub fn open(servers: Servers, registration: &Registration, tasks: &Tasks) -> Self {
        let (commands, receiver) = mpsc::channel(QUEUE);
        let (publish, state) = watch::channel(SessionState::Connecting);
        let end = tasks.shutdown().child();
        let health = watch::Sender::default();
        let worker = Worker::new(servers, registration, receiver, health.subscribe(), publish);
        let ended = end.clone();
        tasks.spawn("session", async move {
            tokio::select! {
                () = worker.run() => {}
                () = ended.wait() => {}
            }
        });
        Self { commands, health, state, end }
    }

    /// The present state, and news of it. The channel closes when the session is over.
    pub fn state(&self) -> watch::Receiver<SessionState> {
        self.state.clone()
    }

    /// Takes the instance out of load balancing. Returns the change that did it, for
    /// [`wait_acknowledged`](super::wait_acknowledged).
    pub async fn drain(&self) -> Result<Revision, SessionError> {
        self.request(Change::Drain).await
    }

    /// Changes weight or metadata.
    pub async fn update(&self, update: Update) -> Result<Revision, SessionError> {
        self.request(Change::Update(update)).await
    }

    /// Says whether the instance works; for one that is registered with [`Check::Owner`](crate::model::Check::Owner). The server
    /// is told as soon as there is one, the newest verdict only, and so is each further server that the session comes to.
    pub fn report(&self, verdict: Verdict, reason: String) {
        self.health.send_replace(Some(Report { verdict, reason }));
    }

    /// Removes the instance and ends the session.
    pub async fn deregister(self) -> Result<Revision, SessionError> {
        self.request(Change::Deregister).await
    }

    async fn request(&self, change: Change) -> Result<Revision, SessionError> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(Command { change, reply }).await.map_err(|_| SessionError::Ended)?;
        answer.await.map_err(|_| SessionError::Ended)?
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.end.start();
    }
}

#[cfg(test)]
mod tests;
