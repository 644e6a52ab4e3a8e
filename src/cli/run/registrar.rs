use std::time::{Duration, SystemTime};

use tokio::sync::watch;

use super::life::Registrar;
use crate::{
    client::{Acknowledged, Servers, Session, SessionState, wait_acknowledged},
    model::{Incarnation, Registration, Revision},
    rt::{Tasks, now},
};

/// How long the removal of an earlier incarnation is waited for.
const REPLACE: Duration = Duration::from_secs(2);

/// Registers by a session, one for each incarnation.
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
        self.state = None;
        if let Some(session) = self.session.take() {
            // Removed first, so that no server sees two incarnations claim one id. When that takes too long the end
            // of the session removes it.
            let _ = tokio::time::timeout(REPLACE, session.deregister()).await;
        }
        let earlier = self.registration.incarnation.map_or(0, |incarnation| incarnation.0);
        self.registration.incarnation = Some(incarnation(now()).max(Incarnation(earlier + 1)));
        let session = Session::open(self.servers.clone(), &self.registration, &self.tasks);
        self.state = Some(session.state());
        self.session = Some(session);
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
        proto::v1::session_request::Request,
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
    async fn registering_again_removes_the_instance_and_brings_a_later_incarnation() {
        let mut mock = Mock::start().await;
        let mut sessions = Sessions::new(mock.servers(), registration(), mock.tasks.clone());
        sessions.register().await;
        let mut peer = mock.peer().await;
        let first = peer.registers().await.incarnation;
        peer.registered(1).await;
        assert_eq!(soon(sessions.news()).await, SessionState::Connected { revision: Revision(1) });

        let removal = async {
            let Request::Deregister(removed) = peer.asked().await else { panic!("not a deregistration") };
            assert_eq!(removed.instance.unwrap().incarnation, first);
            peer.deregistered(2).await;
        };
        tokio::join!(sessions.register(), removal);
        let mut peer = mock.peer().await;
        assert!(peer.registers().await.incarnation > first);
        peer.registered(3).await;
        assert_eq!(soon(sessions.news()).await, SessionState::Connected { revision: Revision(3) });
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
