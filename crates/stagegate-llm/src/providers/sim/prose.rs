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

/// Words with which a prompt instructs; a sentence that begins with one is no material.
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
        let title = sentences.first().map_or_else(|| "Simulated answer".to_owned(), |first| title(first));
        if sentences.is_empty() {
            sentences = SPARE.iter().map(|spare| (*spare).to_owned()).collect();
        }
        Self { kind, title, sentences }
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
            let _ = writeln!(text, "{}. {}", nth + 1, self.point(nth, is_draft));
        }
        if is_draft {
            text.push_str("\nMore is to follow once these points are agreed.\n");
            return text;
        }
        text.push_str("\n## Reasons\n\n");
        for nth in 0..2 {
            let lead = dice.pick(&["It matters because", "This was chosen because", "The material asks for it:"]);
            let _ = writeln!(text, "{lead} {}. It is checked where it is used.\n", self.sentence(start + nth));
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

    fn point(&self, nth: usize, is_draft: bool) -> String {
        let sentence = self.sentence(nth);
        if is_draft {
            return format!("{}.", capitalised(sentence));
        }
        statement(self.kind, sentence)
    }

    /// A statement for a key of a JSON answer, by the words in the keys that lead to it.
    pub(super) fn statement_for(&self, keys: &str, nth: usize) -> String {
        let by_keys = kind(keys);
        statement(if by_keys == Kind::General { self.kind } else { by_keys }, self.sentence(nth))
    }
}

fn statement(kind: Kind, sentence: &str) -> String {
    match kind {
        Kind::Requirements => format!("The system must make sure that this holds: {sentence}."),
        Kind::Design => format!("We decide on one component, with one owner, for this: {sentence}. It has a test."),
        Kind::Tests => {
            format!("Given a fresh system, verify that this holds: {sentence}; then break it and see it fail.")
        }
        Kind::Risks => {
            format!("This may not hold under load: {sentence}. Likelihood medium, impact high; watch it and limit it.")
        }
        Kind::General => format!("{}. This is carried out in full and checked.", capitalised(sentence)),
    }
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

/// The material's sentences, without their marks; each once.
fn sentences(text: &str) -> Vec<String> {
    // Prompts often hold JSON of earlier stages: its punctuation and its escaped line breaks end a sentence too.
    let text = text.replace("\\n", "\n").replace("\\\"", "'");
    let mut sentences: Vec<String> = Vec::new();
    for line in text.split(['\n', '"', '{', '}', '[', ']']) {
        for piece in line.split_inclusive(['.', '!', '?', ';']).flat_map(|piece| piece.split(". ")) {
            let words = piece.trim_matches(|c: char| !c.is_alphanumeric());
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

fn is_material(words: &str) -> bool {
    let first = words.split_whitespace().next().unwrap_or_default().to_lowercase();
    let first = first.trim_end_matches(|c: char| !c.is_alphanumeric());
    SENTENCE_CHARS.contains(&words.chars().count())
        && words.split_whitespace().count() >= 4
        && !INSTRUCTIONS.contains(&first)
        && !words.to_lowercase().contains("simulated")
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
             {\"requirements\":[\"[simulated] this was made up before\",\"SMS alerts are sent at night\\nand by day they wait\"]}",
        );
        assert_eq!(
            found,
            ["riders must see their bill within a minute", "SMS alerts are sent at night", "and by day they wait"]
        );
    }

    #[test]
    fn the_first_purpose_that_a_prompt_names_decides() {
        assert_eq!(kind("Design the system for these requirements"), Kind::Design);
        assert_eq!(kind("List the requirements, then we design"), Kind::Requirements);
        assert_eq!(kind("Hello"), Kind::General);
    }
}
