use std::time::{Duration, SystemTime};

use tokio::sync::watch;

use super::life::Registrar;
use crate::{
    client::{Acknowledged, Servers, Session, SessionState, wait_acknowledged},
    model::{Incarnation, Registration, Revision, Verdict},
    rt::{Tasks, now},
};

/// Registers by a session.
#[derive(Debug)]
pub(super) struct Sessions {
    servers: Servers,
    registration: Registration,
    tasks: Tasks,
    session: Option<Session>,
    state: Option<watch::Receiver<SessionState>>,
}

impl Sessions {
    pub(super) fn new(servers: Servers, registration: Registration, tasks: Tasks) -> Self {
        Self { servers, registration, tasks, session: None, state: None }
    }
}

impl Registrar for Sessions {
    async fn register(&mut self) {
        self.registration.incarnation = Some(incarnation(now()));
        self.registration.new_run = true;
        let session = Session::open(self.servers.clone(), &self.registration, &self.tasks);
        self.state = Some(session.state());
        self.session = Some(session);
    }

    fn report(&mut self, verdict: Verdict, seen: String) {
        if let Some(session) = &self.session {
            session.report(verdict, seen);
        }
    }

    async fn news(&mut self) -> SessionState {
        if let Some(state) = &mut self.state
            && state.changed().await.is_ok()
        {
            return state.borrow_and_update().clone();
        }
        std::future::pending().await
    }

    async fn drain(&mut self) -> Result<Revision, String> {
        let session = self.session.as_ref().ok_or("there is no session")?;
        session.drain().await.map_err(|error| error.to_string())
    }

    async fn acknowledged(&mut self, revision: Revision, limit: Duration) -> Acknowledged {
        wait_acknowledged(&self.servers, revision, &self.registration.key.service, limit).await
    }

    async fn deregister(&mut self) -> Result<Revision, String> {
        let session = self.session.take().ok_or("there is no session")?;
        session.deregister().await.map_err(|error| error.to_string())
    }
}

/// Milliseconds since the epoch: a later run on the same machine has a greater one.
fn incarnation(now: SystemTime) -> Incarnation {
    let since = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Incarnation(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        client::mock::{Mock, soon},
        model::{Limits, RawRegistration},
    };

    fn registration() -> Registration {
        let raw = RawRegistration {
            service: "greeter".into(),
            id: "a".into(),
            address: Some("127.0.0.1".into()),
            port: Some(50051),
            ..RawRegistration::default()
        };
        Registration::check(raw, &Limits::default()).unwrap()
    }

    #[tokio::test]
    async fn after_a_refusal_there_is_no_more_news() {
        let mut mock = Mock::start().await;
        let mut sessions = Sessions::new(mock.servers(), registration(), mock.tasks.clone());
        sessions.register().await;
        let mut peer = mock.peer().await;
        peer.registers().await;
        peer.refuses(tonic::Code::InvalidArgument, "port: is wrong").await;
        let refused = SessionState::Refused { message: "port: is wrong".into() };
        assert_eq!(soon(sessions.news()).await, refused);
        assert!(sessions.drain().await.is_err());
        let more = tokio::time::timeout(Duration::from_millis(10), sessions.news()).await;
        assert!(more.is_err(), "{more:?}");
    }
}
