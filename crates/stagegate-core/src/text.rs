//! Text from outside: owns how bytes become text, alike for files, standard input, requests and configuration.

/// Why bytes are no text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotText {
    /// UTF-16 or UTF-32, as some editors and shells on Windows write.
    #[error("it is UTF-16 or UTF-32 text: save it as UTF-8")]
    Wide,
    /// Any other encoding, or none.
    #[error("it is not UTF-8 text: byte {0} begins no character; save it as UTF-8")]
    NotUtf8(usize),
}

/// UTF-8, with a byte order mark or without; the mark is taken off. Line ends stay as they are.
pub fn decode(bytes: Vec<u8>) -> Result<String, NotText> {
    let is_wide = match bytes.as_slice() {
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] | [0, 0, 0xfe, 0xff, ..] => true,
        // Without a mark: a document begins with an ASCII character.
        [0, other, ..] | [other, 0, ..] => *other != 0,
        _ => false,
    };
    if is_wide {
        return Err(NotText::Wide);
    }
    let mut text = String::from_utf8(bytes).map_err(|error| NotText::NotUtf8(error.utf8_error().valid_up_to()))?;
    if text.starts_with(MARK) {
        text.drain(..MARK.len_utf8());
    }
    Ok(text)
}

/// The byte order mark.
const MARK: char = '\u{feff}';

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_order_mark_is_taken_off_and_other_encodings_are_named() {
        assert_eq!(decode(b"\xef\xbb\xbfa\r\nb".to_vec()).as_deref(), Ok("a\r\nb"));
        assert_eq!(decode(Vec::new()).as_deref(), Ok(""));
        assert_eq!(decode("é".into()).as_deref(), Ok("é"));
        for wide in [&b"\xff\xfe{\0}\0"[..], b"\xfe\xff\0{\0}", b"{\0}\0", b"\0{\0}", b"\xff\xfe\0\0{\0\0\0"] {
            assert_eq!(decode(wide.to_vec()), Err(NotText::Wide), "{wide:?}");
        }
        assert_eq!(decode(b"ab\xe9".to_vec()), Err(NotText::NotUtf8(2)));
    }
}
