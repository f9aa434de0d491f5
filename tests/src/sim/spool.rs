//! A miner's disk: what the spool of `quasar-miner` keeps, for as long as it keeps it.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use bytes::Bytes;
use protocol::Digest;
use protocol::audits::SEGMENT_CYCLES;
use protocol::documents::{OPENING_PARTS, OpenedStep};
use protocol::schedule::cycle_of;

use super::tensors::Weights;

/// Session and local step.
pub type Moment = (u64, u64);

/// Parts of an opening, by audit.
pub type Opening = [Bytes; OPENING_PARTS as usize];

/// Survives a crash.
#[derive(Default)]
pub struct Disk {
    /// States at the start of segments, with the applied versions.
    pub states: BTreeMap<Moment, (Weights, Vec<u64>)>,
    pub steps: BTreeMap<Moment, OpenedStep>,
    /// By outer step, session and local step.
    exports: BTreeMap<(u64, u64, u64), Export>,
    pub openings: BTreeMap<Digest, Opening>,
    pub keyframes: HashMap<(u16, u64), Bytes>,
    pub sequence: u64,
    pub session: u64,
}

/// What a payload is bound to.
struct Export {
    start_step: u64,
    payload: Digest,
}

/// What audits may still ask for, as far as this process was told.
#[derive(Default)]
pub struct Asked {
    /// Outer steps whose payloads audits ask for.
    pub steps: BTreeSet<u64>,
    /// Payloads of outer steps before this one are not asked for any more.
    released: u64,
}

/// The segment of a payload, with its steps.
pub struct Segment {
    pub start_step: u64,
    pub state: Weights,
    pub versions: Vec<u64>,
    pub steps: Vec<OpenedStep>,
}

impl Disk {
    /// Keeps the state before a step, and lets go of what no audit can ask for any more.
    pub fn put_state(&mut self, local_step: u64, state: Weights, versions: Vec<u64>, fragments: u16, asked: &Asked) {
        self.states.insert((self.session, local_step), (state, versions));
        self.trim(fragments, asked);
    }

    pub fn put_export(&mut self, t: u64, start_step: u64, local_step: u64, payload: Digest) {
        self.exports.insert((t, self.session, local_step), Export { start_step, payload });
    }

    /// The segment of the payload of outer step `t` with this digest, if it is there: two answers to one pull may lie here.
    pub fn segment(&self, t: u64, payload: Digest) -> Option<Segment> {
        let mut answers = self.exports.range((t, 0, 0)..(t + 1, 0, 0));
        let ((_, session, local_step), Export { start_step, .. }) = answers.find(|(_, export)| export.payload == payload)?;
        let (state, versions) = self.states.get(&(*session, *start_step))?.clone();
        let steps: Option<_> = (*start_step..*local_step).map(|step| self.steps.get(&(*session, step)).cloned()).collect();
        Some(Segment { start_step: *start_step, state, versions, steps: steps? })
    }

    /// Outer step `t` is opened: of its cycle nobody asks for another payload, nor of those before it.
    pub fn release(&mut self, t: u64, fragments: u16, asked: &mut Asked) {
        asked.released = asked.released.max((cycle_of(t, fragments) + 1) * u64::from(fragments));
        asked.steps.remove(&t);
        self.trim(fragments, asked);
    }

    fn trim(&mut self, fragments: u16, asked: &Asked) {
        let newest = self.exports.last_key_value().map_or(0, |((t, ..), _)| *t);
        let spooled = SEGMENT_CYCLES * u64::from(fragments);
        self.exports.retain(|(t, ..), _| asked.steps.contains(t) || (*t >= asked.released && *t + spooled > newest));
        let mut kept: BTreeSet<Moment> = self.exports.iter().map(|((_, session, _), export)| (*session, export.start_step)).collect();
        // A restart begins with the newest, and the next export may belong to the one before it.
        kept.extend(self.states.keys().rev().take(2));
        // A step belongs to the segment that began last before it.
        let states = &self.states;
        self.steps.retain(|step, _| states.range(..=*step).next_back().is_none_or(|(segment, _)| kept.contains(segment)));
        self.states.retain(|at, _| kept.contains(at));
    }
}
