//! The three protocols' shapes: reads a request of any of them into a [`Call`], and writes an answer as that vendor
//! would. Holds no state.

use std::{fmt::Write, time::Instant};

use hyper::http::request::Parts;
use serde_json::{Map, Value, json};

use super::{Call, Content, End, Protocol, PurposeHint, Reply};

/// The longest piece of a prompt that an echo repeats, in characters.
const ECHO_MAX_CHARS: usize = 120;

pub(super) fn read_call(head: &Parts, bytes: &[u8], started: Instant) -> Call {
    let body: Value = serde_json::from_slice(bytes).unwrap_or(Value::Null);
    let path = head.uri.path().to_owned();
    let protocol = protocol(&head.method, &path);
    let (messages, schema) = match protocol {
        Protocol::Openai => (openai_messages(&body), body.pointer("/response_format/json_schema/schema")),
        Protocol::Anthropic => (anthropic_messages(&body), anthropic_schema(&body)),
        Protocol::Gemini => (gemini_messages(&body), body.pointer("/generationConfig/responseJsonSchema")),
        Protocol::Unknown => (Vec::new(), None),
    };
    let model = match protocol {
        Protocol::Gemini => path.rsplit('/').next().and_then(|last| last.split(':').next()).unwrap_or_default(),
        _ => body["model"].as_str().unwrap_or_default(),
    };
    let has = |key| schema.and_then(|s| s["properties"].get(key)).is_some();
    let judges = ((has("score") || has("verdict")) && has("reason"))
        || messages
            .first()
            .is_some_and(|(role, text)| role == "system" && text.starts_with("You are a strict reviewer"));
    let last_user = messages.iter().rev().find(|(role, _)| role == "user");
    Call {
        is_http2: head.version == hyper::Version::HTTP_2,
        index: 0,
        protocol,
        model: model.to_owned(),
        prompt_text: messages.iter().map(|(_, text)| text.as_str()).collect::<Vec<_>>().join("\n\n"),
        last_user_text: last_user.map(|(_, text)| text.clone()).unwrap_or_default(),
        schema: schema.cloned(),
        purpose_hint: if judges { PurposeHint::Judge } else { PurposeHint::Stage },
        headers: head
            .headers
            .iter()
            .map(|(name, value)| (name.as_str().to_owned(), String::from_utf8_lossy(value.as_bytes()).into_owned()))
            .collect(),
        query: head.uri.query().map(str::to_owned),
        path,
        body,
        started,
        finished: None,
        abandoned: false,
        charged: false,
    }
}

fn protocol(method: &hyper::Method, path: &str) -> Protocol {
    // Behind a gateway, and at some vendors, there are other parts before it.
    let is_gemini = || path.contains("/models/") && path.ends_with(":generateContent");
    match path {
        _ if method != hyper::Method::POST => Protocol::Unknown,
        _ if path.ends_with("/chat/completions") => Protocol::Openai,
        _ if path.ends_with("/messages") => Protocol::Anthropic,
        _ if is_gemini() => Protocol::Gemini,
        _ => Protocol::Unknown,
    }
}

/// A message's text, whether it is a string or a list of blocks.
fn text_of(content: &Value) -> String {
    match content {
        Value::String(text) => text.clone(),
        Value::Array(blocks) => blocks.iter().filter_map(|b| b["text"].as_str()).collect::<Vec<_>>().join("\n"),
        _ => String::new(),
    }
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn openai_messages(body: &Value) -> Vec<(String, String)> {
    list(&body["messages"])
        .map(|message| {
            let role = message["role"].as_str().unwrap_or_default();
            (role.replace("developer", "system"), text_of(&message["content"]))
        })
        .collect()
}

fn anthropic_messages(body: &Value) -> Vec<(String, String)> {
    let system = body.get("system").map(|system| ("system".to_owned(), text_of(system)));
    let rest = list(&body["messages"])
        .map(|message| (message["role"].as_str().unwrap_or_default().to_owned(), text_of(&message["content"])));
    system.into_iter().chain(rest).collect()
}

fn gemini_messages(body: &Value) -> Vec<(String, String)> {
    let system = body.get("systemInstruction").map(|system| ("system".to_owned(), text_of(&system["parts"])));
    let rest = list(&body["contents"]).map(|content| {
        let role = if content["role"] == "model" { "assistant" } else { "user" };
        (role.to_owned(), text_of(&content["parts"]))
    });
    system.into_iter().chain(rest).collect()
}

/// The schema of the tool that the request forces.
fn anthropic_schema(body: &Value) -> Option<&Value> {
    let forced = body.pointer("/tool_choice/name")?;
    list(&body["tools"]).find(|tool| &tool["name"] == forced).map(|tool| &tool["input_schema"])
}

pub(super) fn body(call: &Call, reply: &Reply, judge_score: f64) -> String {
    let text = match &reply.content {
        Content::Raw(body) => return body.clone(),
        Content::Huge(bytes) => return "x".repeat(*bytes),
        Content::Text(text) => text.clone(),
        Content::Echo => echo(call, judge_score),
    };
    let answer = match call.protocol {
        Protocol::Anthropic => anthropic_answer(call, reply, &text),
        Protocol::Gemini => gemini_answer(call, reply, &text),
        Protocol::Openai | Protocol::Unknown => openai_answer(call, reply, &text),
    };
    answer.to_string()
}

fn echo(call: &Call, judge_score: f64) -> String {
    if call.purpose_hint == PurposeHint::Judge {
        return json!({ "score": judge_score, "reason": "as the test asked" }).to_string();
    }
    let start: String = call.last_user_text.chars().take(ECHO_MAX_CHARS).collect();
    if let Some(schema) = &call.schema {
        return instance(schema, schema, &start, 0).to_string();
    }
    if call.body.pointer("/response_format/type").is_some_and(|t| t == "json_object")
        || call.body.pointer("/generationConfig/responseMimeType").is_some_and(|t| t == "application/json")
    {
        return json!({ "echo": start }).to_string();
    }
    let mut text = format!("An answer of the fake provider to: {start}\n");
    for line in 1..=12 {
        let _ = writeln!(text, "{line}. This line is there so that the answer has a length like a real one's.");
    }
    text
}

/// A value that minimally fits a plain schema: objects with what they require, arrays as short as they may be.
fn instance(schema: &Value, root: &Value, text: &str, depth: usize) -> Value {
    if depth > 32 {
        return Value::Null;
    }
    let inner = |schema: &Value| instance(schema, root, text, depth + 1);
    if let Some(constant) = schema.get("const") {
        return constant.clone();
    }
    if let Some(first) = list(&schema["enum"]).next() {
        return first.clone();
    }
    for key in ["anyOf", "oneOf", "allOf"] {
        if let Some(first) = list(&schema[key]).next() {
            return inner(first);
        }
    }
    if let Some(target) = schema["$ref"].as_str().and_then(|path| root.pointer(path.strip_prefix('#')?)) {
        return inner(target);
    }
    let kind = schema["type"].as_str().or_else(|| list(&schema["type"]).find_map(Value::as_str));
    match kind {
        Some("string") => {
            let least = usize::try_from(schema["minLength"].as_u64().unwrap_or(0)).unwrap_or(0);
            let most = usize::try_from(schema["maxLength"].as_u64().unwrap_or(u64::MAX)).unwrap_or(usize::MAX);
            let mut value: String = format!("echo: {text}").chars().take(most).collect();
            let missing = least.saturating_sub(value.chars().count());
            value.extend(std::iter::repeat_n('.', missing));
            Value::String(value)
        }
        Some("integer") => {
            #[expect(clippy::cast_possible_truncation, reason = "schemas of tests hold small numbers")]
            let least = schema["minimum"].as_f64().unwrap_or(1.0).ceil() as i64;
            json!(least)
        }
        Some("number") => schema.get("minimum").cloned().unwrap_or_else(|| json!(1)),
        Some("boolean") => json!(true),
        Some("null") => Value::Null,
        Some("array") => {
            let least = schema["minItems"].as_u64().unwrap_or(0);
            let items = schema.get("items").filter(|items| items.is_object());
            (0..least).map(|_| items.map_or_else(|| json!(format!("echo: {text}")), inner)).collect()
        }
        _ => {
            let known = &schema["properties"];
            let required = list(&schema["required"]).filter_map(Value::as_str);
            let fields: Map<String, Value> = required
                .map(|key| (key.to_owned(), known.get(key).map_or_else(|| json!(format!("echo: {text}")), inner)))
                .collect();
            Value::Object(fields)
        }
    }
}

fn openai_answer(call: &Call, reply: &Reply, text: &str) -> Value {
    let finish = match reply.end {
        End::Stop => "stop",
        End::Length => "length",
        End::Refused => "content_filter",
    };
    let mut answer = json!({
        "id": format!("chatcmpl-{}", call.index),
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": call.model,
        "choices": [{
            "index": 0,
            "message": { "role": "assistant", "content": text, "refusal": null },
            "logprobs": null,
            "finish_reason": finish,
        }],
    });
    if let Some((input, output)) = reply.usage {
        answer["usage"] = json!({
            "prompt_tokens": input,
            "completion_tokens": output,
            "total_tokens": input + output,
            "prompt_tokens_details": { "cached_tokens": 0, "audio_tokens": 0 },
            "completion_tokens_details": { "reasoning_tokens": 0 },
        });
    }
    answer
}

fn anthropic_answer(call: &Call, reply: &Reply, text: &str) -> Value {
    let tool = call.body.pointer("/tool_choice/name");
    let input = tool.and_then(|_| serde_json::from_str::<Value>(text).ok()).filter(Value::is_object);
    let (content, complete) = match (tool, input) {
        (Some(name), Some(input)) => {
            (json!([{ "type": "tool_use", "id": "toolu_01", "name": name, "input": input }]), "tool_use")
        }
        _ => (json!([{ "type": "text", "text": text }]), "end_turn"),
    };
    let mut answer = json!({
        "id": format!("msg_{}", call.index),
        "type": "message",
        "role": "assistant",
        "model": call.model,
        "content": content,
        "stop_reason": match reply.end {
            End::Stop => complete,
            End::Length => "max_tokens",
            End::Refused => "refusal",
        },
        "stop_sequence": null,
    });
    if let Some((input, output)) = reply.usage {
        answer["usage"] = json!({
            "input_tokens": input,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": output,
        });
    }
    answer
}

fn gemini_answer(call: &Call, reply: &Reply, text: &str) -> Value {
    let mut answer = json!({
        "candidates": [{
            "content": { "role": "model", "parts": [{ "text": text }] },
            "finishReason": match reply.end {
                End::Stop => "STOP",
                End::Length => "MAX_TOKENS",
                End::Refused => "SAFETY",
            },
            "index": 0,
        }],
        "modelVersion": call.model,
        "responseId": format!("resp-{}", call.index),
    });
    if let Some((input, output)) = reply.usage {
        answer["usageMetadata"] = json!({
            "promptTokenCount": input,
            "candidatesTokenCount": output,
            "totalTokenCount": input + output,
        });
    }
    answer
}
