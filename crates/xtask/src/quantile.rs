//! Quantiles by nearest rank: what is told is always a value that was measured.

/// The value at or below which `percent` of the sorted ones lie; NaN where there is none.
pub(crate) fn nearest_rank(sorted: &[f64], percent: usize) -> f64 {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or(f64::NAN)
}
