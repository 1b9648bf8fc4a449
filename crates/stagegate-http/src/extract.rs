//! Bodies, queries and path segments: owns how they are read, within limits, into types. A caller who made several
//! mistakes is told all of them.
//!
//! A JSON body is held against the very schema that `/openapi.json` publishes before it is decoded, so that what is
//! documented and what is enforced cannot differ.

use std::{collections::BTreeMap, str::FromStr};

use axum::extract::{FromRequest, FromRequestParts, Request};
use http::{
    HeaderMap,
    header::{CONTENT_ENCODING, CONTENT_TYPE},
    request::Parts,
};
use hyper::body::Body as _;
use serde::{
    Deserialize,
    de::{DeserializeOwned, IgnoredAny},
};
use serde_json::value::RawValue;
use stagegate_core::{
    Code, Violation,
    error::nearest,
    json::Size,
    pipeline::{Bundle, FILES_MAX},
    text,
};
use utoipa::ToSchema;

use crate::{body::tenant_of, problem::Problem, state::Shared};

/// How often a parsed body is held at once: as values, and while these become its type.
const PARSED_COPIES: u64 = 2;

// ---- Bodies -------------------------------------------------------------------------------------------------

/// A JSON body of one of the documented types.
pub(crate) struct Json<T>(pub(crate) T);

impl<T: DeserializeOwned + ToSchema> FromRequest<Shared> for Json<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, shared: &Shared) -> Result<Self, Problem> {
        let kind = media_type(request.headers())?;
        if !is_json(&kind) {
            return Err(wrong_type(&kind, "application/json"));
        }
        let tenant = tenant_of(&request)?;
        let text = read_text(request, shared.config.body_max_bytes).await?;
        let parsed_bytes = measure(&text, shared.config.json_max_depth, shared.config.body_max_nodes)?;
        // Held until the body is of its type, which keeps payloads as text.
        let _room = shared.engine.memory().bodies.acquire_for(&tenant, parsed_bytes * PARSED_COPIES).await;
        let mut value = parse(&text)?;
        shared.document.leave_out_nulls(&T::name(), &mut value);
        let violations = shared.document.check(&T::name(), &value);
        if !violations.is_empty() {
            return Err(Problem::violations(Code::InvalidRequest, violations));
        }
        shared.document.settle(&T::name(), &mut value);
        serde_path_to_error::deserialize(value).map(Json).map_err(|error| {
            let violation = Violation::new(Code::WrongValue, error.path().to_string(), error.inner().to_string());
            Problem::violations(Code::InvalidRequest, vec![violation])
        })
    }
}

/// The same, where the body may be left out.
pub(crate) struct JsonOrNothing<T>(pub(crate) Option<T>);

impl<T: DeserializeOwned + ToSchema> FromRequest<Shared> for JsonOrNothing<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, shared: &Shared) -> Result<Self, Problem> {
        if request.body().is_end_stream() {
            return Ok(Self(None));
        }
        Json::from_request(request, shared).await.map(|Json(body)| Self(Some(body)))
    }
}

/// A definition as its author wrote it, unread: YAML or JSON, or JSON with the files that the definition names.
pub(crate) struct Source(pub(crate) Bundle);

impl FromRequest<Shared> for Source {
    type Rejection = Problem;

    async fn from_request(request: Request, shared: &Shared) -> Result<Self, Problem> {
        let kind = media_type(request.headers())?;
        let yaml = ["application/yaml", "application/x-yaml", "text/yaml", "text/x-yaml"].contains(&kind.as_str());
        if !yaml && !is_json(&kind) {
            return Err(wrong_type(&kind, "application/yaml, text/yaml or application/json"));
        }
        let tenant = tenant_of(&request)?;
        let text = read_text(request, shared.config.body_max_bytes).await?;
        if yaml || !is_bundle(&text) {
            return Ok(Self(Bundle { definition: text, files: BTreeMap::new() }));
        }
        let parsed_bytes = measure(&text, shared.config.json_max_depth, shared.config.body_max_nodes)?;
        let _room = shared.engine.memory().bodies.acquire_for(&tenant, parsed_bytes).await;
        bundle(&text).map(Self)
    }
}

/// A definition with the files that it names.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct DefinitionBundle {
    /// The definition: a JSON object, or YAML or JSON as one text.
    #[schema(value_type = Value)]
    definition: Box<RawValue>,
    /// What its files hold, by the names that `prompt_file`, `system_file`, `rubric_file` and `schema_file` give them.
    #[serde(default)]
    files: BTreeMap<String, String>,
}

/// Whether a text is an object with this key.
#[derive(Deserialize)]
struct Probe {
    #[serde(rename = "definition")]
    _definition: IgnoredAny,
}

fn is_bundle(text: &str) -> bool {
    serde_json::from_str::<Probe>(text).is_ok()
}

/// The bundle that a JSON text is. The definition stays text, so that its keys and numbers are read where all definitions
/// are: within their bounds, and with what is wrong told.
fn bundle(text: &str) -> Result<Bundle, Problem> {
    let DefinitionBundle { definition, files } = serde_json::from_str(text).map_err(|error| {
        let mend = "send { \"definition\": …, \"files\": { \"name\": \"text\" } }";
        let violation = Violation::new(Code::WrongValue, "", error.to_string()).mend(mend);
        Problem::violations(Code::InvalidRequest, vec![violation])
    })?;
    if files.len() > FILES_MAX {
        let message = format!("there are {} files, at most {FILES_MAX} are allowed", files.len());
        return Err(Problem::violations(
            Code::InvalidRequest,
            vec![Violation::new(Code::WrongValue, "files", message)],
        ));
    }
    let definition = match serde_json::from_str::<String>(definition.get()) {
        Ok(text) => text,
        Err(_) => definition.get().to_owned(),
    };
    let plain = |name: String| name.strip_prefix("./").map_or_else(|| name.clone(), str::to_owned);
    let files = files.into_iter().map(|(name, text)| (plain(name), text)).collect();
    Ok(Bundle { definition, files })
}

fn is_json(kind: &str) -> bool {
    kind == "application/json" || (kind.starts_with("application/") && kind.ends_with("+json"))
}

fn wrong_type(given: &str, takes: &str) -> Problem {
    let given = if given.is_empty() { "no content type".to_owned() } else { format!("`{given}`") };
    Problem::new(Code::UnsupportedMediaType, format!("The body has {given}; send {takes}."))
}

/// The media type without its parameters, in lower case; empty where there is none. A compressed body, or one in
/// another encoding than UTF-8, is refused.
fn media_type(headers: &HeaderMap) -> Result<String, Problem> {
    if headers.get(CONTENT_ENCODING).is_some_and(|value| !value.as_bytes().eq_ignore_ascii_case(b"identity")) {
        return Err(Problem::new(Code::UnsupportedMediaType, "Send the body uncompressed."));
    }
    let text = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let mut parts = text.split(';').map(|part| part.trim().to_ascii_lowercase());
    let kind = parts.next().unwrap_or_default();
    let foreign = |part: &String| {
        part.strip_prefix("charset=").is_some_and(|charset| !["utf-8", "utf8"].contains(&charset.trim_matches('"')))
    };
    match parts.find(foreign) {
        Some(charset) => {
            Err(Problem::new(Code::UnsupportedMediaType, format!("`{charset}` is not taken; send UTF-8.")))
        }
        None => Ok(kind),
    }
}

/// The body as text. [`crate::body`] has received it, within its limits.
async fn read_text(request: Request, max_bytes: usize) -> Result<String, Problem> {
    let broken = |_| Problem::new(Code::InvalidRequest, "The body ended before it was complete.");
    let bytes = axum::body::to_bytes(request.into_body(), max_bytes).await.map_err(broken)?;
    text::decode(bytes.into())
        .map_err(|error| Problem::new(Code::InvalidRequest, format!("The body cannot be read: {error}.")))
}

/// About what JSON takes in memory once it is parsed, in bytes. Refuses what is nested deeper, or holds more values, than
/// the limits.
fn measure(text: &str, max_depth: usize, max_nodes: u64) -> Result<u64, Problem> {
    let depth = depth(text);
    if depth > max_depth {
        let detail = format!("The JSON is nested {depth} levels deep; the limit is {max_depth}.");
        return Err(Problem::new(Code::InvalidRequest, detail));
    }
    let size = Size::of_text(text).map_err(|error| not_json(&error))?;
    if size.nodes > max_nodes {
        let nodes = size.nodes;
        let detail = format!("The JSON holds {nodes} values; the limit is {max_nodes} (`http.body_max_nodes`).");
        return Err(Problem::new(Code::BodyTooLarge, detail));
    }
    Ok(size.parsed_bytes)
}

fn parse(text: &str) -> Result<serde_json::Value, Problem> {
    serde_json::from_str(text).map_err(|error| not_json(&error))
}

fn not_json(error: &serde_json::Error) -> Problem {
    let mut violation = Violation::new(Code::Syntax, "", error.to_string());
    violation.line = u32::try_from(error.line()).ok();
    violation.column = u32::try_from(error.column()).ok();
    Problem::violations(Code::InvalidRequest, vec![violation])
}

/// How deep brackets are nested, strings left out. Right for whatever parses; for what does not, an upper bound that
/// costs one pass and no stack.
fn depth(text: &str) -> usize {
    let (mut now, mut deepest, mut in_string, mut escaped) = (0_usize, 0, false, false);
    for byte in text.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            _ if in_string => {}
            b'[' | b'{' => {
                now += 1;
                deepest = deepest.max(now);
            }
            b']' | b'}' => now = now.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

// ---- Queries ------------------------------------------------------------------------------------------------

/// A query string of one of the documented shapes.
pub(crate) struct Query<T>(pub(crate) T);

/// A query string's shape.
pub(crate) trait FromQuery: Sized {
    /// Every parameter's name.
    const NAMES: &'static [&'static str];

    /// Reads the parameters; mistakes are noted in the fields.
    fn read(fields: &mut Fields) -> Self;
}

impl<T: FromQuery> FromRequestParts<Shared> for Query<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &Shared) -> Result<Self, Problem> {
        read_query(parts.uri.query().unwrap_or_default()).map(Query)
    }
}

fn read_query<T: FromQuery>(query: &str) -> Result<T, Problem> {
    let mut fields = Fields::parse(query, T::NAMES);
    let value = T::read(&mut fields);
    if fields.violations.is_empty() {
        Ok(value)
    } else {
        Err(Problem::violations(Code::InvalidParameter, fields.violations))
    }
}

/// The parameters of a query string, and the mistakes found so far.
pub(crate) struct Fields {
    pairs: Vec<(String, String)>,
    violations: Vec<Violation>,
}

impl Fields {
    fn parse(query: &str, names: &[&str]) -> Self {
        let mut fields = Self { pairs: Vec::new(), violations: Vec::new() };
        for (name, value) in url::form_urlencoded::parse(query.as_bytes()) {
            if !names.contains(&name.as_ref()) {
                let mend = match nearest(&name, names.iter().copied()) {
                    Some(word) => format!("did you mean `{word}`?"),
                    None if names.is_empty() => "this route takes none".to_owned(),
                    None => format!("this route takes {}", names.join(", ")),
                };
                let shown: String = name.chars().take(80).collect();
                let message = format!("`{shown}` is not a parameter of this route");
                fields.violations.push(Violation::new(Code::UnknownKey, shown, message).mend(mend));
            } else if value.chars().any(|c| c.is_ascii_control()) || value.contains('\u{fffd}') {
                fields.wrong(&name, "it holds characters that no value can have");
            } else {
                fields.pairs.push((name.into_owned(), value.into_owned()));
            }
        }
        fields
    }

    /// Notes a mistake.
    pub(crate) fn wrong(&mut self, name: &str, message: impl Into<String>) {
        self.violations.push(Violation::new(Code::WrongValue, name, message));
    }

    /// Every value of a parameter that may be repeated; commas separate values too where `split` says so.
    pub(crate) fn many<T>(&mut self, name: &str, split: bool, read: impl Fn(&str) -> Result<T, String>) -> Vec<T> {
        let texts: Vec<String> = self.pairs.iter().filter(|(n, _)| n == name).map(|(_, v)| v.clone()).collect();
        let mut values = Vec::new();
        for text in &texts {
            let parts: Vec<&str> = if split { text.split(',').map(str::trim).collect() } else { vec![text] };
            for part in parts {
                match read(part) {
                    Ok(value) => values.push(value),
                    Err(message) => self.wrong(name, message),
                }
            }
        }
        values
    }

    /// The value of a parameter that stands once.
    pub(crate) fn one<T>(&mut self, name: &str, read: impl Fn(&str) -> Result<T, String>) -> Option<T> {
        let mut values = self.many(name, false, read);
        if values.len() > 1 {
            self.wrong(name, "it stands more than once");
        }
        values.pop()
    }

    /// The value of a parameter that reads itself.
    pub(crate) fn parsed<T: FromStr<Err: ToString>>(&mut self, name: &str) -> Option<T> {
        self.one(name, |text| text.parse().map_err(|error: T::Err| error.to_string()))
    }

    /// A whole number within limits.
    pub(crate) fn number(&mut self, name: &str, min: u64, max: u64) -> Option<u64> {
        self.one(name, |text| match text.parse::<u64>() {
            Ok(number) if (min..=max).contains(&number) => Ok(number),
            _ => Err(format!("write a whole number from {min} to {max}")),
        })
    }
}

// ---- Path segments ------------------------------------------------------------------------------------------

/// The segments of the path.
pub(crate) struct Path<T>(pub(crate) T);

impl<T: DeserializeOwned + Send> FromRequestParts<Shared> for Path<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, shared: &Shared) -> Result<Self, Problem> {
        match axum::extract::Path::<T>::from_request_parts(parts, shared).await {
            Ok(axum::extract::Path(value)) => Ok(Self(value)),
            Err(error) => Err(Problem::new(Code::InvalidRequest, error.body_text())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Sample {
        limit: Option<u64>,
        tags: Vec<String>,
    }

    impl FromQuery for Sample {
        const NAMES: &'static [&'static str] = &["limit", "tag"];
        fn read(fields: &mut Fields) -> Self {
            Self { limit: fields.number("limit", 1, 9), tags: fields.many("tag", true, |t| Ok(t.to_owned())) }
        }
    }

    #[test]
    fn a_bundles_definition_stays_as_it_was_written() {
        let text =
            r#"{"definition": {"name": "a", "name": "b", "n": 123456789012345678901234567890}, "files": {"./p": "x"}}"#;
        let bundle = bundle(text).expect("valid");
        assert_eq!(bundle.definition, r#"{"name": "a", "name": "b", "n": 123456789012345678901234567890}"#);
        assert_eq!(bundle.files.get("p").map(String::as_str), Some("x"));
        assert_eq!(super::bundle(r#"{"definition": "name: a"}"#).expect("valid").definition, "name: a");
        assert!(is_bundle(text) && !is_bundle(r#"{"name": "a", "stages": []}"#));
    }

    #[test]
    fn every_mistake_of_a_query_is_told_at_once() {
        let good = read_query::<Sample>("limit=3&tag=a,b&tag=c").expect("valid");
        assert_eq!((good.limit, good.tags.len()), (Some(3), 3));
        let many = read_query::<Sample>(&"x&".repeat(5_000)).expect_err("5 000 mistakes");
        assert_eq!(many.violations_told(), 100);
        let problem = read_query::<Sample>("limit=0&limt=1&tag=%00").expect_err("three mistakes");
        let text = format!("{problem:?}");
        for part in ["from 1 to 9", "did you mean `limit`?", "no value can have"] {
            assert!(text.contains(part), "{part} in {text}");
        }
        assert!(read_query::<Sample>("limit=1&limit=2").is_err());
    }

    #[test]
    fn depth_counts_brackets_outside_of_strings() {
        assert_eq!(depth(r#"{"a":["]]","\"[[["]}"#), 2);
        assert_eq!(depth("[[[]]]"), 3);
        assert!(measure("[[1]]", 2, 9).is_ok() && measure("[[[1]]]", 2, 9).is_err());
    }

    #[test]
    fn a_body_of_more_values_than_the_limit_is_refused_by_the_limits_name() {
        assert!(measure("[1,2,3]", 9, 4).is_ok());
        let problem = format!("{:?}", measure("[1,2,3,4]", 9, 4).expect_err("five values"));
        assert!(problem.contains("http.body_max_nodes") && problem.contains("holds 5 values"), "{problem}");
        let whole = format!("[0{}]", ",0".repeat(1024 * 1024 - 2));
        let default = crate::config::HttpConfig::default();
        assert!(whole.len() <= default.body_max_bytes);
        assert!(measure(&whole, 9, default.body_max_nodes).is_ok(), "whatever fits into a body of the default size");
    }

    #[test]
    fn a_content_type_is_read_with_its_parameters() {
        let read = |text: &str| {
            let headers = HeaderMap::from_iter([(CONTENT_TYPE, text.parse().expect("valid"))]);
            media_type(&headers).ok()
        };
        assert_eq!(read("Application/JSON; charset=UTF-8").as_deref(), Some("application/json"));
        assert_eq!(read("application/json; charset=latin1"), None);
        assert!(is_json("application/merge-patch+json") && !is_json("text/json"));
    }
}
