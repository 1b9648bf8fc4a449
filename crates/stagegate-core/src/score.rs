//! Scores as people read them: owns which of their digits are shown. A score is cut, never rounded, so that one that missed
//! its threshold does not look as if it had met it.

/// So many decimals are shown where all of them decide nothing more.
const DECIMALS_MIN: usize = 4;

/// The score with the digits that decide, and its threshold: `0.6999…` and `0.7`.
pub fn against(score: f64, threshold: f64) -> (String, String) {
    let (text, needed) = (score.to_string(), threshold.to_string());
    let Some((whole, decimals)) = text.split_once('.').filter(|(_, decimals)| decimals.len() > DECIMALS_MIN) else {
        return (text, needed);
    };
    let decides = |cut: &str| cut.parse::<f64>().is_ok_and(|cut| (cut >= threshold) == (score >= threshold));
    let cut = (DECIMALS_MIN..decimals.len()).map(|length| format!("{whole}.{}", &decimals[..length]));
    (cut.into_iter().find(|cut| decides(cut)).map_or(text.clone(), |cut| format!("{cut}…")), needed)
}

/// The score with two decimals, for columns.
pub fn short(score: f64) -> String {
    let text = score.to_string();
    match text.split_once('.') {
        Some((whole, decimals)) if decimals.len() > 2 => format!("{whole}.{}", &decimals[..2]),
        _ => format!("{score:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_score_is_shown_with_the_digits_that_decide() {
        for (score, threshold, shown) in [
            (0.9, 0.7, "0.9 of 0.7"),
            (0.699_99, 0.7, "0.6999… of 0.7"),
            (0.699_999_999, 0.7, "0.6999… of 0.7"),
            (0.700_000_1, 0.7, "0.7000… of 0.7"),
            (0.700_000_02, 0.700_000_01, "0.70000002 of 0.70000001"),
            (0.123_456_789, 0.123_455, "0.123456… of 0.123455"),
            (1.0, 0.85, "1 of 0.85"),
        ] {
            let (score, threshold) = against(score, threshold);
            assert_eq!(format!("{score} of {threshold}"), shown);
        }
    }

    #[test]
    fn a_score_in_a_column_is_never_rounded_up() {
        for (score, shown) in [(0.95, "0.95"), (0.699_9, "0.69"), (1.0, "1.00"), (0.0, "0.00"), (0.4, "0.40")] {
            assert_eq!(short(score), shown);
        }
    }
}
