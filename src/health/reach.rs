//! Tells a checker that lost its network from targets that are gone. Pure: time comes in as an argument.
//!
//! A target that refuses a connection, resets it or answers wrongly is reached: whatever it is, the checker sees it, and condemns
//! it. Only silence is in doubt: nothing came back from the target's machine. When a target has been silent for as long as its
//! threshold says, its silence is held against what was seen of other machines since its silence began. If a large share of them are silent, too, it
//! is rather the checker that is cut off, and silence condemns nobody until fewer are. What is counted is machines (IP
//! addresses), not instances: a machine with a thousand instances that fails is one. With one or two machines there is nobody to compare with, and silence
//! condemns: then either some are left, or all fail and keep their calls (see the endpoints of `resources`).

use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
};

use tokio::time::Instant;

/// Machines from which on there is something to compare.
const FEW: usize = 3;

/// Machines, the silent one among them, that must have been seen before silence condemns one.
const WITNESSES: usize = 4;

/// What is to become of a target that has been silent for long.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Judgement {
    /// It is gone.
    Condemn,
    /// It is rather the checker that is cut off.
    Suspend,
    /// Too little is known: check these first.
    Ask(Vec<u64>),
}

#[derive(Debug)]
struct Host {
    targets: BTreeSet<u64>,
    /// When the newest check began, and whether nothing came back.
    last: Option<(Instant, bool)>,
}

/// Which machines can be reached.
#[derive(Debug)]
pub(super) struct Reach {
    /// In percent of the machines.
    share: u8,
    hosts: HashMap<IpAddr, Host>,
    silent: usize,
    suspended: bool,
}

impl Reach {
    pub(super) fn new(share: u8) -> Self {
        Self { share, hosts: HashMap::new(), silent: 0, suspended: false }
    }

    pub(super) fn add(&mut self, host: IpAddr, target: u64) {
        let host = self.hosts.entry(host).or_insert_with(|| Host { targets: BTreeSet::new(), last: None });
        host.targets.insert(target);
    }

    pub(super) fn remove(&mut self, address: IpAddr, target: u64) {
        let Some(host) = self.hosts.get_mut(&address) else { return };
        host.targets.remove(&target);
        if host.targets.is_empty() {
            self.silent -= usize::from(host.last.is_some_and(|(_, silent)| silent));
            self.hosts.remove(&address);
            self.settle();
        }
    }

    /// A check that began then came to its end.
    pub(super) fn note(&mut self, address: IpAddr, began: Instant, silent: bool) {
        let Some(host) = self.hosts.get_mut(&address) else { return };
        let before = host.last.is_some_and(|(_, silent)| silent);
        host.last = Some((began, silent));
        self.silent = self.silent + usize::from(silent) - usize::from(before);
        self.settle();
    }

    fn settle(&mut self) {
        if self.suspended && !self.large(self.silent, self.hosts.len()) {
            self.suspended = false;
        }
    }

    fn large(&self, silent: usize, of: usize) -> bool {
        of >= FEW && silent * 100 >= usize::from(self.share) * of
    }

    /// A target on `address` has been silent since then for as long as its threshold says.
    pub(super) fn judge(&mut self, address: IpAddr, since: Instant) -> Judgement {
        if self.suspended {
            return Judgement::Suspend;
        }
        if self.hosts.len() < FEW {
            return Judgement::Condemn;
        }
        let (mut known, mut silent) = (0, 0);
        let mut unknown = Vec::new();
        for (host, Host { targets, last }) in &self.hosts {
            match last {
                Some((began, is_silent)) if *began >= since || *host == address => {
                    known += 1;
                    silent += usize::from(*is_silent);
                }
                _ if unknown.len() < WITNESSES => unknown.extend(targets.first()),
                _ => {}
            }
        }
        if known < WITNESSES.min(self.hosts.len()) {
            return Judgement::Ask(unknown);
        }
        if self.large(silent, known) {
            self.suspended = true;
            return Judgement::Suspend;
        }
        Judgement::Condemn
    }

    /// Whether silence condemns nobody at present.
    pub(super) fn suspended(&self) -> bool {
        self.suspended
    }

    /// How many machines were silent at last, and how many there are.
    pub(super) fn counts(&self) -> (usize, usize) {
        (self.silent, self.hosts.len())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn host(n: u64) -> IpAddr {
        [10, 0, 0, u8::try_from(n).unwrap()].into()
    }

    /// One target on each of so many machines, all seen before `now`.
    fn reach(hosts: u64, now: Instant) -> Reach {
        let mut reach = Reach::new(50);
        for n in 0..hosts {
            reach.add(host(n), n);
            reach.note(host(n), now - Duration::from_secs(1), false);
        }
        reach
    }

    #[tokio::test(start_paused = true)]
    async fn one_or_two_machines_are_condemned() {
        let now = Instant::now();
        for hosts in [1, 2] {
            let mut reach = reach(hosts, now);
            (0..hosts).for_each(|n| reach.note(host(n), now, true));
            assert_eq!(reach.judge(host(0), now), Judgement::Condemn, "{hosts}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn others_are_asked_before_one_is_condemned() {
        let now = Instant::now();
        let mut reach = reach(10, now);
        reach.note(host(0), now, true);
        let Judgement::Ask(targets) = reach.judge(host(0), now) else { panic!("judged too early") };
        assert_eq!(targets.len(), WITNESSES);
        targets.iter().for_each(|n| reach.note(host(*n), now, false));
        assert_eq!(reach.judge(host(0), now), Judgement::Condemn);
        assert!(!reach.suspended());
    }

    #[tokio::test(start_paused = true)]
    async fn when_many_fall_silent_at_once_nobody_is_condemned_until_fewer_are() {
        let now = Instant::now();
        let mut reach = reach(10, now);
        for n in 0..4 {
            reach.note(host(n), now, true);
        }
        assert_eq!(reach.judge(host(0), now), Judgement::Suspend);
        assert!(reach.suspended());
        (4..10).for_each(|n| reach.note(host(n), now, true));
        assert_eq!(reach.counts(), (10, 10));
        for n in 0..5 {
            assert_eq!(reach.judge(host(9), now), Judgement::Suspend, "{n} are back");
            reach.note(host(n), now, false);
        }
        assert!(reach.suspended());
        reach.note(host(5), now, false);
        assert!(!reach.suspended());
        assert_eq!(reach.judge(host(9), now), Judgement::Condemn);

        // Machines that leave do not count any more.
        (0..6).for_each(|n| reach.remove(host(n), n));
        assert_eq!(reach.counts(), (4, 4));
    }
}
