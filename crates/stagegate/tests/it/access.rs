//! Promises of access: keys are shown once, open doors exactly as far as they say, and a listener that others can reach
//! is never open.

use serde_json::Value;

use crate::support::{Api, Place};

/// Makes a key; its secret is all of stdout.
pub(crate) fn make_key(place: &Place, arguments: &[&str], environment: &[(&str, &str)]) -> String {
    let mut command = place.stagegate(&[&["keys", "create", "--name", "test"], arguments].concat());
    for (name, value) in environment {
        command.env(name, value);
    }
    let output = command.output().expect("the binary starts");
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{stderr}");
    let secret = stdout.trim_end().to_owned();
    assert!(secret.starts_with("sg_") && !secret.contains(char::is_whitespace), "{stdout}");
    assert!(!stderr.contains(&secret), "the secret is on stdout alone");
    secret
}

#[test]
fn a_key_is_shown_once_listed_without_its_secret_and_revoked() {
    let place = Place::new();
    let (code, stdout, stderr) = place.run(&["keys", "list"]);
    assert!(code == 0 && stdout.is_empty() && stderr.contains("there are no keys"), "{stderr}");
    let secret = make_key(&place, &["--tenant", "acme", "--role", "admin", "--expires", "90d"], &[]);
    let (_, stdout, _) = place.run(&["keys", "list", "--json"]);
    assert!(!stdout.contains(&secret), "{stdout}");
    let list: Value = serde_json::from_str(&stdout).expect("JSON");
    let key = &list[0]["key"];
    assert_eq!((&key["tenant"], &key["role"], &key["name"]), (&"acme".into(), &"admin".into(), &"test".into()));
    assert!(list[0]["state"].as_str().is_some_and(|state| state.starts_with("valid until")), "{stdout}");
    let (_, stdout, _) = place.run(&["keys", "list", "--tenant", "other"]);
    assert!(stdout.is_empty());

    let id = key["id"].as_str().expect("an id");
    let (code, stdout, stderr) = place.run(&["keys", "revoke", id]);
    assert!(code == 0 && stdout.is_empty() && stderr.contains("is revoked"), "{stderr}");
    let (_, stdout, _) = place.run(&["keys", "list"]);
    assert!(stdout.contains(id) && stdout.contains("revoked"), "{stdout}");
    let (code, _, stderr) = place.run(&["keys", "revoke", "0198c2d0-7c3e-7b1a-8f0e-2d4c6a8b0e1f"]);
    assert!(code == 2 && stderr.contains("SG0210"), "{stderr}");
    for slip in [["--role", "king"], ["--expires", "soon"], ["--tenant", "A B"]] {
        let (code, stdout, _) = place.run(&[&["keys", "create", "--name", "x"], &slip[..]].concat());
        assert_eq!((code, stdout.as_str()), (2, ""), "{slip:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn with_keys_asked_for_only_a_key_opens_and_only_so_far() {
    let place = Place::new();
    let viewer = make_key(&place, &["--role", "viewer"], &[]);
    let admin = make_key(&place, &["--role", "admin"], &[]);
    let daemon = place.serve(&["--auth", "keys"], &[]).await;
    assert_eq!(Api::new(&daemon.base, None).status("/v1/pipelines").await, 401);
    assert_eq!(Api::new(&daemon.base, Some("sg_nonsense")).status("/v1/pipelines").await, 401);
    assert_eq!(Api::new(&daemon.base, Some(&viewer)).status("/v1/pipelines").await, 200);
    assert_eq!(Api::new(&daemon.base, None).status("/healthz").await, 200);
    let definition = "name: p\nstages: [{ id: one, prompt: hi, model: sim/quick }]\n";
    assert_eq!(Api::new(&daemon.base, Some(&admin)).register(definition).await, 1);
    let denied = crate::support::client()
        .post(format!("{}/v1/pipelines", daemon.base))
        .bearer_auth(&viewer)
        .header("content-type", "application/yaml")
        .body(definition)
        .send()
        .await
        .expect("an answer");
    assert_eq!(denied.status().as_u16(), 403);
}

#[test]
fn a_listener_that_others_can_reach_is_never_open() {
    let place = Place::new();
    let (code, stdout, stderr) = place.run(&["serve", "--listen", "0.0.0.0:0", "--auth", "open"]);
    assert_eq!((code, stdout.as_str()), (2, ""), "{stderr}");
    assert!(stderr.contains("SG0504") && stderr.contains("stagegate keys create"), "{stderr}");
    assert!(!place.path("data/stagegate").exists(), "nothing was touched");
}
