//! Lists runs.

use axum::Json;
use chrono::{DateTime, Utc};
use stagegate_core::{PipelineName, RunId, RunState, pipeline::Labels, store::RunQuery};

use utoipa::openapi::schema::{Array, ArrayBuilder, ObjectBuilder, SchemaType, Type};

use crate::{
    context::{Context, Viewer},
    cursor::Paging,
    extract::{Fields, FromQuery, Query},
    problem::Problem,
    routes::{PageQuery, VERSION_MAX},
    views::{Page, RunView},
};

/// The most labels that one list can be filtered by.
const LABELS_MAX: usize = 32;

/// Which runs.
#[derive(Debug, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct RunsQuery {
    /// Only in one of these states. May be repeated, or separated by commas.
    #[param(required = false)]
    state: Vec<RunState>,
    /// Only of this pipeline.
    pipeline: Option<PipelineName>,
    /// Only of this version.
    #[param(minimum = 1, maximum = 2_147_483_647)]
    version: Option<u32>,
    /// Only with this label, as `name:value`. Repeated, all of them are needed.
    #[param(schema_with = label_schema, required = false)]
    label: Labels,
    /// Only those accepted at or after this time (RFC 3339).
    created_from: Option<DateTime<Utc>>,
    /// Only those accepted before this time (RFC 3339).
    created_before: Option<DateTime<Utc>>,
    /// The `next_cursor` of the page before.
    cursor: Option<String>,
    /// The size of the page.
    #[param(minimum = 1, maximum = 200, default = 50, required = false)]
    limit: u32,
}

impl FromQuery for RunsQuery {
    const NAMES: &'static [&'static str] =
        &["state", "pipeline", "version", "label", "created_from", "created_before", "cursor", "limit"];

    fn read(fields: &mut Fields) -> Self {
        let PageQuery { cursor, limit } = PageQuery::read(fields);
        let states = RunState::ALL.iter().map(|state| state.as_str()).collect::<Vec<_>>().join(", ");
        let mut state = fields
            .many("state", true, |text| RunState::known(text).ok_or_else(|| format!("a state is one of {states}")));
        // The same filters in another order are the same list.
        state.sort_by_key(|state| state.as_str());
        state.dedup();
        let label = fields.many("label", false, |text| {
            let pair = text.split_once(':').filter(|(name, _)| !name.is_empty());
            pair.map(|(name, value)| (name.to_owned(), value.to_owned())).ok_or_else(|| "write `name:value`".to_owned())
        });
        if label.len() > LABELS_MAX {
            fields.wrong("label", format!("give at most {LABELS_MAX}"));
        }
        Self {
            state,
            pipeline: fields.parsed("pipeline"),
            version: fields.number("version", 1, VERSION_MAX.into()).and_then(|version| u32::try_from(version).ok()),
            label: label.into_iter().collect(),
            created_from: fields.one("created_from", time),
            created_before: fields.one("created_before", time),
            cursor,
            limit,
        }
    }
}

/// In a query a bare `+` means a space; it cannot be anything but the sign of an offset here.
fn time(text: &str) -> Result<DateTime<Utc>, String> {
    crate::time::parse(&text.replace(' ', "+"))
}

fn label_schema() -> Array {
    let pair = "^[^:\\u0000-\\u001f\\u007f]+:[^\\u0000-\\u001f\\u007f]*$";
    let pair = ObjectBuilder::new().schema_type(SchemaType::Type(Type::String)).pattern(Some(pair));
    ArrayBuilder::new().items(pair).max_items(Some(LABELS_MAX)).build()
}

/// List runs
///
/// Newest first. Filters narrow the list; a cursor is good for the filters that it came with.
#[utoipa::path(
    get, path = "/v1/runs", tag = "runs", operation_id = "listRuns", params(RunsQuery),
    responses((status = 200, description = "A page of runs.", body = Page<RunView>))
)]
pub(crate) async fn list(
    context: Context<Viewer>,
    Query(query): Query<RunsQuery>,
) -> Result<Json<Page<RunView>>, Problem> {
    let RunsQuery { state, pipeline, version, label, created_from, created_before, cursor, limit } = query;
    let filters = format!("{state:?} {pipeline:?} {version:?} {label:?} {created_from:?} {created_before:?}");
    let paging = Paging::new("runs", &context.tenant, &filters);
    let query = RunQuery {
        tenant: context.tenant.clone(),
        pipeline,
        version,
        states: state,
        labels: label,
        created_from,
        created_before,
        before: paging.read::<RunId>(cursor.as_deref())?,
        limit: limit + 1,
    };
    let now = context.now();
    let found = context.store().runs(&query).await?;
    let items = found.into_iter().map(|run| RunView::new(run, now, context.base())).collect();
    Ok(Json(Page::new(items, limit, |last: &RunView| paging.cursor(last.id))))
}
