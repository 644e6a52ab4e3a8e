//! When results of checks change a verdict. Pure: time comes in as an argument.

use std::{collections::VecDeque, time::Duration};

use tokio::time::Instant;

use crate::model::Verdict;

/// Changes of the verdict within [`WINDOW`] intervals from which on an instance flaps.
const FLAPS: usize = 4;

/// See [`FLAPS`].
const WINDOW: u32 = 60;

/// The verdict on one instance, moved by results that agree.
///
/// A verdict moves when as many results in a row as the threshold says are all better, or all worse, and only as far as every one of
/// them goes. An instance that has never passed needs one good result only. One that flaps needs twice as many as usual.
#[derive(Debug)]
pub struct Machine {
    healthy: u32,
    unhealthy: u32,
    window: Duration,
    verdict: Verdict,
    passed: bool,
    /// Results in a row that are all better, or all worse, than the verdict.
    streak: u32,
    /// Of these the one nearest to the verdict.
    nearest: Verdict,
    /// The last changes, at most [`FLAPS`].
    flips: VecDeque<Instant>,
}

impl Machine {
    /// Goes on from `verdict`; `passed` tells whether the instance was ever seen to work. The thresholds are how many good, and how
    /// many bad, results in a row count.
    pub fn new(healthy: u32, unhealthy: u32, interval: Duration, verdict: Verdict, passed: bool) -> Self {
        Self {
            healthy,
            unhealthy,
            window: interval.saturating_mul(WINDOW),
            verdict,
            passed,
            streak: 0,
            nearest: verdict,
            flips: VecDeque::new(),
        }
    }

    /// The verdict that stands.
    pub fn verdict(&self) -> Verdict {
        self.verdict
    }

    /// Takes in a result; returns the verdict that it is time for. It stands once it is [accepted](Self::accept); until then each
    /// further result of the kind asks for it again.
    pub fn observe(&mut self, seen: Verdict, now: Instant) -> Option<Verdict> {
        if rank(seen) == rank(self.verdict) {
            self.streak = 0;
            return None;
        }
        let better = rank(seen) > rank(self.verdict);
        let same_way = self.streak > 0 && better == (rank(self.nearest) > rank(self.verdict));
        self.nearest = match same_way {
            false => seen,
            true if better == (rank(seen) < rank(self.nearest)) => seen,
            true => self.nearest,
        };
        self.streak = if same_way { self.streak.saturating_add(1) } else { 1 };
        (self.streak >= self.needed(better, now)).then_some(self.nearest)
    }

    /// The verdict changes.
    pub fn accept(&mut self, verdict: Verdict, now: Instant) {
        if self.verdict != Verdict::Unknown {
            self.flips.push_back(now);
            while self.flips.len() > FLAPS {
                self.flips.pop_front();
            }
        }
        self.verdict = verdict;
        self.passed |= verdict.works();
        self.streak = 0;
    }

    /// Whether the last results speak against the instance, but are too few.
    pub fn doubts(&self) -> bool {
        self.streak > 0 && rank(self.nearest) < rank(self.verdict)
    }

    /// Whether the verdict has changed too often of late.
    pub fn flaps(&self, now: Instant) -> bool {
        self.flips.len() == FLAPS && self.flips.front().is_some_and(|first| now - *first <= self.window)
    }

    fn needed(&self, better: bool, now: Instant) -> u32 {
        match better {
            false => self.unhealthy,
            true if !self.passed => 1,
            true if self.flaps(now) => self.healthy.saturating_mul(2),
            true => self.healthy,
        }
    }
}

/// Doubled, so that what is not known stands between: any good result is better, any bad one worse.
fn rank(verdict: Verdict) -> u8 {
    match verdict {
        Verdict::Unhealthy => 0,
        Verdict::Unknown => 1,
        Verdict::Degraded => 2,
        Verdict::Healthy => 4,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn machine(healthy: u32, unhealthy: u32, verdict: Verdict) -> Machine {
        Machine::new(healthy, unhealthy, Duration::from_secs(1), verdict, verdict != Verdict::Unknown)
    }

    fn verdict(letter: char) -> Verdict {
        match letter {
            'h' => Verdict::Healthy,
            'd' => Verdict::Degraded,
            'u' => Verdict::Unhealthy,
            _ => Verdict::Unknown,
        }
    }

    /// What the verdict is after each result.
    fn run(machine: &mut Machine, results: &str, now: Instant) -> String {
        let step = |letter| {
            if let Some(next) = machine.observe(verdict(letter), now) {
                machine.accept(next, now);
            }
            match machine.verdict() {
                Verdict::Healthy => 'h',
                Verdict::Degraded => 'd',
                Verdict::Unhealthy => 'u',
                Verdict::Unknown => '?',
            }
        };
        results.chars().map(step).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn verdicts_by_case() {
        for (before, results, want) in [
            ('?', "h", "h"),
            ('?', "d", "d"),
            ('?', "uuu", "??u"),
            // It has never passed: once is enough.
            ('?', "uuuuh", "??uuh"),
            ('h', "uuhuuu", "hhhhhu"),
            ('u', "huhh", "uuuh"),
            // As far as all agree.
            ('h', "udu", "hhd"),
            ('h', "uduu", "hhdd"),
            // After the move to degraded, bad ones have to agree anew.
            ('h', "ududuu", "hhdddd"),
            ('u', "hd", "ud"),
            ('d', "hh", "dh"),
            ('d', "huuu", "dddu"),
        ] {
            let mut machine = machine(2, 3, verdict(before));
            let got = run(&mut machine, results, Instant::now());
            assert_eq!(got, want, "{before} {results}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_flaps_has_to_pass_twice_as_often() {
        let mut machine = machine(2, 1, Verdict::Healthy);
        let start = Instant::now();
        assert_eq!(run(&mut machine, "uhhuhh", start), "uuhuuh");
        assert!(machine.flaps(start));
        assert_eq!(run(&mut machine, "uhhhh", start), "uuuuh");
        let later = start + Duration::from_secs(61);
        assert!(!machine.flaps(later));
        assert_eq!(run(&mut machine, "uhh", later), "uuh");
    }

    #[tokio::test(start_paused = true)]
    async fn a_verdict_that_was_not_accepted_is_asked_for_again() {
        let mut machine = machine(1, 2, Verdict::Healthy);
        let now = Instant::now();
        let asked = [(); 4].map(|()| machine.observe(Verdict::Unhealthy, now));
        assert_eq!(
            asked,
            [None, Some(Verdict::Unhealthy), Some(Verdict::Unhealthy), Some(Verdict::Unhealthy)]
        );
        assert!(machine.doubts());
        assert_eq!(machine.observe(Verdict::Healthy, now), None);
        assert_eq!(machine.observe(Verdict::Unhealthy, now), None);
    }

    proptest! {
        /// A model that looks back over all results since the last change. Long intervals: nothing flaps.
        #[test]
        fn equals_a_model_that_remembers_everything(
            healthy in 1..4u32,
            unhealthy in 1..4u32,
            known in any::<bool>(),
            results in proptest::collection::vec(0..3usize, 0..60),
        ) {
            let all = [Verdict::Unhealthy, Verdict::Degraded, Verdict::Healthy];
            let mut now = Instant::now();
            let mut machine = machine(healthy, unhealthy, if known { Verdict::Healthy } else { Verdict::Unknown });
            let (mut verdict, mut passed) = (known.then_some(2), known);
            let mut since_change: Vec<usize> = Vec::new();
            for result in results {
                now += Duration::from_secs(20);
                if let Some(next) = machine.observe(all[result], now) {
                    machine.accept(next, now);
                }
                since_change.push(result);
                let better = |r: &usize| verdict.map_or(*r > 0, |verdict| *r > verdict);
                let worse = |r: &usize| verdict.map_or(*r == 0, |verdict| *r < verdict);
                let ups: Vec<_> = since_change.iter().rev().take_while(|r| better(r)).collect();
                let downs: Vec<_> = since_change.iter().rev().take_while(|r| worse(r)).collect();
                let up_needed = if passed { healthy as usize } else { 1 };
                let next = if ups.len() >= up_needed {
                    ups.into_iter().min()
                } else if downs.len() >= unhealthy as usize {
                    downs.into_iter().max()
                } else {
                    None
                };
                if let Some(next) = next.copied() {
                    verdict = Some(next);
                    passed |= next > 0;
                    since_change.clear();
                }
                prop_assert_eq!(machine.verdict(), verdict.map_or(Verdict::Unknown, |v| all[v]));
            }
        }
    }
}
