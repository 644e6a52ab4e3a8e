use std::{collections::VecDeque, net::SocketAddr, time::Duration};

use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

use super::{Change, Command, QUEUE, Report, SessionError, SessionState};
use crate::{
    client::{
        servers::{Servers, describe},
        wire::check_to_proto,
    },
    model::{Registration, Revision, Update, Verdict},
    proto::v1::{
        self as v1, DeregisterRequest, DrainRequest, HealthRequest, InstanceRef, Locality, MetadataUpdate,
        RegisterRequest, SessionRequest, SessionResponse, UpdateRequest, registry_client::RegistryClient,
        session_request::Request, session_response::Response,
    },
    rt::Backoff,
};

/// Longest first wait before all servers are tried again.
const FIRST_WAIT: Duration = Duration::from_millis(50);
/// Longest later wait.
const WAIT_CAP: Duration = Duration::from_secs(2);
/// A connection that lasted this long was a good one: the next loss is met with the short wait again.
const STEADY: Duration = Duration::from_secs(2);
/// A server that leaves a request unanswered for this long is left for the next one. Pings tell of a lost server
/// sooner; this is for one that lives and is stuck.
const ANSWER: Duration = Duration::from_secs(10);
/// What every new stream starts with.
#[derive(Debug)]
struct Wanted {
    register: RegisterRequest,
    draining: bool,
}

/// The task behind a session.
#[derive(Debug)]
pub(super) struct Worker {
    servers: Servers,
    wanted: Wanted,
    commands: mpsc::Receiver<Command>,
    /// The newest verdict of the owner.
    health: watch::Receiver<Option<Report>>,
    /// To be sent, before what comes through `commands`.
    queue: VecDeque<Command>,
    /// Sent, in the order in which the server will answer.
    unanswered: VecDeque<Sent>,
    /// A server has accepted the registration once.
    registered: bool,
    state: watch::Sender<SessionState>,
}

#[derive(Debug)]
struct Sent {
    what: What,
    /// When to give the server up.
    deadline: Instant,
}

#[derive(Debug)]
enum What {
    /// A request that opens a stream; after the last one the instance is as wanted.
    Opening {
        last: bool,
    },
    Health,
    Command(Command),
}

/// Why a stream is over.
#[derive(Debug)]
enum End {
    /// The instance is deregistered, or nobody is left who could want it.
    Done,
    /// For this reason; trying again may help.
    Broken(String),
    /// For this reason; trying again does not help.
    Refused(String),
}

impl Worker {
    pub(super) fn new(
        servers: Servers,
        registration: &Registration,
        commands: mpsc::Receiver<Command>,
        health: watch::Receiver<Option<Report>>,
        state: watch::Sender<SessionState>,
    ) -> Self {
        Self {
            servers,
            wanted: Wanted { register: register_request(registration), draining: false },
            commands,
            health,
            queue: VecDeque::new(),
            unanswered: VecDeque::new(),
            registered: false,
            state,
        }
    }

    /// Returns when the instance is deregistered or refused, or when the session was dropped.
    pub(super) async fn run(mut self) {
        let mut backoff = Backoff::new(FIRST_WAIT, WAIT_CAP);
        let addresses = self.servers.addresses().to_vec();
        let mut failed = 0;
        for address in addresses.iter().cycle() {
            let since = Instant::now();
            match self.stream(*address).await {
                End::Done => return,
                End::Refused(message) => {
                    self.state.send_replace(SessionState::Refused { message });
                    return;
                }
                End::Broken(error) => {
                    self.state.send_replace(SessionState::Reconnecting { error });
                }
            }
            if since.elapsed() >= STEADY {
                backoff.reset();
                failed = 0;
            }
            failed += 1;
            // A wait each time round, so that a server that is well is found at once.
            if failed >= addresses.len() {
                failed = 0;
                sleep(backoff.next_wait()).await;
            }
        }
    }

    /// One stream to one server, until it ends.
    async fn stream(&mut self, address: SocketAddr) -> End {
        let link = match self.servers.connect(address).await {
            Ok(link) => link,
            Err(error) => return End::Broken(error),
        };
        let requests = self.opening();
        // Room for the opening requests and for as many more as may be unanswered: sending never waits.
        let (outgoing, stream) = mpsc::channel(QUEUE + requests.len());
        for request in requests {
            if outgoing.try_send(request).is_err() {
                return End::Broken("more requests than the stream has room for".to_owned());
            }
        }
        let mut client = RegistryClient::new(link);
        // Opened with requests waiting, because a server may answer only when it has read the first.
        let mut answers = match timeout(ANSWER, client.session(ReceiverStream::new(stream))).await {
            Ok(Ok(answers)) => answers.into_inner(),
            Ok(Err(status)) => return self.ended(address, &status),
            Err(_) => return End::Broken(format!("{address}: no answer within {} s", ANSWER.as_secs())),
        };
        loop {
            let deadline = self.unanswered.front().map(|sent| sent.deadline);
            let room = self.unanswered.len() < QUEUE;
            tokio::select! {
                answer = answers.message() => {
                    let end = match answer {
                        Ok(Some(answer)) => {
                            self.adopt(&answer);
                            self.answered(address, outcome(answer)).err()
                        }
                        Ok(None) => Some(End::Broken(format!("{address}: the server ended the session"))),
                        Err(status) => Some(self.ended(address, &status)),
                    };
                    if let Some(end) = end {
                        return end;
                    }
                }
                command = next(&mut self.queue, &mut self.commands), if room => {
                    let Some(command) = command else { return End::Done };
                    let request = self.command(command);
                    if outgoing.try_send(request).is_err() {
                        return End::Broken(format!("{address}: the server reads no more requests"));
                    }
                }
                Ok(()) = self.health.changed(), if room => {
                    if let Some(request) = self.report()
                        && outgoing.try_send(request).is_err()
                    {
                        return End::Broken(format!("{address}: the server reads no more requests"));
                    }
                }
                () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => {
                    return End::Broken(format!("{address}: no answer within {} s", ANSWER.as_secs()));
                }
            }
        }
    }

    /// The requests that open a stream. They go out together, so that a draining instance is not seen serving for
    /// longer than the server takes to read on.
    fn opening(&mut self) -> Vec<SessionRequest> {
        for sent in std::mem::take(&mut self.unanswered).into_iter().rev() {
            if let What::Command(command) = sent.what {
                self.queue.push_front(command);
            }
        }
        while self.queue.len() < QUEUE
            && let Ok(command) = self.commands.try_recv()
        {
            self.queue.push_back(command);
        }
        // Never register what is to be removed: its process may be dead.
        if self.queue.iter().any(|command| matches!(command.change, Change::Deregister)) {
            self.queue.retain(|command| matches!(command.change, Change::Deregister));
            return Vec::new();
        }
        self.wanted.draining |= self.queue.iter().any(|command| matches!(command.change, Change::Drain));

        let mut requests = vec![Request::Register(self.wanted.register.clone())];
        if self.wanted.draining {
            requests.push(Request::Drain(DrainRequest { instance: Some(self.reference()) }));
        }
        for left in (0..requests.len()).rev() {
            self.sent(What::Opening { last: left == 0 });
        }
        let opening = requests.into_iter().map(|request| SessionRequest { request: Some(request) });
        let mut requests: Vec<_> = opening.collect();
        requests.extend(self.report());
        requests
    }

    /// The request that tells the newest verdict, noted as sent.
    fn report(&mut self) -> Option<SessionRequest> {
        let Report { verdict, reason } = self.health.borrow_and_update().clone()?;
        let verdict = match verdict {
            Verdict::Unknown => v1::Verdict::Unspecified,
            Verdict::Healthy => v1::Verdict::Healthy,
            Verdict::Degraded => v1::Verdict::Degraded,
            Verdict::Unhealthy => v1::Verdict::Unhealthy,
        };
        let request = HealthRequest { instance: Some(self.reference()), verdict: verdict.into(), reason };
        self.sent(What::Health);
        Some(SessionRequest { request: Some(Request::Health(request)) })
    }

    /// Notes the command as sent and returns its request.
    fn command(&mut self, command: Command) -> SessionRequest {
        let instance = Some(self.reference());
        let request = match &command.change {
            Change::Update(update) => Request::Update(UpdateRequest {
                instance,
                weight: update.weight.map(Into::into),
                metadata: update.metadata.clone().map(|entries| MetadataUpdate { entries }),
            }),
            Change::Drain => {
                self.wanted.draining = true;
                Request::Drain(DrainRequest { instance })
            }
            Change::Deregister => Request::Deregister(DeregisterRequest { instance }),
        };
        self.sent(What::Command(command));
        SessionRequest { request: Some(request) }
    }

    fn sent(&mut self, what: What) {
        self.unanswered.push_back(Sent { what, deadline: Instant::now() + ANSWER });
    }

    fn reference(&self) -> InstanceRef {
        let RegisterRequest { service, id, incarnation, .. } = &self.wanted.register;
        InstanceRef { service: service.clone(), id: id.clone(), incarnation: *incarnation }
    }

    /// The run is what the server says that it is from its first registration on, and is not new any more.
    fn adopt(&mut self, answer: &SessionResponse) {
        let Some(Response::Register(answer)) = &answer.response else { return };
        let Some(instance) = &answer.instance else { return };
        self.wanted.register.new_run = false;
        if instance.incarnation != 0 && self.wanted.register.incarnation != instance.incarnation {
            self.wanted.register.incarnation = instance.incarnation;
            // What was said was on another run.
            self.health.mark_changed();
        }
    }

    /// Takes the answer to the oldest request.
    fn answered(
        &mut self,
        address: SocketAddr,
        outcome: Result<Revision, (Code, String)>,
    ) -> Result<(), End> {
        let Some(sent) = self.unanswered.pop_front() else {
            return Err(End::Broken(format!("{address}: the server answered what was not asked")));
        };
        match (sent.what, outcome) {
            (What::Opening { last }, Ok(revision)) => {
                self.registered = true;
                if last {
                    self.state.send_replace(SessionState::Connected { revision });
                }
                Ok(())
            }
            (What::Opening { .. }, Err((code, message))) => Err(self.refused(address, code, message)),
            // One that is refused says that somebody else checks the instance by now.
            (What::Health, _) => Ok(()),
            (What::Command(Command { change, reply }), Ok(revision)) => {
                self.state.send_replace(SessionState::Connected { revision });
                let done = matches!(change, Change::Deregister);
                if let Change::Update(update) = change {
                    self.wanted.update(update);
                }
                // Nobody listens when the caller has dropped its future, which is its right.
                let _ = reply.send(Ok(revision));
                if done { Err(End::Done) } else { Ok(()) }
            }
            (What::Command(Command { reply, .. }), Err((_, message))) => {
                let _ = reply.send(Err(SessionError::Refused(message)));
                Ok(())
            }
        }
    }

    fn ended(&self, address: SocketAddr, status: &Status) -> End {
        self.refused(address, status.code(), describe(status))
    }

    /// A wrong registration stays wrong. A collision or a missing right is final for a newcomer; one that was
    /// registered before keeps trying, because what holds its place may be its own lost session. Of several servers some may
    /// serve proxies only: the next one is asked.
    fn refused(&self, address: SocketAddr, code: Code, message: String) -> End {
        match code {
            Code::InvalidArgument => End::Refused(message),
            Code::AlreadyExists
            | Code::Aborted
            | Code::FailedPrecondition
            | Code::PermissionDenied
            | Code::Unauthenticated
                if !self.registered =>
            {
                End::Refused(message)
            }
            Code::Unimplemented if !self.registered && self.servers.addresses().len() == 1 => {
                End::Refused(message)
            }
            _ => End::Broken(format!("{address}: {message}")),
        }
    }
}

impl Wanted {
    fn update(&mut self, update: Update) {
        let Update { weight, metadata } = update;
        if let Some(weight) = weight {
            self.register.weight = weight.into();
        }
        if let Some(metadata) = metadata {
            self.register.metadata = metadata;
        }
    }
}

/// Cancel-safe: takes a command only when it returns it.
async fn next(queue: &mut VecDeque<Command>, commands: &mut mpsc::Receiver<Command>) -> Option<Command> {
    match queue.pop_front() {
        Some(command) => Some(command),
        None => commands.recv().await,
    }
}

fn outcome(answer: SessionResponse) -> Result<Revision, (Code, String)> {
    match answer.response {
        Some(Response::Register(answer)) => Ok(Revision(answer.revision)),
        Some(Response::Update(answer)) => Ok(Revision(answer.revision)),
        Some(Response::Drain(answer)) => Ok(Revision(answer.revision)),
        Some(Response::Deregister(answer)) => Ok(Revision(answer.revision)),
        Some(Response::Health(answer)) => Ok(Revision(answer.revision)),
        Some(Response::Error(error)) => Err((Code::from_i32(error.code), error.message)),
        None => Err((Code::Internal, "the server sent an empty answer".to_owned())),
    }
}

fn register_request(registration: &Registration) -> RegisterRequest {
    // The TTL is left out: the lease of a session is its stream.
    let Registration { key, incarnation, new_run, address, port, locality, weight, metadata, ttl: _, check } =
        registration;
    RegisterRequest {
        service: key.service.to_string(),
        id: key.id.to_string(),
        incarnation: incarnation.map_or(0, |incarnation| incarnation.0),
        address: address.to_string(),
        port: u16::from(*port).into(),
        locality: Some(Locality {
            region: locality.region.to_string(),
            zone: locality.zone.to_string(),
            sub_zone: locality.sub_zone.to_string(),
        }),
        weight: (*weight).into(),
        metadata: metadata.clone(),
        ttl: None,
        check: check.as_ref().map(check_to_proto),
        new_run: *new_run,
    }
}
