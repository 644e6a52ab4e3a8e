//! How many instances may go without evidence. Pure: time and counts come in as arguments.

use std::{
    collections::{HashMap, VecDeque},
    time::Duration,
};

use tokio::time::Instant;

use crate::model::ServiceId;

/// When to doubt that instances are gone, and how to ask them.
#[derive(Debug, Clone, PartialEq)]
pub struct Guards {
    /// The share of a service's instances, from 0 to 1, and of all services' together, that stays unless there is evidence
    /// against each that goes. 0 doubts nothing, 1 everything.
    pub min_share: f64,
    /// How long a removal without evidence counts against the share.
    pub window: Duration,
    /// How long an instance that is held may take to answer.
    pub ask_timeout: Duration,
    /// How often an instance that is held is asked again, once it has been for a while.
    pub ask_interval: Duration,
    /// How often an instance may go within `flap_window`, other than drained, before it is damped: proxies are not told of its
    /// next run until that has lasted for `flap_penalty`. 0 damps nobody.
    pub flaps: u32,
    /// See `flaps`.
    pub flap_window: Duration,
    /// See `flaps`.
    pub flap_penalty: Duration,
}

impl Default for Guards {
    fn default() -> Self {
        Self {
            min_share: 0.5,
            window: Duration::from_secs(60),
            ask_timeout: Duration::from_secs(1),
            ask_interval: Duration::from_secs(10),
            flaps: 5,
            flap_window: Duration::from_secs(2 * 60),
            flap_penalty: Duration::from_secs(60),
        }
    }
}

/// The instances of a service, or of all, before some leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Count {
    /// Those that are registered and not held.
    pub(super) present: usize,
    /// Those that leave now.
    pub(super) leaving: usize,
    /// Others that have been silent for so long that they are about to leave, too.
    pub(super) silent: usize,
}

/// What other processes over the same store let go without evidence within the window.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Elsewhere {
    /// All of it.
    pub(super) lost: usize,
    /// Of these, instances that the catalog may still show.
    pub(super) going: usize,
}

/// Whether some instances may leave that do not refuse connections. [`Guard::settled`] follows, when the catalog shows what
/// became of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// They may.
    Go,
    /// They stay, as stale.
    Hold {
        /// The service was trusted until now.
        trips: bool,
    },
}

/// Judges removals that nobody asked for.
#[derive(Debug)]
pub(super) struct Guard {
    settings: Guards,
    all: Losses,
    services: HashMap<ServiceId, Losses>,
    swept: Option<Instant>,
}

/// What went, and what is in doubt.
#[derive(Debug, Default)]
struct Losses {
    /// Removals without evidence within the window, oldest first.
    gone: VecDeque<(Instant, usize)>,
    /// The sum of them.
    total: usize,
    /// Of these, instances that the catalog still shows.
    going: usize,
    /// Instances that left and are about to be held.
    doubtful: usize,
    /// When an instance was last held.
    doubted: Option<Instant>,
}

impl Losses {
    fn forget(&mut self, now: Instant, window: Duration) {
        while let Some((at, count)) = self.gone.front().copied()
            && now.saturating_duration_since(at) >= window
        {
            self.gone.pop_front();
            self.total -= count;
        }
        self.doubted = self.doubted.filter(|at| now.saturating_duration_since(*at) < window);
    }

    fn go(&mut self, now: Instant, count: usize) {
        self.gone.push_back((now, count));
        self.total += count;
        self.going += count;
    }

    fn come_back(&mut self, count: usize) {
        if let Some(at) = self.gone.iter().rposition(|(_, gone)| *gone == count) {
            self.gone.remove(at);
            self.total -= count;
        }
    }

    fn settled(&mut self, verdict: Verdict, count: usize) {
        let under_way = match verdict {
            Verdict::Go => &mut self.going,
            Verdict::Hold { .. } => &mut self.doubtful,
        };
        *under_way = under_way.saturating_sub(count);
    }

    /// Whether nothing went within the window, or was held, without evidence.
    fn is_calm(&self) -> bool {
        self.total == 0 && self.doubtful == 0 && self.doubted.is_none()
    }

    fn stays_above(&self, share: f64, count: Count, elsewhere: Elsewhere) -> bool {
        let doubtful = count.leaving + count.silent + self.doubtful;
        let kept = count.present.saturating_sub(doubtful + self.going + elsewhere.going);
        kept as f64 >= share * (kept + doubtful + self.total + elsewhere.lost) as f64
    }
}

impl Guard {
    pub(super) fn new(settings: Guards) -> Self {
        Self { settings, all: Losses::default(), services: HashMap::new(), swept: None }
    }

    /// Judges those of a service that leave now; `all` counts every service, with everybody who leaves at the same time and
    /// has not been judged.
    pub(super) fn judge(
        &mut self,
        now: Instant,
        service: &ServiceId,
        (of, of_elsewhere): (Count, Elsewhere),
        (all, all_elsewhere): (Count, Elsewhere),
    ) -> Verdict {
        let Guards { min_share, window, .. } = self.settings;
        self.sweep(now);
        self.all.forget(now, window);
        let losses = self.services.entry(service.clone()).or_default();
        losses.forget(now, window);
        let stays = losses.stays_above(min_share, of, of_elsewhere);
        if stays && self.all.stays_above(min_share, all, all_elsewhere) {
            losses.go(now, of.leaving);
            self.all.go(now, of.leaving);
            return Verdict::Go;
        }
        self.hold(now, service, of.leaving)
    }

    /// Judges those of a service that leave now and still accept connections: alive, or frozen. A lease that ends alone is
    /// believed; where another one ended within the window without evidence, of this service or any, or is about to, what they
    /// have in common is the likelier cause.
    pub(super) fn judge_living(
        &mut self,
        now: Instant,
        service: &ServiceId,
        of: (Count, Elsewhere),
        all: (Count, Elsewhere),
    ) -> Verdict {
        let Guards { min_share, window, .. } = self.settings;
        // What is lost of a service is lost of all.
        self.all.forget(now, window);
        let alone = (of.0.leaving, of.0.silent, all.0.leaving, all.1.lost) == (1, 0, 1, 0);
        if min_share == 0.0 || (alone && self.all.is_calm()) {
            return self.judge(now, service, of, all);
        }
        self.hold(now, service, of.0.leaving)
    }

    /// They stay, whatever else there is.
    pub(super) fn hold(&mut self, now: Instant, service: &ServiceId, count: usize) -> Verdict {
        let losses = self.services.entry(service.clone()).or_default();
        losses.doubtful += count;
        self.all.doubtful += count;
        self.all.doubted = Some(now);
        Verdict::Hold { trips: losses.doubted.replace(now).is_none() }
    }

    /// Takes a verdict back: nothing was done yet.
    pub(super) fn take_back(&mut self, service: &ServiceId, verdict: Verdict, count: usize) {
        self.settled(service, verdict, count);
        if verdict == Verdict::Go {
            self.all.come_back(count);
            if let Some(losses) = self.services.get_mut(service) {
                losses.come_back(count);
            }
        }
    }

    /// Those that were judged are removed or held, or their owner came back.
    pub(super) fn settled(&mut self, service: &ServiceId, verdict: Verdict, count: usize) {
        self.all.settled(verdict, count);
        if let Some(losses) = self.services.get_mut(service) {
            losses.settled(verdict, count);
        }
    }

    /// Forgets services of which there is nothing to remember, once a window.
    fn sweep(&mut self, now: Instant) {
        let window = self.settings.window;
        if self.swept.is_some_and(|at| now.saturating_duration_since(at) < window) {
            return;
        }
        self.swept = Some(now);
        self.services.retain(|_, losses| {
            losses.forget(now, window);
            losses.total > 0 || losses.going > 0 || losses.doubtful > 0 || losses.doubted.is_some()
        });
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn service(n: u8) -> ServiceId {
        format!("s{n}").parse().unwrap()
    }

    fn here(count: Count) -> (Count, Elsewhere) {
        (count, Elsewhere::default())
    }

    fn count(present: usize, leaving: usize, silent: usize) -> Count {
        Count { present, leaving, silent }
    }

    #[test]
    fn what_may_go_and_what_is_asked() {
        // The instances of the service of a thousand; whether they go.
        for (present, leaving, silent, share, goes) in [
            (10, 1, 0, 0.5, true),
            (10, 5, 0, 0.5, true),
            (10, 6, 0, 0.5, false),
            (10, 1, 5, 0.5, false),
            (2, 1, 0, 0.5, true),
            (1, 1, 0, 0.5, false),
            (1, 1, 0, 0.0, true),
            (10, 1, 0, 1.0, false),
            (10, 2, 0, 0.9, false),
        ] {
            let mut guard = Guard::new(Guards { min_share: share, ..Guards::default() });
            let all = if share < 1.0 { count(1000, leaving, silent) } else { count(1000, 0, 0) };
            let verdict =
                guard.judge(Instant::now(), &service(0), here(count(present, leaving, silent)), here(all));
            let want = if goes { Verdict::Go } else { Verdict::Hold { trips: true } };
            assert_eq!(verdict, want, "{leaving} and {silent} of {present} at {share}");
        }
    }

    #[test]
    fn one_trip_lasts_while_there_is_doubt() {
        let mut guard = Guard::new(Guards::default());
        let window = Guards::default().window;
        let mut now = Instant::now();
        for (after, trips) in [(0, true), (30, false), (59, false), (60, true)] {
            now += Duration::from_secs(after);
            let verdict = guard.judge(now, &service(0), here(count(1, 1, 0)), here(count(100, 1, 0)));
            assert_eq!(verdict, Verdict::Hold { trips }, "{after} s later");
            guard.settled(&service(0), verdict, 1);
        }
        now += window;
        let verdict = guard.judge(now, &service(1), here(count(9, 1, 0)), here(count(100, 1, 0)));
        assert_eq!(verdict, Verdict::Go);
        assert_eq!(guard.services.len(), 1, "nothing is kept of the other");
    }

    #[test]
    fn many_services_that_lose_little_each_are_a_doubt_together() {
        let mut guard = Guard::new(Guards::default());
        let now = Instant::now();
        let verdict = guard.judge(now, &service(0), here(count(10, 1, 0)), here(count(100, 60, 0)));
        assert_eq!(verdict, Verdict::Hold { trips: true });
    }

    #[test]
    fn what_others_let_go_counts_and_what_was_taken_back_does_not() {
        let mut guard = Guard::new(Guards::default());
        let (now, all) = (Instant::now(), here(count(1000, 5, 0)));
        let mut judge = |lost, going| {
            let verdict = guard.judge(now, &service(0), (count(30, 5, 0), Elsewhere { lost, going }), all);
            guard.take_back(&service(0), verdict, 5);
            verdict == Verdict::Go
        };
        // Of 30 the others let go 10, which are still shown; then of 40.
        for (lost, going, goes) in
            [(0, 0, true), (10, 10, true), (11, 11, false), (20, 0, true), (21, 0, false)]
        {
            assert_eq!(judge(lost, going), goes, "{lost} {going}");
        }
    }

    #[derive(Debug, Clone)]
    enum Step {
        Register(u8, usize),
        Deregister(u8, usize),
        Leave(u8, usize, usize),
        Answer(u8, usize),
        Shown(u8, usize),
        Wait(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        let service = 0..2u8;
        prop_oneof![
            (service.clone(), 1..8usize).prop_map(|(s, n)| Step::Register(s, n)),
            (service.clone(), 1..4usize).prop_map(|(s, n)| Step::Deregister(s, n)),
            (service.clone(), 1..6usize, 0..4usize).prop_map(|(s, n, more)| Step::Leave(s, n, more)),
            (service.clone(), 1..6usize).prop_map(|(s, n)| Step::Answer(s, n)),
            (service, 1..9usize).prop_map(|(s, n)| Step::Shown(s, n)),
            (1..40u64).prop_map(Step::Wait),
        ]
    }

    /// What a service has: sure of, removed but still shown, about to be held, held, and when how many went without evidence.
    #[derive(Debug, Default, Clone)]
    struct Model {
        fresh: usize,
        going: usize,
        asked: usize,
        held: usize,
        lost: Vec<(Instant, usize)>,
    }

    proptest! {
        /// Whatever happens: after a removal without evidence, what proxies still have of a service, and of all, is at least
        /// the share of what they would have without such removals within the window. And the guard is not in the way of
        /// what keeps far above the share.
        #[test]
        fn never_below_the_share_without_evidence(
            steps in proptest::collection::vec(step(), 1..80),
            share in prop_oneof![Just(0.5), Just(0.8), 0.0..1.0f64],
        ) {
            let settings = Guards { min_share: share, ..Guards::default() };
            let window = settings.window;
            let mut guard = Guard::new(settings);
            let mut now = Instant::now();
            let mut models = vec![Model::default(); 2];
            for step in steps {
                match step {
                    Step::Register(s, n) => models[s as usize].fresh += n,
                    Step::Deregister(s, n) => {
                        let model = &mut models[s as usize];
                        model.fresh -= n.min(model.fresh);
                    }
                    Step::Wait(seconds) => now += Duration::from_secs(seconds),
                    Step::Answer(s, n) => {
                        let model = &mut models[s as usize];
                        let n = n.min(model.asked);
                        guard.settled(&service(s), Verdict::Hold { trips: false }, n);
                        model.asked -= n;
                        // Half refused and went with evidence.
                        model.held += n / 2;
                    }
                    Step::Shown(s, n) => {
                        let model = &mut models[s as usize];
                        let n = n.min(model.going);
                        guard.settled(&service(s), Verdict::Go, n);
                        model.going -= n;
                    }
                    Step::Leave(s, n, silent) => {
                        let at = s as usize;
                        let n = n.min(models[at].fresh);
                        if n == 0 { continue }
                        let silent = silent.min(models[at].fresh - n);
                        let shown = |m: &Model| m.fresh + m.going + m.asked;
                        let present = models.iter().map(shown).sum();
                        let of = count(shown(&models[at]), n, silent);
                        match guard.judge(now, &service(s), here(of), here(count(present, n, silent))) {
                            Verdict::Go => {
                                models[at].fresh -= n;
                                models[at].going += n;
                                models[at].lost.push((now, n));
                                let lost = |m: &Model| -> usize {
                                    m.lost.iter().filter(|(at, _)| now - *at < window).map(|(_, n)| n).sum()
                                };
                                let has = |m: &Model| m.fresh + m.asked + m.held;
                                let whole = (models.iter().map(has).sum(), models.iter().map(lost).sum());
                                for (has, lost) in [(has(&models[at]), lost(&models[at])), whole] {
                                    let (has, lost): (usize, usize) = (has, lost);
                                    prop_assert!(has as f64 >= share * (has + lost) as f64, "{has} of {}", has + lost);
                                }
                            }
                            Verdict::Hold { .. } => {
                                models[at].fresh -= n;
                                models[at].asked += n;
                                let calm = models.iter().all(|m| m.asked == 0 && m.lost.is_empty());
                                prop_assert!(!calm || share > 0.0, "nothing is asked without a share");
                            }
                        }
                    }
                }
            }
        }
    }
}
