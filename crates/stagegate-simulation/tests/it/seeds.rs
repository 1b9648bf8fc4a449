//! Some seeds, and that a seed decides everything.

use stagegate_simulation::{Options, simulate};

#[test]
fn the_same_seed_gives_the_same_history_byte_for_byte() {
    let record = Options { record: true, ..Options::default() };
    for seed in 1..=30 {
        let (first, second) = (simulate(seed, record), simulate(seed, record));
        for (line, (a, b)) in first.history.iter().zip(&second.history).enumerate() {
            assert_eq!(a, b, "seed {seed}, line {line}");
        }
        assert_eq!(first, second, "seed {seed}");
        assert!(first.history.len() > 15, "seed {seed} met nothing: {:?}", first.history);
        let unrecorded = simulate(seed, Options::default());
        assert_eq!(
            (unrecorded.violation, unrecorded.counts),
            (first.violation, first.counts),
            "seed {seed}, unrecorded"
        );
    }
}

#[test]
fn two_threads_do_not_disturb_each_other() {
    let alone: Vec<_> = (100..110).map(|seed| simulate(seed, Options::default())).collect();
    let together = std::thread::scope(|scope| {
        let play = || (100..110).map(|seed| simulate(seed, Options::default())).collect::<Vec<_>>();
        let (one, other) = (scope.spawn(play), scope.spawn(play));
        (one.join().expect("no panic"), other.join().expect("no panic"))
    });
    assert_eq!((&together.0, &together.1), (&alone, &alone));
}

#[test]
fn a_lease_is_lost_at_every_call_that_an_engine_lives_by() {
    let record = Options { record: true, ..Options::default() };
    let mut missed = vec!["submit", "commit", "claim", "load", "heartbeat", "signals", "signal", "release", "owned"];
    for seed in 1..=400 {
        if missed.is_empty() {
            break;
        }
        let history = simulate(seed, record).history;
        let lost = |method: &str| history.iter().any(|line| line.contains("LEASE LOST") && line.ends_with(method));
        missed.retain(|method| !lost(&format!(" {method}")));
    }
    assert_eq!(missed, Vec::<&str>::new());
}

#[test]
fn every_promise_is_kept() {
    for seed in 10_001..=10_060 {
        let outcome = simulate(seed, Options::default());
        assert_eq!(outcome.violation, None, "cargo xtask simulate --seed {seed}");
    }
}
