//! Examples of requests and answers: owns where they stand in the document. They were recorded from a daemon
//! (`examples.json`); a test sends the requests again, and holds them and the answers against the schemas and the daemon.

use serde_json::{Value, json};
use stagegate_core::Code;

use crate::problem::PROBLEM_JSON;

/// By operation: `request` and `responses`, by status and type.
const RECORDED: &str = include_str!("examples.json");
/// The correlation id of all examples.
const REQUEST_ID: &str = "01985c2d-7c3e-7b1a-8f0e-2d4c6a8b0e1f";

/// Adds the recorded examples to the document, and an example of its first code to each error.
pub(crate) fn add(document: &mut Value) {
    // The file is ours, and a test reads it.
    let recorded: Value = serde_json::from_str(RECORDED).unwrap_or_default();
    let paths = document.get_mut("paths").and_then(Value::as_object_mut).into_iter().flatten();
    for (_, operation) in paths.flat_map(|(_, item)| item.as_object_mut().into_iter().flatten()) {
        let Some(id) = operation.get("operationId").and_then(Value::as_str) else { continue };
        let of_operation = recorded.get(id).cloned().unwrap_or_default();
        put(operation.pointer_mut("/requestBody/content"), &of_operation["request"]);
        for (status, response) in operation.get_mut("responses").and_then(Value::as_object_mut).into_iter().flatten() {
            let description = response.get("description").and_then(Value::as_str).unwrap_or_default().to_owned();
            put(response.get_mut("content"), &of_operation["responses"][status.as_str()]);
            let problem = response.get_mut("content").and_then(|content| content.get_mut(PROBLEM_JSON));
            if let (Some(problem), Some(code)) = (problem, first_code(&description)) {
                problem["example"] = example_of(code, status, &description);
            }
        }
    }
}

/// Each type's example.
fn put(content: Option<&mut Value>, examples: &Value) {
    for (kind, media) in content.and_then(Value::as_object_mut).into_iter().flatten() {
        if let Some(example) = examples.get(kind) {
            media["example"] = example.clone();
        }
    }
}

/// The first code that a description names: `(SG0207)`.
fn first_code(description: &str) -> Option<Code> {
    let at = description.find("SG")?;
    Code::parse(description.get(at..at + 6)?)
}

fn example_of(code: Code, status: &str, description: &str) -> Value {
    json!({
        "type": code.docs_url(),
        "title": code.title(),
        "status": status.parse::<u16>().unwrap_or(code.status()),
        "detail": description,
        "code": code.as_str(),
        "request_id": REQUEST_ID,
        "violations": [],
    })
}
