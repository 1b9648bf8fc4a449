//! What replicas and HAProxy wrote: owns what is read out of their logs. The replicas say when they stop their own work
//! (nobody else can know that), and what they were not happy with.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde_json::Value;

use super::{
    timeline::Timeline,
    world::{Window, WindowKind, World},
};

/// What a replica says when it abandons what is under way.
const ABANDONS: [&str; 3] = ["stops its own work", "begins a new life", "the attempts under way are abandoned"];
/// What a replica says when the shared cache failed it once, and when it goes on without it for a while.
const CACHE_FAILED: &str = "the shared cache failed";
const CACHE_SPARED: &str = "the shared cache is spared";
/// How long it goes on without it.
const CACHE_SPARED_S: f64 = 6.0;
/// How long around a line what it tells may have been the case.
const AFTER_S: f64 = 0.5;
/// The longest time without a line that counts as standing still.
const STILL_MAX_S: f64 = 2.0;

/// What the replicas' logs tell.
#[derive(Debug, Default)]
pub(crate) struct Told {
    /// Warnings and errors: level and message, how often, and one with its fields.
    pub(crate) lines: BTreeMap<(String, String), (u64, String)>,
    /// When a replica stopped its own work.
    pub(crate) fences: Vec<Window>,
    /// When the shared cache did not answer a replica.
    pub(crate) cache_silences: Vec<Window>,
    /// When each replica wrote a line: its signs of life, in order.
    pub(crate) alive_s: Vec<Vec<f64>>,
    /// Panics: a finding each.
    pub(crate) panics: Vec<String>,
}

/// Reads the logs of all replicas.
pub(crate) fn replicas(world: &World) -> anyhow::Result<Told> {
    let mut told = Told { alive_s: vec![Vec::new(); world.replicas.len()], ..Told::default() };
    for (index, replica) in world.replicas.iter().enumerate() {
        let Ok(program) = replica.program() else { continue };
        let (text, _) = program.log_from(0)?;
        for line in text.lines() {
            if line.contains("panicked") {
                told.panics.push(format!("{}: {line}", replica.name()));
            }
            let Ok(line) = serde_json::from_str::<Value>(line) else { continue };
            read(&mut told, &line, index, replica.name(), &world.timeline);
        }
    }
    Ok(told)
}

fn read(told: &mut Told, line: &Value, index: usize, name: &str, timeline: &Timeline) {
    let text = |key: &str| line[key].as_str().unwrap_or_default().to_owned();
    let (level, message) = (text("level").to_uppercase(), text("msg"));
    let at: Option<DateTime<Utc>> = line["ts"].as_str().and_then(|at| at.parse().ok());
    let what = format!("{name}: {message}");
    if let Some(at_s) = at.map(|at| timeline.of_wall(at)) {
        told.alive_s[index].push(at_s);
        if message.starts_with(CACHE_FAILED) || message.starts_with(CACHE_SPARED) {
            let lasts_s = if message.starts_with(CACHE_SPARED) { CACHE_SPARED_S } else { AFTER_S };
            let (from_s, to_s, kind) = (at_s - AFTER_S, at_s + lasts_s, WindowKind::CacheAway(Some(index)));
            told.cache_silences.push(Window { what, from_s, to_s, kind });
        } else if ABANDONS.iter().any(|word| message.contains(word)) {
            let (from_s, to_s, kind) = (at_s, at_s + AFTER_S, WindowKind::Interrupted(index));
            told.fences.push(Window { what, from_s, to_s, kind });
        }
    }
    if !matches!(level.as_str(), "WARN" | "ERROR") {
        return;
    }
    let row = told.lines.entry((level, message)).or_insert_with(|| (0, format!("{name}: {line}")));
    row.0 += 1;
}

impl Told {
    /// From the last sign of life until each interruption: on a machine that is short of processors a replica can have
    /// stood still for a while when its end comes, and has not read what was delivered meanwhile.
    pub(crate) fn stood_still(&self, windows: &[Window]) -> Vec<Window> {
        let before = |window: &Window| {
            let WindowKind::Interrupted(index) = window.kind else { return None };
            let last_s = self.alive_s.get(index)?.iter().rfind(|at| **at < window.from_s + AFTER_S)?;
            let (from_s, to_s) = (last_s.max(window.from_s - STILL_MAX_S), window.from_s);
            let still = Window { from_s, to_s, kind: WindowKind::Still(index), what: window.what.clone() };
            (from_s < to_s).then_some(still)
        };
        windows.iter().filter_map(before).collect()
    }
}

/// A kind of request that HAProxy answered, or passed on, with 5xx.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct BadAnswer {
    pub(crate) status: String,
    /// HAProxy's own words for how the session ended, and what that means.
    pub(crate) why: String,
    pub(crate) request: String,
}

/// What HAProxy answered with 5xx, by why, and how many requests it sent again.
pub(crate) fn haproxy(log: &str) -> (BTreeMap<BadAnswer, u64>, u64) {
    let (mut bad, mut again) = (BTreeMap::new(), 0);
    for line in log.lines() {
        let mut words = line.split_whitespace().skip_while(|word| word.parse::<f64>().is_err());
        let (Some(_at), Some(status), Some(end), Some(server), Some(retries), Some(_times), Some(method), Some(path)) = (
            words.next(),
            words.next(),
            words.next(),
            words.next(),
            words.next(),
            words.next(),
            words.next(),
            words.next(),
        ) else {
            continue;
        };
        again += u64::from(retries.trim_start_matches('+') != "0");
        if !status.starts_with('5') {
            continue;
        }
        let route =
            path.split('/').map(|part| if part.len() == 36 { "{id}" } else { part }).collect::<Vec<_>>().join("/");
        let why = format!("{end}: {}", meaning(end, server));
        let request = format!("{method} {route}");
        *bad.entry(BadAnswer { status: status.to_owned(), why, request }).or_default() += 1;
    }
    (bad, again)
}

/// The first two letters of a termination state, in words.
fn meaning(end: &str, server: &str) -> &'static str {
    match (end.get(..2).unwrap_or_default(), server) {
        ("SC", "<NOSRV>") => "no replica was ready",
        ("SC", _) => "no connection to the replica",
        ("sC", _) => "the connection to the replica took too long",
        ("sQ", _) => "it waited too long for a replica",
        ("sH", _) => "the replica did not answer in time",
        ("SH", _) => "the replica broke the connection before its answer",
        ("SD" | "sD", _) => "the replica broke off in the middle of its answer",
        ("--", _) => "the replica's own answer",
        _ => "see HAProxy's manual, termination states",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_interrupted_stood_still_since_its_last_sign_of_life() {
        let told = Told { alive_s: vec![vec![1.0, 7.0, 9.9], vec![1.0, 8.5], vec![1.0]], ..Told::default() };
        let window =
            |index| Window { what: String::new(), from_s: 9.5, to_s: 12.0, kind: WindowKind::Interrupted(index) };
        let still = |index| told.stood_still(&[window(index)]).first().map(|still| (still.from_s, still.to_s));
        assert_eq!([still(0), still(1), still(2)], [None, Some((8.5, 9.5)), Some((9.5 - STILL_MAX_S, 9.5))]);
    }

    #[test]
    fn lines_of_haproxy_are_read() {
        let log = "1700000000.123 503 SC-- <NOSRV> 3 0/0/-1/-1/12 POST /v1/runs\n\
                   1700000001.000 200 ---- r1 +1 0/0/1/2/3 GET /v1/runs/01931f00-0000-7000-8000-000000000000\n\
                   [WARNING] (1) : Server replicas/r1 is DOWN\n";
        let (bad, again) = haproxy(log);
        assert_eq!(again, 2);
        let (one, count) = bad.first_key_value().expect("one");
        assert_eq!((one.status.as_str(), one.request.as_str(), *count), ("503", "POST /v1/runs", 1));
        assert!(one.why.contains("no replica was ready"));
    }
}
