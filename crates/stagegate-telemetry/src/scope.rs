//! Who a line is about: owns the ids that spans carry, and finds them from anywhere inside. Shared by logs and error
//! reports, so that both name the same run.

use std::fmt;

use tracing::{
    Event, Metadata, Subscriber,
    field::{Field, Visit},
    level_filters::LevelFilter,
    span,
    subscriber::Interest,
};
use tracing_subscriber::{
    EnvFilter, Layer,
    layer::{Context, Filter},
    registry::LookupSpan,
};

/// The span and event fields that every line inside is marked with. The order is the order in a line.
pub(crate) const NAMES: [&str; 6] = ["request_id", "run_id", "stage_id", "tenant", "attempt", "trace_id"];

/// The longest id that is kept, in bytes.
const ID_MAX_BYTES: usize = 128;

/// The ids of a span, an event, or all of an event's scope.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Ids([Option<String>; NAMES.len()]);

impl Ids {
    /// Takes the value if the name is one of an id; false if it is not.
    pub(crate) fn take(&mut self, name: &str, value: &str) -> bool {
        let Some(place) = NAMES.iter().position(|known| *known == name) else { return false };
        let mut end = value.len().min(ID_MAX_BYTES);
        while !value.is_char_boundary(end) {
            end -= 1;
        }
        self.0[place] = Some(value[..end].to_owned());
        true
    }

    /// Name and value of each id that is there.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&'static str, &str)> {
        NAMES.iter().zip(&self.0).filter_map(|(name, value)| Some((*name, value.as_deref()?)))
    }

    /// Fills what is missing from an outer scope.
    fn fill_from(&mut self, outer: &Self) {
        for (mine, theirs) in self.0.iter_mut().zip(&outer.0) {
            if mine.is_none() {
                mine.clone_from(theirs);
            }
        }
    }

    /// Fills what the event itself does not name from the spans around it, the innermost first.
    pub(crate) fn fill_from_scope<S>(&mut self, event: &Event<'_>, context: &Context<'_, S>)
    where
        S: Subscriber + for<'a> LookupSpan<'a>,
    {
        let Some(scope) = context.event_scope(event) else { return };
        for span in scope {
            if let Some(ids) = span.extensions().get::<Ids>() {
                self.fill_from(ids);
            }
        }
    }
}

impl Visit for Ids {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if NAMES.contains(&field.name()) {
            self.take(field.name(), &format!("{value:?}"));
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.take(field.name(), value);
    }
}

/// Keeps the ids of each span beside it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ScopeLayer;

impl<S> Layer<S> for ScopeLayer
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    fn on_new_span(&self, attributes: &span::Attributes<'_>, id: &span::Id, context: Context<'_, S>) {
        // Values are formatted before the span is locked: a `Debug` that panics must not poison it.
        let mut ids = Ids::default();
        attributes.record(&mut ids);
        if let Some(span) = context.span(id) {
            span.extensions_mut().insert(ids);
        }
    }

    fn on_record(&self, id: &span::Id, values: &span::Record<'_>, context: Context<'_, S>) {
        let mut new = Ids::default();
        values.record(&mut new);
        let Some(span) = context.span(id) else { return };
        let mut extensions = span.extensions_mut();
        match extensions.get_mut::<Ids>() {
            Some(ids) => {
                new.fill_from(ids);
                *ids = new;
            }
            None => extensions.insert(new),
        }
    }
}

/// Lets through what the filter asks for, and every span down to `info` besides: a quiet log must not lose the ids of
/// the lines that it still writes.
#[derive(Debug)]
pub(crate) struct AndSpans<F>(pub(crate) F);

fn is_outline(metadata: &Metadata<'_>) -> bool {
    metadata.is_span() && *metadata.level() <= tracing::Level::INFO
}

impl<S, F: Filter<S>> Filter<S> for AndSpans<F> {
    fn enabled(&self, metadata: &Metadata<'_>, context: &Context<'_, S>) -> bool {
        is_outline(metadata) || self.0.enabled(metadata, context)
    }

    fn callsite_enabled(&self, metadata: &'static Metadata<'static>) -> Interest {
        // The inner filter is asked in any case: it learns of the callsite by that.
        let inner = self.0.callsite_enabled(metadata);
        if is_outline(metadata) { Interest::always() } else { inner }
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        self.0.max_level_hint().map(|level| level.max(LevelFilter::INFO))
    }

    fn on_new_span(&self, attributes: &span::Attributes<'_>, id: &span::Id, context: Context<'_, S>) {
        self.0.on_new_span(attributes, id, context);
    }

    fn on_record(&self, id: &span::Id, values: &span::Record<'_>, context: Context<'_, S>) {
        self.0.on_record(id, values, context);
    }

    fn on_enter(&self, id: &span::Id, context: Context<'_, S>) {
        self.0.on_enter(id, context);
    }

    fn on_exit(&self, id: &span::Id, context: Context<'_, S>) {
        self.0.on_exit(id, context);
    }

    fn on_close(&self, id: span::Id, context: Context<'_, S>) {
        self.0.on_close(id, context);
    }
}

/// What the log shows by a configured filter: panics are always among it.
pub(crate) fn filter(text: &str) -> Result<EnvFilter, String> {
    let filter = EnvFilter::builder().parse(text).map_err(|error| error.to_string())?;
    // A literal directive; it parses.
    let panics = format!("{}=error", crate::logs::PANIC_TARGET).parse();
    Ok(match panics {
        Ok(directive) => filter.add_directive(directive),
        Err(_) => filter,
    })
}
