//! The simulator's words: owns how an answer comes to read like one. Every statement is made from the prompt's own
//! sentences, so that an answer to a brief speaks of that brief.

use std::fmt::Write;

use stagegate_core::pipeline::Role;

use super::{CRITIQUE_GREETING, DRAFT_MARK, dice::Dice};
use crate::provider::ProviderRequest;

/// Sentences kept from a prompt, at most.
const SENTENCES_MAX: usize = 60;

/// The shortest and the longest sentence that is kept, in characters.
const SENTENCE_CHARS: std::ops::RangeInclusive<usize> = 16..=220;

/// The most of a prompt that is read, in bytes.
const PROMPT_MAX_BYTES: usize = 64 * 1024;

/// Words with which a prompt instructs; a line or sentence that begins with one is no material.
const INSTRUCTIONS: [&str; 34] = [
    "you",
    "your",
    "list",
    "write",
    "give",
    "return",
    "answer",
    "produce",
    "use",
    "keep",
    "design",
    "describe",
    "turn",
    "derive",
    "draft",
    "name",
    "make",
    "be",
    "do",
    "don't",
    "for",
    "include",
    "output",
    "respond",
    "review",
    "score",
    "summarize",
    "summarise",
    "explain",
    "create",
    "plan",
    "propose",
    "read",
    "base",
];

/// Statements by kind: what stands before and after a sentence of the material. The befores are taken off again where
/// an answer becomes the material of a later stage.
type Forms = [(&'static str, &'static str); 3];

const REQUIREMENTS: Forms = [
    ("The system must make sure that this holds: ", "."),
    ("At any time it must be true that ", "."),
    ("A user can rely on this, or is told why not: ", "."),
];

const DECISIONS: Forms = [
    ("One component with one owner answers for this: ", "."),
    ("The state behind this is kept in one place, and nowhere else: ", "."),
    ("This is decided at the border, before anything is stored: ", "."),
];

const TESTS: Forms = [
    ("Given a fresh system, verify that this holds: ", "."),
    ("Break this on purpose and see it reported: ", "."),
    ("Do this a thousand times and find no difference: ", "."),
];

const RISKS: Forms = [
    ("This may not hold under load: ", ". Likelihood medium, impact high; limit it and watch it."),
    ("Nobody may notice when this stops being true: ", ". Likelihood low, impact high; alert on it."),
    ("This may cost more than was planned: ", ". Likelihood medium, impact medium; budget for it."),
];

const POINTS: Forms = [
    ("This is carried out in full: ", "."),
    ("This comes first, since the rest depends on it: ", "."),
    ("This is kept small, and can be changed later: ", "."),
];

/// How a reason begins.
const REASONS: Forms =
    [("It matters because ", "."), ("This was chosen because ", "."), ("What was given asks for it: ", ".")];

/// What the simulator says besides; no material for a later stage.
const FILLERS: [&str; 8] = [
    "likelihood ",
    "limit it and watch",
    "this text starts from",
    "it keeps to what can be",
    "more is to follow",
    "what the review found",
    "it is checked where",
    "who decides when",
];

/// What to say where a prompt holds no sentence.
const SPARE: [&str; 4] = [
    "the request is answered within its stated bounds",
    "each step can be checked on its own",
    "failures are reported with their cause",
    "the result can be traced back to its input",
];

/// What kind of document is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Requirements,
    Design,
    Tests,
    Risks,
    General,
}

/// The material of an answer.
#[derive(Debug)]
pub(super) struct Prose {
    kind: Kind,
    title: String,
    sentences: Vec<String>,
}

impl Prose {
    pub(super) fn from_request(request: &ProviderRequest<'_>) -> Self {
        let is_material = |role: Role, text: &str| role == Role::User && !text.starts_with(CRITIQUE_GREETING);
        let users = request.messages.iter().filter(|m| is_material(m.role, &m.content));
        let mut text = users.map(|message| message.content.as_str()).collect::<Vec<_>>().join("\n");
        let mut end = text.len().min(PROMPT_MAX_BYTES);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
        let kind = kind(&text);
        let mut sentences = sentences(&text);
        let named = headings(&text).next().or_else(|| sentences.first().cloned());
        let title = named.map_or_else(|| "Simulated answer".to_owned(), |name| title(&name));
        if sentences.is_empty() {
            sentences = SPARE.iter().map(|spare| (*spare).to_owned()).collect();
        }
        Self { kind, title, sentences }
    }

    /// Where there is no prompt.
    pub(super) fn spare() -> Self {
        let sentences = SPARE.iter().map(|spare| (*spare).to_owned()).collect();
        Self { kind: Kind::General, title: "Simulated answer".to_owned(), sentences }
    }

    /// A document in so many characters: its first lines, or where there is no room for these a few words.
    pub(super) fn shortened(&self, document: &str, chars_max: usize) -> String {
        let mut kept = String::new();
        let mut chars = 0;
        let mut said = 0;
        for line in document.split_inclusive('\n') {
            chars += line.chars().count();
            if chars > chars_max {
                break;
            }
            kept.push_str(line);
            said += usize::from(!line.trim().is_empty() && !line.starts_with(['#', '[']));
        }
        if said > 0 {
            return kept.trim_end().to_owned() + "\n";
        }
        let words = format!("[simulated] {}.", capitalised(self.sentence(0)));
        if words.chars().count() <= chars_max {
            return words;
        }
        let cut: String = words.chars().take(chars_max).collect();
        let whole = cut.rsplit_once(' ').map_or(cut.as_str(), |(whole, _)| whole);
        whole.trim_end_matches(|c: char| !c.is_alphanumeric() && c != ']').to_owned()
    }

    /// How many sentences there are; never none.
    pub(super) fn len(&self) -> usize {
        self.sentences.len()
    }

    /// The nth sentence, going round; in the middle of another sentence.
    pub(super) fn sentence(&self, nth: usize) -> &str {
        &self.sentences[nth % self.sentences.len()]
    }

    /// A few words of the nth sentence.
    pub(super) fn phrase(&self, nth: usize) -> String {
        title(self.sentence(nth))
    }

    /// A text of some paragraphs. A draft is shorter and says what it is; a revision answers the critique.
    pub(super) fn document(&self, seed: u64, is_draft: bool, critique: Option<&str>, dice: &mut Dice) -> String {
        let mut text = format!("[simulated by stagegate sim, seed {seed}]\n\n");
        if is_draft {
            let _ = write!(text, "## {DRAFT_MARK}\n\n");
        } else if critique.is_some() {
            text.push_str("## Revised\n\nThis revision carries out what the review found to be missing.\n\n");
        }
        let _ = write!(text, "# {}\n\n", self.title);
        let start = dice.index(self.sentences.len());
        let _ = write!(
            text,
            "## Summary\n\nThis text starts from what was given: {}. It holds that {}, and it keeps to what can be \
             checked.\n\n",
            self.sentence(0),
            self.sentence(start + 1)
        );
        let points = if is_draft { 3 } else { self.sentences.len().clamp(4, 7) };
        let _ = write!(text, "## {}\n\n", self.heading());
        for nth in 0..points {
            let point = if is_draft { format!("{}.", capitalised(self.sentence(nth))) } else { self.point(nth) };
            let _ = writeln!(text, "{}. {point}", nth + 1);
        }
        text.push_str("\n## Reasons\n\n");
        for nth in 0..if is_draft { 1 } else { 2 } {
            let reason = stated(*dice.pick(&REASONS), self.sentence(start + nth));
            let _ = writeln!(text, "{reason} It is checked where it is used.\n");
        }
        if is_draft {
            text.push_str("More is to follow once these points are agreed.\n");
            return text;
        }
        text.push_str("## Open questions\n\n");
        for nth in 0..2 {
            let _ = writeln!(text, "- Who decides when this changes: {}?", self.sentence(start + nth + 2));
        }
        text
    }

    fn heading(&self) -> &'static str {
        match self.kind {
            Kind::Requirements => "Requirements",
            Kind::Design => "Decisions",
            Kind::Tests => "Test cases",
            Kind::Risks => "Risks",
            Kind::General => "Points",
        }
    }

    fn point(&self, nth: usize) -> String {
        stated(self.kind.forms()[nth % 3], self.sentence(nth))
    }

    /// A statement for a key of a JSON answer, by the words in the keys that lead to it.
    pub(super) fn statement_for(&self, keys: &str, nth: usize) -> String {
        let by_keys = kind(keys);
        let kind = if by_keys == Kind::General { self.kind } else { by_keys };
        stated(kind.forms()[nth % 3], self.sentence(nth))
    }
}

impl Kind {
    fn forms(self) -> &'static Forms {
        match self {
            Self::Requirements => &REQUIREMENTS,
            Self::Design => &DECISIONS,
            Self::Tests => &TESTS,
            Self::Risks => &RISKS,
            Self::General => &POINTS,
        }
    }
}

fn stated((before, after): (&str, &str), sentence: &str) -> String {
    format!("{before}{sentence}{after}")
}

/// By the first word of its kind: a prompt names its purpose before its material.
fn kind(text: &str) -> Kind {
    let lower = text.to_lowercase();
    [
        ("requirement", Kind::Requirements),
        ("test", Kind::Tests),
        ("risk", Kind::Risks),
        ("design", Kind::Design),
        ("decision", Kind::Design),
        ("spec", Kind::Design),
    ]
    .into_iter()
    .filter_map(|(word, kind)| lower.find(word).map(|at| (at, kind)))
    .min_by_key(|(at, _)| *at)
    .map_or(Kind::General, |(_, kind)| kind)
}

/// The headings of the material, without the simulator's own.
fn headings(text: &str) -> impl Iterator<Item = String> {
    let own = [
        "Summary",
        "Requirements",
        "Decisions",
        "Test cases",
        "Risks",
        "Points",
        "Reasons",
        "Open questions",
        "Revised",
    ];
    text.lines()
        .filter_map(|line| line.trim_start().strip_prefix('#'))
        .map(|line| line.trim_start_matches('#').trim().to_owned())
        .filter(move |name| !name.is_empty() && !own.contains(&name.as_str()) && !name.contains("simulated"))
}

/// The material's sentences, without their marks; each once. A line that begins with an instruction is none of it, and
/// neither is a heading.
fn sentences(text: &str) -> Vec<String> {
    // Prompts often hold JSON of earlier stages: its punctuation and its escaped line breaks end a sentence too.
    let text = text.replace("\\n", "\n").replace("\\\"", "'");
    let mut sentences: Vec<String> = Vec::new();
    let lines = text.split(['\n', '"', '{', '}', '[', ']']).filter(|line| !line.starts_with('#'));
    for line in lines.filter(|line| !INSTRUCTIONS.contains(&first_word(line).as_str())) {
        for piece in line.split_inclusive(['.', '!', '?', ';']) {
            let words = without_lead(piece.trim_matches(|c: char| !c.is_alphanumeric()));
            if sentences.len() < SENTENCES_MAX && is_material(words) {
                let words = words.split_whitespace().collect::<Vec<_>>().join(" ");
                let sentence = uncapitalised(&words);
                if !sentences.contains(&sentence) {
                    sentences.push(sentence);
                }
            }
        }
    }
    sentences
}

fn first_word(text: &str) -> String {
    let word = text.split_whitespace().next().unwrap_or_default();
    word.trim_matches(|c: char| !c.is_alphanumeric()).to_lowercase()
}

fn without_lead(words: &str) -> &str {
    let befores = [REQUIREMENTS, DECISIONS, TESTS, RISKS, POINTS, REASONS];
    let befores = befores.as_flattened().iter().map(|(before, _)| *before);
    let mut own = befores.filter(|before| words.get(..before.len()).is_some_and(|w| w.eq_ignore_ascii_case(before)));
    own.next().map_or(words, |before| &words[before.len()..])
}

fn is_material(words: &str) -> bool {
    let lower = words.to_lowercase();
    SENTENCE_CHARS.contains(&words.chars().count())
        && words.split_whitespace().count() >= 4
        && !INSTRUCTIONS.contains(&first_word(words).as_str())
        && !lower.contains("simulated")
        && !FILLERS.iter().any(|filler| lower.contains(filler))
        && !words.contains("://")
}

/// The first words, as a title.
fn title(sentence: &str) -> String {
    let words: Vec<&str> = sentence.split_whitespace().take(6).collect();
    capitalised(words.join(" ").trim_end_matches(|c: char| !c.is_alphanumeric()))
}

fn capitalised(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |first| first.to_uppercase().chain(chars).collect())
}

/// With a small first letter, unless the first word is an abbreviation.
fn uncapitalised(text: &str) -> String {
    let mut chars = text.chars();
    match (chars.next(), chars.clone().next()) {
        (Some(first), Some(second)) if !second.is_uppercase() => first.to_lowercase().chain(chars).collect(),
        _ => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sentences_are_the_materials_not_the_instructions() {
        let found = sentences(
            "List the testable requirements in this brief.\n- Riders must see their bill within a minute. OK.\n\
             {\"requirements\":[\"[simulated] The system must make sure that this holds: a stop has a number.\",\"SMS alerts are sent at night\\nand by day they wait\"]}",
        );
        assert_eq!(
            found,
            [
                "riders must see their bill within a minute",
                "a stop has a number",
                "SMS alerts are sent at night",
                "and by day they wait"
            ]
        );
    }

    #[test]
    fn the_first_purpose_that_a_prompt_names_decides() {
        assert_eq!(kind("Design the system for these requirements"), Kind::Design);
        assert_eq!(kind("List the requirements, then we design"), Kind::Requirements);
        assert_eq!(kind("Hello"), Kind::General);
    }
}
