//! Who is woken by what: the sets of a view come in at a [`Publisher`], and the streams that asked for what changed are woken.

#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeSet, HashMap},
    future::poll_fn,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Waker},
};

use arc_swap::{ArcSwapOption, Guard};
use imbl::{OrdSet, ordset::DiffItem};
use tokio::time::Instant;

use super::{Proxies, ResourceSet, ResourceType, Subscription, by_type::ByType, names::collection};
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
        Follower { standing: Standing { feed: self.clone(), place }, id, grain, following: ByType::default() }
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
    types: ByType<TypeIndex>,
}

#[derive(Debug, Default)]
struct TypeIndex {
    /// Woken by every change of the type.
    all: BTreeSet<u32>,
    /// Woken by changes of a name, or of a member of the collection of this name.
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
        for (kind, index) in ResourceType::ALL.into_iter().zip(self.types.iter()) {
            let Some(changed) = set.changed_since(kind, before.revision()) else {
                return self.everybody();
            };
            let mut changed = changed.peekable();
            if changed.peek().is_some() {
                concerned.extend(&index.all);
            }
            if index.names.is_empty() {
                continue;
            }
            // Each once: whoever follows a collection follows all its members (rule X3), which may be many.
            let mut collections = BTreeSet::new();
            for name in changed {
                concerned.extend(index.names.get(name).into_iter().flatten());
                collections.extend(collection(name));
            }
            let collections = collections.iter().filter_map(|glob| index.names.get(glob.as_str()));
            concerned.extend(collections.flatten());
        }
        concerned.sort_unstable();
        concerned.dedup();
        concerned
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
#[derive(Debug, Clone, Default)]
enum Following {
    #[default]
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
    following: ByType<Following>,
}

/// A look at the newest set; not to be kept.
pub(super) type Peek = Guard<Option<Arc<ResourceSet>>>;

/// What a stream takes at its turn.
#[derive(Debug)]
pub(super) struct Taken {
    /// There is one.
    pub set: Peek,
    /// Up to here nothing concerns the stream that it has not looked at before.
    pub quiet: Revision,
    /// When the first publication came that does.
    pub since: Option<Instant>,
}

impl Follower {
    /// The newest set, for a look at it: it is not counted among those who have it, which all streams would do at the same time.
    pub(super) fn peek(&self) -> Peek {
        self.standing.feed.shared.set.load()
    }

    /// Where the ledger sees how far it got.
    pub(super) fn standing(&self) -> Standing {
        self.standing.clone()
    }

    /// Has the stream woken by what it asked for. Call it whenever that changes, before [`Follower::take`]: what is published
    /// in between is then either in what is taken, or wakes the stream.
    pub(super) fn subscribe(&mut self, kind: ResourceType, to: &Subscription) {
        let following = self.following.of_mut(kind);
        let shared = &self.standing.feed.shared;
        // What all of a type makes is not worth to be told by name.
        let there = || shared.set.load().as_ref().map_or(0, |set| set.len(kind));
        let all = || {
            to.is_wildcard()
                || to.names().len() > self.grain.names
                || to.names().len().saturating_mul(self.grain.share) > there()
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
        shared.index().types.of_mut(kind).change(self.id, following, &next);
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
        marks.news.is_some() && self.peek().as_ref().is_some_and(|set| set.revision() >= marks.newest)
    }

    /// The newest set, if there is one; its news are news no longer.
    pub(super) fn take(&self) -> Option<Taken> {
        let mut marks = self.standing.place.marks();
        let set = self.peek();
        let revision = set.as_ref()?.revision();
        let news = if revision >= marks.newest { marks.news.take() } else { marks.news };
        Some(Taken {
            quiet: news.map_or(revision, |news| news.after.min(revision)),
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
        for (of, following) in index.types.iter_mut().zip(self.following.iter()) {
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
