use std::mem;

use tokio::time::Instant;

use super::{
    ProtocolError, Response,
    asked::Asked,
    engine::{Engine, Heard, Variant},
    feed::{Follower, Taken},
    status::Seat,
};

/// A stream that is served: its state machine, what it follows, and whether there may be something to send. No IO and no
/// clock either; whoever drives it waits for what it says.
#[derive(Debug)]
pub(super) struct Served<V> {
    pub engine: Engine<V>,
    follower: Follower,
    /// Something happened since there was nothing to send.
    due: bool,
    /// What the stream asked for may have changed, or what there is, since its follower was told.
    asked: bool,
    /// There is something to make a response of.
    known: bool,
    armed: Option<Instant>,
}

impl<V: Variant> Served<V> {
    pub(super) fn new(engine: Engine<V>, follower: Follower) -> Self {
        let known = follower.peek().is_some();
        Self { engine, follower, due: true, asked: true, known, armed: None }
    }

    /// Takes a request in.
    pub(super) fn hear(&mut self, asked: Asked<V::Request>, now: Instant) -> Result<Heard, ProtocolError> {
        let set = self.follower.peek();
        let heard = self.engine.on_request(asked, set.as_ref(), now)?;
        let anew = self.engine.asked_anew();
        self.asked |= anew;
        // An answer that leaves nothing wanting calls for nothing: most changes take one look.
        self.due |= anew || !matches!(heard, Heard::Acknowledged(..)) || !self.engine.rests();
        Ok(heard)
    }

    /// Whether there is anything to make a response of.
    pub(super) fn is_known(&self) -> bool {
        self.known
    }

    /// Whether [`Served::next`] may have a response.
    pub(super) fn is_due(&self) -> bool {
        self.due && self.known
    }

    /// Whether there was nothing to send, and nothing has happened since.
    pub(super) fn is_idle(&self) -> bool {
        !self.due
    }

    /// Waits for news; false when there will be none any more. Then call [`Served::wake`]. Cancel-safe.
    pub(super) async fn news(&self) -> bool {
        self.follower.news().await
    }

    /// There are news, or the time of [`Served::timer`] has come.
    pub(super) fn wake(&mut self) {
        self.due = true;
        self.asked = true;
        self.known = self.follower.peek().is_some();
    }

    /// The next response, made from the newest set. Call while [`Served::is_due`]; after that the status is to be reported.
    pub(super) fn next(&mut self, now: Instant) -> Result<Option<Response>, ProtocolError> {
        // Before the set is taken: what comes in between is in it, or is news.
        if mem::take(&mut self.asked) {
            self.engine.subscriptions().for_each(|(kind, to)| self.follower.subscribe(kind, to));
        }
        let Some(Taken { set, quiet, since }) = self.follower.take() else { return Ok(None) };
        let Some(set) = set.as_ref() else { return Ok(None) };
        if let Some(since) = since {
            self.engine.on_news(since);
        }
        self.engine.skip(quiet);
        let response = self.engine.next_response(set, now)?;
        self.due = response.is_some() && !self.engine.is_done();
        Ok(response)
    }

    /// When to wake it next, at `last` at the latest, if that is to be set anew: for something earlier only, for after each ACK it would be for
    /// nothing.
    pub(super) fn timer(&mut self, last: Option<Instant>) -> Option<Instant> {
        let deadline = self.engine.deadline().into_iter().chain(last).min()?;
        let earlier = self.armed.is_none_or(|armed| deadline < armed);
        earlier.then(|| *self.armed.insert(deadline))
    }

    /// Whether it is to be woken at some time.
    pub(super) fn is_armed(&self) -> bool {
        self.armed.is_some()
    }

    /// The time has come.
    pub(super) fn time_out(&mut self) {
        self.armed = None;
        self.wake();
    }

    /// Brings the status in the table to where the stream is, and counts from there what it does not say.
    pub(super) fn report(&self, seat: &Seat) {
        seat.update(|types| self.engine.update_status(types));
        self.follower.reported();
    }
}

#[cfg(test)]
impl<V: Variant> Served<V> {
    pub(super) fn follower(&self) -> &Follower {
        &self.follower
    }

    pub(super) fn is_late(&self, now: Instant) -> bool {
        self.armed.is_some_and(|at| at <= now)
    }
}
