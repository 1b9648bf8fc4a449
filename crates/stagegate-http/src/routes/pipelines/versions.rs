//! Lists the versions of a pipeline.

use axum::Json;
use stagegate_core::PipelineName;

use crate::{
    context::{Context, Viewer},
    cursor::Paging,
    extract::{Path, Query},
    problem::Problem,
    routes::{PageQuery, pipeline_name, pipelines::read::not_found},
    views::{Page, PipelineSummary},
};

/// List a pipeline's versions
///
/// Newest first.
#[utoipa::path(
    get, path = "/v1/pipelines/{name}/versions", tag = "pipelines", operation_id = "listVersions",
    params(("name" = PipelineName, Path, description = "The pipeline's name."), PageQuery),
    responses((status = 200, description = "A page of versions.", body = Page<PipelineSummary>))
)]
pub(crate) async fn versions(
    context: Context<Viewer>,
    Path(name): Path<String>,
    Query(query): Query<PageQuery>,
) -> Result<Json<Page<PipelineSummary>>, Problem> {
    let name = pipeline_name(&name)?;
    let paging = Paging::new("versions", &context.tenant, name.as_str());
    let before: Option<u32> = paging.read(query.cursor.as_deref())?;
    let found = context.store().versions(&context.tenant, &name, before, query.limit + 1).await?;
    // A pipeline that exists has a first version, so that only a first page can be empty for want of one.
    if found.is_empty() && before.is_none() {
        return Err(not_found(&name, &context.tenant));
    }
    let items: Vec<PipelineSummary> =
        found.into_iter().map(|version| PipelineSummary::new(version, context.base())).collect();
    Ok(Json(Page::new(items, query.limit, |last| paging.cursor(last.version))))
}
