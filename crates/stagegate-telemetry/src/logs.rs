//! Logging: owns the process's one subscriber, its panic hook, and where lines go (stderr, so that stdout is a
//! command's result alone). The form of a line is `line`'s, what may be in it `redact`'s.

use std::{
    backtrace::{Backtrace, BacktraceStatus},
    io::{self, IsTerminal, Write},
    panic::PanicHookInfo,
};

use stagegate_core::{Clock, Code, Error, SystemClock};
use tracing::{Event, Metadata, Subscriber};
use tracing_subscriber::{
    Layer,
    filter::filter_fn,
    layer::{Context, SubscriberExt},
    registry::LookupSpan,
    util::SubscriberInitExt,
};

use crate::{
    config::{LogConfig, LogFormat, SentryConfig},
    line::{self, Head, Record},
    scope::{self, AndSpans, ScopeLayer},
    sentry::Reports,
};

/// The target that panics are logged under. It passes every filter.
pub(crate) const PANIC_TARGET: &str = "panic";

/// Keeps error reports going; dropped at the end of `main`, it sends those that wait, for a bounded time.
#[derive(Debug)]
#[must_use = "dropping it ends error reports"]
pub struct Guard {
    _reports: Option<Reports>,
}

/// Installs logs, the panic hook and, with a DSN, error reports. To be called once, first thing in `main`; a second
/// call fails. `version` is the binary's.
pub fn init(log: &LogConfig, sentry: &SentryConfig, version: &str) -> Result<Guard, Error> {
    let filter = scope::filter(&log.filter).map_err(|why| {
        let mend = "write levels and targets, such as `info` or `info,stagegate_engine=debug`";
        Error::new(Code::InvalidConfig, format!("log.filter: `{}` is no filter: {why}; {mend}", log.filter))
    })?;
    let reports = Reports::start(sentry, version)?;
    let format = match log.format {
        LogFormat::Auto if io::stderr().is_terminal() => LogFormat::Pretty,
        LogFormat::Auto => LogFormat::Json,
        chosen => chosen,
    };
    tracing_subscriber::registry()
        .with(ScopeLayer.with_filter(AndSpans(filter_fn(is_our_span))))
        .with(LogLayer { format, payloads: log.payloads, sink: stderr(format) }.with_filter(AndSpans(filter)))
        .with(reports.as_ref().map(Reports::layer))
        .try_init()
        .map_err(|error| Error::new(Code::Internal, format!("logging was installed twice: {error}")))?;
    std::panic::set_hook(Box::new(log_panic));
    Ok(Guard { _reports: reports })
}

/// The ids of our own debug spans are kept too; those of libraries' would cost and tell nothing.
fn is_our_span(metadata: &Metadata<'_>) -> bool {
    metadata.is_span() && metadata.target().starts_with("stagegate")
}

/// Writes to stderr. A stderr that is closed, full or broken loses lines; it never stops the work.
fn stderr(format: LogFormat) -> Sink {
    match format {
        LogFormat::Pretty => Box::new(|line| drop(anstream::stderr().lock().write_all(line.as_bytes()))),
        LogFormat::Json | LogFormat::Auto => Box::new(|line| drop(io::stderr().lock().write_all(line.as_bytes()))),
    }
}

type Sink = Box<dyn Fn(&str) + Send + Sync>;

/// Turns events into lines.
struct LogLayer {
    format: LogFormat,
    payloads: bool,
    sink: Sink,
}

impl<S> Layer<S> for LogLayer
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut record = Record::new(self.payloads);
        event.record(&mut record);
        record.ids.fill_from_scope(event, &context);
        let head = Head { at: SystemClock.now(), level: *event.metadata().level(), target: event.metadata().target() };
        let line = match self.format {
            LogFormat::Pretty => line::pretty(head, &record),
            LogFormat::Json | LogFormat::Auto => line::json(head, &record),
        };
        (self.sink)(&line);
    }
}

/// Logs a panic as one line, inside the spans in which it happened.
fn log_panic(info: &PanicHookInfo<'_>) {
    let location = info.location().map(ToString::to_string).unwrap_or_default();
    let thread = std::thread::current();
    let thread = thread.name().unwrap_or("unnamed");
    let message = info.payload_as_str().unwrap_or("no message");
    let backtrace = Backtrace::capture();
    if backtrace.status() == BacktraceStatus::Captured {
        tracing::error!(target: PANIC_TARGET, location, thread, %backtrace, "panicked: {message}");
    } else {
        tracing::error!(target: PANIC_TARGET, location, thread, "panicked: {message}");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex, PoisonError};

    use tracing::subscriber::with_default;

    use super::*;

    /// The lines, as JSON, that `work` logs under a filter.
    fn logged(filter: &str, payloads: bool, work: impl FnOnce()) -> Vec<serde_json::Value> {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&lines);
        let sink: Sink = Box::new(move |line| {
            let line = serde_json::from_str(line).expect("JSON");
            kept.lock().unwrap_or_else(PoisonError::into_inner).push(line);
        });
        let filter = AndSpans(scope::filter(filter).expect("a filter"));
        let subscriber = tracing_subscriber::registry()
            .with(ScopeLayer.with_filter(AndSpans(filter_fn(is_our_span))))
            .with(LogLayer { format: LogFormat::Json, payloads, sink }.with_filter(filter));
        with_default(subscriber, work);
        lines.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    #[test]
    fn every_line_inside_a_span_carries_its_ids_however_deep() {
        let lines = logged("info", false, || {
            let _request =
                tracing::info_span!("request", request_id = "req_1", tenant = tracing::field::Empty).entered();
            tracing::Span::current().record("tenant", "acme");
            let _run = tracing::info_span!("run", run_id = %"run_7").entered();
            {
                let _stage = tracing::info_span!("stage", stage_id = "spec", attempt = 2_u32).entered();
                let _inner = tracing::info_span!("render").entered();
                tracing::info!(tokens = 12, "stage finished");
            }
            tracing::info!(run_id = "run_8", "another run named");
        });
        let first = &lines[0];
        for (key, value) in [("request_id", "req_1"), ("tenant", "acme"), ("run_id", "run_7"), ("stage_id", "spec")] {
            assert_eq!(first[key], value, "{first}");
        }
        assert_eq!((&first["attempt"], &first["fields"]["tokens"]), (&2.into(), &12.into()));
        assert_eq!((&lines[1]["run_id"], &lines[1]["request_id"]), (&"run_8".into(), &"req_1".into()));
        assert!(lines[1].get("stage_id").is_none());
    }

    #[test]
    fn a_quiet_filter_keeps_the_ids_of_what_it_lets_through() {
        let lines = logged("warn", false, || {
            let _run = tracing::info_span!("run", run_id = "run_7").entered();
            tracing::info!("not shown");
            tracing::warn!("shown");
        });
        assert_eq!(lines.len(), 1);
        assert_eq!(lines[0]["run_id"], "run_7");
    }

    #[test]
    fn payloads_are_shown_only_when_asked_for_and_secrets_never() {
        let log = || {
            tracing::info!(
                prompt = "write a poem",
                stage_output = ?"a poem",
                input = 12,
                api_key = "k",
                token = 5,
                url = "redis://:pass@h/0",
                "with Bearer abcdefgh"
            );
        };
        let quiet = &logged("info", false, log)[0];
        let loud = &logged("info", true, log)[0];
        assert_eq!(quiet["fields"]["prompt"], "[redacted]");
        assert_eq!(quiet["fields"]["stage_output"], "[redacted]");
        assert_eq!(quiet["fields"]["input"], 12, "a count is no payload");
        assert_eq!(loud["fields"]["prompt"], "write a poem");
        for line in [quiet, loud] {
            assert_eq!(line["fields"]["api_key"], "[redacted]");
            assert_eq!(line["fields"]["token"], "[redacted]");
            assert_eq!(line["fields"]["url"], "redis://[redacted]@h/0");
            assert_eq!(line["msg"], "with Bearer [redacted]");
        }
    }

    #[test]
    fn an_error_is_told_with_its_causes() {
        #[derive(Debug)]
        struct Outer(io::Error);
        impl std::fmt::Display for Outer {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("could not commit")
            }
        }
        impl std::error::Error for Outer {
            fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
                Some(&self.0)
            }
        }
        let lines = logged("info", false, || {
            let error = Outer(io::Error::other("disk full"));
            tracing::error!(error = &error as &dyn std::error::Error, "gave up");
        });
        assert_eq!(lines[0]["fields"]["error"], "could not commit: disk full");
    }

    #[test]
    fn a_bad_filter_is_refused_by_name() {
        let log = LogConfig { filter: "loud=very".to_owned(), ..LogConfig::default() };
        let error = init(&log, &SentryConfig::default(), "0").expect_err("no filter");
        assert_eq!(error.code, Code::InvalidConfig);
        assert!(error.detail.starts_with("log.filter: `loud=very`"), "{}", error.detail);
    }
}
