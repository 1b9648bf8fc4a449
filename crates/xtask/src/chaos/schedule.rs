//! The schedule of faults: owns what goes wrong when, drawn from the seed before anything runs, so that a seed tells it.

use rand::{Rng, SeedableRng, rngs::StdRng, seq::SliceRandom};

/// What can go wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    /// SIGKILL, then a restart.
    Kill,
    /// SIGSTOP past the TTL, then SIGCONT.
    Freeze,
    /// SIGSTOP for less than the fence, then SIGCONT.
    FreezeShortly,
    /// SIGTERM, which must end it in order, then a restart.
    Term,
    /// Each replica in turn by SIGTERM.
    Rolling,
    /// Postgres is restarted in order ("fast").
    PostgresRestart,
    /// Postgres ends at once ("immediate"), and recovers at its start.
    PostgresCrash,
    /// Every session on the database is terminated.
    PostgresSessions,
    /// Redis is killed and started again, empty.
    RedisKill,
    /// Redis loses everything.
    RedisFlush,
    /// Redis accepts and never answers.
    RedisBlackhole,
    /// Connections to Postgres break in the middle of an answer.
    CutPostgres,
    /// Connections to Redis break in the middle of an answer.
    CutRedis,
    /// One replica cannot reach Postgres for longer than the TTL; what was on the way arrives afterwards.
    Partition,
    /// The disk under the database's files is full.
    DiskFull,
    /// The provider answers every call with 529.
    ProviderDown,
    /// The provider answers a few calls in each window of some seconds, and the others with 429.
    ProviderLimited,
}

impl Kind {
    const ALL: [Self; 17] = [
        Self::Kill,
        Self::Freeze,
        Self::FreezeShortly,
        Self::Term,
        Self::Rolling,
        Self::PostgresRestart,
        Self::PostgresCrash,
        Self::PostgresSessions,
        Self::RedisKill,
        Self::RedisFlush,
        Self::RedisBlackhole,
        Self::CutPostgres,
        Self::CutRedis,
        Self::Partition,
        Self::DiskFull,
        Self::ProviderDown,
        Self::ProviderLimited,
    ];

    /// Its name in reports.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Kill => "SIGKILL, restart",
            Self::Freeze => "SIGSTOP past the TTL, SIGCONT",
            Self::FreezeShortly => "SIGSTOP for less than the fence, SIGCONT",
            Self::Term => "SIGTERM, restart",
            Self::Rolling => "rolling restart",
            Self::PostgresRestart => "Postgres restarted (fast)",
            Self::PostgresCrash => "Postgres restarted (immediate)",
            Self::PostgresSessions => "pg_terminate_backend of all sessions",
            Self::RedisKill => "Redis killed, restarted empty",
            Self::RedisFlush => "Redis flushed",
            Self::RedisBlackhole => "Redis blackholed",
            Self::CutPostgres => "Postgres connections cut mid-reply",
            Self::CutRedis => "Redis connections cut mid-reply",
            Self::Partition => "partition from Postgres past the TTL",
            Self::DiskFull => "disk full under the database",
            Self::ProviderDown => "provider answers 529",
            Self::ProviderLimited => "provider limits the rate",
        }
    }
}

/// A fault to come.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fault {
    pub(crate) at_s: f64,
    pub(crate) kind: Kind,
    /// Which replica, where it is about one.
    pub(crate) replica: usize,
    /// Where between its shortest and its longest it lasts, 0 to 1.
    pub(crate) length: f64,
}

/// Faults from `from_s` to `to_s`, one every `pace_s` on the average. Kinds are drawn from a bag that holds each once, so
/// that a short run has as many as fit.
pub(crate) fn draw(seed: u64, from_s: f64, to_s: f64, pace_s: f64, replicas: usize, disk: bool) -> Vec<Fault> {
    let mut rng = StdRng::seed_from_u64(seed ^ 0xC4A0_5EED);
    let (mut bag, mut faults, mut at_s) = (Vec::new(), Vec::new(), from_s);
    while at_s < to_s {
        if bag.is_empty() {
            bag = Kind::ALL.into_iter().filter(|kind| disk || *kind != Kind::DiskFull).collect();
            bag.shuffle(&mut rng);
            // Kills are what it is all about: twice in each bag.
            bag.insert(rng.random_range(0..bag.len()), Kind::Kill);
        }
        let kind = bag.pop().unwrap_or(Kind::Kill);
        faults.push(Fault { at_s, kind, replica: rng.random_range(0..replicas), length: rng.random() });
        at_s += pace_s * rng.random_range(0.4..1.6);
    }
    faults
}

/// Nothing but rolling restarts, one after another.
pub(crate) fn rolling(from_s: f64, to_s: f64, pace_s: f64) -> Vec<Fault> {
    let mut faults = Vec::new();
    let mut at_s = from_s;
    while at_s < to_s {
        faults.push(Fault { at_s, kind: Kind::Rolling, replica: 0, length: 0.0 });
        at_s += pace_s;
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_tells_the_schedule() {
        let draw = |seed| {
            let faults = draw(seed, 3.0, 180.0, 4.0, 3, true);
            faults.iter().map(|fault| (fault.kind, fault.replica, fault.at_s.to_bits())).collect::<Vec<_>>()
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
        for kind in Kind::ALL {
            assert!(draw(1).iter().any(|(drawn, ..)| *drawn == kind), "{kind:?}");
        }
    }
}
