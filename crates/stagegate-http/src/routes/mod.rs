//! The routes: one file each, or one for a family of very small ones. A route states its documentation, its role and
//! its handler; what holds for all of them is in the layers and in [`crate::openapi`].

pub(crate) mod cache;
pub(crate) mod docs;
pub(crate) mod pipelines;
pub(crate) mod plan;
pub(crate) mod probes;
pub(crate) mod replicas;
pub(crate) mod runs;

use http::HeaderMap;
use stagegate_core::{Code, PipelineName, RunId, StageId};

use crate::{
    extract::{Fields, FromQuery},
    problem::{Problem, unknown},
};

/// The largest number that JSON and every store hold exactly; the highest seq that can be asked for.
pub(crate) const NUMBER_MAX: u64 = (1 << 53) - 1;

/// A pipeline's name in a path: what is no name names nothing.
pub(crate) fn pipeline_name(text: &str) -> Result<PipelineName, Problem> {
    PipelineName::new(text).map_err(|invalid| unknown(Code::PipelineNotFound, &invalid))
}

/// A run's id in a path.
pub(crate) fn run_id(text: &str) -> Result<RunId, Problem> {
    text.parse().map_err(|invalid| unknown(Code::RunNotFound, &invalid))
}

/// A stage's id in a path.
pub(crate) fn stage_id(text: &str) -> Result<StageId, Problem> {
    StageId::new(text).map_err(|invalid| unknown(Code::StageNotFound, &invalid))
}

/// Versions fit into 31 bits in every store.
pub(crate) const VERSION_MAX: u32 = i32::MAX as u32;

/// A version's number in a path.
pub(crate) fn version_number(text: &str) -> Result<u32, Problem> {
    let number = text.parse().ok().filter(|version| (1..=VERSION_MAX).contains(version));
    number.ok_or_else(|| {
        let shown: String = text.chars().take(80).collect();
        Problem::new(Code::VersionNotFound, format!("`{shown}` is not a version: write a number from 1."))
    })
}

/// Which page of a list.
#[derive(Debug, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct PageQuery {
    /// The `next_cursor` of the page before.
    pub(crate) cursor: Option<String>,
    /// The size of the page.
    #[param(minimum = 1, maximum = 200, default = 50, required = false)]
    pub(crate) limit: u32,
}

impl PageQuery {
    pub(crate) const NAMES: &'static [&'static str] = &["cursor", "limit"];
    const LIMIT_MAX: u64 = 200;
    const LIMIT_DEFAULT: u32 = 50;
}

impl FromQuery for PageQuery {
    const NAMES: &'static [&'static str] = PageQuery::NAMES;

    fn read(fields: &mut Fields) -> Self {
        let limit = fields.number("limit", 1, Self::LIMIT_MAX).and_then(|limit| u32::try_from(limit).ok());
        let cursor = fields.parsed::<String>("cursor").filter(|cursor| !cursor.is_empty());
        Self { cursor, limit: limit.unwrap_or(Self::LIMIT_DEFAULT) }
    }
}

/// A header as text, where it is there.
pub(crate) fn header_text<'a>(headers: &'a HeaderMap, name: &str) -> Result<Option<&'a str>, Problem> {
    let Some(value) = headers.get(name) else { return Ok(None) };
    let text =
        value.to_str().map_err(|_| Problem::new(Code::InvalidRequest, format!("`{name}` is not ASCII text.")))?;
    Ok(Some(text))
}
