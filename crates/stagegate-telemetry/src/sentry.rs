//! Error reports: owns what is sent to Sentry. Errors and panics with the ids of their run, never a prompt, an output,
//! a secret or anything about a person.
//!
//! Sentry's own `tracing` layer and its hubs are not used: they keep breadcrumbs per thread, and threads serve every
//! tenant, so one tenant's report would tell of another's lines.

use std::{sync::Arc, time::Duration};

use ::sentry::{
    Client, ClientOptions, Level, Transport, TransportFactory, TransportOptions,
    integrations::{backtrace, contexts},
    protocol::{Context as ReportContext, Event as Report, Exception, Map, Mechanism},
    transports::ReqwestHttpTransportOptions,
};
use stagegate_core::{Clock, Code, Error, SystemClock};
use tracing::{Event, Subscriber, level_filters::LevelFilter};
use tracing_subscriber::{Layer, layer::Context, registry::LookupSpan};

use crate::{
    config::SentryConfig,
    line::{Record, Value},
    logs::PANIC_TARGET,
    redact,
    scope::AndSpans,
};

/// How long the reports that wait may take to be sent at the end.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);
/// How long one report may take to be sent.
const SEND_TIMEOUT: Duration = Duration::from_secs(3);
/// Reports that wait to be sent; more are dropped.
const QUEUE_MAX_REPORTS: usize = 64;
/// The longest text in a report, in bytes.
const TEXT_MAX_BYTES: usize = 4 * 1024;
/// Whoever sends reports may fail to, and say so: that must not make another report.
const SENDERS: &[&str] = &["h2", "hyper", "reqwest", "rustls", "sentry"];

/// The client. Dropped, it sends what waits, for a bounded time.
pub(crate) struct Reports(Arc<Client>);

impl std::fmt::Debug for Reports {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Reports")
    }
}

impl Drop for Reports {
    fn drop(&mut self) {
        self.0.close(Some(FLUSH_TIMEOUT));
    }
}

impl Reports {
    /// A client, where the configuration has a DSN.
    pub(crate) fn start(config: &SentryConfig, version: &str) -> Result<Option<Self>, Error> {
        let Some(dsn) = &config.dsn else { return Ok(None) };
        // What is wrong with it is not said in its own words: it is a secret.
        let dsn: ::sentry::types::Dsn = dsn.expose().trim().parse().map_err(|_| {
            let mend = "copy it from the project's settings; it looks like https://<key>@<host>/<project>";
            Error::new(Code::InvalidConfig, format!("sentry.dsn is not a DSN; {mend}"))
        })?;
        // Fails only where the process has installed one, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = reqwest::Client::builder()
            .timeout(SEND_TIMEOUT)
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .map_err(|error| Error::new(Code::Internal, format!("no HTTP client for error reports: {error}")))?;
        let mut options = ClientOptions::new()
            .release(format!("stagegate@{version}"))
            .environment(config.environment.clone().unwrap_or_else(|| "production".to_owned()))
            .send_default_pii(false)
            .attach_stacktrace(true)
            .max_breadcrumbs(0)
            .in_app_include(["stagegate"])
            .default_integrations(false)
            .add_integration(backtrace::AttachStacktraceIntegration::new())
            .add_integration(contexts::ContextIntegration::default())
            .add_integration(backtrace::ProcessStacktraceIntegration::new())
            .transport_channel_capacity(QUEUE_MAX_REPORTS)
            .transport(Http(http))
            .before_send(|report| Some(scrubbed(report)));
        options.dsn = Some(dsn);
        Ok(Some(Self(Arc::new(Client::with_options(options)))))
    }

    /// What turns errors and panics into reports.
    pub(crate) fn layer<S>(&self) -> impl Layer<S> + use<S>
    where
        S: Subscriber + for<'a> LookupSpan<'a>,
    {
        ReportLayer(Arc::clone(&self.0)).with_filter(AndSpans(LevelFilter::ERROR))
    }
}

/// Sends by our own client, which has a timeout and follows no redirect.
struct Http(reqwest::Client);

impl TransportFactory for Http {
    fn create_transport_with_options(&self, options: TransportOptions) -> Arc<dyn Transport> {
        Arc::new(ReqwestHttpTransportOptions::from(options).with_client(self.0.clone()).build())
    }
}

struct ReportLayer(Arc<Client>);

impl<S> Layer<S> for ReportLayer
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let metadata = event.metadata();
        if SENDERS.iter().any(|sender| metadata.target().starts_with(sender)) {
            return;
        }
        // Payloads never leave the house, whatever the logs may show.
        let mut record = Record::new(false);
        event.record(&mut record);
        record.ids.fill_from_scope(event, &context);
        self.0.capture_event(report(metadata.target(), record), None);
    }
}

fn report(target: &str, record: Record) -> Report<'static> {
    let mut report = Report {
        level: Level::Error,
        logger: Some(target.to_owned()),
        timestamp: SystemClock.now().into(),
        tags: record.ids.iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect(),
        ..Report::default()
    };
    if target == PANIC_TARGET {
        report.level = Level::Fatal;
        report.exception.values.push(Exception {
            ty: "panic".to_owned(),
            value: Some(record.message),
            mechanism: Some(Mechanism { ty: "panic".to_owned(), handled: Some(false), ..Mechanism::default() }),
            stacktrace: backtrace::current_stacktrace(),
            ..Exception::default()
        });
    } else {
        report.message = Some(record.message);
    }
    let fields: Map<_, _> = record.fields.into_iter().map(|(name, value)| (name.to_owned(), json(value))).collect();
    if !fields.is_empty() {
        report.contexts.insert("fields".to_owned(), ReportContext::Other(fields));
    }
    report
}

fn json(value: Value) -> serde_json::Value {
    match value {
        Value::Bool(value) => value.into(),
        Value::Number(number) => serde_json::from_str(&number).unwrap_or(serde_json::Value::String(number)),
        Value::Text(text) => clean(&text).into(),
    }
}

/// The last wall before the socket, for whatever came into the report by another way.
fn scrubbed(mut report: Report<'static>) -> Report<'static> {
    report.user = None;
    report.request = None;
    report.breadcrumbs = Vec::new().into();
    report.message = report.message.map(|text| clean(&text));
    for exception in &mut report.exception.values {
        exception.value = exception.value.take().map(|text| clean(&text));
    }
    for value in report.tags.values_mut() {
        *value = clean(value);
    }
    report
}

fn clean(text: &str) -> String {
    let mut text = redact::mask(text).into_owned();
    if text.len() > TEXT_MAX_BYTES {
        let mut end = TEXT_MAX_BYTES;
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use stagegate_core::Secret;

    use super::*;

    #[test]
    fn a_bad_dsn_is_refused_without_being_repeated() {
        let config = SentryConfig { dsn: Some(Secret::from("hunter2-no-dsn".to_owned())), environment: None };
        let error = Reports::start(&config, "0").expect_err("no DSN");
        assert_eq!(error.code, Code::InvalidConfig);
        assert!(error.detail.contains("sentry.dsn") && !error.detail.contains("hunter2"), "{}", error.detail);
    }

    #[test]
    fn without_a_dsn_there_is_no_client() {
        assert!(Reports::start(&SentryConfig::default(), "0").expect("fine").is_none());
    }
}
