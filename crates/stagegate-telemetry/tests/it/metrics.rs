//! What Prometheus reads, and what the documentation says of it.

use std::{collections::BTreeMap, fmt::Write as _};

use stagegate_telemetry::Metrics;

/// A sample's line as `name{labels} value`.
fn sample(line: &str) -> (&str, f64) {
    let (series, value) = line.rsplit_once(' ').expect("a value");
    (series, value.parse().expect("a number"))
}

#[test]
fn what_is_rendered_reads_as_the_text_format() {
    let metrics = Metrics::new();
    metrics.build_info.with_label_values(&["1.2.3"]).set(1);
    metrics.http_requests.with_label_values(&["GET", "/v1/runs/{id}", "200"]).inc();
    metrics.pool_wait.observe(0.003);
    metrics.pool_wait.observe(90.0);
    let text = metrics.render().expect("text");
    assert!(text.ends_with('\n'), "the format wants a last newline");

    let (mut help, mut kinds) = (BTreeMap::new(), BTreeMap::new());
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, words) = rest.split_once(' ').expect("words");
            assert!(help.insert(name, words).is_none(), "{name}: one HELP");
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').expect("a type");
            assert!(kinds.insert(name, kind).is_none(), "{name}: one TYPE");
        } else {
            let (series, _) = sample(line);
            let name = series.split('{').next().expect("a name");
            let family = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
            assert!(kinds.contains_key(family) || kinds.contains_key(name), "{line}: told before its TYPE");
        }
    }
    assert_eq!(help.keys().collect::<Vec<_>>(), kinds.keys().collect::<Vec<_>>());
    assert_eq!(kinds["stagegate_http_requests_total"], "counter");
    assert_eq!(kinds["stagegate_db_pool_wait_seconds"], "histogram");
    assert_eq!(help["stagegate_build_info"], "Which version runs; always 1.");
    assert!(text.contains("stagegate_http_requests_total{method=\"GET\",route=\"/v1/runs/{id}\",status=\"200\"} 1\n"));
    assert!(text.contains("stagegate_db_pool_wait_seconds_bucket{le=\"+Inf\"} 2\n"));
    assert!(text.contains("stagegate_db_pool_wait_seconds_count 2\n"));
}

/// Those without labels, and those whose labels' values are known.
#[test]
fn closed_series_are_there_from_the_first_scrape() {
    let text = Metrics::new().render().expect("text");
    let open = ["provider", "model", "method", "route", "status", "version"];
    for (name, _, labels, _) in Metrics::CATALOGUE {
        let is_open = labels.iter().any(|label| open.contains(label));
        assert_eq!(text.contains(&format!("# TYPE {name} ")), !is_open, "{name}");
    }
    for series in [
        "stagegate_runs_finished_total{state=\"expired\"} 0",
        "stagegate_errors_total{code=\"SG0409\"} 0",
        "stagegate_assessments_total{evaluator=\"judge\",passed=\"false\"} 0",
        "stagegate_cache_lookups_total{outcome=\"stale\",tier=\"shared\"} 0",
        "stagegate_stage_attempt_duration_seconds_count{verdict=\"held\"} 0",
    ] {
        assert!(text.contains(&format!("{series}\n")), "{series} in {text}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn the_process_is_told_by_the_usual_names() {
    let text = Metrics::new().render().expect("text");
    for name in ["cpu_seconds_total", "open_fds", "max_fds", "resident_memory_bytes", "start_time_seconds", "threads"] {
        assert!(text.contains(&format!("\nprocess_{name} ")), "{name} in {text}");
    }
}

/// A sum over a metric counts each thing once: the values of a label exclude each other.
#[test]
fn no_label_has_a_value_that_stands_for_all_others() {
    let text = Metrics::new().render().expect("text");
    for value in ["all", "total", "any", "max", "sum"] {
        assert!(!text.contains(&format!("=\"{value}\"")), "{value} in {text}");
    }
}

#[test]
fn buckets_only_ever_grow() {
    let metrics = Metrics::new();
    for seconds in [0.0002, 0.004, 0.2, 7.0] {
        metrics.checkpoint_save.observe(seconds);
    }
    let text = metrics.render().expect("text");
    let counts: Vec<f64> = text
        .lines()
        .filter(|line| line.starts_with("stagegate_checkpoint_save_seconds_bucket"))
        .map(|line| sample(line).1)
        .collect();
    assert!(counts.len() > 10 && counts.is_sorted(), "{counts:?}");
    assert!((counts.last().expect("some") - 4.0).abs() < f64::EPSILON);
}

#[test]
fn two_catalogues_do_not_share_their_numbers() {
    let (one, other) = (Metrics::new(), Metrics::new());
    one.runs_accepted.inc();
    assert_eq!((one.runs_accepted.get(), other.runs_accepted.get()), (1, 0));
}

/// The page as the catalogue has it. `UPDATE_DOCS=1` writes it anew.
#[test]
fn the_documentation_lists_the_catalogue() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/metrics.md");
    let mut page = String::from(
        "# Metrics\n\n\
         What `GET /metrics` answers, in the Prometheus text format. The catalogue is `crates/stagegate-telemetry/src/metrics.rs`;\n\
         this page is written from it: `UPDATE_DOCS=1 cargo test -p stagegate-telemetry --test it documentation`.\n\n\
         Units are seconds, US dollars and plain counts. No label has values that a caller can make up: routes are templates,\n\
         models are those that the configuration or a registered pipeline names, and tenants are never a label. Where the values\n\
         of its labels are known, a series is there from the first scrape, at 0; models, routes and statuses come with their first\n\
         call. The values of a label exclude each other, so that a `sum()` counts each thing once. On Linux `process_*` (CPU,\n\
         memory, open files, threads, start time) is there under its usual names.\n\n\
         | metric | type | labels | what it tells |\n| --- | --- | --- | --- |\n",
    );
    for (name, kind, labels, help) in Metrics::CATALOGUE {
        let kind = kind.trim_start_matches("Int").trim_end_matches("Vec").to_lowercase();
        let labels = labels.iter().map(|label| format!("`{label}`")).collect::<Vec<_>>().join(", ");
        writeln!(page, "| `{name}` | {kind} | {labels} | {} |", help.trim()).expect("a String takes it");
    }
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(path, &page).expect("written");
    }
    let written = std::fs::read_to_string(path).expect("the page");
    assert!(written == page, "docs/metrics.md is not what the catalogue says; UPDATE_DOCS=1 writes it anew");
}
