//! The activity of a connection: owns how long it may stay idle, and how long a head may take. It counts requests and
//! compares times; it reads and writes nothing.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

/// How long a connection may go without a request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// From the first byte of a head to its last, and from the acceptance to the first head.
    pub(crate) head: Duration,
    /// Between two requests.
    pub(crate) idle: Duration,
}

/// What a connection is doing at a moment.
#[derive(Debug, Clone, Copy)]
struct Now {
    /// Requests whose answer has not ended.
    open: usize,
    /// Since when none is open, or since when a head is being sent.
    since: Instant,
    /// A head has begun, or none has come yet.
    head: bool,
    /// The client does not read the bytes that are to be sent.
    blocked: bool,
}

/// When something is to be done about a connection.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Due {
    /// Nothing before this moment.
    At(Instant),
    /// The head took too long.
    Head,
    /// No request came for too long.
    Idle,
}

/// What one connection is doing.
#[derive(Debug)]
pub(crate) struct Activity(Mutex<Now>);

impl Activity {
    /// A connection that was accepted just now.
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self(Mutex::new(Now { open: 0, since: Instant::now(), head: true, blocked: false })))
    }

    fn now(&self) -> std::sync::MutexGuard<'_, Now> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A request has come; it is open until the answer's end drops what is returned.
    pub(crate) fn open(self: &Arc<Self>) -> Open {
        let mut now = self.now();
        now.open += 1;
        now.head = false;
        Open(Arc::clone(self))
    }

    /// Bytes have come. Without an open request they begin a head (of HTTP/1: the frames of HTTP/2 mean other things, too).
    pub(crate) fn bytes(&self) {
        let mut now = self.now();
        if now.open == 0 && !now.head {
            (now.head, now.since) = (true, Instant::now());
        }
    }

    /// Whether something that is to be sent is not taken now: the end of an answer may be on its way after its body is
    /// gone. How long that may last is the limit of [`super::socket::Socket`].
    pub(crate) fn blocked(&self, blocked: bool) {
        let mut now = self.now();
        now.blocked = blocked;
        if now.open == 0 && !now.head {
            now.since = Instant::now();
        }
    }

    /// Whether no request is open.
    pub(crate) fn is_idle(&self) -> bool {
        self.now().open == 0
    }

    /// What is due at this moment.
    pub(crate) fn due(&self, at: Instant, limits: Limits) -> Due {
        let now = *self.now();
        if now.open > 0 || now.blocked {
            return Due::At(at + limits.check());
        }
        let end = now.since + if now.head { limits.head } else { limits.idle };
        match (end <= at, now.head) {
            // A head may begin meanwhile, which has less time.
            (false, _) => Due::At(end.min(at + limits.check())),
            (true, true) => Due::Head,
            (true, false) => Due::Idle,
        }
    }
}

impl Limits {
    /// How often a connection is looked at: as often that neither limit is overstepped.
    fn check(self) -> Duration {
        self.head.min(self.idle).max(Duration::from_millis(1))
    }
}

/// An open request.
#[derive(Debug)]
pub(crate) struct Open(Arc<Activity>);

impl Drop for Open {
    fn drop(&mut self) {
        let mut now = self.0.now();
        now.open -= 1;
        if now.open == 0 {
            (now.head, now.since) = (false, Instant::now());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { head: Duration::from_secs(10), idle: Duration::from_secs(75) };

    /// What is due some seconds from now.
    fn due(activity: &Activity, seconds: u64) -> Due {
        activity.due(Instant::now() + Duration::from_secs(seconds), LIMITS)
    }

    #[test]
    fn a_begun_head_has_less_time_than_an_idle_connection() {
        let activity = Activity::new();
        assert_eq!(due(&activity, 10), Due::Head, "nothing came at all");
        drop(activity.open());
        assert!(matches!(due(&activity, 74), Due::At(_)), "idle, and within its time");
        assert_eq!(due(&activity, 75), Due::Idle);
        activity.bytes();
        assert!(matches!(due(&activity, 9), Due::At(_)), "a head has ten seconds from its first byte");
        assert_eq!(due(&activity, 10), Due::Head);
    }

    #[test]
    fn a_connection_with_something_under_way_is_never_idle() {
        let activity = Activity::new();
        let (first, second) = (activity.open(), activity.open());
        drop(first);
        activity.bytes();
        assert!(matches!(due(&activity, 3_600), Due::At(_)));
        drop(second);
        assert_eq!(due(&activity, 75), Due::Idle);
        activity.blocked(true);
        assert!(matches!(due(&activity, 3_600), Due::At(_)), "the end of its answer is still on its way");
        activity.blocked(false);
        assert!(matches!(due(&activity, 74), Due::At(_)), "it was taken just now");
    }
}
