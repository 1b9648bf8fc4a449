//! The report: owns its form, as markdown for people and as one JSON line for machines. It judges nothing: what failed
//! is in the checks.

use std::{collections::BTreeMap, fmt::Write as _};

use serde_json::{Value, json};

use super::{
    calls::Paid,
    client::Client,
    load::Done,
    logs::{BadAnswer, Told},
    reconcile::Check,
    takeover::TakeOvers,
    world::{Seen, Window, WindowKind},
};
use crate::quantile::nearest_rank;

/// Warnings of the replicas that are told, the most frequent first.
const WARNINGS_MAX: usize = 25;

/// Everything that a report tells.
pub(crate) struct Facts<'a> {
    pub(crate) title: String,
    pub(crate) setup: Vec<(&'static str, String)>,
    pub(crate) checks: &'a [Check],
    pub(crate) seen: &'a Seen,
    pub(crate) done: &'a Done,
    pub(crate) paid: &'a Paid,
    pub(crate) take_overs: &'a TakeOvers,
    pub(crate) told: &'a Told,
    pub(crate) bad_answers: &'a BTreeMap<BadAnswer, u64>,
    pub(crate) sent_again: u64,
    pub(crate) client: &'a Client,
    pub(crate) states: &'a BTreeMap<(String, String), u64>,
    /// From the end of the last fault until everything was terminal.
    pub(crate) settled_s: Option<f64>,
}

impl Facts<'_> {
    pub(crate) fn passed(&self) -> bool {
        self.checks.iter().all(|check| check.wrong == 0)
    }

    fn verdict(&self) -> String {
        let failed: Vec<&str> = self.checks.iter().filter(|check| check.wrong > 0).map(|check| check.name).collect();
        if failed.is_empty() { "**PASS**".to_owned() } else { format!("**FAIL**: {}", failed.join("; ")) }
    }

    /// Seconds of take-overs: all, and those that nothing else disturbed.
    fn take_over_seconds(&self) -> [(&'static str, Vec<f64>); 2] {
        let taken = &self.take_overs.taken;
        let all = taken.iter().map(|one| one.seconds).collect();
        let alone = taken.iter().filter(|one| one.undisturbed).map(|one| one.seconds).collect();
        [("all", all), ("with no other fault about", alone)]
    }

    /// How long a 202 took to come, in seconds, sorted.
    fn accept_seconds(&self) -> Vec<f64> {
        let took = |submit: &super::load::Submitted| submit.accepted_s.map(|at| at - submit.due_s);
        let mut seconds: Vec<f64> = self.done.submitted.iter().filter_map(took).collect();
        seconds.sort_by(f64::total_cmp);
        seconds
    }

    /// As markdown.
    pub(crate) fn markdown(&self) -> String {
        let mut text = format!("# {}\n\n{}\n\n| | |\n| --- | --- |\n", self.title, self.verdict());
        for (name, value) in &self.setup {
            row(&mut text, &[name, value]);
        }
        let settled = self.settled_s.map_or("never".to_owned(), |seconds| format!("{seconds:.1} s"));
        row(&mut text, &["everything terminal after the last fault was mended", &settled]);
        self.checks_part(&mut text);
        self.load_part(&mut text);
        self.paid_part(&mut text);
        self.take_over_part(&mut text);
        self.faults_part(&mut text);
        self.answers_part(&mut text);
        self.logs_part(&mut text);
        text
    }

    fn checks_part(&self, text: &mut String) {
        text.push_str("\n## Reconciliation\n\n| check | looked at | wrong |\n| --- | --: | --: |\n");
        for check in self.checks {
            row(text, &[check.name, &check.looked_at.to_string(), &check.wrong.to_string()]);
        }
        for check in self.checks.iter().filter(|check| check.wrong > 0) {
            let _ = write!(text, "\n{} ({} findings):\n\n", check.name, check.wrong);
            for finding in &check.findings {
                let _ = writeln!(text, "- {finding}");
            }
        }
    }

    fn load_part(&self, text: &mut String) {
        let (submitted, seconds) = (&self.done.submitted, self.accept_seconds());
        let requests: u32 = submitted.iter().map(|submit| submit.requests).sum();
        let connections: u32 = self.done.watched.iter().map(|watcher| watcher.connections).sum();
        let events: usize = self.done.watched.iter().map(|watcher| watcher.events.len()).sum();
        let _ = write!(
            text,
            "\n## Load\n\n{} submits (open loop) in {requests} requests; from the time when each was due to its 202: \
             p50 {:.3} s, p99 {:.3} s, longest {:.3} s. {} watchers saw {events} events over {connections} \
             connections. Actions taken: {}.\n\n| pipeline | state | runs |\n| --- | --- | --: |\n",
            submitted.len(),
            nearest_rank(&seconds, 50),
            nearest_rank(&seconds, 99),
            seconds.last().copied().unwrap_or(f64::NAN),
            self.done.watched.len(),
            listed(self.done.actions.iter().collect::<BTreeMap<_, _>>()),
        );
        for ((pipeline, state), runs) in self.states {
            row(text, &[pipeline, state, &runs.to_string()]);
        }
    }

    fn paid_part(&self, text: &mut String) {
        let paid = self.paid;
        let excused: u64 = paid.exceptions.values().sum();
        let _ = write!(
            text,
            "\n## Calls paid\n\n{} calls were charged = {} distinct requests + {excused} named exceptions + {} without a \
             reason.\n\n| why a request was paid again | calls |\n| --- | --: |\n",
            paid.charged,
            paid.needed,
            paid.findings.len()
        );
        for (why, calls) in &paid.exceptions {
            row(text, &[why, &calls.to_string()]);
        }
        text.push_str("\n| the provider's answers | calls | left by the caller |\n| --- | --: | --: |\n");
        for (answer, (calls, left)) in &paid.by_answer {
            row(text, &[answer.name(), &calls.to_string(), &left.to_string()]);
        }
    }

    fn take_over_part(&self, text: &mut String) {
        text.push_str(
            "\n## Take-over\n\nFrom the SIGKILL, SIGSTOP or partition of their owner to the first event of its runs by \
             another.\n\n| | runs | p50 | p99 | longest |\n| --- | --: | --: | --: | --: |\n",
        );
        for (name, seconds) in self.take_over_seconds() {
            let of = |percent| {
                if seconds.is_empty() { "-".to_owned() } else { format!("{:.2} s", nearest_rank(&seconds, percent)) }
            };
            row(text, &[name, &seconds.len().to_string(), &of(50), &of(99), &of(100)]);
        }
        let TakeOvers { taken, not_taken } = self.take_overs;
        let owned = taken.len() as u64 + not_taken.values().sum::<u64>();
        let _ = writeln!(text, "\n{} of {owned} owned runs were taken over. The others:", taken.len());
        let _ = writeln!(text, "{}.", listed(not_taken.iter().collect()));
    }

    fn faults_part(&self, text: &mut String) {
        text.push_str("\n## Faults\n\n| from | until | what |\n| --: | --: | --- |\n");
        // What the cache lost stands there already, as the fault that it was.
        let is_told = |window: &&Window| window.kind != WindowKind::CacheLost;
        let mut windows: Vec<_> = self.seen.windows.iter().filter(is_told).collect();
        windows.sort_by(|a, b| a.from_s.total_cmp(&b.from_s));
        for window in windows {
            row(text, &[&format!("{:.1} s", window.from_s), &format!("{:.1} s", window.to_s), &window.what]);
        }
        text.push_str("\nA window includes its aftermath, in which what it cost is still excused.\n");
        for note in &self.seen.notes {
            let _ = writeln!(text, "\n- {note}");
        }
        if !self.seen.stops.is_empty() {
            text.push_str("\n| SIGTERM | at | took | exit status |\n| --- | --: | --: | --: |\n");
            for (replica, at_s, took_s, status) in &self.seen.stops {
                let status = status.map_or("none".to_owned(), |status| status.to_string());
                row(text, &[replica, &format!("{at_s:.1} s"), &format!("{took_s:.2} s"), &status]);
            }
        }
    }

    fn answers_part(&self, text: &mut String) {
        let _ = write!(
            text,
            "\n## Answers\n\nHAProxy sent {} requests again by itself. What it answered or passed on with 5xx:\n\n\
             | status | why | request | times |\n| --- | --- | --- | --: |\n",
            self.sent_again
        );
        for (bad, times) in self.bad_answers {
            row(text, &[&bad.status, &bad.why, &bad.request, &times.to_string()]);
        }
        text.push_str("\n| request, as clients saw it | outcome | times |\n| --- | --- | --: |\n");
        for ((asked, outcome), times) in self.client.outcomes() {
            row(text, &[asked, &outcome, &times.to_string()]);
        }
    }

    fn logs_part(&self, text: &mut String) {
        let _ = write!(
            text,
            "\n## What the replicas logged\n\nA replica stopped its own work {} times.\n\n| level | message | times |\n\
             | --- | --- | --: |\n",
            self.told.fences.len()
        );
        let mut lines: Vec<_> = self.told.lines.iter().collect();
        lines.sort_by(|a, b| (&a.0.0, b.1.0).cmp(&(&b.0.0, a.1.0)));
        for ((level, message), (times, _)) in lines.iter().take(WARNINGS_MAX) {
            row(text, &[level, message, &times.to_string()]);
        }
        for ((level, _), (_, sample)) in lines.iter().filter(|line| line.0.0 == "ERROR") {
            let _ = writeln!(text, "\n- {level}: `{sample}`");
        }
    }

    /// As one JSON value.
    pub(crate) fn json(&self) -> Value {
        let take_over = |seconds: &[f64]| {
            let of = |percent| Some(nearest_rank(seconds, percent)).filter(|value| value.is_finite());
            json!({ "runs": seconds.len(), "p50_s": of(50), "p99_s": of(99), "longest_s": of(100) })
        };
        let [(_, all), (_, alone)] = self.take_over_seconds();
        let runs: BTreeMap<String, u64> =
            self.states.iter().map(|((pipeline, state), n)| (format!("{pipeline} {state}"), *n)).collect();
        let bad: Vec<Value> = self
            .bad_answers
            .iter()
            .map(|(bad, n)| json!({ "status": bad.status, "why": bad.why, "request": bad.request, "times": n }))
            .collect();
        let faults: Vec<&Window> = self.seen.windows.iter().filter(|window| !window.what.is_empty()).collect();
        json!({
            "title": self.title,
            "passed": self.passed(),
            "setup": self.setup.iter().cloned().collect::<BTreeMap<_, _>>(),
            "checks": self.checks,
            "runs": runs,
            "submits": self.done.submitted.len(),
            "watchers": self.done.watched.len(),
            "charged": self.paid.charged,
            "needed": self.paid.needed,
            "exceptions": self.paid.exceptions,
            "take_over": take_over(&all),
            "take_over_undisturbed": take_over(&alone),
            "not_taken_over": self.take_overs.not_taken,
            "fences": self.told.fences.len(),
            "interruptions": faults.iter().filter(|w| matches!(w.kind, WindowKind::Interrupted(_))).count(),
            "faults": faults,
            "settled_s": self.settled_s,
            "bad_answers": bad,
            "notes": self.seen.notes,
        })
    }
}

fn row(text: &mut String, cells: &[&str]) {
    let cells: Vec<String> = cells.iter().map(|cell| cell.replace('|', "\\|")).collect();
    let _ = writeln!(text, "| {} |", cells.join(" | "));
}

fn listed(counts: BTreeMap<&&'static str, &u64>) -> String {
    let words: Vec<String> = counts.into_iter().map(|(what, times)| format!("{what} {times}")).collect();
    if words.is_empty() { "none".to_owned() } else { words.join(", ") }
}
