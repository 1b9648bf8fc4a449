//! The demo keeps what the README says of it.

use crate::support::Place;

#[test]
fn the_demo_shows_a_retry_then_five_hits_then_one_bought_stage() {
    let place = Place::new();
    let (code, story, progress) = place.run(&["demo", "--once"]);
    assert_eq!(code, 0, "{story}\n{progress}");
    let has = |part: &str| assert!(story.contains(part), "`{part}` is not in\n{story}\n{progress}");
    has("All answers are simulated");
    has("requirements → design → spec → {test-plan, risk-review}");
    has("The first run: every stage is bought");
    has("The gate of design sent its first answer back with the critique: 2 attempts");
    has("The result (abridged; simulated)");
    has("5 of 5 stages came from the cache: 0 calls were bought, $");
    has("bought: risk-review; from the cache: requirements, design, spec, test-plan.");
    has("In sum (simulated)");
    assert!(!story.contains("$0 was saved"), "{story}");

    let lines = |mark: &str| progress.lines().filter(|line| line.trim_start().starts_with(mark)).count();
    assert_eq!(lines("↻ design"), 1, "{progress}");
    assert_eq!((lines("✓"), lines("●")), (6, 9), "5 + 0 + 1 bought, 0 + 5 + 4 cached: {progress}");
    for fact in ["attempt 2", "score 0.", "tokens", "$", " ms"] {
        assert!(progress.contains(fact), "{fact}: {progress}");
    }
    assert!(!place.path("data").exists(), "it leaves nothing behind");
}

#[test]
fn a_taken_port_is_told_before_anything_starts() {
    let place = Place::new();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("bound").port().to_string();
    let (code, stdout, stderr) = place.run(&["demo", "--once", "--port", &port]);
    assert!(code == 2 && stdout.is_empty() && stderr.contains("another process listens there"), "{stderr}");
}
