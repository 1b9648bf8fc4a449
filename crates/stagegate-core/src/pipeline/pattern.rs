//! An author's regular expression: owns compiling it, and what looking for it in a text may cost.
//!
//! A search takes time in proportion to the text, nearly always at the speed of memory. Only where an expression is so
//! ambiguous that each character leads to a new state does it cost the expression's size as well; then a large text
//! takes minutes, and a search cannot be interrupted. So a search that could take too long is tried first in a way that
//! gives up where that happens.

use regex::{Regex, RegexBuilder};
use regex_automata::{Input, hybrid::dfa::DFA, nfa::thompson};
use regex_syntax::hir::{Hir, HirKind};

use crate::evaluation::{self, Unclaimed};

/// The largest compiled regular expression, in bytes.
pub(super) const REGEX_MAX_BYTES: usize = 256 * 1024;
/// How often the states of a trial may outgrow its memory before it gives up.
const TRIAL_CLEARS_MAX: usize = 8;

/// A compiled regular expression.
#[derive(Debug)]
pub(super) struct Pattern {
    regex: Regex,
    /// The places of the expression that a search can be at, at worst all of them at once.
    places: u64,
}

impl Pattern {
    /// Compiles an expression; else what is wrong with it.
    pub(super) fn compile(source: &str) -> Result<Self, regex::Error> {
        let regex = RegexBuilder::new(source).size_limit(REGEX_MAX_BYTES).build()?;
        Ok(Self { places: places(source), regex })
    }

    /// The first match in a text.
    pub(super) fn find<'t>(&self, text: &'t str) -> Option<regex::Match<'t>> {
        self.regex.find(text)
    }

    /// All matches in a text, with their groups.
    pub(super) fn captures<'r, 't>(&'r self, text: &'t str) -> regex::CaptureMatches<'r, 't> {
        self.regex.captures_iter(text)
    }

    /// Whether it may be looked for in this text; else, as the rest of a sentence, why not.
    pub(super) fn claim(&self, text: &str) -> Result<(), String> {
        self.claim_if(text, || self.is_plain_in(text))
    }

    /// The same for all matches with their groups: where a pattern has some, they are found by walking all its places.
    pub(super) fn claim_captures(&self, text: &str) -> Result<(), String> {
        self.claim_if(text, || self.regex.captures_len() == 1 && self.is_plain_in(text))
    }

    fn claim_if(&self, text: &str, is_plain: impl FnOnce() -> bool) -> Result<(), String> {
        let price = self.places.saturating_mul(text.len() as u64);
        match evaluation::claim(price) {
            Ok(()) => Ok(()),
            Err(Unclaimed::Interrupted) => Err("the check was ended early".to_owned()),
            Err(Unclaimed::TooDear(_)) if is_plain() => Ok(()),
            Err(Unclaimed::TooDear(times)) => Err(format!(
                "could take about {times} times as long as an evaluation may, for a text of {} bytes: write an \
                 expression that repeats less, or check a shorter text",
                text.len()
            )),
        }
    }

    /// Whether the text leads through few enough states.
    fn is_plain_in(&self, text: &str) -> bool {
        let config = DFA::config()
            .minimum_cache_clear_count(Some(TRIAL_CLEARS_MAX))
            .minimum_bytes_per_state(Some(64))
            .unicode_word_boundary(true);
        let nfa = thompson::Config::new().nfa_size_limit(Some(4 * REGEX_MAX_BYTES));
        let Ok(trial) = DFA::builder().configure(config).thompson(nfa).build(self.regex.as_str()) else { return false };
        trial.try_search_fwd(&mut trial.create_cache(), &Input::new(text)).is_ok()
    }
}

/// Why an expression cannot be used, and what to write instead. It may be a good one in another engine: what that engine
/// has and this one has not is told by its name.
pub(super) fn why_not(source: &str, error: &impl std::fmt::Display) -> (String, String) {
    const SYNTAX: &str = "see https://docs.rs/regex for the syntax";
    let does_not = |why: &str| format!("the regular expression does not compile: {why}");
    match regex_syntax::parse(source) {
        // A good expression that makes too large a program.
        Ok(_) => {
            let why = format!("its repetitions make a program of more than {REGEX_MAX_BYTES} bytes");
            let mend =
                format!("write smaller bounds, or check the length by itself (`maxLength`, `max_chars`); {SYNTAX}");
            (does_not(&why), mend)
        }
        Err(_) if has_any(source, &["(?=", "(?!", "(?<=", "(?<!"]) => {
            let why = "look-around is not part of this engine, whose searches take time in proportion to the text";
            let mend = format!(
                "write what must match, and what must not as a check of its own (`not_matches`, or `not: {{ pattern: … }}` in a schema); {SYNTAX}"
            );
            (does_not(why), mend)
        }
        Err(_) if has_back_reference(source) => {
            let why = "back-references are not part of this engine, whose searches take time in proportion to the text";
            (does_not(why), format!("write out what the group may match; {SYNTAX}"))
        }
        Err(_) => {
            let detail = error.to_string();
            // The last line of a syntax error says what is wrong; the others draw where.
            let detail = detail.lines().last().unwrap_or_default().trim_start_matches("error: ");
            (does_not(detail), SYNTAX.to_owned())
        }
    }
}

fn has_any(source: &str, parts: &[&str]) -> bool {
    parts.iter().any(|part| source.contains(part))
}

/// `\1` to `\9`, or `\k<name>`.
fn has_back_reference(source: &str) -> bool {
    let mut chars = source.chars();
    while let Some(char) = chars.next() {
        if char == '\\' && chars.next().is_some_and(|next| ('1'..='9').contains(&next) || next == 'k') {
            return true;
        }
    }
    false
}

/// The places of an expression, each as often as it is repeated; at most what a program of the largest size has.
pub(super) fn places(source: &str) -> u64 {
    match regex_syntax::parse(source) {
        Ok(hir) => places_of(&hir).max(1),
        Err(_) => REGEX_MAX_BYTES as u64,
    }
}

fn places_of(hir: &Hir) -> u64 {
    match hir.kind() {
        HirKind::Empty | HirKind::Look(_) => 1,
        HirKind::Literal(literal) => literal.0.len() as u64,
        // As many as the longest of its characters has bytes.
        HirKind::Class(class) => class.maximum_len().unwrap_or(1) as u64,
        HirKind::Repetition(repetition) => {
            let times = repetition.max.unwrap_or(repetition.min.saturating_add(1)).max(1);
            places_of(&repetition.sub).saturating_mul(times.into())
        }
        HirKind::Capture(capture) => places_of(&capture.sub),
        HirKind::Concat(parts) | HirKind::Alternation(parts) => {
            parts.iter().map(places_of).fold(0, u64::saturating_add)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::evaluation::{Stop, whole};

    fn claimed(pattern: &str, text: &str, longest_s: u64) -> Result<(), String> {
        let pattern = Pattern::compile(pattern).expect("valid");
        whole(&Stop::default(), Duration::from_secs(longest_s), || pattern.claim(text)).expect("finished")
    }

    #[test]
    fn places_are_counted_as_often_as_they_are_repeated() {
        for (pattern, expected) in [("abc", 3), ("a{3}", 3), ("[ab]{2,5}", 5), ("a+", 2), ("(a|bc)*", 3), ("é", 2)] {
            assert_eq!(places(pattern), expected, "{pattern}");
        }
        assert!(places("^[01]*1[01]{3000}$") > 3_000);
        assert!(places(r"(?i)lorem ipsum\b") < 100);
    }

    #[test]
    fn an_ambiguous_expression_on_a_large_text_is_refused_with_what_to_change() {
        let bits: String =
            (0_u32..200_000).map(|n| if (n.wrapping_mul(2_654_435_761) >> 16) & 1 == 0 { '0' } else { '1' }).collect();
        let why = claimed("^[01]*1[01]{3000}$", &bits, 1).expect_err("six seconds at worst");
        assert!(why.contains("200000 bytes") && why.contains("repeats less"), "{why}");
        assert_eq!(claimed("^[01]*1[01]{3000}$", &bits[..30_000], 1), Ok(()), "small enough");
    }

    #[test]
    fn groups_are_found_at_the_full_price() {
        let text = "ab ".repeat(1_000_000);
        let claimed = |source: &str| {
            let pattern = Pattern::compile(source).expect("valid");
            whole(&Stop::default(), Duration::from_secs(1), || pattern.claim_captures(&text)).expect("finished")
        };
        assert!(claimed("(?:[ab]{1,200})").is_ok());
        assert!(claimed("([ab]{1,200})").expect_err("walked place by place").contains("repeats less"));
        assert!(claimed("(a)b").is_ok());
    }

    #[test]
    fn a_plain_expression_is_accepted_for_any_text() {
        let text = "The quick brown fox jumps over the lazy dog. ".repeat(100_000);
        for pattern in ["(?i)lorem ipsum", r"^[\w\s.,]{2,4}$", "fox|dog|cat", r"(?s)^.{10,90}end"] {
            assert_eq!(claimed(pattern, &text, 1), Ok(()), "{pattern}");
        }
    }
}
