//! What arrives at a server that takes Sentry's envelopes.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    thread,
};

use serde_json::Value;

use crate::child;

/// One envelope as it was posted.
struct Envelope {
    path: String,
    auth: String,
    body: String,
}

impl Envelope {
    /// The event in it: header, item header, item.
    fn event(&self) -> Value {
        let line = self.body.lines().nth(2).expect("an item");
        serde_json::from_str(line).expect("JSON")
    }
}

/// Takes envelopes on a socket until nobody sends any more.
fn server() -> (String, mpsc::Receiver<Envelope>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let dsn = format!("http://PUBLICKEY@{}/42", listener.local_addr().expect("bound"));
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let sender = sender.clone();
            thread::spawn(move || {
                while let Some(envelope) = take(&stream) {
                    let answer = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}";
                    if sender.send(envelope).is_err() || (&stream).write_all(answer).is_err() {
                        break;
                    }
                }
            });
        }
    });
    (dsn, receiver)
}

fn take(stream: &TcpStream) -> Option<Envelope> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).ok().filter(|n| *n > 0)?;
    let path = line.split(' ').nth(1)?.to_owned();
    let (mut length, mut auth) = (0, String::new());
    loop {
        line.clear();
        reader.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim_end().split_once(": ") else { break };
        match name.to_ascii_lowercase().as_str() {
            "content-length" => length = value.parse().ok()?,
            "x-sentry-auth" => value.clone_into(&mut auth),
            _ => {}
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    Some(Envelope { path, auth, body: String::from_utf8(body).ok()? })
}

#[test]
fn errors_and_panics_arrive_with_their_run_and_without_secrets() {
    let (dsn, envelopes) = server();
    let output = child::reporting("json", &dsn).output().expect("it ran");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let received: Vec<_> = envelopes.try_iter().collect();
    assert_eq!(received.len(), 2, "the error and the panic, and nothing else");
    for envelope in &received {
        assert_eq!(envelope.path, "/api/42/envelope/");
        assert!(envelope.auth.contains("sentry_key=PUBLICKEY"), "{}", envelope.auth);
        for secret in ["PAYLOAD", "KEY-OF-OURS", "PASSWORD", "BEARERTOKEN", "sk-SECRET"] {
            assert!(!envelope.body.contains(secret), "{secret} in {}", envelope.body);
        }
        let event = envelope.event();
        let tags = &event["tags"];
        let ids = ["request_id", "run_id", "stage_id", "tenant", "attempt"].map(|tag| tags[tag].as_str().unwrap_or(""));
        assert_eq!(ids, ["req_1", "run_7", "spec", "acme", "3"], "{event}");
        assert_eq!(event["release"], "stagegate@1.2.3");
        assert_eq!(event["environment"], "test");
        assert!(event.get("user").is_none() && event.get("request").is_none());
    }
    let (error, panic) = (received[0].event(), received[1].event());
    assert_eq!(error["message"], "refused: Bearer [redacted]");
    assert_eq!(error["contexts"]["fields"]["model"], "openai/gpt-5-mini");
    assert_eq!(error["contexts"]["fields"]["prompt"], "[redacted]");
    let exception = &panic["exception"]["values"][0];
    assert_eq!(panic["level"], "fatal");
    assert_eq!(exception["type"], "panic");
    assert_eq!(exception["value"], "panicked: no such stage, said [redacted]");
    let frames = exception["stacktrace"]["frames"].as_array().expect("a stack");
    let ours = |frame: &&Value| frame["function"].as_str().is_some_and(|name| name.contains("child::work"));
    assert!(frames.iter().any(|frame| ours(&frame)), "{frames:?}");
}

#[test]
fn a_sentry_that_never_answers_holds_no_process_up_for_ever() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let dsn = format!("http://PUBLICKEY@{}/42", listener.local_addr().expect("bound"));
    let output = child::reporting("json", &dsn).output().expect("it ran");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    drop(listener);
}
