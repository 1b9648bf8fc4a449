//! The limit on open files: owns that it fits what the configuration allows, or that somebody is told.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::config::Config;

/// Files beside connections: the store's, logs, timers, what runtimes need.
const OTHERS: u64 = 256;

/// Open files that this configuration can come to need: connections of clients, of the store and of Redis, and one to a
/// provider for each run in flight.
fn needed(config: &Config) -> u64 {
    let connections = [
        config.http.max_connections as u64,
        stagegate_http::RESERVED_CONNECTIONS as u64,
        config.engine.max_runs as u64,
        u64::from(config.store.pool.max_connections),
    ];
    connections.into_iter().fold(OTHERS, u64::saturating_add)
}

/// Raises the limit as far as it is needed and may be. Returns what to do where that is not enough.
pub(crate) fn raise(config: &Config) -> Option<String> {
    let needed = needed(config);
    let now = getrlimit(Resource::Nofile);
    let target = target(needed, &now)?;
    let raised = setrlimit(Resource::Nofile, Rlimit { current: Some(target), maximum: now.maximum });
    let limit = if raised.is_ok() { target } else { now.current.unwrap_or(target) };
    (limit < needed).then(|| {
        format!(
            "only {limit} files may be open, and http.max_connections, engine.max_runs and the pools can need {needed}: raise \
             the limit (LimitNOFILE= of systemd, `ulimit -Hn`, the container runtime's default), or lower http.max_connections"
        )
    })
}

/// What the limit is to be; None where it suffices.
fn target(needed: u64, now: &Rlimit) -> Option<u64> {
    let current = now.current.filter(|current| *current < needed)?;
    Some(now.maximum.map_or(needed, |maximum| maximum.min(needed)).max(current))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_raised_as_far_as_it_is_needed_and_may_be() {
        let limit = |current, maximum| Rlimit { current, maximum };
        assert_eq!(target(20_000, &limit(Some(1_024), Some(1_048_576))), Some(20_000));
        assert_eq!(target(20_000, &limit(Some(1_024), Some(4_096))), Some(4_096));
        assert_eq!(target(20_000, &limit(Some(1_024), None)), Some(20_000));
        assert_eq!(target(20_000, &limit(Some(65_536), Some(65_536))), None);
        assert_eq!(target(20_000, &limit(None, None)), None);
        assert!(needed(&Config::default()) > 20_000);
    }
}
