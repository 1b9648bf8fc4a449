//! Servers with a dialect: each knows a part of its protocol, and refuses the rest in the words of a server that does so.
//! None of them runs a model; [`FakeProvider::speak`] adds the refusals as rules, and what is not refused is answered as usual.

use serde_json::{Value, json};

use super::{Call, FakeProvider, Protocol, Reply};

/// A server with a dialect.
#[derive(Debug, Clone)]
pub struct Dialect {
    /// Which kind of server it is.
    pub name: &'static str,
    /// The protocol that it speaks a part of.
    pub protocol: Protocol,
    refusals: Vec<Refusal>,
}

/// What it refuses, by the request's body, and how.
#[derive(Debug, Clone)]
struct Refusal {
    refuses: fn(&Value) -> bool,
    status: u16,
    body: Value,
}

fn has(body: &Value, key: &str) -> bool {
    body.get(key).is_some()
}

fn format(body: &Value) -> &str {
    body.pointer("/response_format/type").and_then(Value::as_str).unwrap_or_default()
}

fn says(body: &Value, role: &str) -> bool {
    body["messages"].as_array().into_iter().flatten().any(|message| message["role"] == role)
}

fn generation(body: &Value, key: &str) -> bool {
    body["generationConfig"].get(key).is_some()
}

fn refusal(refuses: fn(&Value) -> bool, status: u16, body: Value) -> Refusal {
    Refusal { refuses, status, body }
}

/// In the words of OpenAI.
fn openai(refuses: fn(&Value) -> bool, message: &str, param: &str, code: &str) -> Refusal {
    let error = json!({ "message": message, "type": "invalid_request_error", "param": param, "code": code });
    refusal(refuses, 400, json!({ "error": error }))
}

/// In the words of a server of its own that says nothing but a sentence.
fn sentence(refuses: fn(&Value) -> bool, message: &str) -> Refusal {
    refusal(
        refuses,
        400,
        json!({ "error": { "message": message, "type": "BadRequestError", "param": null, "code": 400 } }),
    )
}

/// In the words of `FastAPI`, for a field that it does not know.
fn forbidden(refuses: fn(&Value) -> bool, field: &str) -> Refusal {
    let detail = json!([{
        "type": "extra_forbidden",
        "loc": ["body", field],
        "msg": "Extra inputs are not permitted",
        "input": "what was sent",
    }]);
    refusal(refuses, 422, json!({ "detail": detail }))
}

fn anthropic(refuses: fn(&Value) -> bool, message: &str) -> Refusal {
    let error = json!({ "type": "invalid_request_error", "message": message });
    refusal(refuses, 400, json!({ "type": "error", "error": error }))
}

fn gemini(refuses: fn(&Value) -> bool, message: &str) -> Refusal {
    refusal(refuses, 400, json!({ "error": { "code": 400, "message": message, "status": "INVALID_ARGUMENT" } }))
}

/// What servers say that take `json_object` only with the word in the messages.
const WANTS_WORD: &str =
    "Prompt must contain the word 'json' in some form to use 'response_format' of type 'json_object'.";

fn has_no_word(body: &Value) -> bool {
    format(body) == "json_object" && !body["messages"].to_string().to_lowercase().contains("json")
}

fn compatible(name: &'static str, refusals: Vec<Refusal>) -> Dialect {
    Dialect { name, protocol: Protocol::Openai, refusals }
}

fn messages(name: &'static str, refusals: Vec<Refusal>) -> Dialect {
    Dialect { name, protocol: Protocol::Anthropic, refusals }
}

fn generate(name: &'static str, refusals: Vec<Refusal>) -> Dialect {
    Dialect { name, protocol: Protocol::Gemini, refusals }
}

/// Every server of the suite.
pub fn all() -> Vec<Dialect> {
    [with_forms_of_json(), with_roles_and_parameters(), of_anthropics_protocol(), of_geminis_protocol()].concat()
}

fn with_forms_of_json() -> Vec<Dialect> {
    vec![
        compatible(
            "a server with an old model",
            vec![
                openai(
                    |body| format(body) == "json_schema",
                    "Invalid parameter: 'response_format' of type 'json_schema' is not supported with this model.",
                    "response_format",
                    "invalid_request_error",
                ),
                openai(has_no_word, WANTS_WORD, "messages", "invalid_request_error"),
            ],
        ),
        compatible(
            "a server that knows json_object alone",
            vec![
                sentence(|body| format(body) == "json_schema", "This response_format type is unavailable now"),
                sentence(has_no_word, WANTS_WORD),
            ],
        ),
        compatible(
            "a server that knows json_schema alone",
            vec![sentence(
                |body| format(body) == "json_object",
                "'response_format.type' must be 'json_schema' or 'text'",
            )],
        ),
        compatible(
            "a server that knows no response_format",
            vec![sentence(
                |body| has(body, "response_format"),
                "Unrecognized request argument supplied: response_format",
            )],
        ),
    ]
}

fn with_roles_and_parameters() -> Vec<Dialect> {
    vec![
        compatible(
            "a model that reasons",
            vec![
                openai(
                    |body| has(body, "max_tokens"),
                    "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
                    "max_tokens",
                    "unsupported_parameter",
                ),
                openai(
                    |body| has(body, "temperature"),
                    "Unsupported value: 'temperature' does not support 0.5 with this model. Only the default (1) value is supported.",
                    "temperature",
                    "unsupported_value",
                ),
                openai(
                    |body| has(body, "top_p"),
                    "Unsupported parameter: 'top_p' is not supported with this model.",
                    "top_p",
                    "unsupported_parameter",
                ),
                openai(
                    |body| has(body, "stop"),
                    "Unsupported parameter: 'stop' is not supported with this model.",
                    "stop",
                    "unsupported_parameter",
                ),
            ],
        ),
        compatible(
            "a model that knows no system and no developer",
            vec![openai(
                |body| says(body, "system") || says(body, "developer"),
                "Unsupported value: 'messages[0].role' does not support 'system' with this model.",
                "messages[0].role",
                "unsupported_value",
            )],
        ),
        compatible(
            "a model that knows a developer",
            vec![sentence(
                |body| says(body, "system"),
                "'system' is not one of ['user', 'assistant', 'developer'] - 'messages.0.role'",
            )],
        ),
        compatible(
            "a server that forbids what it does not know",
            vec![
                forbidden(|body| has(body, "seed"), "seed"),
                forbidden(|body| has(body, "response_format"), "response_format"),
            ],
        ),
        compatible(
            "a template that knows no system",
            vec![sentence(|body| says(body, "system"), "System role not supported")],
        ),
        compatible(
            "a template that fails at a system",
            vec![refusal(
                |body| says(body, "system"),
                500,
                json!({ "error": { "code": 500, "message": "Jinja Exception: System role not supported", "type": "server_error" } }),
            )],
        ),
        compatible(
            "a proxy that knows its models",
            vec![sentence(
                |body| has(body, "seed") || has(body, "top_p"),
                "litellm.UnsupportedParamsError: fake does not support parameters: ['seed', 'top_p'], for model=m.",
            )],
        ),
        compatible(
            "a server that says so inside a 200",
            vec![refusal(
                |body| format(body) == "json_schema",
                200,
                json!({ "object": "error", "message": "response_format json_schema is not supported", "code": 400 }),
            )],
        ),
    ]
}

fn of_anthropics_protocol() -> Vec<Dialect> {
    vec![
        messages(
            "a model that cannot be forced",
            vec![anthropic(
                |body| has(body, "tool_choice"),
                "tool_choice: type \"tool\" and \"any\" are not supported for this model.",
            )],
        ),
        messages(
            "a model with one way to sample",
            vec![anthropic(
                |body| has(body, "temperature") && has(body, "top_p"),
                "`temperature` and `top_p` cannot both be specified for this model. Please use only one.",
            )],
        ),
        messages(
            "a model that samples as it likes",
            vec![
                anthropic(|body| has(body, "temperature"), "`temperature` is deprecated for this model."),
                anthropic(|body| has(body, "top_p"), "`top_p` is deprecated for this model."),
                anthropic(|body| has(body, "stop_sequences"), "stop_sequences: Extra inputs are not permitted"),
            ],
        ),
    ]
}

fn of_geminis_protocol() -> Vec<Dialect> {
    vec![
        generate(
            "a model without instructions",
            vec![
                gemini(
                    |body| has(body, "systemInstruction"),
                    "Developer instruction is not enabled for models/gemma-3-27b-it",
                ),
                gemini(
                    |body| generation(body, "responseMimeType"),
                    "JSON mode is not enabled for models/gemma-3-27b-it",
                ),
            ],
        ),
        generate(
            "a server of an older version",
            vec![
                gemini(
                    |body| generation(body, "responseJsonSchema"),
                    "Invalid JSON payload received. Unknown name \"responseJsonSchema\" at 'generation_config': Cannot find field.",
                ),
                gemini(
                    |body| generation(body, "seed"),
                    "Invalid JSON payload received. Unknown name \"seed\" at 'generation_config': Cannot find field.",
                ),
            ],
        ),
    ]
}

impl FakeProvider {
    /// Refuses what a dialect does not know, before all rules that are added later.
    pub fn speak(&self, dialect: &Dialect) {
        for Refusal { refuses, status, body } in &dialect.refusals {
            let refuses = *refuses;
            let matches = std::sync::Arc::new(move |call: &Call| refuses(&call.body));
            self.on(matches).respond(Reply::status(*status, body.to_string()));
        }
    }
}
