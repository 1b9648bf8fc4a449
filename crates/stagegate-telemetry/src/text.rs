//! Texts of others, made safe to look at: owns which characters a terminal or a reader must never be given as they are.

use std::borrow::Cow;

/// Whether a character moves the cursor, hides, or turns the order of what is read: the controls (C0, C1, DEL), and Unicode's
/// marks of direction, invisible operators and tags. The joiners of emoji and scripts are none.
pub fn is_unsafe(character: char) -> bool {
    character.is_control()
        || matches!(
            u32::from(character),
            0x00AD | 0x061C | 0x180E | 0x200B | 0x200E..=0x200F | 0x2028..=0x202E | 0x2060..=0x206F | 0xFEFF
                | 0xFFF9..=0xFFFB | 0xE0000..=0xE007F
        )
}

/// The text with those characters shown instead of sent. Line breaks and tabs are left.
pub fn visible(text: &str) -> Cow<'_, str> {
    let is_shown = |c: char| is_unsafe(c) && c != '\n' && c != '\t';
    if !text.contains(is_shown) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 16);
    for character in text.chars() {
        if is_shown(character) {
            shown.extend(character.escape_unicode());
        } else {
            shown.push(character);
        }
    }
    Cow::Owned(shown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn controls_and_marks_of_direction_are_shown_and_words_are_left() {
        for (text, shown) in [
            ("\u{1b}[2Jgone\u{7}", "\\u{1b}[2Jgone\\u{7}"),
            ("\u{9b}31m", "\\u{9b}31m"),
            ("user\u{202e}txt.exe", "user\\u{202e}txt.exe"),
            ("a\u{2066}b\u{2069}", "a\\u{2066}b\\u{2069}"),
            ("line\nbreak\ttab", "line\nbreak\ttab"),
            ("\u{1F468}\u{200D}\u{1F469} caf\u{e9} \u{5d0}", "\u{1F468}\u{200D}\u{1F469} caf\u{e9} \u{5d0}"),
        ] {
            assert_eq!(visible(text), shown);
        }
    }
}
