//! What the orchestrator computes between the learners: merges, outer steps, and the public form that everybody has.

use anyhow::anyhow;
use fragments::codec::{self, PayloadHeader};
use fragments::delta;
use fragments::keyframe::{self, KeyframeId};
use fragments::merge::{Input, Merged, averaged, merge, robust_merge, unit_norms};
use fragments::outer;
use fragments::state::FragmentState;
use protocol::documents::Codec;
use protocol::{Digest, FragmentPlan, MergeRule, Reason, Slice};

use super::setting::{Base, Model};
use super::swarm::Scheme;

/// How contributions are combined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// The mean of everything.
    Mean,
    /// Radial-directional averaging with the mean norm as radius, as published; no filter.
    MeanRadius,
    /// The same with the median norm; no filter.
    MedianRadius,
    /// Filters, clipping, median radius: what the orchestrator does.
    Robust,
}

impl Rule {
    pub const ALL: [Self; 4] = [Self::Mean, Self::MeanRadius, Self::MedianRadius, Self::Robust];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Mean => "mean",
            Self::MeanRadius => "RDA, mean radius",
            Self::MedianRadius => "RDA, median radius",
            Self::Robust => "filters + RDA, median radius",
        }
    }

    /// Combines contributions of equal weight.
    pub fn merge(self, slices: &[Slice], contributions: &[Vec<f32>]) -> anyhow::Result<Merged> {
        let inputs: Vec<Input> = contributions.iter().map(|values| Input { values, weight: 1 }).collect();
        Ok(match self {
            Self::Mean => merge(&averaged(slices), &inputs)?,
            Self::MedianRadius => merge(slices, &inputs)?,
            Self::Robust => robust_merge(slices, &inputs)?,
            Self::MeanRadius => {
                let mut merged = merge(slices, &inputs)?;
                set_mean_radius(slices, contributions, &mut merged.delta)?;
                merged
            }
        })
    }
}

/// Brings each merged unit to the mean norm of the contributions in place of their median.
fn set_mean_radius(slices: &[Slice], contributions: &[Vec<f32>], delta: &mut [f32]) -> anyhow::Result<()> {
    let found = unit_norms(slices, delta)?;
    let norms = contributions.iter().map(|values| unit_norms(slices, values)).collect::<Result<Vec<_>, _>>()?;
    let mut rest = delta;
    let units = slices.iter().flat_map(|slice| (0..slice.rows() / slice.unit_rows).map(move |_| slice));
    for (unit, slice) in units.enumerate() {
        let (values, tail) = rest.split_at_mut((slice.unit_rows * slice.row_elements) as usize);
        let radius = norms.iter().map(|norms| norms[unit]).sum::<f64>() / norms.len() as f64;
        if slice.rule == MergeRule::Rda && found[unit] > 0.0 {
            values.iter_mut().for_each(|value| *value = (f64::from(*value) * radius / found[unit]) as f32);
        }
        rest = tail;
    }
    Ok(())
}

/// F32 states, the public forms, versions.
pub struct Server<'a> {
    plan: &'a FragmentPlan,
    digest: Digest,
    scheme: Scheme,
    /// How each slice is merged.
    slices: Vec<Vec<Slice>>,
    closing: bool,
    states: Vec<FragmentState>,
    /// Θ̂ of each fragment, as everybody has it.
    replicas: Model,
    versions: Vec<u64>,
    /// Means of the step norms.
    means: Vec<u64>,
}

impl<'a> Server<'a> {
    pub fn new(base: &'a Base, scheme: Scheme) -> anyhow::Result<Self> {
        let (plan, digest) = (&base.plan, base.plan.digest());
        let count = plan.fragments.len();
        let states = (0..count).map(|fragment| Ok(FragmentState::new(base.tree.read_fragment(plan, fragment)?, scheme.momentum > 0.0)));
        let states = states.collect::<anyhow::Result<Vec<_>>>()?;
        let slices = plan.fragments.clone();
        let (versions, means) = (vec![0; count], vec![0; count]);
        let mut server = Self { plan, digest, scheme, slices, closing: false, states, replicas: Vec::new(), versions, means };
        server.replicas = (0..count).map(|fragment| server.keyframe(fragment)).collect::<Result<_, _>>()?;
        Ok(server)
    }

    /// From here on merges give the average of the learners' weights.
    pub fn close(&mut self) {
        self.slices = self.plan.fragments.iter().map(|slices| averaged(slices)).collect();
        self.closing = true;
    }

    pub fn replica(&self, fragment: usize) -> &[f32] {
        &self.replicas[fragment]
    }

    /// The header that payloads for a fragment have now.
    pub fn header(&self, fragment: usize) -> PayloadHeader {
        let codec = if self.closing { self.scheme.closing } else { self.scheme.up };
        PayloadHeader::new(codec, self.plan, self.digest, fragment, self.versions[fragment])
    }

    /// Merges payloads into the next version, after the attackers among the learners (the last ones) have replaced theirs. Gives the
    /// decoded contributions and what became of each.
    pub fn merge(&mut self, fragment: usize, payloads: &[Vec<u8>], seed: u64) -> anyhow::Result<(Vec<Vec<f32>>, Vec<Reason>)> {
        let header = self.header(fragment);
        let mut contributions = payloads.iter().map(|bytes| codec::decode(bytes, &header)).collect::<Result<Vec<_>, _>>()?;
        if let Some((attack, attackers)) = self.scheme.attack {
            let honest = contributions.len() - attackers;
            contributions.truncate(honest);
            contributions.extend(attack.contributions(&contributions, attackers, seed));
        }
        let merged = self.scheme.rule.merge(&self.slices[fragment], &contributions);
        let mut merged = merged.map_err(|error| anyhow!("fragment {fragment}: {error}"))?;
        let (lr, mu) = if self.closing { (1.0, 0.0) } else { (self.scheme.outer_lr, self.scheme.momentum) };
        if self.scheme.rule == Rule::Robust && !self.closing {
            let (mean, steps) = (&mut self.means[fragment], self.versions[fragment]);
            outer::limit(&mut merged.delta, merged.norm_micro, *mean, steps);
            *mean = outer::mean_norm(*mean, steps, merged.norm_micro);
        }
        let state = &mut self.states[fragment];
        outer::step(&mut state.theta, &mut state.momentum, &merged.delta, lr, mu);
        self.publish(fragment)?;
        Ok((contributions, merged.inputs.iter().map(|report| report.outcome).collect()))
    }

    fn publish(&mut self, fragment: usize) -> anyhow::Result<()> {
        let base = self.id(fragment);
        self.versions[fragment] += 1;
        self.replicas[fragment] = match self.scheme.down {
            Codec::Int4 => delta::write(self.plan, &base, &self.replicas[fragment], &self.states[fragment].theta)?.replica,
            _ => self.keyframe(fragment)?,
        };
        Ok(())
    }

    /// The state of a fragment through its published file.
    fn keyframe(&self, fragment: usize) -> anyhow::Result<Vec<f32>> {
        let id = self.id(fragment);
        let bytes = keyframe::write(self.plan, &id, &self.states[fragment].theta)?;
        Ok(keyframe::read(self.plan, &id, &bytes)?)
    }

    fn id(&self, fragment: usize) -> KeyframeId {
        KeyframeId { plan: self.digest, fragment: fragment as u32, version: self.versions[fragment] }
    }

    /// What a release would hold.
    pub fn into_model(self) -> Model {
        self.states.into_iter().map(|state| state.theta).collect()
    }
}
