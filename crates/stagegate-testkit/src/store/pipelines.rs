//! Promises about pipelines.

use serde_json::{Value, json};
use stagegate_core::{
    Store,
    store::{NewVersion, PipelineQuota, PipelineVersion, Registered},
};

use super::{
    Subject,
    fixtures::{at, nasty_json, pipeline, tenant},
};

fn version(of: &str, name: &str, content: u8, definition: Value) -> NewVersion {
    let now = at(i64::from(content));
    let quota = PipelineQuota { pipelines: 100, versions: 100 };
    NewVersion { tenant: tenant(of), name: pipeline(name), digest: [content; 32], definition, now, quota }
}

async fn register(store: &dyn Store, of: &str, name: &str, content: u8) -> (PipelineVersion, bool) {
    let new = version(of, name, content, json!({"name": name, "content": content}));
    match store.register(&new).await.expect("register") {
        Registered::New(version) => (version, true),
        Registered::Known(version) => (version, false),
        full @ Registered::Full { .. } => panic!("{name} {content}: {full:?}"),
    }
}

/// A quota refuses what would be new, tells what is there, changes nothing, and never what is registered already or what
/// others do.
pub async fn a_quota_bounds_pipelines_and_versions_of_a_tenant(subject: Subject) {
    let store = subject.store.as_ref();
    let offer = async |of: &str, name: &str, content: u8| {
        let quota = PipelineQuota { pipelines: 2, versions: 4 };
        let new = NewVersion { quota, ..version(of, name, content, json!({"content": content})) };
        store.register(&new).await.expect("register")
    };
    let full = |pipelines, versions| Registered::Full { pipelines, versions };
    for (name, content) in [("p", 1), ("q", 1), ("p", 2)] {
        assert!(matches!(offer("acme", name, content).await, Registered::New(_)), "{name} {content}");
    }
    assert_eq!(offer("acme", "r", 1).await, full(2, 3), "a third pipeline");
    assert_eq!(store.pipeline(&tenant("acme"), &pipeline("r"), None).await.expect("read"), None);
    assert!(matches!(offer("acme", "q", 2).await, Registered::New(version) if version.version == 2));
    assert_eq!(offer("acme", "q", 3).await, full(2, 4), "a fifth version");
    assert!(matches!(offer("acme", "p", 1).await, Registered::Known(version) if version.version == 1));
    assert!(matches!(offer("umbrella", "r", 1).await, Registered::New(_)), "another tenant");
}

/// Twenty writers of as many pipelines at once.
pub async fn concurrent_registrations_never_overstep_the_quota(subject: Subject) {
    let work = (0..20_u8).map(|n| {
        let store = subject.store.clone();
        let quota = PipelineQuota { pipelines: 7, versions: 9 };
        // Two versions of each of ten pipelines.
        let new = NewVersion { quota, ..version("acme", &format!("p{}", n / 2), n, json!({ "content": n })) };
        tokio::spawn(async move { store.register(&new).await.expect("register") })
    });
    let mut new = Vec::new();
    for task in work.collect::<Vec<_>>() {
        if let Registered::New(version) = task.await.expect("no panic") {
            new.push(version);
        }
    }
    let pipelines = subject.store.pipelines(&tenant("acme"), None, 100).await.expect("list");
    assert!(pipelines.len() <= 7 && new.len() <= 9, "{} pipelines, {} versions", pipelines.len(), new.len());
    assert_eq!(new.iter().filter(|version| version.version == 1).count(), pipelines.len());
    assert!(pipelines.len() == 7 || new.len() == 9, "there was room: {} and {}", pipelines.len(), new.len());
}

/// The same content of one name is one version, with its first date.
pub async fn the_same_content_is_the_same_version(subject: Subject) {
    let store = subject.store.as_ref();
    let (first, new) = register(store, "acme", "p", 1).await;
    assert!(new);
    assert_eq!((first.version, first.digest.as_str(), first.created_at), (1, "01".repeat(32).as_str(), at(1)));
    let (second, new) = register(store, "acme", "p", 2).await;
    assert!(new && second.version == 2);
    let mut again = version("acme", "p", 1, json!({"name": "p", "content": 1}));
    again.now = at(9_999);
    assert_eq!(store.register(&again).await.expect("register"), Registered::Known(first));
}

/// Each tenant and each name counts for itself.
pub async fn versions_are_numbered_per_tenant_and_name(subject: Subject) {
    let store = subject.store.as_ref();
    for (of, name) in [("acme", "p"), ("acme", "q"), ("umbrella", "p")] {
        for content in 1..=3 {
            let (made, new) = register(store, of, name, content).await;
            assert!(new);
            assert_eq!(made.version, u32::from(content));
        }
    }
}

/// Twenty writers at once: the numbers have no gap and no double, and one content is new once.
pub async fn concurrent_registrations_are_numbered_without_gaps(subject: Subject) {
    let work = (0..20_u8).map(|n| {
        let store = subject.store.clone();
        // The first ten differ; the others are all the same.
        tokio::spawn(async move { register(store.as_ref(), "acme", "p", n.min(10)).await })
    });
    let mut made = Vec::new();
    for task in work.collect::<Vec<_>>() {
        made.push(task.await.expect("no panic"));
    }
    let mut new: Vec<u32> = made.iter().filter(|(_, new)| *new).map(|(version, _)| version.version).collect();
    new.sort_unstable();
    assert_eq!(new, (1..=11).collect::<Vec<_>>());
    let same: Vec<_> = made.iter().filter(|(version, _)| version.digest.starts_with("0a")).collect();
    assert_eq!(same.len(), 10);
    assert!(same.iter().all(|(version, _)| *version == same[0].0));
}

/// No version means the newest; a version that was never registered is none.
pub async fn the_newest_version_is_the_default(subject: Subject) {
    let store = subject.store.as_ref();
    let (of, name) = (tenant("acme"), pipeline("p"));
    assert_eq!(store.pipeline(&of, &name, None).await.expect("read"), None);
    let (first, _) = register(store, "acme", "p", 1).await;
    let (second, _) = register(store, "acme", "p", 2).await;
    register(store, "acme", "p", 1).await;
    assert_eq!(store.pipeline(&of, &name, None).await.expect("read"), Some(second.clone()));
    assert_eq!(store.pipeline(&of, &name, Some(1)).await.expect("read"), Some(first));
    assert_eq!(store.pipeline(&of, &name, Some(2)).await.expect("read"), Some(second));
    assert_eq!(store.pipeline(&of, &name, Some(3)).await.expect("read"), None);
    assert_eq!(store.pipeline(&tenant("umbrella"), &name, None).await.expect("read"), None);
}

/// Pipelines by name, each by its newest version; versions from the newest down. Of one tenant only.
pub async fn pipelines_and_versions_page_in_order(subject: Subject) {
    let store = subject.store.as_ref();
    let of = tenant("acme");
    for name in ["b_x", "a", "b-x", "c"] {
        register(store, "acme", name, 1).await;
        register(store, "acme", name, 2).await;
    }
    register(store, "umbrella", "d", 1).await;
    let page = async |after: Option<&str>, limit| -> Vec<(String, u32)> {
        let after = after.map(pipeline);
        let found = store.pipelines(&of, after.as_ref(), limit).await.expect("list");
        found.into_iter().map(|version| (version.name.to_string(), version.version)).collect()
    };
    let named = |names: &[&str]| -> Vec<_> { names.iter().map(|name| ((*name).to_owned(), 2)).collect() };
    assert_eq!(page(None, 2).await, named(&["a", "b-x"]));
    assert_eq!(page(Some("b-x"), 2).await, named(&["b_x", "c"]));
    assert_eq!(page(Some("c"), 2).await, named(&[]));

    let name = pipeline("c");
    for content in 3..=5 {
        register(store, "acme", "c", content).await;
    }
    let versions = async |before, limit| -> Vec<u32> {
        let found = store.versions(&of, &name, before, limit).await.expect("list");
        found.into_iter().map(|version| version.version).collect()
    };
    assert_eq!(versions(None, 2).await, [5, 4]);
    assert_eq!(versions(Some(4), 10).await, [3, 2, 1]);
    assert!(versions(Some(1), 10).await.is_empty());
}

/// Any JSON.
pub async fn a_definition_comes_back_as_it_was(subject: Subject) {
    let registered = subject.store.register(&version("acme", "p", 1, nasty_json())).await.expect("register");
    let Registered::New(made) = registered else { panic!("{registered:?}") };
    assert_eq!(made.definition, nasty_json());
    let read = subject.store.pipeline(&tenant("acme"), &pipeline("p"), None).await.expect("read");
    assert_eq!(read, Some(made));
}
