//! Lists pipelines.

use axum::Json;
use stagegate_core::PipelineName;

use crate::{
    context::{Context, Viewer},
    cursor::Paging,
    extract::Query,
    problem::Problem,
    routes::PageQuery,
    views::{Page, PipelineSummary},
};

/// List pipelines
///
/// The newest version of each pipeline, by name.
#[utoipa::path(
    get, path = "/v1/pipelines", tag = "pipelines", operation_id = "listPipelines", params(PageQuery),
    responses((status = 200, description = "A page of pipelines.", body = Page<PipelineSummary>))
)]
pub(crate) async fn list(
    context: Context<Viewer>,
    Query(query): Query<PageQuery>,
) -> Result<Json<Page<PipelineSummary>>, Problem> {
    let paging = Paging::new("pipelines", &context.tenant, "");
    let after: Option<PipelineName> = paging.read(query.cursor.as_deref())?;
    let found = context.store().pipelines(&context.tenant, after.as_ref(), query.limit + 1).await?;
    let items: Vec<PipelineSummary> =
        found.into_iter().map(|version| PipelineSummary::new(version, context.base())).collect();
    Ok(Json(Page::new(items, query.limit, |last| paging.cursor(&last.name))))
}
