//! Attackers who know every honest contribution, after the simulation behind the robust merge
//! (`tests/reference/robust_merge_sim.py`).

/// What attackers send in place of a contribution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attack {
    /// The opposite of an honest contribution, ten times as long.
    Flip,
    /// An honest contribution, a hundred times as long.
    Long,
    /// All the same: against the honest mean, at the median norm.
    Collude,
    /// The same direction mixed with noise of their own, half and half.
    Jitter,
    /// "A little is enough": the honest mean less one standard deviation in every coordinate.
    Little,
}

impl Attack {
    pub const ALL: [Self; 5] = [Self::Flip, Self::Long, Self::Collude, Self::Jitter, Self::Little];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Flip => "sign flip x10",
            Self::Long => "norm x100",
            Self::Collude => "identical, against the mean",
            Self::Jitter => "the same, half noise",
            Self::Little => "mean less one deviation",
        }
    }

    /// The contributions of `attackers` attackers; `seed` chooses their noise.
    pub fn contributions(self, honest: &[Vec<f32>], attackers: usize, seed: u64) -> Vec<Vec<f32>> {
        let scaled = |values: &[f32], by: f64| values.iter().map(|value| (f64::from(*value) * by) as f32).collect();
        let own = |attacker: usize| &honest[attacker % honest.len()];
        let (mean, deviation) = mean_and_deviation(honest);
        let radius = median(honest.iter().map(|values| norm(values)).collect());
        let mean_norm = norm64(&mean).max(f64::MIN_POSITIVE);
        let make = |attacker: usize| -> Vec<f32> {
            match self {
                Self::Flip => scaled(own(attacker), -10.0),
                Self::Long => scaled(own(attacker), 100.0),
                Self::Collude => mean.iter().map(|mean| (-radius / mean_norm * mean) as f32).collect(),
                Self::Jitter => {
                    let noise = Noise(seed ^ (attacker as u64 + 1) << 32).direction(mean.len());
                    let half = 0.5f64.sqrt() * radius;
                    mean.iter().zip(noise).map(|(mean, noise)| (half * (noise - mean / mean_norm)) as f32).collect()
                }
                Self::Little => mean.iter().zip(&deviation).map(|(mean, deviation)| (mean - deviation) as f32).collect(),
            }
        };
        (0..attackers).map(make).collect()
    }
}

/// ‖values‖₂.
pub fn norm(values: &[f32]) -> f64 {
    values.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt()
}

fn norm64(values: &[f64]) -> f64 {
    values.iter().map(|value| value * value).sum::<f64>().sqrt()
}

/// The middle value of at least one.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len().is_multiple_of(2) { (values[middle - 1] + values[middle]) / 2.0 } else { values[middle] }
}

fn mean_and_deviation(vectors: &[Vec<f32>]) -> (Vec<f64>, Vec<f64>) {
    let count = vectors.len() as f64;
    let coordinate = |at: usize| {
        let mean = vectors.iter().map(|vector| f64::from(vector[at])).sum::<f64>() / count;
        let variance = vectors.iter().map(|vector| (f64::from(vector[at]) - mean).powi(2)).sum::<f64>() / count;
        (mean, variance.sqrt())
    };
    (0..vectors[0].len()).map(coordinate).unzip()
}

/// Normal deviates from a counter: Box-Muller over SplitMix64.
struct Noise(u64);

impl Noise {
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((word ^ word >> 31) >> 11) as f64 / (1u64 << 53) as f64
    }

    fn next(&mut self) -> f64 {
        let (radius, angle) = ((-2.0 * (1.0 - self.uniform()).ln()).sqrt(), self.uniform() * std::f64::consts::TAU);
        radius * angle.cos()
    }

    /// A random vector of length 1.
    fn direction(mut self, elements: usize) -> Vec<f64> {
        let values: Vec<f64> = (0..elements).map(|_| self.next()).collect();
        let length = norm64(&values).max(f64::MIN_POSITIVE);
        values.into_iter().map(|value| value / length).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dot(left: &[f32], right: &[f32]) -> f64 {
        left.iter().zip(right).map(|(left, right)| f64::from(*left) * f64::from(*right)).sum()
    }

    #[test]
    fn each_attack_sends_what_its_name_says() {
        let honest: Vec<Vec<f32>> =
            (0..6).map(|seed| Noise(seed).direction(5000).iter().map(|value| (value + 0.01) as f32).collect()).collect();
        let mean: Vec<f32> = mean_and_deviation(&honest).0.iter().map(|value| *value as f32).collect();
        let sent = |attack: Attack| attack.contributions(&honest, 2, 7);
        assert!((norm(&sent(Attack::Long)[1]) / norm(&honest[1]) - 100.0).abs() < 1e-3);
        assert!((dot(&sent(Attack::Flip)[0], &honest[0]) / dot(&honest[0], &honest[0]) + 10.0).abs() < 1e-3);
        let collude = sent(Attack::Collude);
        assert_eq!(collude[0], collude[1]);
        assert!((dot(&collude[0], &mean) / (norm(&collude[0]) * norm(&mean)) + 1.0).abs() < 1e-5);
        let jitter = sent(Attack::Jitter);
        let cosine = dot(&jitter[0], &jitter[1]) / (norm(&jitter[0]) * norm(&jitter[1]));
        assert!((cosine - 0.5).abs() < 0.1, "{cosine}");
        assert!(sent(Attack::Little)[0].iter().zip(&mean).all(|(little, mean)| little <= mean));
    }
}
