//! More than there is room for: streams, first requests, clients that do not read, storms, large messages.

use super::*;

#[tokio::test]
async fn k2_more_streams_than_allowed_are_turned_away() {
    let server = start_with(Some(one_of_each()), Config { streams: 2, ..Config::default() }).await;
    let mut streams = [server.delta("a").await, server.delta("b").await];
    let (_requests, third) =
        server.stream::<DeltaDiscoveryRequest, DeltaDiscoveryResponse>(methods::CLUSTERS[1]).await;
    let error = third.unwrap_err();
    assert_eq!(error.code(), tonic::Code::ResourceExhausted);
    assert!(error.message().contains("xds.streams"), "{error}");
    for stream in &mut streams {
        stream.ask(delta(CDS, &[], &[])).await;
        assert_eq!(stream.take().await, ["a"]);
    }
    let [first, _second] = streams;
    drop(first);
    server.until("the first left", |server| server.proxies.len() == 1).await;
    let mut next = server.delta("c").await;
    next.ask(delta(CDS, &[], &[])).await;
    assert_eq!(next.take().await, ["a"]);
}

#[tokio::test]
async fn k2_s_e6_first_requests_take_turns_and_wait_only_so_long() {
    let config =
        Config { arrivals: 1, first_request_timeout: Duration::from_millis(300), ..Config::default() };
    let server = start_with(Some(one_of_each()), config).await;
    let turn = server.ads.shared.arrivals.acquire().await.unwrap();
    let mut early = server.delta("early").await;
    early.ask(delta(CDS, &[], &[])).await;
    let error = early.next().await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::Unavailable, "{error}");

    let mut waiting = server.delta("waiting").await;
    waiting.ask(delta(CDS, &[], &[])).await;
    drop(turn);
    assert_eq!(waiting.take().await, ["a"]);
}

/// However often a response was waited for in vain and however much is newer: what was not taken is replaced.
#[tokio::test]
async fn pitfall_19_k8_one_response_of_a_type_is_held_for_a_reader_that_is_stuck() {
    const LAST: u64 = 10;
    // More than its connection takes in without it.
    const LARGE: usize = 3 << 20;
    let config = Config { ack_timeout: Duration::from_millis(1), ..Config::default() };
    let server = start_with(Some(ResourceSet::default()), config).await;
    let kinds = [CDS, EDS];
    // The memory of what was published, which is this list's alone once the server is done with it.
    let mut memory = Vec::new();
    let mut publish = |revision: u64| {
        let text = format!("{}{revision}", "x".repeat(LARGE));
        let resources = kinds.map(|kind| resource(kind, "a", &text));
        memory.extend(resources.iter().map(|resource| (revision, resource.kind, resource.delta_field())));
        server.publish(revision, resources.map(Change::Put));
    };
    publish(1);
    let ask = async |id| {
        let client = server.delta(id).await;
        for kind in kinds {
            client.ask(delta(kind, &["a"], &[])).await;
        }
        client
    };
    let mut stuck = ask("stuck").await;
    server.until("it is sent something", |server| server.counts.get("sent") > 0).await;
    let mut good = ask("good").await;
    for revision in 2..=LAST {
        assert_eq!((good.take().await.len(), good.take().await.len()), (1, 1));
        publish(revision);
    }
    let newest = server.sets.latest().unwrap();
    let held = |kind| {
        let of = memory
            .iter()
            .filter(|(revision, of, memory)| *of == kind && !memory.is_unique() && *revision < LAST);
        of.map(|(revision, ..)| *revision).collect::<Vec<_>>()
    };
    drop(good);
    server.until("one of a type is held", |_| kinds.iter().all(|kind| held(*kind).len() <= 1)).await;
    assert!(kinds.iter().any(|kind| !held(*kind).is_empty()), "it has read all of it");
    assert_eq!(stuck.take().await, ["a"]);
    for kind in kinds {
        // Nothing in between, once what was made before it read is through.
        let want = newest.get(kind, "a").unwrap().resource.version.to_string();
        let mut responses = 0;
        loop {
            let response = stuck.next().await.unwrap().unwrap();
            if response.type_url == kind.url() && response.resources[0].version == want {
                break;
            }
            responses += 1;
            assert!(responses <= 1, "{:?}", response.nonce);
        }
    }
}

#[tokio::test]
async fn pitfall_23_in_a_storm_nobody_who_is_stuck_holds_up_the_others() {
    let server = start_with(None, Config { arrivals: 1, ..Config::default() }).await;
    // They ask while there is nothing yet, and never read what comes.
    let mut stuck = Vec::new();
    for n in 0..20 {
        stuck.push(server.delta(&format!("stuck {n}")).await);
        stuck[n].ask(delta(CDS, &[], &[])).await;
    }
    server.until("all in the table", |server| server.proxies.len() == 20).await;
    let big = "x".repeat(1 << 20);
    server.publish(1, [Change::Put(resource(CDS, "a", &big))]);
    for n in 20..40 {
        stuck.push(server.delta(&format!("stuck {n}")).await);
        stuck[n].ask(delta(CDS, &[], &[])).await;
    }
    let mut good = server.delta("good").await;
    good.ask(delta(CDS, &[], &[])).await;
    assert_eq!(good.take().await, ["a"]);
}

#[tokio::test]
async fn pitfall_20_nothing_is_left_of_clients_that_left() {
    let config = Config { streams: 60, ..Config::default() };
    let server = start_with(Some(one_of_each()), config).await;
    for _ in 0..3 {
        let mut clients = Vec::new();
        for n in 0..50 {
            clients.push(server.delta(&format!("{n}")).await);
            clients[n].ask(delta(CDS, &[], &[])).await;
        }
        for (n, client) in clients.iter_mut().enumerate() {
            // Some leave with a response unread, some unanswered.
            if n % 3 > 0 {
                client.next().await.unwrap();
            }
        }
        drop(clients);
        let shared = &server.ads.shared;
        let left = || (server.proxies.len(), 60 - shared.streams.available_permits());
        server.until("all gone", |_| left() == (0, 0)).await;
        assert_eq!(shared.arrivals.available_permits(), Config::default().arrivals);
    }
}

#[tokio::test]
async fn pitfall_25_k5_a_first_request_of_many_megabytes_and_an_answer_in_parts() {
    let server = start(Some(one_of_each())).await;
    let mut client = server.delta("many").await;
    let names: Vec<String> = (0..100_000).map(|n| format!("a service with a rather long name {n}")).collect();
    let held = names.iter().map(|name| (name.clone(), "0123456789abcdef".to_owned())).collect();
    let request = DeltaDiscoveryRequest {
        type_url: EDS.url().into(),
        resource_names_subscribe: names,
        initial_resource_versions: held,
        ..Default::default()
    };
    assert!(prost::Message::encoded_len(&request) > 8 << 20);
    client.ask(request).await;
    let (mut removed, mut parts) = (0, 0);
    while removed < 100_000 {
        let response = client.next().await.unwrap().unwrap();
        assert!(prost::Message::encoded_len(&response) < 4 << 20);
        removed += response.removed_resources.len();
        parts += 1;
        client
            .ask(DeltaDiscoveryRequest {
                type_url: response.type_url,
                response_nonce: response.nonce,
                ..Default::default()
            })
            .await;
    }
    assert_eq!((removed, parts), (100_000, 2));
}
