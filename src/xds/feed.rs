use std::{
    collections::{BTreeSet, HashMap},
    future::poll_fn,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Waker},
};

use arc_swap::ArcSwapOption;
use imbl::{OrdSet, ordset::DiffItem};
use tokio::time::Instant;

use super::{Proxies, ResourceSet, ResourceType, Subscription};
use crate::model::Revision;

/// Where the resources of a view are put whenever they change. Only streams that a change concerns are woken: what it costs
/// does not depend on how many others there are. Streams end when it is dropped.
#[derive(Debug)]
pub struct Publisher {
    feed: Feed,
    proxies: Proxies,
}

impl Publisher {
    /// Nothing is known yet. Whoever waits for an acknowledgement in `proxies` is told of each publication, because it settles
    /// streams that it does not concern.
    pub fn new(proxies: &Proxies) -> Self {
        Self { feed: Feed::default(), proxies: proxies.clone() }
    }

    /// What streams follow.
    pub fn feed(&self) -> Feed {
        self.feed.clone()
    }

    /// The newest set.
    pub fn latest(&self) -> Option<Arc<ResourceSet>> {
        self.feed.latest()
    }

    /// Whether anybody has its feed.
    pub fn is_followed(&self) -> bool {
        Arc::strong_count(&self.feed.shared) > 1
    }

    /// Replaces the set by a newer one, made from it. Returns how many streams that concerns, all of which are woken.
    pub fn publish(&self, set: Arc<ResourceSet>) -> usize {
        let shared = &self.feed.shared;
        let index = shared.index();
        let before = shared.set.load();
        let floor = before.as_ref().map_or(Revision(0), |before| before.revision());
        let concerned = match before.as_ref().filter(|before| before.revision() < set.revision()) {
            Some(before) => index.concerned(before, &set),
            None => index.everybody(),
        };
        drop(before);
        let places: Vec<_> = concerned.into_iter().filter_map(|id| index.place(id)).collect();
        for place in &places {
            place.marks().note(floor, &set);
        }
        // A stream that asks for more waits for the lock: it is either noted above or sees the new set.
        shared.set.store(Some(set));
        drop(index);
        let woken = places.iter().filter_map(|place| place.marks().waker.take());
        woken.for_each(Waker::wake);
        self.proxies.tell();
        places.len()
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        let shared = &self.feed.shared;
        shared.closed.store(true, Ordering::SeqCst);
        let places: Vec<_> = {
            let index = shared.index();
            index.everybody().into_iter().filter_map(|id| index.place(id)).collect()
        };
        let woken = places.iter().filter_map(|place| place.marks().waker.take());
        woken.for_each(Waker::wake);
    }
}

/// What the streams of one view are served, now and as it changes. A clone is the same.
#[derive(Debug, Clone, Default)]
pub struct Feed {
    shared: Arc<Shared>,
}

impl Feed {
    /// The newest set; `None` until there is one.
    pub fn latest(&self) -> Option<Arc<ResourceSet>> {
        self.shared.set.load_full()
    }

    /// A stream's place, which follows nothing yet.
    pub(super) fn follow(&self) -> Follower {
        self.follow_with(Grain::default())
    }

    pub(super) fn follow_with(&self, grain: Grain) -> Follower {
        let place = Arc::new(Place::default());
        // Something was published before: that is news.
        place.marks().news = Some(News::default());
        place.marks().unreported = Some(Revision(0));
        let id = self.shared.index().add(&place);
        Follower {
            standing: Standing { feed: self.clone(), place },
            id,
            grain,
            following: ResourceType::ALL.map(|_| Following::Nothing),
        }
    }
}

#[derive(Debug, Default)]
struct Shared {
    set: ArcSwapOption<ResourceSet>,
    /// Nothing more will be published.
    closed: AtomicBool,
    index: Mutex<Index>,
}

impl Shared {
    fn index(&self) -> MutexGuard<'_, Index> {
        // A panic leaves at most a stream that is woken for nothing.
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Who is to be woken by what. Streams have numbers, which take little room where many name much.
#[derive(Debug, Default)]
struct Index {
    places: Vec<Option<Arc<Place>>>,
    free: Vec<u32>,
    types: [TypeIndex; ResourceType::ALL.len()],
}

#[derive(Debug, Default)]
struct TypeIndex {
    /// Woken by every change of the type.
    all: BTreeSet<u32>,
    /// Woken by changes of a name.
    names: HashMap<Arc<str>, BTreeSet<u32>>,
}

impl Index {
    fn add(&mut self, place: &Arc<Place>) -> u32 {
        if let Some(id) = self.free.pop()
            && let Some(free) = self.places.get_mut(id as usize)
        {
            *free = Some(Arc::clone(place));
            return id;
        }
        self.places.push(Some(Arc::clone(place)));
        u32::try_from(self.places.len() - 1).unwrap_or(u32::MAX)
    }

    fn place(&self, id: u32) -> Option<Arc<Place>> {
        self.places.get(id as usize)?.clone()
    }

    fn everybody(&self) -> Vec<u32> {
        let there = self.places.iter().enumerate().filter(|(_, place)| place.is_some());
        there.filter_map(|(id, _)| u32::try_from(id).ok()).collect()
    }

    /// Whom what changed between two sets concerns, each once.
    fn concerned(&self, before: &ResourceSet, set: &ResourceSet) -> Vec<u32> {
        let mut concerned = Vec::new();
        for (kind, index) in ResourceType::ALL.into_iter().zip(&self.types) {
            let Some(changed) = set.changed_since(kind, before.revision()) else {
                return self.everybody();
            };
            let mut changed = changed.peekable();
            if changed.peek().is_some() {
                concerned.extend(&index.all);
            }
            concerned.extend(changed.filter_map(|name| index.names.get(name)).flatten());
        }
        concerned.sort_unstable();
        concerned.dedup();
        concerned
    }

    fn of(&mut self, kind: ResourceType) -> Option<&mut TypeIndex> {
        self.types.get_mut(kind as usize)
    }
}

impl TypeIndex {
    fn add(&mut self, name: &Arc<str>, id: u32) {
        match self.names.get_mut(name) {
            Some(ids) => _ = ids.insert(id),
            None => _ = self.names.insert(Arc::clone(name), BTreeSet::from([id])),
        }
    }

    fn remove(&mut self, name: &Arc<str>, id: u32) {
        if let Some(ids) = self.names.get_mut(name) {
            ids.remove(&id);
            if ids.is_empty() {
                self.names.remove(name);
            }
        }
    }
}

#[derive(Debug, Default)]
struct Place(Mutex<Marks>);

impl Place {
    fn marks(&self) -> MutexGuard<'_, Marks> {
        // Every change of it is a few assignments.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a stream does not know yet.
#[derive(Debug, Default)]
struct Marks {
    /// What concerns it and was not looked at.
    news: Option<News>,
    /// What concerns it and is not in its status is after this.
    unreported: Option<Revision>,
    /// The newest that concerns it.
    newest: Revision,
    waker: Option<Waker>,
}

/// Publications that concern a stream.
#[derive(Debug, Clone, Copy, Default)]
struct News {
    /// They came after this.
    after: Revision,
    /// When the first came.
    since: Option<Instant>,
}

impl Marks {
    fn note(&mut self, before: Revision, set: &ResourceSet) {
        self.news.get_or_insert(News { after: before, since: set.published() });
        self.unreported.get_or_insert(before);
        self.newest = set.revision();
    }
}

/// When a stream follows all of a type rather than what it names.
#[derive(Debug, Clone, Copy)]
pub(super) struct Grain {
    /// It names more than this.
    pub names: usize,
    /// There are fewer than so many times as many as it names.
    pub share: usize,
}

impl Default for Grain {
    fn default() -> Self {
        Self { names: 1024, share: 2 }
    }
}

/// What a stream follows of a type.
#[derive(Debug, Clone)]
enum Following {
    Nothing,
    All,
    Each(OrdSet<Arc<str>>),
}

/// A stream's place in a feed, given up when it is dropped.
#[derive(Debug)]
pub(super) struct Follower {
    standing: Standing,
    id: u32,
    grain: Grain,
    following: [Following; ResourceType::ALL.len()],
}

/// What a stream takes at its turn.
#[derive(Debug)]
pub(super) struct Taken {
    pub set: Arc<ResourceSet>,
    /// Up to here nothing concerns the stream that it has not looked at before.
    pub quiet: Revision,
    /// When the first publication came that does.
    pub since: Option<Instant>,
}

impl Follower {
    pub(super) fn latest(&self) -> Option<Arc<ResourceSet>> {
        self.standing.feed.latest()
    }

    /// Where the ledger sees how far it got.
    pub(super) fn standing(&self) -> Standing {
        self.standing.clone()
    }

    /// Has the stream woken by what it asked for. Call it whenever that changes, before [`Follower::take`]: what is published
    /// in between is then either in what is taken, or wakes the stream.
    pub(super) fn subscribe(&mut self, kind: ResourceType, to: &Subscription) {
        let Some(following) = self.following.get_mut(kind as usize) else { return };
        let shared = &self.standing.feed.shared;
        // What all of a type makes is not worth to be told by name.
        let all = || {
            let there = shared.set.load().as_ref().map_or(0, |set| set.len(kind));
            to.is_wildcard()
                || to.names().len() > self.grain.names
                || to.names().len().saturating_mul(self.grain.share) > there
        };
        match following {
            Following::Nothing if to.is_empty() => return,
            Following::Each(names) if !to.is_wildcard() && names.ptr_eq(to.names()) => return,
            Following::All if !to.is_empty() && all() => return,
            _ => {}
        }
        let next = if to.is_empty() {
            Following::Nothing
        } else if all() {
            Following::All
        } else {
            Following::Each(to.names().clone())
        };
        let mut index = shared.index();
        if let Some(index) = index.of(kind) {
            index.change(self.id, following, &next);
        }
        *following = next;
    }

    /// Ready when there is news of what it follows, or the first set; false when there will be none any more.
    pub(super) async fn news(&self) -> bool {
        poll_fn(|context| self.poll_news(context)).await
    }

    fn poll_news(&self, context: &mut Context<'_>) -> Poll<bool> {
        let shared = &self.standing.feed.shared;
        let mut marks = self.standing.place.marks();
        if shared.closed.load(Ordering::SeqCst) {
            return Poll::Ready(false);
        }
        if self.has_news(&marks) {
            return Poll::Ready(true);
        }
        match &mut marks.waker {
            Some(waker) => waker.clone_from(context.waker()),
            None => marks.waker = Some(context.waker().clone()),
        }
        Poll::Pending
    }

    /// What is noted is there too: it is noted first.
    fn has_news(&self, marks: &Marks) -> bool {
        let set = self.standing.feed.shared.set.load();
        marks.news.is_some() && set.as_ref().is_some_and(|set| set.revision() >= marks.newest)
    }

    /// The newest set, if there is one; its news are news no longer.
    pub(super) fn take(&self) -> Option<Taken> {
        let mut marks = self.standing.place.marks();
        let set = self.latest()?;
        let news = if set.revision() >= marks.newest { marks.news.take() } else { marks.news };
        Some(Taken {
            quiet: news.map_or(set.revision(), |news| news.after.min(set.revision())),
            since: news.and_then(|news| news.since),
            set,
        })
    }

    /// The stream's status says what it made of everything that it took.
    pub(super) fn reported(&self) {
        let mut marks = self.standing.place.marks();
        marks.unreported = marks.news.map(|news| news.after);
    }
}

impl TypeIndex {
    fn change(&mut self, id: u32, from: &Following, to: &Following) {
        let none = OrdSet::new();
        let names = |of: &Following| match of {
            Following::Each(names) => names.clone(),
            Following::Nothing | Following::All => none.clone(),
        };
        if matches!(to, Following::All) {
            self.all.insert(id);
        }
        for difference in names(from).diff(&names(to)) {
            match difference {
                DiffItem::Add(name) => self.add(name, id),
                DiffItem::Remove(name) => self.remove(name, id),
            }
        }
        if !matches!(to, Following::All) {
            self.all.remove(&id);
        }
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        let mut index = self.standing.feed.shared.index();
        for (of, following) in index.types.iter_mut().zip(&self.following) {
            of.change(self.id, following, &Following::Nothing);
        }
        if let Some(place) = index.places.get_mut(self.id as usize) {
            *place = None;
            index.free.push(self.id);
        }
    }
}

/// How far a stream is served, as others see it.
#[derive(Debug, Clone)]
pub(super) struct Standing {
    feed: Feed,
    place: Arc<Place>,
}

impl Standing {
    pub(super) fn set(&self) -> Option<Arc<ResourceSet>> {
        self.feed.latest()
    }

    /// Up to here the stream's status is all that there is to say: nothing came that concerns it. Read it before the status.
    pub(super) fn quiet(&self) -> Revision {
        // In this order: what is in the set has been noted.
        let newest = self.feed.shared.set.load().as_ref().map_or(Revision(0), |set| set.revision());
        self.place.marks().unreported.unwrap_or(newest)
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, time::Duration};

    use futures_util::FutureExt as _;
    use proptest::{collection::vec, prelude::*};

    use super::*;
    use crate::xds::{
        Change, Config,
        subscription::Terms,
        testing::{CDS, EDS, put, random, remove},
    };

    const KINDS: [ResourceType; 2] = [CDS, EDS];
    const STREAMS: usize = 3;

    #[derive(Debug, Clone)]
    enum Step {
        /// Kind, name, content; without content it is removed.
        Publish(Vec<(u8, u8, Option<u8>)>),
        /// Stream, kind, names that it asks for from now on; 0 is the wildcard.
        Subscribe(u8, u8, Vec<u8>),
        Take(u8),
        Report(u8),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let change = (0..2_u8, 1..5_u8, prop::option::weighted(0.8, 0..3_u8));
        let step = prop_oneof![
            3 => vec(change, 0..3).prop_map(Step::Publish),
            2 => (0..STREAMS as u8, 0..2_u8, vec(0..5_u8, 0..3))
                .prop_map(|(stream, kind, names)| Step::Subscribe(stream, kind, names)),
            2 => (0..STREAMS as u8).prop_map(Step::Take),
            1 => (0..STREAMS as u8).prop_map(Step::Report),
        ];
        vec(step, 0..60)
    }

    fn subscription(names: &[u8]) -> Subscription {
        let name = |n: &u8| if *n == 0 { "*".to_owned() } else { n.to_string() };
        let names: Vec<String> = names.iter().map(name).collect();
        let config = Config::default();
        let terms = Terms { kind: EDS, config: &config, legacy_wildcard: false, elsewhere: 0, set: None };
        let mut subscription = Subscription::default();
        subscription.replace(&names, terms).unwrap();
        subscription
    }

    /// What a stream is to know, and what it asked for.
    #[derive(Default)]
    struct Model {
        asked: BTreeMap<ResourceType, Subscription>,
        /// The revision before the first that concerns it and that it has not taken, or not reported.
        news: Option<u64>,
        unreported: Option<u64>,
    }

    fn run(steps: Vec<Step>, grain: Grain) {
        let exact = grain.share == 0;
        let publisher = Publisher::new(&Proxies::default());
        publisher.publish(Arc::default());
        let mut followers: Vec<Follower> =
            (0..STREAMS).map(|_| publisher.feed().follow_with(grain)).collect();
        let mut models: Vec<Model> = (0..STREAMS).map(|_| Model::default()).collect();
        followers.iter().for_each(|follower| {
            follower.take().unwrap();
            follower.reported();
        });
        for step in steps {
            match step {
                Step::Publish(changes) => {
                    let before = publisher.latest().unwrap();
                    let changes = changes.into_iter().map(|(kind, name, text)| {
                        let kind = KINDS[usize::from(kind)];
                        match text {
                            Some(text) => put(kind, &name.to_string(), &text.to_string()),
                            None => remove(kind, &name.to_string()),
                        }
                    });
                    let set =
                        before.apply(Revision(before.revision().0 + 1), changes.collect::<Vec<Change>>());
                    for model in &mut models {
                        let concerned = model.asked.iter().any(|(kind, asked)| {
                            let mut changed = set.changed_since(*kind, before.revision()).unwrap();
                            changed.any(|name| asked.covers(name))
                        });
                        if concerned {
                            model.news.get_or_insert(before.revision().0);
                            model.unreported.get_or_insert(before.revision().0);
                        }
                    }
                    publisher.publish(Arc::new(set));
                }
                Step::Subscribe(stream, kind, names) => {
                    let (stream, kind) = (usize::from(stream), KINDS[usize::from(kind)]);
                    let to = subscription(&names);
                    followers[stream].subscribe(kind, &to);
                    models[stream].asked.insert(kind, to);
                }
                Step::Take(stream) => {
                    let stream = usize::from(stream);
                    let newest = publisher.latest().unwrap().revision();
                    let taken = followers[stream].take().unwrap();
                    assert_eq!(taken.set.revision(), newest);
                    let want = models[stream].news.take().unwrap_or(newest.0);
                    assert!(taken.quiet.0 == want || !exact && taken.quiet.0 < want);
                }
                Step::Report(stream) => {
                    let stream = usize::from(stream);
                    followers[stream].reported();
                    models[stream].unreported = models[stream].news;
                }
            }
            for (follower, model) in followers.iter().zip(&models) {
                let woken = follower.news().now_or_never() == Some(true);
                assert!(woken == model.news.is_some() || !exact && woken);
                let newest = publisher.latest().unwrap().revision().0;
                let (quiet, want) = (follower.standing().quiet().0, model.unreported.unwrap_or(newest));
                assert!(quiet == want || !exact && quiet < want, "{quiet} {want}");
            }
        }
        drop(followers);
        let index = publisher.feed.shared.index();
        assert!(index.types.iter().all(|of| of.all.is_empty() && of.names.is_empty()), "nothing is left");
    }

    #[test]
    fn whoever_a_change_concerns_is_woken_and_nobody_else() {
        random(500, steps(), |steps| run(steps, Grain { names: usize::MAX, share: 0 }));
        random(200, steps(), |steps| run(steps, Grain::default()));
        random(200, steps(), |steps| run(steps, Grain { names: 1, share: 1 }));
    }

    /// Streams that ask for other names all the time while these change, on threads of their own: in the end each has the
    /// newest content of what it asked for last.
    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn nothing_is_missed_between_asking_and_publishing() {
        const ROUNDS: u8 = 100;
        const LAST: u64 = 20 * ROUNDS as u64;
        let publisher = Publisher::new(&Proxies::default());
        publisher.publish(Arc::default());
        let stream = |seed: u8| {
            let feed = publisher.feed();
            async move {
                let mut follower = feed.follow_with(Grain { names: usize::MAX, share: 0 });
                for round in 0..ROUNDS {
                    let names = [1 + (seed + round) % 4, 1 + (seed + round / 3) % 4];
                    follower.subscribe(EDS, &subscription(&names));
                    let mut taken = follower.take().unwrap();
                    let target = LAST / u64::from(ROUNDS) * u64::from(round + 1);
                    // Until both names have come this far, which each does.
                    while names.iter().any(|name| {
                        taken
                            .set
                            .get(EDS, &name.to_string())
                            .is_none_or(|entry| entry.changed.0 + 4 <= target)
                    }) {
                        assert!(follower.news().await);
                        taken = follower.take().unwrap();
                    }
                }
            }
        };
        let mut streams: tokio::task::JoinSet<()> = (0..4).map(stream).collect();
        for revision in 1..=LAST {
            let before = publisher.latest().unwrap();
            let name = (1 + revision % 4).to_string();
            let set = before.apply(Revision(revision), [put(EDS, &name, &revision.to_string())]);
            publisher.publish(Arc::new(set));
            if revision % 7 == 0 {
                tokio::task::yield_now().await;
            }
        }
        let all = async { while streams.join_next().await.is_some_and(|end| end.is_ok()) {} };
        tokio::time::timeout(Duration::from_secs(10), all).await.expect("all are woken");
        assert!(streams.is_empty(), "one failed");
    }
}
