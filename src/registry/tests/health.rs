use super::*;
use crate::model::{HealthReport, RawCheck, RawKind, Verdict};

fn checked(id: &str, incarnation: u64) -> Registration {
    let raw = RawRegistration {
        service: "greeter".into(),
        id: id.into(),
        incarnation: Some(incarnation),
        address: Some("127.0.0.1".into()),
        port: Some(1),
        ttl: Some(TTL),
        check: Some(RawCheck::default()),
        ..RawRegistration::default()
    };
    Registration::check(raw, &Limits::default()).unwrap()
}

fn report(id: &str, incarnation: u64, verdict: Verdict) -> HealthReport {
    HealthReport { key: key(id), incarnation: Incarnation(incarnation), verdict, reason: "seen\nso".into() }
}

/// `verdict, passed` of an instance.
fn verdict(registry: &Registry, id: &str) -> (Verdict, bool) {
    let snapshot = registry.catalog().latest();
    let health = &snapshot.instance(&key(id)).unwrap().health;
    (health.verdict, health.passed)
}

async fn records(store: &Arc<dyn Store>) -> usize {
    store.list(record::HEALTH).await.unwrap().entries.len()
}

#[tokio::test(start_paused = true)]
async fn a_verdict_is_written_when_it_changes_and_outlives_a_restart() {
    let store: Arc<dyn Store> = Arc::new(MemoryStore::default());
    let node = Node::start(Arc::clone(&store)).await;
    let registry = &node.registry;
    let first = registry.register(checked("a", 1)).await.unwrap();
    assert_eq!(verdict(registry, "a"), (Verdict::Unknown, false));
    assert_eq!(registry.catalog().latest().instance(&key("a")), Some(&first.instance));

    let healthy = registry.set_health(vec![report("a", 1, Verdict::Healthy)]).await.unwrap();
    assert!(healthy > first.revision);
    assert_eq!(verdict(registry, "a"), (Verdict::Healthy, true));
    assert_eq!(registry.set_health(vec![report("a", 1, Verdict::Healthy)]).await.unwrap(), healthy);
    registry.set_health(vec![report("a", 1, Verdict::Unhealthy)]).await.unwrap();
    let reason = registry.catalog().latest().instance(&key("a")).unwrap().health.reason.clone();
    assert_eq!(&*reason, "seen so");

    // Neither a renewal nor an update touches it, and it does not stand in their way.
    assert_eq!(registry.register(checked("a", 1)).await.unwrap().revision, first.revision);
    let update = Update { weight: 3.try_into().ok(), metadata: None };
    let updated = registry.update(key("a"), None, update).await.unwrap();
    assert_eq!(updated.instance.health.verdict, Verdict::Unhealthy);
    assert_eq!(verdict(registry, "a"), (Verdict::Unhealthy, true));

    node.stop().await;
    let node = Node::start(Arc::clone(&store)).await;
    assert_eq!(verdict(&node.registry, "a"), (Verdict::Unhealthy, true));
    assert_eq!(records(&store).await, 1);
    node.registry.deregister(key("a"), None).await.unwrap();
    assert_eq!(records(&store).await, 0, "the verdict goes with its instance");
}

#[tokio::test(start_paused = true)]
async fn a_verdict_is_on_one_run_of_a_checked_instance() {
    let store: Arc<dyn Store> = Arc::new(MemoryStore::default());
    let registry = Node::start(Arc::clone(&store)).await.registry;
    registry.register(checked("a", 1)).await.unwrap();
    registry.set_health(vec![report("a", 1, Verdict::Healthy)]).await.unwrap();
    registry.register(checked("a", 2)).await.unwrap();
    assert_eq!(verdict(&registry, "a"), (Verdict::Unknown, false), "a new run is checked anew");
    registry
        .set_health(vec![report("a", 1, Verdict::Unhealthy), report("b", 1, Verdict::Healthy)])
        .await
        .unwrap();
    assert_eq!(verdict(&registry, "a"), (Verdict::Unknown, false));
    registry.set_health(vec![report("a", 2, Verdict::Degraded)]).await.unwrap();
    assert_eq!(verdict(&registry, "a"), (Verdict::Degraded, true));
    let wrong = registry.report_health(report("a", 2, Verdict::Healthy)).await;
    assert_eq!(refused(wrong), "conflict health");

    // Without the check there is no verdict; with it again, proxies go on to know of the instance.
    registry.register(Registration { check: None, ..checked("a", 2) }).await.unwrap();
    assert_eq!(verdict(&registry, "a"), (Verdict::Unknown, true));
    assert_eq!(records(&store).await, 0);
    registry.register(checked("a", 2)).await.unwrap();
    assert_eq!(verdict(&registry, "a"), (Verdict::Unknown, true));

    let raw = RawCheck { kind: RawKind::Owner, ..RawCheck::default() };
    let owner = crate::model::Check::check_into(raw, &Limits::default(), &mut Default::default());
    registry.register(Registration { check: owner, ..checked("o", 1) }).await.unwrap();
    assert_eq!(verdict(&registry, "o"), (Verdict::Healthy, true));
    registry.report_health(report("o", 1, Verdict::Unhealthy)).await.unwrap();
    assert_eq!(verdict(&registry, "o"), (Verdict::Unhealthy, true));
    assert_eq!(
        refused(registry.report_health(report("o", 2, Verdict::Healthy)).await),
        "conflict incarnation"
    );
    registry.set_health(vec![report("o", 1, Verdict::Healthy)]).await.unwrap();
    assert_eq!(verdict(&registry, "o"), (Verdict::Unhealthy, true), "the server does not check it");
}

#[tokio::test(start_paused = true)]
async fn many_verdicts_are_few_commits_and_a_removal_meanwhile_harms_none() {
    let store = Gated::open();
    let registry = Node::start(Arc::clone(&store) as Arc<dyn Store>).await.registry;
    for n in 0..200 {
        registry.register(checked(&format!("i{n}"), 1)).await.unwrap();
    }
    store.close_gate();
    let reports = (0..200).map(|n| report(&format!("i{n}"), 1, Verdict::Healthy)).collect();
    let (removed, judged) = tokio::join!(registry.deregister(key("i7"), None), async {
        let judging = registry.set_health(reports);
        tokio::join!(judging, async {
            store.until_waiting(5).await;
            store.let_through(Semaphore::MAX_PERMITS);
        })
        .0
    });
    removed.unwrap();
    judged.unwrap();
    let snapshot = registry.catalog().latest();
    let healthy = |n: &usize| snapshot.instance(&key(&format!("i{n}"))).map(|i| i.health.verdict);
    assert!((0..200).filter(|n| *n != 7).all(|n| healthy(&n) == Some(Verdict::Healthy)));
    assert_eq!(records(&(store as Arc<dyn Store>)).await, 199);
}
