//! The server's own answers: owns the answer to a client whose head could not be read.
//!
//! hyper answers such a head by itself, before any layer of ours, with a bare status. That answer is the last that a connection
//! writes, has no body and none of our headers, and so is recognised; a problem like any other is sent in its place.

use crate::{
    layers::{SECURITY_HEADERS, X_REQUEST_ID},
    problem,
};

/// What a bare answer ends with, and what it says of its body.
const END: &[u8] = b"\r\n\r\n";
const NO_BODY: &[u8] = b"content-length: 0\r\n";
/// The most that a bare answer takes.
const BARE_MAX_BYTES: usize = 256;

/// Where a bare answer begins in what is to be written, and its status.
pub(crate) fn find(bytes: &[u8]) -> Option<(usize, u16)> {
    if !bytes.ends_with(END) {
        return None;
    }
    let from = bytes.len().saturating_sub(BARE_MAX_BYTES);
    let tail = &bytes[from..];
    let at = (0..tail.len()).rev().find(|at| tail[*at..].starts_with(b"HTTP/1."))?;
    let head = &tail[at..];
    let status = std::str::from_utf8(head.get(9..12)?).ok()?.parse().ok()?;
    let has = |part: &[u8]| head.windows(part.len()).any(|window| window == part);
    let is_bare = matches!(status, 400 | 414 | 431) && has(NO_BODY) && !has(X_REQUEST_ID.as_str().as_bytes());
    is_bare.then_some((from + at, status))
}

/// The whole answer of a status, its head and its body.
pub(crate) fn answer(status: u16) -> Vec<u8> {
    use std::fmt::Write as _;

    let request_id = uuid::Uuid::new_v4().to_string();
    let (reason, body) = problem::of_the_listener(status, &request_id);
    let mut text = format!("HTTP/1.1 {status} {reason}\r\n{}: {request_id}\r\n", X_REQUEST_ID.as_str());
    for (name, value) in SECURITY_HEADERS {
        // Writing to a string cannot fail.
        let _ = write!(text, "{}: {value}\r\n", name.as_str());
    }
    let (kind, length) = (problem::PROBLEM_JSON, body.len());
    let _ = write!(text, "content-type: {kind}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n");
    let mut bytes = text.into_bytes();
    bytes.extend_from_slice(&body);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_bare_answer_is_taken_for_one() {
        let bare = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\
            date: Sat, 28 Nov 2026 18:00:00 GMT\r\n\r\n";
        assert_eq!(find(bare), Some((0, 431)));
        let after = [b"{\"an\": \"earlier answer\"}".as_slice(), bare].concat();
        assert_eq!(find(&after), Some((after.len() - bare.len(), 431)));
        for other in [
            "HTTP/1.1 400 Bad Request\r\nx-request-id: a\r\ncontent-length: 0\r\n\r\n",
            "HTTP/1.1 304 Not Modified\r\ncontent-length: 0\r\n\r\n",
            "HTTP/1.1 400 Bad Request\r\ncontent-length: 2\r\n\r\n{}",
            "text\r\n\r\n",
            "",
        ] {
            assert_eq!(find(other.as_bytes()), None, "{other}");
        }
    }

    #[test]
    fn an_answer_of_the_server_is_a_whole_problem() {
        for (status, code) in [(400, "SG0001"), (408, "SG0006"), (414, "SG0001"), (431, "SG0001")] {
            let answer = String::from_utf8(answer(status)).expect("text");
            let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
            let body: serde_json::Value = serde_json::from_str(body).expect("JSON");
            assert_eq!((&body["status"], &body["code"]), (&status.into(), &code.into()));
            let id = body["request_id"].as_str().expect("an id");
            assert!(head.contains(&format!("x-request-id: {id}")) && head.contains("nosniff"), "{head}");
            assert_eq!(find(answer.as_bytes()), None);
        }
    }
}
