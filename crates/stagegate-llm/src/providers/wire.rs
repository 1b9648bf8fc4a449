//! HTTP/1.1 as a client reads it: owns what the bytes of an answer's head and of its chunks mean (RFC 9112). It does
//! no I/O.

use std::io;

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};

/// Headers of one answer, at most.
const HEADERS_MAX: usize = 100;
/// The longest head, and the longest line about a chunk.
const HEAD_MAX_BYTES: usize = 64 * 1024;

/// The head of an answer.
#[derive(Debug)]
pub(super) struct Head {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) left: Left,
    /// The connection may carry another exchange after the body.
    pub(super) is_kept: bool,
}

/// What is still to come of a body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Left {
    Nothing,
    /// So many bytes.
    Bytes(u64),
    /// A chunk, of which its size comes first.
    Chunk,
    /// The rest of a chunk, and the end of its line.
    InChunk(u64),
    /// After the last chunk: fields, a line each, up to an empty one.
    Trailers,
    /// Whatever comes until the connection is closed.
    UntilClosed,
}

pub(super) fn malformed(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// The head that the bytes begin with, and its length; None where more of it is to come.
pub(super) fn head(bytes: &[u8]) -> io::Result<Option<(Head, usize)>> {
    let mut fields = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut answer = httparse::Response::new(&mut fields);
    let parsed = answer.parse(bytes).map_err(|_| malformed("the head of the answer is no HTTP"))?;
    let httparse::Status::Complete(length) = parsed else { return part(bytes) };
    let (Some(version), Some(code)) = (answer.version, answer.code) else {
        return Err(malformed("the head of the answer is no HTTP"));
    };
    let status = StatusCode::from_u16(code).map_err(|_| malformed("the status of the answer is none"))?;
    let mut headers = HeaderMap::with_capacity(answer.headers.len());
    for field in answer.headers.iter() {
        let name = HeaderName::from_bytes(field.name.as_bytes());
        let value = HeaderValue::from_bytes(field.value);
        let (Ok(name), Ok(value)) = (name, value) else { return Err(malformed("a header of the answer is invalid")) };
        headers.append(name, value);
    }
    let is_http11 = version == 1;
    let left = left(status, &headers, is_http11)?;
    let ends = if is_http11 { names(&headers, header::CONNECTION, "close") } else { true };
    // Two ways to tell one length are a sign of somebody between who may have understood the other.
    let is_odd = headers.contains_key(header::TRANSFER_ENCODING) && headers.contains_key(header::CONTENT_LENGTH);
    let is_kept = !ends && !is_odd && left != Left::UntilClosed && status != StatusCode::SWITCHING_PROTOCOLS;
    Ok(Some((Head { status, headers, left, is_kept }, length)))
}

/// How long the body is (section 6.3).
fn left(status: StatusCode, headers: &HeaderMap, is_http11: bool) -> io::Result<Left> {
    if status.is_informational() || matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED) {
        return Ok(Left::Nothing);
    }
    if headers.contains_key(header::TRANSFER_ENCODING) {
        if !is_http11 {
            return Err(malformed("the answer has a transfer encoding, which its version does not know"));
        }
        let last = headers.get_all(header::TRANSFER_ENCODING).iter().next_back();
        let last = last.and_then(|value| value.to_str().ok()).and_then(|text| text.rsplit(',').next());
        let is_chunked = last.is_some_and(|coding| coding.trim().eq_ignore_ascii_case("chunked"));
        return Ok(if is_chunked { Left::Chunk } else { Left::UntilClosed });
    }
    let mut lengths =
        headers.get_all(header::CONTENT_LENGTH).iter().flat_map(|value| value.as_bytes().split(|b| *b == b','));
    let Some(first) = lengths.next() else { return Ok(Left::UntilClosed) };
    let first = number(first)?;
    for other in lengths {
        if number(other)? != first {
            return Err(malformed("the answer has two lengths"));
        }
    }
    Ok(if first == 0 { Left::Nothing } else { Left::Bytes(first) })
}

fn number(digits: &[u8]) -> io::Result<u64> {
    let digits = digits.trim_ascii();
    let text = std::str::from_utf8(digits).ok().filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
    text.and_then(|text| text.parse().ok()).ok_or_else(|| malformed("the length of the answer is no number"))
}

/// Whether one of the words of a header is this.
fn names(headers: &HeaderMap, name: HeaderName, word: &str) -> bool {
    let texts = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
    texts.flat_map(|text| text.split(',')).any(|part| part.trim().eq_ignore_ascii_case(word))
}

/// The size that a chunk begins with and the length of that line; None where more of it is to come.
pub(super) fn chunk(bytes: &[u8]) -> io::Result<Option<(u64, usize)>> {
    // httparse takes a line without digits for a size of 0, which would be the end.
    if bytes.first().is_some_and(|byte| !byte.is_ascii_hexdigit()) {
        return Err(malformed("a chunk of the answer has no size"));
    }
    match httparse::parse_chunk_size(bytes) {
        Ok(httparse::Status::Complete((length, size))) => Ok(Some((size, length))),
        Ok(httparse::Status::Partial) => part(bytes),
        Err(_) => Err(malformed("a chunk of the answer has no size")),
    }
}

/// The end of a chunk's own line; None where more of it is to come.
pub(super) fn chunk_end(bytes: &[u8]) -> io::Result<Option<((), usize)>> {
    match bytes {
        [b'\r', b'\n', ..] => Ok(Some(((), 2))),
        [] | [b'\r'] => Ok(None),
        _ => Err(malformed("a chunk of the answer is longer than it said")),
    }
}

/// Whether the line after the last chunk is the empty one, and its length; None where more of it is to come.
pub(super) fn trailer(bytes: &[u8]) -> io::Result<Option<(bool, usize)>> {
    match bytes.iter().position(|byte| *byte == b'\n') {
        Some(end) => Ok(Some((matches!(bytes[..end], [] | [b'\r']), end + 1))),
        None => part(bytes),
    }
}

/// What is not whole yet may go on, within the bound.
fn part<T>(bytes: &[u8]) -> io::Result<Option<T>> {
    if bytes.len() < HEAD_MAX_BYTES { Ok(None) } else { Err(malformed("the head of the answer is too long")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> io::Result<Option<(Head, usize)>> {
        head(text.replace('\n', "\r\n").as_bytes())
    }

    fn framing(text: &str) -> (Left, bool) {
        let (head, _) = read(text).expect("valid").expect("whole");
        (head.left, head.is_kept)
    }

    #[test]
    fn the_length_of_a_body_is_told_by_its_head() {
        assert_eq!(framing("HTTP/1.1 200 OK\ncontent-length: 3\n\n"), (Left::Bytes(3), true));
        assert_eq!(framing("HTTP/1.1 200 OK\ncontent-length: 3, 3\nContent-Length: 3\n\n"), (Left::Bytes(3), true));
        assert_eq!(framing("HTTP/1.1 200 OK\ncontent-length: 0\n\n"), (Left::Nothing, true));
        assert_eq!(framing("HTTP/1.1 200 OK\ntransfer-encoding: gzip, Chunked\n\n"), (Left::Chunk, true));
        assert_eq!(framing("HTTP/1.1 200 OK\ntransfer-encoding: chunked\ncontent-length: 3\n\n"), (Left::Chunk, false));
        assert_eq!(framing("HTTP/1.1 200 OK\ntransfer-encoding: gzip\n\n"), (Left::UntilClosed, false));
        assert_eq!(framing("HTTP/1.1 200 OK\n\n"), (Left::UntilClosed, false));
        assert_eq!(framing("HTTP/1.1 204 No Content\ncontent-length: 3\n\n"), (Left::Nothing, true));
        assert_eq!(framing("HTTP/1.0 200 OK\ncontent-length: 3\n\n"), (Left::Bytes(3), false));
        assert_eq!(framing("HTTP/1.1 200 OK\ncontent-length: 3\nConnection: x, Close\n\n"), (Left::Bytes(3), false));
    }

    #[test]
    fn what_is_no_answer_is_refused_and_what_is_a_part_waits() {
        let bad = [
            "SSH-2.0-OpenSSH_9\n",
            "HTTP/1.1 200 OK\ncontent-length: 3\ncontent-length: 4\n\n",
            "HTTP/1.1 200 OK\ncontent-length: -3\n\n",
            "HTTP/1.1 200 OK\ncontent-length: \n\n",
            "HTTP/1.0 200 OK\ntransfer-encoding: chunked\n\n",
        ];
        for text in bad {
            assert!(read(text).is_err(), "{text}");
        }
        assert!(read("HTTP/1.1 200 OK\ncontent-le").expect("a part").is_none());
        assert!(head(format!("HTTP/1.1 200 OK\r\nx: {}", "y".repeat(HEAD_MAX_BYTES)).as_bytes()).is_err());
    }
}
