//! Hints over Redis: owns a channel of publish and subscribe, and the form of what is said on it. It lives here because
//! Redis does (docs/ARCHITECTURE.md); it knows nothing of caches or models.
//!
//! A message is `sgh1`, eight bytes that name its sender, and hints: a byte for its kind, and the 16 bytes of a run's id
//! where it is about one. What cannot be read is ignored. Redis being away, frozen or slow costs nobody anything but the
//! hints: publishing is a push into a bounded queue, and everything else happens in two tasks of its own.

use std::{collections::HashSet, fmt, time::Duration};

use async_trait::async_trait;
use deadpool_redis::redis::{self, AsyncConnectionConfig, Client, RedisError, aio::MultiplexedConnection};
use futures::StreamExt as _;
use stagegate_core::{
    Code, Error, RunId, Secret,
    hint::{Hint, Hints},
};
use stagegate_net::install_tls;
use tokio::{
    sync::{Mutex, mpsc},
    time::{sleep, timeout},
};
use uuid::Uuid;

use crate::RedisConfig;

/// What a message begins with: the form's name and version.
const MAGIC: &[u8; 4] = b"sgh1";
/// Bytes of the sender's name.
const SENDER_BYTES: usize = 8;
/// Hints that wait to be sent, or to be heard; past it they are dropped.
const QUEUE_MAX: usize = 4_096;
/// Hints in one message.
const MESSAGE_MAX: usize = 1_024;
/// The pause after a message, in which hints gather for the next.
const GATHER: Duration = Duration::from_millis(10);
/// The pause before the next try to connect, from the first to the longest.
const RETRY_FIRST: Duration = Duration::from_millis(100);
/// See [`RETRY_FIRST`].
const RETRY_LONGEST: Duration = Duration::from_secs(5);
/// After this much silence the server is asked whether it is still there.
const SILENCE: Duration = Duration::from_secs(5);

type Sender = [u8; SENDER_BYTES];

/// Hints over a Redis channel. Its tasks end when it is dropped.
pub struct RedisHints {
    outgoing: mpsc::Sender<Hint>,
    incoming: Mutex<mpsc::Receiver<Hint>>,
}

impl fmt::Debug for RedisHints {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisHints").finish_non_exhaustive()
    }
}

/// One server and channel, and how long either may take.
struct Line {
    client: Client,
    channel: String,
    sender: Sender,
    config: RedisConfig,
}

impl RedisHints {
    /// For the server at `url`. Connects in the background, again and again. Fails on a URL that is none. Must be
    /// called inside a tokio runtime.
    pub fn start(url: &Secret, config: &RedisConfig) -> Result<Self, Error> {
        install_tls();
        // The error of a wrong URL could repeat it, and with it the password.
        let client = Client::open(url.expose()).map_err(|error| {
            let why = error.category();
            Error::new(Code::InvalidConfig, format!("the Redis URL is not valid ({why}): write `redis://host:6379/0`"))
        })?;
        let channel = format!("{}:hints", config.key_prefix);
        let [sender @ .., _, _, _, _, _, _, _, _] = Uuid::new_v4().into_bytes();
        let speaking = Line { client: client.clone(), channel: channel.clone(), sender, config: config.clone() };
        let hearing = Line { client, channel, sender, config: config.clone() };
        let (outgoing, to_send) = mpsc::channel(QUEUE_MAX);
        let (heard, incoming) = mpsc::channel(QUEUE_MAX);
        tokio::spawn(speak(speaking, to_send));
        tokio::spawn(hear(hearing, heard));
        Ok(Self { outgoing, incoming: Mutex::new(incoming) })
    }
}

#[async_trait]
impl Hints for RedisHints {
    fn publish(&self, hint: Hint) {
        let _ = self.outgoing.try_send(hint); // A queue that is full loses it: it is only a hint.
    }

    async fn next(&self) -> Vec<Hint> {
        let mut hints = Vec::new();
        if self.incoming.lock().await.recv_many(&mut hints, MESSAGE_MAX).await == 0 {
            std::future::pending::<()>().await; // The listening task is gone, with the runtime.
        }
        hints
    }
}

/// Sends what gathers, until nobody can publish any more.
async fn speak(line: Line, mut hints: mpsc::Receiver<Hint>) {
    let mut connection: Option<MultiplexedConnection> = None;
    let mut pause = RETRY_FIRST;
    let mut gathered = Vec::new();
    loop {
        gathered.clear();
        if hints.recv_many(&mut gathered, MESSAGE_MAX).await == 0 {
            return;
        }
        match say(&line, &mut connection, &gathered).await {
            Ok(()) => {
                pause = RETRY_FIRST;
                sleep(GATHER).await;
            }
            Err(error) => {
                tracing::debug!(reason = error, "hints to the other replicas were lost");
                connection = None;
                sleep(pause).await;
                pause = (pause * 2).min(RETRY_LONGEST);
                while hints.try_recv().is_ok() {} // By now the others have looked by themselves.
            }
        }
    }
}

async fn say(line: &Line, connection: &mut Option<MultiplexedConnection>, hints: &[Hint]) -> Result<(), String> {
    let connected = if let Some(connected) = connection {
        connected
    } else {
        let settings = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(line.config.connect_timeout.0))
            .set_response_timeout(Some(line.config.response_timeout.0));
        let made = line.client.get_multiplexed_async_connection_with_config(&settings).await;
        connection.insert(made.map_err(|error| describe(&error))?)
    };
    let mut publish = redis::cmd("PUBLISH");
    publish.arg(&line.channel).arg(encode(line.sender, hints));
    let sent: Result<i64, RedisError> = publish.query_async(connected).await;
    sent.map(drop).map_err(|error| describe(&error))
}

/// Listens until nobody wants to hear any more.
async fn hear(line: Line, heard: mpsc::Sender<Hint>) {
    let mut pause = RETRY_FIRST;
    loop {
        let reason = tokio::select! {
            () = heard.closed() => return,
            reason = listen(&line, &heard, &mut pause) => reason,
        };
        tracing::debug!(reason, "hints of the other replicas are not heard");
        tokio::select! {
            () = heard.closed() => return,
            () = sleep(pause) => {}
        }
        pause = (pause * 2).min(RETRY_LONGEST);
    }
}

/// Listens on one connection until it breaks, or is silent and does not answer. Returns why it ended.
async fn listen(line: &Line, heard: &mpsc::Sender<Hint>, pause: &mut Duration) -> String {
    let (connect, answer) = (line.config.connect_timeout.0, line.config.response_timeout.0);
    let mut connection = match timeout(connect, line.client.get_async_pubsub()).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => return describe(&error),
        Err(_) => return "no connection in time".to_owned(),
    };
    match timeout(answer, connection.subscribe(&line.channel)).await {
        Ok(Ok(())) => *pause = RETRY_FIRST,
        Ok(Err(error)) => return describe(&error),
        Err(_) => return "no answer in time".to_owned(),
    }
    let (mut asking, mut messages) = connection.split();
    loop {
        match timeout(SILENCE, messages.next()).await {
            Ok(Some(message)) => {
                for hint in decode(line.sender, message.get_payload_bytes()) {
                    let _ = heard.try_send(hint); // Whoever is behind looks by itself before long.
                }
            }
            Ok(None) => return "the connection broke".to_owned(),
            Err(_) => match timeout(answer, asking.ping::<redis::Value>()).await {
                Ok(Ok(_)) => {}
                Ok(Err(error)) => return describe(&error),
                Err(_) => return "no answer in time".to_owned(),
            },
        }
    }
}

/// What went wrong, without what Redis said in its own words.
fn describe(error: &RedisError) -> String {
    error.category().to_owned()
}

fn encode(sender: Sender, hints: &[Hint]) -> Vec<u8> {
    let mut message = Vec::with_capacity(MAGIC.len() + SENDER_BYTES + hints.len() * 17);
    message.extend_from_slice(MAGIC);
    message.extend_from_slice(&sender);
    let mut said = HashSet::new();
    for hint in hints.iter().filter(|hint| said.insert(**hint)) {
        let (kind, run) = match hint {
            Hint::Work => (b'w', None),
            Hint::Watching => (b'l', None),
            Hint::Signal(run) => (b's', Some(run)),
            Hint::News(run) => (b'n', Some(run)),
        };
        message.push(kind);
        message.extend_from_slice(run.map_or(&[], |run| run.0.as_bytes()));
    }
    message
}

/// The hints of a message of somebody else, as far as they can be read; at most [`MESSAGE_MAX`].
fn decode(own: Sender, message: &[u8]) -> Vec<Hint> {
    let mut hints = Vec::new();
    let Some((sender, mut rest)) = message.strip_prefix(MAGIC).and_then(<[u8]>::split_first_chunk::<SENDER_BYTES>)
    else {
        return hints;
    };
    if *sender == own {
        return hints;
    }
    while let Some((kind, after)) = rest.split_first()
        && hints.len() < MESSAGE_MAX
    {
        let about = after.split_first_chunk::<16>().map(|(id, after)| (RunId(Uuid::from_bytes(*id)), after));
        let (hint, after) = match (kind, about) {
            (b'w', _) => (Hint::Work, after),
            (b'l', _) => (Hint::Watching, after),
            (b's', Some((run, after))) => (Hint::Signal(run), after),
            (b'n', Some((run, after))) => (Hint::News(run), after),
            // A newer kind, or garbage: nobody knows how long it is.
            _ => return hints,
        };
        hints.push(hint);
        rest = after;
    }
    hints
}

#[cfg(test)]
mod tests {
    use super::*;

    const ME: Sender = *b"sender-1";
    const YOU: Sender = *b"sender-2";

    fn run(n: u128) -> RunId {
        RunId(Uuid::from_u128(n))
    }

    #[test]
    fn hints_come_out_as_they_went_in_each_once() {
        let hints = [Hint::Work, Hint::Signal(run(1)), Hint::Watching, Hint::News(run(2)), Hint::Work];
        assert_eq!(decode(YOU, &encode(ME, &hints)), hints[..4]);
    }

    #[test]
    fn what_one_says_oneself_is_not_heard() {
        assert_eq!(decode(ME, &encode(ME, &[Hint::Work])), []);
    }

    #[test]
    fn garbage_is_ignored_from_where_it_begins() {
        let mut message = encode(ME, &[Hint::Work, Hint::News(run(7))]);
        message.extend_from_slice(b"?and more");
        assert_eq!(decode(YOU, &message), [Hint::Work, Hint::News(run(7))]);
        message.truncate(MAGIC.len() + SENDER_BYTES + 5);
        assert_eq!(decode(YOU, &message), [Hint::Work]);
        for garbage in [&b""[..], b"sgh1", b"sgh1short", b"sgh2sender-1w", b"{\"hint\":true}", &[0xFF; 64]] {
            assert_eq!(decode(YOU, garbage), [], "{garbage:?}");
        }
    }

    #[test]
    fn a_message_without_end_is_cut() {
        let message = encode(ME, &(0..5_000).map(|n| Hint::News(run(n))).collect::<Vec<_>>());
        assert_eq!(decode(YOU, &message).len(), MESSAGE_MAX);
    }

    #[tokio::test]
    async fn a_wrong_url_is_refused_without_showing_the_password() {
        let url = Secret::from("http://:hunter2@host".to_owned());
        let error = RedisHints::start(&url, &RedisConfig::default()).expect_err("no Redis URL");
        assert_eq!(error.code, Code::InvalidConfig);
        assert!(!error.to_string().contains("hunter2"), "{error}");
    }
}
