//! Every form in which an address is written, for each kind.

use super::*;

fn url(kind: ProviderKind, written: &str) -> String {
    match Place::of(kind, Some(written)) {
        Ok(place) => place.url("m/1").to_string(),
        Err(Wrong { what, mend }) => panic!("{written}: {what} ({mend})"),
    }
}

fn key_header(kind: ProviderKind, written: &str) -> &'static str {
    Place::of(kind, Some(written)).expect("valid").key_header
}

#[track_caller]
fn refused(kind: ProviderKind, written: &str, what: &str, mend: &str) {
    let error = Place::of(kind, Some(written)).expect_err(written);
    assert!(error.what.contains(what), "{written}: {}", error.what);
    assert!(error.mend.contains(mend), "{written}: {}", error.mend);
}

#[test]
fn an_address_of_openais_dialect_is_joined_from_every_form() {
    for (written, joined) in [
        ("https://api.openai.com", "https://api.openai.com/v1/chat/completions"),
        ("https://api.openai.com/", "https://api.openai.com/v1/chat/completions"),
        ("https://api.openai.com/v1", "https://api.openai.com/v1/chat/completions"),
        ("https://api.openai.com/v1/", "https://api.openai.com/v1/chat/completions"),
        ("https://api.openai.com/v1/chat/completions", "https://api.openai.com/v1/chat/completions"),
        ("https://api.openai.com/v1/chat/completions/", "https://api.openai.com/v1/chat/completions"),
        ("http://localhost:11434", "http://localhost:11434/v1/chat/completions"),
        ("http://localhost:11434//v1", "http://localhost:11434/v1/chat/completions"),
        ("http://[::1]:8080", "http://[::1]:8080/v1/chat/completions"),
        ("http://[fd12::1]:8080/v1", "http://[fd12::1]:8080/v1/chat/completions"),
        ("https://gateway.example/llm/v2", "https://gateway.example/llm/v2/chat/completions"),
        ("https://gateway.example/llm/", "https://gateway.example/llm/chat/completions"),
        ("https://gateway.example/chat/completions", "https://gateway.example/chat/completions"),
        ("https://gateway.example/a%20b/v1", "https://gateway.example/a%20b/v1/chat/completions"),
        ("https://gateway.example/v1?team=a&x=%20", "https://gateway.example/v1/chat/completions?team=a&x=%20"),
        ("https://gateway.example/v1?", "https://gateway.example/v1/chat/completions"),
        ("https://openrouter.ai", "https://openrouter.ai/api/v1/chat/completions"),
        ("https://openrouter.ai/api", "https://openrouter.ai/api/v1/chat/completions"),
        ("https://api.groq.com", "https://api.groq.com/openai/v1/chat/completions"),
        ("https://api.groq.com/openai", "https://api.groq.com/openai/v1/chat/completions"),
        ("https://api.perplexity.ai", "https://api.perplexity.ai/chat/completions"),
        ("https://api.deepseek.com", "https://api.deepseek.com/v1/chat/completions"),
        (
            "https://generativelanguage.googleapis.com/v1beta/openai/",
            "https://generativelanguage.googleapis.com/v1beta/openai/chat/completions",
        ),
        (
            "https://bedrock-runtime.us-west-2.amazonaws.com",
            "https://bedrock-runtime.us-west-2.amazonaws.com/openai/v1/chat/completions",
        ),
        (
            "https://europe-west4-aiplatform.googleapis.com/v1/projects/p/locations/europe-west4",
            "https://europe-west4-aiplatform.googleapis.com/v1/projects/p/locations/europe-west4/endpoints/openapi/chat/completions",
        ),
    ] {
        assert_eq!(url(ProviderKind::Openai, written), joined, "{written}");
        assert_eq!(key_header(ProviderKind::Openai, written), "authorization", "{written}");
    }
}

#[test]
fn azure_is_known_in_its_classic_form_and_in_v1() {
    for (written, joined) in [
        ("https://r.openai.azure.com", "https://r.openai.azure.com/openai/v1/chat/completions"),
        ("https://r.openai.azure.com/openai", "https://r.openai.azure.com/openai/v1/chat/completions"),
        ("https://r.openai.azure.com/openai/v1/", "https://r.openai.azure.com/openai/v1/chat/completions"),
        (
            "https://r.openai.azure.com/?api-version=preview",
            "https://r.openai.azure.com/openai/v1/chat/completions?api-version=preview",
        ),
        (
            "https://r.openai.azure.com?api-version=2024-10-21",
            "https://r.openai.azure.com/openai/deployments/m%2F1/chat/completions?api-version=2024-10-21",
        ),
        (
            "https://r.openai.azure.com/openai/deployments?api-version=2024-10-21",
            "https://r.openai.azure.com/openai/deployments/m%2F1/chat/completions?api-version=2024-10-21",
        ),
        (
            "https://r.openai.azure.com/openai/deployments/prod?api-version=2024-10-21",
            "https://r.openai.azure.com/openai/deployments/prod/chat/completions?api-version=2024-10-21",
        ),
        (
            "https://r.openai.azure.com/openai/deployments/prod/chat/completions?api-version=2024-10-21",
            "https://r.openai.azure.com/openai/deployments/prod/chat/completions?api-version=2024-10-21",
        ),
        (
            "https://gateway.example/azure/openai/deployments/prod?api-version=2024-10-21",
            "https://gateway.example/azure/openai/deployments/prod/chat/completions?api-version=2024-10-21",
        ),
        (
            "https://r.services.ai.azure.com/models?api-version=2024-05-01-preview",
            "https://r.services.ai.azure.com/models/chat/completions?api-version=2024-05-01-preview",
        ),
    ] {
        assert_eq!(url(ProviderKind::Openai, written), joined, "{written}");
        assert_eq!(key_header(ProviderKind::Openai, written), "api-key", "{written}");
    }
    let deployment = "https://r.openai.azure.com/openai/deployments/prod";
    refused(ProviderKind::Openai, deployment, "needs an `api-version`", "?api-version=");
    let other = format!("{deployment}/images/generations?api-version=1");
    refused(ProviderKind::Openai, &other, "not `/chat/completions`", "end it at `/openai/deployments/prod`");
}

#[test]
fn an_address_of_anthropics_dialect_is_joined_from_every_form() {
    for (written, joined) in [
        ("https://api.anthropic.com", "https://api.anthropic.com/v1/messages"),
        ("https://api.anthropic.com/v1/", "https://api.anthropic.com/v1/messages"),
        ("https://api.anthropic.com/v1/messages", "https://api.anthropic.com/v1/messages"),
        ("https://gateway.example/anthropic", "https://gateway.example/anthropic/v1/messages"),
        ("https://gateway.example/anthropic/v1", "https://gateway.example/anthropic/v1/messages"),
        ("https://gateway.example/messages?beta=true", "https://gateway.example/messages?beta=true"),
        ("http://[::1]:1234/", "http://[::1]:1234/v1/messages"),
    ] {
        assert_eq!(url(ProviderKind::Anthropic, written), joined, "{written}");
        assert_eq!(key_header(ProviderKind::Anthropic, written), "x-api-key", "{written}");
    }
}

#[test]
fn an_address_of_geminis_dialect_is_joined_from_every_form() {
    let vendor = "https://generativelanguage.googleapis.com";
    let vertex = "https://europe-west4-aiplatform.googleapis.com/v1/projects/p/locations/europe-west4";
    for (written, joined) in [
        (vendor.to_owned(), format!("{vendor}/v1beta/models/m%2F1:generateContent")),
        (format!("{vendor}/v1beta/"), format!("{vendor}/v1beta/models/m%2F1:generateContent")),
        (format!("{vendor}/v1"), format!("{vendor}/v1/models/m%2F1:generateContent")),
        (format!("{vendor}/v1beta/models"), format!("{vendor}/v1beta/models/m%2F1:generateContent")),
        (
            format!("{vendor}/v1beta/models/gemini-2.5-flash:generateContent"),
            format!("{vendor}/v1beta/models/m%2F1:generateContent"),
        ),
        (
            format!("{vendor}/v1beta/models/gemini-2.5-flash:streamGenerateContent"),
            format!("{vendor}/v1beta/models/m%2F1:generateContent"),
        ),
        (
            "https://gateway.example/gemini?team=a".to_owned(),
            "https://gateway.example/gemini/v1beta/models/m%2F1:generateContent?team=a".to_owned(),
        ),
        ("http://[::1]:80".to_owned(), "http://[::1]/v1beta/models/m%2F1:generateContent".to_owned()),
        (vertex.to_owned(), format!("{vertex}/publishers/google/models/m%2F1:generateContent")),
        (
            format!("{vertex}/publishers/google/models"),
            format!("{vertex}/publishers/google/models/m%2F1:generateContent"),
        ),
        (
            "https://aiplatform.googleapis.com".to_owned(),
            "https://aiplatform.googleapis.com/v1/publishers/google/models/m%2F1:generateContent".to_owned(),
        ),
    ] {
        assert_eq!(url(ProviderKind::Gemini, &written), joined, "{written}");
        assert_eq!(key_header(ProviderKind::Gemini, &written), "x-goog-api-key", "{written}");
    }
}

#[test]
fn an_address_that_cannot_be_joined_is_refused_with_what_to_write() {
    use ProviderKind::{Anthropic, Gemini, Openai};
    for (kind, written, what, mend) in [
        (Openai, "localhost:8000", "no http or https", "`http://localhost:8000`"),
        (Openai, "api.openai.com/v1", "no absolute URL", "`https://api.openai.com/v1`"),
        (Openai, "https://api.openai.com/v1/completions", "older dialect", "end it at `/v1`"),
        (Openai, "https://api.openai.com/v1/responses", "Responses", "end it at `/v1`"),
        (Openai, "https://api.openai.com/v1/embeddings", "`/embeddings`", "end it at `/v1`"),
        (Openai, "https://api.anthropic.com/v1/messages", "Anthropic's", "kind = \"anthropic\""),
        (Openai, "https://g.example/v1beta/models/m:generateContent", "Gemini's", "kind = \"gemini\""),
        (Openai, "https://bedrock-runtime.eu-west-1.amazonaws.com/model/m/converse", "native", "/openai/v1"),
        (Openai, "https://aiplatform.googleapis.com", "Vertex", "endpoints/openapi"),
        (Openai, "https://u:secret@g.example/v1", "credentials", "`api_key`"),
        (Openai, "https://g.example/v1?API_KEY=secret", "`API_KEY`", "`key_header`"),
        (Openai, "https://g.example/v1#x", "fragment", "before `#`"),
        (Openai, "http://g.example:0", "port 0", "the port"),
        (Anthropic, "https://api.anthropic.com/v1/complete", "`/complete`", "v1/messages"),
        (Anthropic, "https://g.example/v1/chat/completions", "OpenAI's", "kind = \"openai\""),
        (Anthropic, "https://bedrock-runtime.eu-west-1.amazonaws.com", "Bedrock", "docs/providers.md"),
        (Gemini, "https://generativelanguage.googleapis.com/v1beta/openai", "OpenAI's", "kind = \"openai\""),
        (Gemini, "https://generativelanguage.googleapis.com/v1beta?key=secret", "`key`", "`api_key`"),
        (Gemini, "https://generativelanguage.googleapis.com/v1beta?alt=sse", "whole", "leave `alt` out"),
        (Gemini, "https://aiplatform.googleapis.com/v1/projects/p", "Vertex", "locations/LOCATION"),
    ] {
        refused(kind, written, what, mend);
        let error = Place::of(kind, Some(written)).expect_err("refused");
        assert!(!format!("{error:?}").contains("secret"), "{error:?}");
    }
}

#[test]
fn only_the_vendors_own_addresses_need_a_key() {
    for kind in [ProviderKind::Openai, ProviderKind::Anthropic, ProviderKind::Gemini] {
        assert!(Place::of(kind, None).expect("valid").needs_key);
        assert!(!Place::of(kind, Some("http://localhost:1234")).expect("valid").needs_key);
    }
    let is_openai = |written| Place::of(ProviderKind::Openai, Some(written)).expect("valid").is_openai;
    assert!(is_openai("https://eu.api.openai.com/v1") && is_openai("https://r.openai.azure.com"));
    assert!(!is_openai("https://r.services.ai.azure.com/models?api-version=1") && !is_openai("http://localhost:1"));
}
