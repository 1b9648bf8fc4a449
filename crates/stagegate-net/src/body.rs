//! The body of an answer on its way: owns the bound on what is read of it, in bytes.

use bytes::{Bytes, BytesMut};

/// What is reserved at once for a body that comes in pieces, at most: an announced length is only a word.
const RESERVED_MAX_BYTES: usize = 256 * 1024;

/// More came than is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TooLarge;

/// A body within its bound.
#[derive(Debug, Default)]
pub(crate) struct Gathering {
    max_bytes: usize,
    /// Whether what is beyond the bound may be missing.
    may_be_cut: bool,
    announced: usize,
    /// Most bodies come in one piece, which needs no copy.
    first: Bytes,
    /// All of it, once there is a second piece.
    joined: BytesMut,
}

impl Gathering {
    /// An empty body of so many announced bytes. One that may be cut ends at its bound, any other one fails there.
    pub(crate) fn new(announced: Option<u64>, max_bytes: usize, may_be_cut: bool) -> Result<Self, TooLarge> {
        let announced = announced.map_or(0, |length| usize::try_from(length).unwrap_or(usize::MAX));
        if announced > max_bytes && !may_be_cut {
            return Err(TooLarge);
        }
        Ok(Self { max_bytes, may_be_cut, announced, ..Self::default() })
    }

    /// Takes a piece. False where no more is wanted.
    pub(crate) fn add(&mut self, piece: &Bytes) -> Result<bool, TooLarge> {
        let room = self.max_bytes - self.first.len().max(self.joined.len());
        if piece.len() > room && !self.may_be_cut {
            return Err(TooLarge);
        }
        let piece = piece.slice(..piece.len().min(room));
        let is_full = piece.len() == room;
        if self.first.is_empty() && self.joined.is_empty() {
            self.first = piece;
        } else {
            if self.joined.is_empty() {
                let announced = self.announced.min(self.max_bytes).min(RESERVED_MAX_BYTES);
                self.joined.reserve(announced.max(self.first.len() + piece.len()));
                self.joined.extend_from_slice(&std::mem::take(&mut self.first));
            }
            self.joined.extend_from_slice(&piece);
        }
        Ok(!(self.may_be_cut && is_full))
    }

    /// All that came.
    pub(crate) fn whole(self) -> Bytes {
        if self.joined.is_empty() { self.first } else { self.joined.freeze() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gather(pieces: &[&'static str], announced: Option<u64>, may_be_cut: bool) -> Result<Bytes, TooLarge> {
        let mut body = Gathering::new(announced, 10, may_be_cut)?;
        for piece in pieces {
            if !body.add(&Bytes::from_static(piece.as_bytes()))? {
                break;
            }
        }
        Ok(body.whole())
    }

    #[test]
    fn a_body_is_read_up_to_its_bound_and_not_a_byte_further() {
        assert_eq!(gather(&[], None, false), Ok(Bytes::new()));
        assert_eq!(gather(&["0123456789"], None, false), Ok(Bytes::from_static(b"0123456789")));
        assert_eq!(gather(&["01234", "56", "789"], Some(10), false), Ok(Bytes::from_static(b"0123456789")));
        assert_eq!(gather(&["01234", "567890"], None, false), Err(TooLarge));
        assert_eq!(gather(&[], Some(11), false), Err(TooLarge));
        assert_eq!(gather(&[], Some(u64::MAX), false), Err(TooLarge));
    }

    #[test]
    fn a_body_that_may_be_cut_ends_at_its_bound() {
        assert_eq!(gather(&["01234", "567890", "never"], None, true), Ok(Bytes::from_static(b"0123456789")));
        assert_eq!(gather(&["0123456789abc"], Some(u64::MAX), true), Ok(Bytes::from_static(b"0123456789")));
    }
}
