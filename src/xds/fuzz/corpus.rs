//! Inputs as bytes. Those that made something happen which no other did are kept in `corpus/`, a line of hexadecimal digits
//! each; they are tried first, and new ones are made from them.

use std::{
    collections::BTreeSet,
    fs,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::time::Instant;

/// The longest input.
const LONGEST: usize = 400;

/// Inputs that are kept of one target.
const KEPT: usize = 120;

/// What happened, as pairs of one event and the next.
#[derive(Debug, Default)]
pub(super) struct Trace {
    pairs: BTreeSet<u64>,
    last: u64,
}

impl Trace {
    /// `event` must have few values: an input that brings a new one, or a new pair, is kept.
    pub(super) fn note(&mut self, event: &str) {
        let mut hasher = DefaultHasher::new();
        event.hash(&mut hasher);
        let event = hasher.finish();
        self.pairs.insert(event ^ self.last.rotate_left(1));
        self.last = event;
    }
}

fn path(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src/xds/fuzz/corpus").join(target).with_extension("hex")
}

fn hex(input: &[u8]) -> String {
    input.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn load(target: &str) -> Vec<Vec<u8>> {
    let path = path(target);
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let lines = text.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
    let byte = |line: &str, at| u8::from_str_radix(&line[at..at + 2], 16);
    let parse = |line: &str| (0..line.len()).step_by(2).map(|at| byte(line, at)).collect::<Result<_, _>>();
    lines.map(|line| parse(line).unwrap_or_else(|error| panic!("{target}: {line}: {error}"))).collect()
}

/// Tries the corpus of `target`, then `cases` inputs made from it, the same each time. With `DISCO_FUZZ_SECONDS` in the
/// environment it goes on with others for that long, and the corpus takes in what was new. A failure prints the input.
#[allow(clippy::disallowed_methods, reason = "a setting of the tests, not of Disco")]
pub(super) fn fuzz(target: &str, cases: u32, run: impl Fn(&[u8]) -> Trace) {
    let seconds = std::env::var("DISCO_FUZZ_SECONDS").ok().and_then(|text| text.parse().ok());
    let until = Instant::now() + Duration::from_secs(seconds.unwrap_or(0));
    let run = |input: &[u8]| {
        let outcome = catch_unwind(AssertUnwindSafe(|| run(input)));
        outcome.unwrap_or_else(|_| panic!("keep it as a line of corpus/{target}.hex: {}", hex(input))).pairs
    };
    let mut inputs = load(target);
    let kept = inputs.len();
    assert!(kept > 0, "there is a corpus");
    let mut seen: BTreeSet<u64> = inputs.iter().flat_map(|input| run(input)).collect();
    let known = seen.len();
    let mut random = fastrand::Rng::with_seed(seconds.unwrap_or(0));
    let mut tried: u64 = 0;
    while tried < cases.into() || Instant::now() < until {
        tried += 1;
        let input = mutate(&inputs, &mut random);
        let before = seen.len();
        seen.extend(run(&input));
        if seen.len() > before {
            inputs.push(input);
        }
    }
    if seconds.is_some() {
        println!(
            "{target}: {kept} inputs kept, {tried} tried, {known} pairs of events known, {} found",
            seen.len()
        );
        keep(target, inputs, run);
    }
}

fn mutate(inputs: &[Vec<u8>], random: &mut fastrand::Rng) -> Vec<u8> {
    let some = |random: &mut fastrand::Rng| random.choice(inputs).cloned().unwrap_or_default();
    let mut input = some(random);
    for _ in 0..random.usize(1..6) {
        let at = random.usize(0..=input.len());
        let end = (at + random.usize(0..24)).min(input.len());
        match random.u8(0..6) {
            0 => drop(input.drain(at..end)),
            1 => drop(input.splice(at..at, std::iter::repeat_with(|| random.u8(..)).take(end - at + 1))),
            2 => input[at..end].iter_mut().take(3).for_each(|byte| *byte = random.u8(..)),
            3 => input[at..end].iter_mut().take(1).for_each(|byte| *byte ^= 1 << random.u8(0..8)),
            4 => drop(input.splice(at..at, input[at..end].to_vec())),
            _ => {
                let other = some(random);
                let from = random.usize(0..=other.len());
                input.truncate(at);
                input.extend_from_slice(&other[from..]);
            }
        }
    }
    input.truncate(LONGEST);
    input
}

/// Writes the few and short inputs that show what was seen, as far as there is room.
fn keep(target: &str, inputs: Vec<Vec<u8>>, run: impl Fn(&[u8]) -> BTreeSet<u64>) {
    let mut traces: Vec<_> = inputs.into_iter().map(|input| (run(&input), input)).collect();
    let mut missing: BTreeSet<u64> = traces.iter().flat_map(|(trace, _)| trace.clone()).collect();
    let mut kept = vec![];
    while kept.len() < KEPT && !missing.is_empty() {
        // What is new, at the price of its bytes.
        let worth = |(trace, input): &(BTreeSet<u64>, Vec<u8>)| {
            trace.intersection(&missing).count() * 1000 / (16 + input.len())
        };
        let Some(best) = (0..traces.len()).max_by_key(|at| worth(&traces[*at])) else { break };
        let (trace, input) = traces.swap_remove(best);
        missing.retain(|pair| !trace.contains(pair));
        kept.push(hex(&input));
    }
    kept.sort_by_key(|line| (line.len(), line.clone()));
    let path = path(target);
    fs::write(&path, kept.join("\n") + "\n").unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}
