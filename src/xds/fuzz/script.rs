//! What a script of a client and of the world around it is, and how bytes spell one: whatever the bytes are, they spell some.

use crate::xds::ResourceType;

/// A request of any kind, in the words of both forms.
#[derive(Debug, Clone)]
pub(super) struct Odd {
    pub(super) url: u8,
    pub(super) names: Vec<u8>,
    pub(super) gives_up: Vec<u8>,
    /// Of the type's newest response, of any earlier one, or invented.
    pub(super) nonce: Option<u8>,
    pub(super) error: bool,
    pub(super) holds: Vec<(u8, u8)>,
    pub(super) node: Option<u8>,
    /// Bytes to change in the encoded request.
    pub(super) flips: Vec<(u16, u8)>,
}

#[derive(Debug, Clone)]
pub(super) enum Step {
    Request(Odd),
    Put(u8, u8, u8),
    Remove(u8, u8),
    Emit,
    Wait(u8),
}

#[derive(Debug, Clone)]
pub(super) struct Script {
    /// An Envoy's stream, not a gRPC client's.
    pub(super) envoy: bool,
    /// The server has something to serve from the start.
    pub(super) synced: bool,
    pub(super) steps: Vec<Step>,
}

const NAMES: [&str; 8] = [
    "a",
    "b",
    "c",
    "x",
    "*",
    "",
    "xdstp:///envoy.config.endpoint.v3.LbEndpoint/c/*",
    "xdstp:///envoy.config.endpoint.v3.LbEndpoint/c/a",
];

/// The name of something that the server has: members of collections are of one type only.
pub(super) fn there(kind: ResourceType, n: u8) -> String {
    if kind == ResourceType::LbEndpoint {
        NAMES[7].to_owned() + ["", "b", "c", "d"][usize::from(n) % 4]
    } else {
        name(n)
    }
}

pub(super) fn name(n: u8) -> String {
    if n == 63 { "x".repeat(3000) } else { NAMES[usize::from(n) % NAMES.len()].to_owned() }
}

pub(super) fn kind(n: u8) -> ResourceType {
    ResourceType::ALL[usize::from(n) % ResourceType::ALL.len()]
}

pub(super) fn url(n: u8) -> String {
    match n {
        60 => String::new(),
        61 => "x".repeat(600),
        50.. => format!("type.googleapis.com/unknown.{}", n % 4),
        n => kind(n).url().to_owned(),
    }
}

/// The longest script; what follows is not read.
const STEPS: usize = 80;

impl Script {
    pub(super) fn read(bytes: &[u8]) -> Self {
        let mut bytes = Bytes(bytes);
        let settings = bytes.next();
        let mut steps = vec![];
        while !bytes.0.is_empty() && steps.len() < STEPS {
            steps.push(bytes.step());
        }
        Self { envoy: settings & 1 == 0, synced: settings & 2 == 0, steps }
    }
}

/// What is left to read; zeros from where it ends.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn next(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn below(&mut self, limit: u8) -> u8 {
        self.next() % limit
    }

    fn list<T>(&mut self, limit: u8, mut one: impl FnMut(&mut Self) -> T) -> Vec<T> {
        (0..self.below(limit)).map(|_| one(self)).collect()
    }

    fn step(&mut self) -> Step {
        match self.below(16) {
            0..6 => Step::Request(self.request()),
            6..9 => Step::Put(self.below(4), self.below(4), self.below(3)),
            9..11 => Step::Remove(self.below(4), self.below(4)),
            11..15 => Step::Emit,
            _ => Step::Wait(self.below(100)),
        }
    }

    // What is an error comes seldom: it ends the script.
    fn request(&mut self) -> Odd {
        Odd {
            url: match self.next() {
                n @ 0..210 => n % 50,
                n @ 210..253 => 50 + n % 10,
                253 => 60,
                254.. => 61,
            },
            names: self.list(4, |bytes| match bytes.next() {
                255 => 63,
                n => n % 6,
            }),
            gives_up: self.list(3, |bytes| bytes.below(8)),
            nonce: Some(self.below(16)).filter(|n| *n < 12),
            error: self.below(4) == 3,
            holds: self.list(4, |bytes| (bytes.below(6), bytes.below(4))),
            node: match self.next() {
                0..85 => Some(0),
                85..254 => None,
                254.. => Some(1),
            },
            flips: match self.next() {
                n @ 224.. => (0..1 + n % 3)
                    .map(|_| (u16::from_be_bytes([self.next(), self.next()]), self.next()))
                    .collect(),
                _ => vec![],
            },
        }
    }
}
