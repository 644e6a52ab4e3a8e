use std::{collections::BTreeMap, time::Duration};

use futures_util::FutureExt as _;
use proptest::{collection::vec, prelude::*};

use super::*;
use crate::xds::{
    Change, Config,
    subscription::Terms,
    testing::{CDS, EDS, LEDS, put, random, remove},
};

const KINDS: [ResourceType; 3] = [CDS, EDS, LEDS];
const STREAMS: usize = 3;

#[derive(Debug, Clone)]
enum Step {
    /// Kind, name, content; without content it is removed.
    Publish(Vec<(u8, u8, Option<u8>)>),
    /// Stream, kind, names that it asks for from now on; 0 is the wildcard, and 1 and 2 are collections if there are any.
    Subscribe(u8, u8, Vec<u8>),
    Take(u8),
    Report(u8),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let change = (0..KINDS.len() as u8, 1..5_u8, prop::option::weighted(0.8, 0..3_u8));
    let step = prop_oneof![
        3 => vec(change, 0..3).prop_map(Step::Publish),
        2 => (0..STREAMS as u8, 0..KINDS.len() as u8, vec(0..5_u8, 0..3))
            .prop_map(|(stream, kind, names)| Step::Subscribe(stream, kind, names)),
        2 => (0..STREAMS as u8).prop_map(Step::Take),
        1 => (0..STREAMS as u8).prop_map(Step::Report),
    ];
    vec(step, 0..60)
}

/// Odd members are in one collection, even ones in another.
fn name(kind: ResourceType, n: u8) -> String {
    if kind == LEDS { format!("{}/{n}", collection_of(n)) } else { n.to_string() }
}

fn collection_of(n: u8) -> String {
    format!("xdstp:///envoy.config.endpoint.v3.LbEndpoint/{}", n % 2)
}

fn subscription(kind: ResourceType, names: &[u8]) -> Subscription {
    let asked = |n: &u8| match n {
        0 => "*".to_owned(),
        1 | 2 if kind == LEDS => format!("{}/*", collection_of(*n)),
        n => name(kind, *n),
    };
    let names: Vec<String> = names.iter().map(asked).collect();
    let config = Config::default();
    let terms = Terms { kind, config: &config, legacy_wildcard: false, elsewhere: 0, set: None };
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
    let mut followers: Vec<Follower> = (0..STREAMS).map(|_| publisher.feed().follow_with(grain)).collect();
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
                        Some(text) => put(kind, &self::name(kind, name), &text.to_string()),
                        None => remove(kind, &self::name(kind, name)),
                    }
                });
                let set = before.apply(Revision(before.revision().0 + 1), changes.collect::<Vec<Change>>());
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
                let to = subscription(kind, &names);
                followers[stream].subscribe(kind, &to);
                models[stream].asked.insert(kind, to);
            }
            Step::Take(stream) => {
                let stream = usize::from(stream);
                let newest = publisher.latest().unwrap().revision();
                let taken = followers[stream].take().unwrap();
                assert_eq!(taken.set.as_ref().unwrap().revision(), newest);
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
                follower.subscribe(EDS, &subscription(EDS, &names));
                let mut taken = follower.take().unwrap();
                let target = LAST / u64::from(ROUNDS) * u64::from(round + 1);
                // Until both names have come this far, which each does.
                while names.iter().any(|name| {
                    taken
                        .set
                        .as_ref()
                        .unwrap()
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
