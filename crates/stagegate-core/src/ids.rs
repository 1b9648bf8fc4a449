//! Identifiers: owns their grammar and their parsing. Never holds a string that has not been checked.

use std::{fmt, str::FromStr, sync::Arc};

use chrono::{DateTime, Utc};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use utoipa::{PartialSchema, ToSchema};
use uuid::Uuid;

/// The longest slug: a name, a tenant or a stage id, in bytes.
pub const SLUG_MAX_BYTES: usize = 64;

/// Why a text is no identifier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{given}` is not a valid {what}: {rule}")]
pub struct InvalidId {
    /// What was expected, in the field's words.
    pub what: &'static str,
    /// What was given, cut to a printable length.
    pub given: String,
    /// The rule that it breaks.
    pub rule: &'static str,
}

const SLUG_RULE: &str = "use 1 to 64 of a-z, 0-9, '-' and '_', starting with a letter or a digit";

fn is_slug(text: &str) -> bool {
    let bytes = text.as_bytes();
    let allowed = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    !bytes.is_empty()
        && bytes.len() <= SLUG_MAX_BYTES
        && allowed(&bytes[0])
        && bytes.iter().all(|b| allowed(b) || *b == b'-' || *b == b'_')
}

macro_rules! slug {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
        #[serde(try_from = "String", into = "String")]
        #[schema(value_type = String, pattern = r"^[a-z0-9][a-z0-9_-]{0,63}$")]
        pub struct $name(Arc<str>);

        impl JsonSchema for $name {
            fn schema_name() -> std::borrow::Cow<'static, str> {
                stringify!($name).into()
            }

            fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
                schemars::json_schema!({ "type": "string", "pattern": "^[a-z0-9][a-z0-9_-]{0,63}$", "description": SLUG_RULE })
            }
        }

        impl $name {
            /// Parses, or says which rule is broken.
            pub fn new(text: impl AsRef<str>) -> Result<Self, InvalidId> {
                let text = text.as_ref();
                if is_slug(text) {
                    Ok(Self(Arc::from(text)))
                } else {
                    Err(InvalidId { what: $what, given: text.chars().take(80).collect(), rule: SLUG_RULE })
                }
            }

            /// The text itself.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;
            fn from_str(text: &str) -> Result<Self, InvalidId> {
                Self::new(text)
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidId;
            fn try_from(text: String) -> Result<Self, InvalidId> {
                Self::new(text)
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0.as_ref().to_owned()
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }
    };
}

slug!(
    /// Whose rows these are. Every row, cache key and event belongs to one tenant.
    TenantId, "tenant"
);
slug!(
    /// A pipeline's name, unique within its tenant.
    PipelineName, "pipeline name"
);
slug!(
    /// A stage's id, unique within its pipeline.
    StageId, "stage id"
);
slug!(
    /// A provider's name: the part of a model before the slash.
    ProviderName, "provider name"
);

impl Default for TenantId {
    /// The tenant of an open, embedded daemon.
    fn default() -> Self {
        Self(Arc::from("default"))
    }
}

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
        #[serde(transparent)]
        #[schema(value_type = Uuid)]
        pub struct $name(pub Uuid);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;
            fn from_str(text: &str) -> Result<Self, InvalidId> {
                Uuid::try_parse(text).map(Self).map_err(|_| InvalidId {
                    what: $what,
                    given: text.chars().take(80).collect(),
                    rule: "it is a UUID, as the API returned it",
                })
            }
        }
    };
}

uuid_id!(
    /// One run. Time-ordered (UUID v7), so that it is its own page key.
    RunId, "run id"
);
uuid_id!(
    /// One life of one replica; a restarted process has a new one.
    ReplicaId, "replica id"
);
uuid_id!(
    /// One API key (not its secret).
    KeyId, "key id"
);

impl RunId {
    /// A new id for a run accepted at `now`; `random` fills the rest.
    pub fn new(now: DateTime<Utc>, random: [u8; 10]) -> Self {
        let millis = u64::try_from(now.timestamp_millis()).unwrap_or(0);
        Self(uuid::Builder::from_unix_timestamp_millis(millis, &random).into_uuid())
    }

    /// When it was made; 1970 where the id does not tell.
    pub fn created_at(self) -> DateTime<Utc> {
        let (seconds, nanos) = self.0.get_timestamp().map_or((0, 0), |at| at.to_unix());
        i64::try_from(seconds).ok().and_then(|seconds| DateTime::from_timestamp(seconds, nanos)).unwrap_or_default()
    }
}

/// A lease's generation. It only grows; every write of an owner carries it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epoch(pub i64);

/// `provider/model`, as it stands in a definition: `openai/gpt-5-mini`, `sim/quick`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ModelRef {
    provider: Arc<str>,
    model: Arc<str>,
}

const MODEL_RULE: &str = "write `provider/model`, such as `openai/gpt-5-mini` or `sim/quick`";

impl ModelRef {
    /// Parses `provider/model`; the model's part may hold further slashes.
    pub fn new(text: impl AsRef<str>) -> Result<Self, InvalidId> {
        let text = text.as_ref();
        let valid_model = |m: &str| !m.is_empty() && m.len() <= 128 && m.bytes().all(|b| b.is_ascii_graphic());
        match text.split_once('/') {
            Some((provider, model)) if is_slug(provider) && valid_model(model) => {
                Ok(Self { provider: Arc::from(provider), model: Arc::from(model) })
            }
            _ => Err(InvalidId { what: "model", given: text.chars().take(80).collect(), rule: MODEL_RULE }),
        }
    }

    /// The configured provider that serves it.
    pub fn provider(&self) -> &str {
        &self.provider
    }

    /// The provider's own name for it.
    pub fn model(&self) -> &str {
        &self.model
    }
}

impl fmt::Display for ModelRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.provider, self.model)
    }
}

impl FromStr for ModelRef {
    type Err = InvalidId;
    fn from_str(text: &str) -> Result<Self, InvalidId> {
        Self::new(text)
    }
}

impl TryFrom<String> for ModelRef {
    type Error = InvalidId;
    fn try_from(text: String) -> Result<Self, InvalidId> {
        Self::new(text)
    }
}

impl From<ModelRef> for String {
    fn from(model: ModelRef) -> String {
        model.to_string()
    }
}

impl JsonSchema for ModelRef {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "ModelRef".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "type": "string",
            "pattern": "^[a-z0-9][a-z0-9_-]{0,63}/[!-~]{1,128}$",
            "description": "provider/model, such as openai/gpt-5-mini"
        })
    }
}

impl PartialSchema for ModelRef {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::Schema> {
        utoipa::openapi::ObjectBuilder::new()
            .schema_type(utoipa::openapi::schema::Type::String)
            .pattern(Some("^[a-z0-9][a-z0-9_-]{0,63}/[!-~]{1,128}$"))
            .description(Some("provider/model, such as openai/gpt-5-mini"))
            .into()
    }
}

impl ToSchema for ModelRef {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slug_is_lower_case_and_bounded() {
        assert!(StageId::new("test-plan").is_ok());
        for bad in ["", "-a", "A", "a b", "é", &"a".repeat(65)] {
            assert!(StageId::new(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_provider_has_a_name_that_a_model_can_hold_and_no_other() {
        for name in
            ["openai", "my-prov_2", "0", "MyProv", "my.prov", "", "-a", "a/b", "ä", &"a".repeat(64), &"a".repeat(65)]
        {
            let reference = ModelRef::new(format!("{name}/m"));
            let is_held = reference.is_ok_and(|model| model.provider() == name);
            assert_eq!(ProviderName::new(name).is_ok(), is_held, "{name}");
        }
    }

    #[test]
    fn a_model_names_its_provider() {
        let model = ModelRef::new("local/meta/llama-3").expect("valid");
        assert_eq!((model.provider(), model.model()), ("local", "meta/llama-3"));
        assert!(ModelRef::new("gpt-5").is_err());
    }

    #[test]
    fn run_ids_sort_by_time() {
        let at = |ms| DateTime::from_timestamp_millis(ms).expect("in range");
        assert!(RunId::new(at(1_000), [255; 10]) < RunId::new(at(1_001), [0; 10]));
    }
}
