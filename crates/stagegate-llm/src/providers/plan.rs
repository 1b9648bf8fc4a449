//! What the configuration says of one provider, checked: owns its name, its address, its key and its headers. Knows no
//! client: a plan is made where the configuration is read, before anything starts.

use ::http::{
    HeaderName, HeaderValue,
    header::{
        ACCEPT, ACCEPT_ENCODING, CONNECTION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, EXPECT, HOST,
        PROXY_AUTHORIZATION, TE, TRAILER, TRANSFER_ENCODING, UPGRADE,
    },
};
use stagegate_core::{Code, ProviderName, Secret, Violation};

use super::address::{Place, Wrong};
use crate::config::ProviderConfig;

/// Headers that say how a request is sent, not what for.
const RESERVED: [HeaderName; 13] = [
    ACCEPT,
    ACCEPT_ENCODING,
    CONNECTION,
    CONTENT_ENCODING,
    CONTENT_LENGTH,
    CONTENT_TYPE,
    EXPECT,
    HOST,
    PROXY_AUTHORIZATION,
    TE,
    TRAILER,
    TRANSFER_ENCODING,
    UPGRADE,
];

/// Those without a name of their own in the library, and the one that tells which shapes Anthropic's answers have.
const RESERVED_TOO: [&str; 3] = ["keep-alive", "proxy-connection", "anthropic-version"];

/// Further headers of a provider, at most, and the bytes of all of them.
const HEADERS_MAX: usize = 32;
/// See [`HEADERS_MAX`].
const HEADERS_MAX_BYTES: usize = 16 * 1024;

/// How one provider is reached.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) place: Place,
    /// The header that carries the key.
    pub(super) key: Option<(HeaderName, HeaderValue)>,
    pub(super) headers: Vec<(HeaderName, HeaderValue)>,
    /// The key, and the values of the headers: what no text may show.
    pub(super) secrets: Vec<Secret>,
}

impl Plan {
    /// Every mistake at once.
    pub(super) fn of(name: &str, config: &ProviderConfig) -> Result<Self, Vec<Violation>> {
        let mut violations = check(name, config);
        let mut note = |violation: Violation| violations.push(violation);
        let place = match Place::of(config.kind, config.base_url.as_deref()) {
            Ok(place) => Some(place),
            Err(Wrong { what, mend }) => {
                note(Violation::new(Code::InvalidConfig, at(name, "base_url"), what).mend(mend));
                None
            }
        };
        let key_header = match &config.key_header {
            Some(text) => header_name(name, "key_header", text).map_err(&mut note).ok(),
            None => place.as_ref().map(|place| HeaderName::from_static(place.key_header)),
        };
        // Keys come from files and shells, often with a line break at their end.
        let key = config.api_key.as_ref().map(|key| key.expose().trim()).filter(|key| !key.is_empty());
        let key_value = key.and_then(|key| key_value(name, key, key_header.as_ref()).map_err(&mut note).ok());
        let headers = headers(name, config, key_header.as_ref().filter(|_| key.is_some()), &mut note);
        let mut secrets: Vec<Secret> = config.headers.values().cloned().collect();
        secrets.extend(key.map(|key| Secret::from(key.to_owned())));
        match place {
            Some(place) if violations.is_empty() => {
                Ok(Self { place, key: key_header.zip(key_value), headers, secrets })
            }
            _ => Err(violations),
        }
    }
}

/// The path of a key of a provider. A name that needs quotes in TOML has them.
fn at(name: &str, key: &str) -> String {
    if ProviderName::new(name).is_ok() {
        format!("llm.providers.{name}.{key}")
    } else {
        format!("{}.{key}", at_name(name))
    }
}

fn at_name(name: &str) -> String {
    let is_bare = !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'));
    if is_bare { format!("llm.providers.{name}") } else { format!("llm.providers.\"{name}\"") }
}

fn check(name: &str, config: &ProviderConfig) -> Vec<Violation> {
    let mut violations = Vec::new();
    if let Err(error) = ProviderName::new(name) {
        let near: String =
            name.trim().to_lowercase().chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
        let near = near.trim_matches('-');
        let violation = Violation::new(Code::InvalidConfig, at_name(name), error.to_string());
        violations.push(match ProviderName::new(near) {
            Ok(near) => violation.mend(format!("write `{}`", near.as_str())),
            Err(_) => violation.mend("write a name such as `my-provider`"),
        });
    }
    if config.max_concurrency == 0 {
        violations.push(
            Violation::new(Code::InvalidConfig, at(name, "max_concurrency"), "no call could ever be made")
                .mend("write 1 or more"),
        );
    }
    for (key, rate) in
        [("fault_rate", config.sim.fault_rate), ("first_attempt_fail_rate", config.sim.first_attempt_fail_rate)]
    {
        if !(0.0..=1.0).contains(&rate) {
            violations.push(
                Violation::new(Code::InvalidConfig, at(name, &format!("sim.{key}")), "a share is a number from 0 to 1")
                    .mend("write, for example, 0.1 for one call in ten"),
            );
        }
    }
    violations
}

/// The name of a header that may be set.
fn header_name(name: &str, key: &str, text: &str) -> Result<HeaderName, Violation> {
    let wrong = |what: &str, mend: &str| Violation::new(Code::InvalidConfig, at(name, key), what).mend(mend);
    let header = HeaderName::from_bytes(text.trim().as_bytes())
        .map_err(|_| wrong("this is no name of a header", "write a name such as `x-team`"))?;
    if RESERVED.contains(&header) || RESERVED_TOO.contains(&header.as_str()) {
        return Err(wrong("this header is set by Stagegate", "leave it out"));
    }
    Ok(header)
}

/// The value of the header that carries the key. It is marked as sensitive, so that nothing prints it.
fn key_value(name: &str, key: &str, header: Option<&HeaderName>) -> Result<HeaderValue, Violation> {
    let prefix = if header.is_some_and(|header| header == "authorization") { "Bearer " } else { "" };
    let mut value = HeaderValue::from_str(&format!("{prefix}{key}")).map_err(|_| {
        Violation::new(
            Code::InvalidConfig,
            at(name, "api_key"),
            "the key holds characters that no HTTP header can carry",
        )
        .mend("give the key alone, on one line")
    })?;
    value.set_sensitive(true);
    Ok(value)
}

/// The further headers. `key_header` is taken, where there is a key.
fn headers(
    name: &str,
    config: &ProviderConfig,
    key_header: Option<&HeaderName>,
    note: &mut impl FnMut(Violation),
) -> Vec<(HeaderName, HeaderValue)> {
    let mut headers: Vec<(HeaderName, HeaderValue)> = Vec::new();
    for (text, value) in &config.headers {
        let key = format!("headers.{text}");
        let wrong = |what: &str, mend: &str| Violation::new(Code::InvalidConfig, at(name, &key), what).mend(mend);
        let header = match header_name(name, &key, text) {
            Ok(header) => header,
            Err(violation) => {
                note(violation);
                continue;
            }
        };
        if key_header == Some(&header) {
            note(wrong("this header takes the key", "give the key as `api_key` alone, or name another `key_header`"));
        } else if headers.iter().any(|(known, _)| *known == header) {
            note(wrong("this header is given twice", "give it once; upper and lower case are the same"));
        }
        match HeaderValue::from_str(value.expose().trim()) {
            Ok(mut value) => {
                value.set_sensitive(true);
                headers.push((header, value));
            }
            Err(_) => note(wrong("its value holds characters that no HTTP header can carry", "give it on one line")),
        }
    }
    let bytes: usize = headers.iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
    if headers.len() > HEADERS_MAX || bytes > HEADERS_MAX_BYTES {
        let what = format!("there are more than {HEADERS_MAX} headers, or more than {HEADERS_MAX_BYTES} bytes of them");
        note(
            Violation::new(Code::InvalidConfig, at(name, "headers"), what)
                .mend("leave out what the server does not need"),
        );
    }
    headers
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ProviderKind;

    fn with(headers: &[(&str, &str)], change: impl FnOnce(&mut ProviderConfig)) -> Result<Plan, Vec<String>> {
        let mut config = ProviderConfig::new(ProviderKind::Openai);
        config.headers =
            headers.iter().map(|(name, value)| ((*name).to_owned(), Secret::from((*value).to_owned()))).collect();
        change(&mut config);
        Plan::of("mine", &config).map_err(|found| {
            assert!(found.iter().all(|violation| violation.mend.is_some()), "{found:?}");
            assert!(!format!("{found:?}").contains("hunter2"), "{found:?}");
            found.into_iter().map(|violation| violation.path).collect()
        })
    }

    #[test]
    fn further_headers_are_sent_and_never_shown() {
        let plan =
            with(&[("x-title", "hunter2 "), ("http-referer", "https://hunter2.example")], |_| {}).expect("valid");
        let sent: Vec<_> = plan.headers.iter().map(|(name, value)| (name.as_str(), value.as_bytes())).collect();
        assert_eq!(sent, [("http-referer", &b"https://hunter2.example"[..]), ("x-title", &b"hunter2"[..])]);
        assert!(!format!("{plan:?}").contains("hunter2"), "{plan:?}");
    }

    #[test]
    fn headers_that_cannot_be_set_are_refused_where_they_are_written() {
        for reserved in
            ["Host", "content-type", "Content-Length", "transfer-encoding", "Connection", "keep-alive", "TE"]
        {
            assert_eq!(
                with(&[(reserved, "hunter2")], |_| {}).expect_err("refused"),
                [format!("llm.providers.mine.headers.{reserved}")]
            );
        }
        assert_eq!(with(&[("a b", "hunter2")], |_| {}).expect_err("refused"), ["llm.providers.mine.headers.a b"]);
        assert_eq!(with(&[("x", "hunter2\nx: y")], |_| {}).expect_err("refused"), ["llm.providers.mine.headers.x"]);
        assert_eq!(
            with(&[("X-A", "1"), ("x-a", "2")], |_| {}).expect_err("refused"),
            ["llm.providers.mine.headers.x-a"]
        );
        let long = "h".repeat(HEADERS_MAX_BYTES);
        assert_eq!(with(&[("x", &long)], |_| {}).expect_err("refused"), ["llm.providers.mine.headers"]);
        let keyed = |config: &mut ProviderConfig| config.api_key = Some(Secret::from("hunter2".to_owned()));
        assert_eq!(
            with(&[("Authorization", "hunter2")], keyed).expect_err("refused"),
            ["llm.providers.mine.headers.Authorization"]
        );
        assert!(with(&[("Authorization", "Basic hunter2")], |_| {}).is_ok(), "without a key, it is free");
        let wrong = |config: &mut ProviderConfig| config.key_header = Some("host".to_owned());
        assert_eq!(with(&[], wrong).expect_err("refused"), ["llm.providers.mine.key_header"]);
    }

    #[test]
    fn the_key_goes_into_the_header_that_is_named() {
        for (header, name, value) in [
            (None, "authorization", "Bearer k"),
            (Some("api-key"), "api-key", "k"),
            (Some("Ocp-Apim-Subscription-Key"), "ocp-apim-subscription-key", "k"),
        ] {
            let plan = with(&[], |config| {
                config.api_key = Some(Secret::from(" k\n".to_owned()));
                config.key_header = header.map(str::to_owned);
            });
            let (sent, shown) = plan.expect("valid").key.expect("a key");
            assert_eq!((sent.as_str(), shown.as_bytes()), (name, value.as_bytes()));
        }
    }

    #[test]
    fn a_name_that_no_model_can_hold_is_refused_with_one_that_can() {
        for (name, path, mend) in [
            ("MyProv", "llm.providers.MyProv", "write `myprov`"),
            ("my.prov", "llm.providers.\"my.prov\"", "write `my-prov`"),
            ("_x", "llm.providers._x", "write `x`"),
            ("日本", "llm.providers.\"日本\"", "write a name such as `my-provider`"),
        ] {
            let found = Plan::of(name, &ProviderConfig::new(ProviderKind::Openai)).expect_err("refused");
            assert_eq!((found[0].path.as_str(), found[0].mend.as_deref()), (path, Some(mend)), "{name}");
            assert_eq!(found.len(), 1);
        }
    }
}
