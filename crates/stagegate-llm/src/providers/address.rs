//! Addresses of providers: owns how what an operator wrote as `base_url` becomes the address of a call, and which header
//! takes the key there. What cannot be joined for sure is refused with what to write. docs/providers.md has an example for
//! each vendor, which a test reads.

use stagegate_net::{BadAddress, Trusted};
use url::Url;

use crate::config::ProviderKind;

const OPENAI: &str = "https://api.openai.com/v1";
const ANTHROPIC: &str = "https://api.anthropic.com";
const GEMINI: &str = "https://generativelanguage.googleapis.com";

/// Servers of OpenAI's dialect whose paths do not begin at `/v1`.
const ROOTS: [(&str, &[&str]); 7] = [
    ("openrouter.ai", &["api", "v1"]),
    ("api.groq.com", &["openai", "v1"]),
    ("generativelanguage.googleapis.com", &["v1beta", "openai"]),
    ("api.fireworks.ai", &["inference", "v1"]),
    ("api.deepinfra.com", &["v1", "openai"]),
    ("api.cohere.ai", &["compatibility", "v1"]),
    ("api.perplexity.ai", &[]),
];

/// Hosts of Azure, where the key goes into `api-key`.
const AZURE: [&str; 6] = [
    ".openai.azure.com",
    ".openai.azure.us",
    ".openai.azure.cn",
    ".cognitiveservices.azure.com",
    ".services.ai.azure.com",
    ".api.cognitive.microsoft.com",
];

/// Parameters of a query that hold a key by their name.
const SECRET_PARAMETERS: [&str; 12] = [
    "key",
    "api_key",
    "api-key",
    "apikey",
    "access_token",
    "token",
    "auth",
    "authorization",
    "sig",
    "signature",
    "subscription-key",
    "code",
];

/// Where a provider's calls go.
#[derive(Debug, Clone)]
pub(super) struct Place {
    /// All of the address that is not the model's, its query included.
    base: Url,
    tail: Tail,
    /// The header that takes the key.
    pub(super) key_header: &'static str,
    /// Whether it is OpenAI's own implementation of its dialect: that of OpenAI or of Azure.
    pub(super) is_openai: bool,
    /// Whether calls without a key are in vain.
    pub(super) needs_key: bool,
}

/// What follows the base.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tail {
    /// Nothing.
    Nothing,
    /// `/{model}:generateContent`
    GenerateContent,
    /// `/{model}/chat/completions`
    Deployment,
}

/// Why an address cannot be used, and what to write.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Wrong {
    pub(super) what: String,
    pub(super) mend: String,
}

fn wrong(what: impl Into<String>, mend: impl Into<String>) -> Wrong {
    Wrong { what: what.into(), mend: mend.into() }
}

impl Place {
    /// From what was written, or of the vendor itself.
    pub(super) fn of(kind: ProviderKind, written: Option<&str>) -> Result<Self, Wrong> {
        let vendor = match kind {
            ProviderKind::Openai | ProviderKind::Sim => OPENAI,
            ProviderKind::Anthropic => ANTHROPIC,
            ProviderKind::Gemini => GEMINI,
        };
        let text = written.unwrap_or(vendor);
        let mut url = Trusted::parse(text).map_err(|error| unusable(kind, &error))?.into_url();
        check_query(&mut url)?;
        let mut path: Vec<String> = url.path().split('/').filter(|part| !part.is_empty()).map(str::to_owned).collect();
        let host = url.host_str().unwrap_or_default().trim_end_matches('.').to_owned();
        let has_version = url.query_pairs().any(|(name, _)| name == "api-version");
        let is_preview = url.query_pairs().any(|(name, value)| name == "api-version" && is_v1(&value));
        let mut place = Self {
            base: url.clone(),
            tail: Tail::Nothing,
            key_header: "authorization",
            is_openai: false,
            needs_key: false,
        };
        match kind {
            ProviderKind::Openai | ProviderKind::Sim => {
                place.join_openai(&host, &mut path, has_version.then_some(is_preview))?;
            }
            ProviderKind::Anthropic => place.join_anthropic(&host, &mut path)?,
            ProviderKind::Gemini => place.join_gemini(&host, &mut path, &url)?,
        }
        url.set_path(&format!("/{}", path.join("/")));
        place.base = url;
        Ok(place)
    }

    /// The address of a call of this model.
    pub(super) fn url(&self, model: &str) -> Url {
        let call = match self.tail {
            Tail::Nothing => return self.base.clone(),
            Tail::GenerateContent => [Some(format!("{model}:generateContent")), None, None],
            Tail::Deployment => [Some(model.to_owned()), Some("chat".to_owned()), Some("completions".to_owned())],
        };
        let mut url = self.base.clone();
        // An http address has a path.
        if let Ok(mut path) = url.path_segments_mut() {
            path.extend(call.iter().flatten());
        }
        url
    }

    /// Where it is, for people: host and port.
    pub(super) fn base(&self) -> &Url {
        &self.base
    }

    /// `POST …/chat/completions`. `azure_version` tells whether there is an `api-version`, and whether it is one of v1.
    fn join_openai(&mut self, host: &str, path: &mut Vec<String>, azure_version: Option<bool>) -> Result<(), Wrong> {
        let is_azure = AZURE.iter().any(|suffix| host.ends_with(suffix));
        let is_vendor = host == "api.openai.com" || host.ends_with(".api.openai.com");
        self.needs_key = is_vendor;
        self.is_openai = is_vendor;
        if is_azure {
            self.key_header = "api-key";
        }
        let is_whole = ends(path, &["chat", "completions"]);
        if is_whole {
            path.truncate(path.len() - 2);
        } else {
            refuse_others_of_openai(host, path)?;
        }
        if let Some(at) = path.windows(2).position(|pair| pair[0] == "openai" && pair[1] == "deployments") {
            return self.join_deployment(path, at, azure_version.is_some());
        }
        let is_bare = path.is_empty() || (path.len() == 1 && path[0] == "openai");
        if is_azure && is_bare && !is_whole {
            if azure_version == Some(false) {
                *path = owned(&["openai", "deployments"]);
                return self.join_deployment(path, 0, true);
            }
            *path = owned(&["openai", "v1"]);
        } else if !is_whole {
            complete_root(host, path)?;
        }
        self.is_openai |= is_azure && ends(path, &["openai", "v1"]);
        path.extend(owned(&["chat", "completions"]));
        Ok(())
    }

    /// Azure's classic form: `/openai/deployments/{name}/chat/completions?api-version=…`. Without a name, the model is the
    /// name of the deployment.
    fn join_deployment(&mut self, path: &mut Vec<String>, at: usize, has_version: bool) -> Result<(), Wrong> {
        if !has_version {
            return Err(wrong(
                "an address of Azure with `/openai/deployments` needs an `api-version`",
                "add one, such as `?api-version=2024-10-21`, or write `https://RESOURCE.openai.azure.com/openai/v1`",
            ));
        }
        self.key_header = "api-key";
        self.is_openai = true;
        match path.len() - (at + 2) {
            0 => self.tail = Tail::Deployment,
            1 => path.extend(owned(&["chat", "completions"])),
            _ => {
                return Err(wrong(
                    "what follows the deployment is not `/chat/completions`",
                    format!("end it at `/{}`", path[..at + 3].join("/")),
                ));
            }
        }
        Ok(())
    }

    /// `POST …/v1/messages`
    fn join_anthropic(&mut self, host: &str, path: &mut Vec<String>) -> Result<(), Wrong> {
        self.key_header = "x-api-key";
        self.needs_key = host == "api.anthropic.com";
        if ends(path, &["chat", "completions"]) || (host == "api.openai.com") {
            return Err(wrong("this is an address of OpenAI's dialect", "write `kind = \"openai\"`"));
        }
        if is_bedrock(host) || is_vertex(host) {
            return Err(wrong(
                "the native dialects of Bedrock and Vertex are not spoken for this kind",
                "write `kind = \"openai\"` and their OpenAI-compatible address (docs/providers.md)",
            ));
        }
        match path.last().map(String::as_str) {
            Some("messages") => {}
            Some("v1") => path.push("messages".to_owned()),
            Some(other @ ("complete" | "models" | "batches" | "count_tokens")) => {
                return Err(wrong(
                    format!("`/{other}` is not where messages are sent"),
                    format!("end it before `/{other}`, or write `…/v1/messages`"),
                ));
            }
            _ => path.extend(owned(&["v1", "messages"])),
        }
        Ok(())
    }

    /// `POST …/models/{model}:generateContent`
    fn join_gemini(&mut self, host: &str, path: &mut Vec<String>, url: &Url) -> Result<(), Wrong> {
        self.key_header = "x-goog-api-key";
        self.needs_key = host == "generativelanguage.googleapis.com";
        self.tail = Tail::GenerateContent;
        if ends(path, &["chat", "completions"]) || path.last().is_some_and(|last| last == "openai" || last == "openapi")
        {
            return Err(wrong("this is an address of OpenAI's dialect", "write `kind = \"openai\"`"));
        }
        if url.query_pairs().any(|(name, _)| name == "alt") {
            return Err(wrong("answers are read whole, not as a stream", "leave `alt` out of the query"));
        }
        // A whole endpoint was pasted: the model is the pipeline's to name.
        if path.len() >= 2 && path[path.len() - 2] == "models" {
            path.truncate(path.len() - 1);
        }
        if path.last().is_some_and(|last| last == "models") {
            path.pop();
        }
        let is_version =
            |part: &String| part.strip_prefix('v').is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
        if ends(path, &["publishers", "google"]) {
        } else if is_vertex(host) {
            match path.as_slice() {
                [] => path.extend(owned(&["v1", "publishers", "google"])),
                [version] if is_version(version) => path.extend(owned(&["publishers", "google"])),
                [.., locations, _] if locations == "locations" => path.extend(owned(&["publishers", "google"])),
                _ => {
                    return Err(wrong(
                        "this is no address of Google's models on Vertex",
                        "write `https://LOCATION-aiplatform.googleapis.com/v1/projects/PROJECT/locations/LOCATION`",
                    ));
                }
            }
        } else if !path.last().is_some_and(is_version) {
            path.push("v1beta".to_owned());
        }
        path.push("models".to_owned());
        Ok(())
    }
}

fn owned(parts: &[&str]) -> Vec<String> {
    parts.iter().map(|part| (*part).to_owned()).collect()
}

fn ends(path: &[String], tail: &[&str]) -> bool {
    path.len() >= tail.len() && path[path.len() - tail.len()..].iter().zip(tail).all(|(one, other)| one == other)
}

fn is_bedrock(host: &str) -> bool {
    host.starts_with("bedrock-runtime") && (host.ends_with(".amazonaws.com") || host.ends_with(".amazonaws.com.cn"))
}

fn is_vertex(host: &str) -> bool {
    host == "aiplatform.googleapis.com"
        || host.ends_with("-aiplatform.googleapis.com")
        || host.ends_with(".rep.googleapis.com")
}

/// Versions of Azure's address that has a version in its path already.
fn is_v1(version: &str) -> bool {
    matches!(version, "v1" | "preview" | "latest")
}

/// Addresses of OpenAI's dialect, and of others, where no chat completions are.
fn refuse_others_of_openai(host: &str, path: &[String]) -> Result<(), Wrong> {
    let Some((last, before)) = path.split_last() else { return Ok(()) };
    let before = || format!("end it at `/{}`", before.join("/"));
    // Azure's model inference has this path before `/chat/completions`.
    let is_inference = host.ends_with(".services.ai.azure.com") && last == "models";
    match last.as_str() {
        "completions" => {
            Err(wrong("`/completions` without `/chat` is the older dialect, which is not spoken", before()))
        }
        "responses" => Err(wrong("the Responses dialect is not spoken, chat completions are", before())),
        "models" if is_inference => Ok(()),
        "embeddings" | "models" | "chat" => {
            Err(wrong(format!("`/{last}` is not where chat completions are"), before()))
        }
        "messages" => Err(wrong("this is an address of Anthropic's dialect", "write `kind = \"anthropic\"`")),
        "invoke" | "converse" if is_bedrock(host) => {
            Err(wrong("Bedrock's native dialect is not spoken", format!("write `https://{host}/openai/v1`")))
        }
        _ if last.contains(":generateContent") || last.contains(":streamGenerateContent") => {
            Err(wrong("this is an address of Gemini's dialect", "write `kind = \"gemini\"`"))
        }
        _ => Ok(()),
    }
}

/// Completes what stops before the place where a known server's paths begin; without any path, `/v1` is meant.
fn complete_root(host: &str, path: &mut Vec<String>) -> Result<(), Wrong> {
    if is_vertex(host) {
        if path.len() >= 2 && path[path.len() - 2] == "locations" {
            path.extend(owned(&["endpoints", "openapi"]));
        }
        if path.iter().any(|part| part == "endpoints") {
            return Ok(());
        }
        return Err(wrong(
            "this is no address of OpenAI's dialect on Vertex",
            "write `https://LOCATION-aiplatform.googleapis.com/v1/projects/PROJECT/locations/LOCATION/endpoints/openapi`",
        ));
    }
    let known = ROOTS.iter().find(|(name, _)| *name == host).map(|(_, root)| *root);
    let root = known.unwrap_or(if is_bedrock(host) { &["openai", "v1"] } else { &["v1"] });
    let is_known = known.is_some() || is_bedrock(host);
    let is_part = path.len() < root.len() && path.iter().zip(root).all(|(one, other)| one == other);
    if is_part && (is_known || path.is_empty()) {
        *path = owned(root);
    }
    Ok(())
}

/// A query is sent as it stands; keys do not belong into it, since addresses are logged on their way.
fn check_query(url: &mut Url) -> Result<(), Wrong> {
    if url.query().is_some_and(str::is_empty) {
        url.set_query(None);
    }
    let is_secret = |name: &str| SECRET_PARAMETERS.contains(&name.to_lowercase().as_str());
    if let Some((name, _)) = url.query_pairs().find(|(name, _)| is_secret(name)) {
        return Err(wrong(
            format!("its query holds a key (`{name}`), and addresses are logged on their way"),
            "give the key as `api_key`; `key_header` names the header that takes it",
        ));
    }
    Ok(())
}

/// What is no address at all.
fn unusable(kind: ProviderKind, error: &BadAddress) -> Wrong {
    let mend = match (error, error.meant()) {
        (_, Some(meant)) => format!("write `{meant}`"),
        (BadAddress::Credentials, _) => "give the key as `api_key`".to_owned(),
        (BadAddress::Fragment, _) => "end it before `#`".to_owned(),
        (BadAddress::PortZero, _) => "write the port that the server listens on".to_owned(),
        _ => match kind {
            ProviderKind::Openai | ProviderKind::Sim => "write an address such as `http://localhost:11434/v1`",
            ProviderKind::Anthropic => "write an address such as `https://api.anthropic.com`",
            ProviderKind::Gemini => "write an address such as `https://generativelanguage.googleapis.com`",
        }
        .to_owned(),
    };
    wrong(error.to_string(), mend)
}

#[cfg(test)]
#[path = "address/tests.rs"]
mod tests;
