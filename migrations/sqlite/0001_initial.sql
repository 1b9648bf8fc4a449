-- The spine: pipelines, runs and what they leave behind, leases, access, the response cache.
--
-- Times are milliseconds since 1970 (INTEGER), ids are 16 bytes (BLOB), money is whole nano-dollars, JSON is TEXT.
-- Every row names its tenant. Child tables lead with the run's id, so that a run's rows lie together; small ones are
-- WITHOUT ROWID (one b-tree, the key is the row), those that hold payloads are not.

CREATE TABLE pipelines (
    tenant TEXT NOT NULL,
    name   TEXT NOT NULL,
    -- The newest version.
    latest INTEGER NOT NULL,
    PRIMARY KEY (tenant, name)
) STRICT, WITHOUT ROWID;

CREATE TABLE pipeline_versions (
    tenant     TEXT NOT NULL,
    name       TEXT NOT NULL,
    version    INTEGER NOT NULL,
    digest     BLOB NOT NULL,
    definition TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    PRIMARY KEY (tenant, name, version),
    UNIQUE (tenant, name, digest),
    FOREIGN KEY (tenant, name) REFERENCES pipelines (tenant, name)
) STRICT;

-- The hot rows. Payloads live elsewhere.
CREATE TABLE runs (
    id               BLOB NOT NULL PRIMARY KEY,
    tenant           TEXT NOT NULL,
    pipeline         TEXT NOT NULL,
    version          INTEGER NOT NULL,
    state            TEXT NOT NULL,
    cancel_requested INTEGER NOT NULL DEFAULT 0,
    priority         INTEGER NOT NULL,
    labels           TEXT NOT NULL,
    cache_mode       TEXT,
    request_id       TEXT,
    stages_total     INTEGER NOT NULL,
    stages_done      INTEGER NOT NULL DEFAULT 0,
    created_at       INTEGER NOT NULL,
    started_at       INTEGER,
    finished_at      INTEGER,
    deadline_at      INTEGER NOT NULL,
    failure          TEXT,
    last_seq         INTEGER NOT NULL,
    -- The lease. `epoch` only grows. A run has an owner, or is ready (since), or parked (until `wake_at`; with
    -- neither, until it is signalled), or has ended.
    epoch            INTEGER NOT NULL DEFAULT 0,
    owner            BLOB,
    ready_at         INTEGER,
    wake_at          INTEGER,
    -- It has signals that its owner was not told of.
    signalled        INTEGER NOT NULL DEFAULT 0,
    -- Totals.
    input_tokens       INTEGER NOT NULL DEFAULT 0,
    cache_read_tokens  INTEGER NOT NULL DEFAULT 0,
    cache_write_tokens INTEGER NOT NULL DEFAULT 0,
    output_tokens      INTEGER NOT NULL DEFAULT 0,
    reasoning_tokens   INTEGER NOT NULL DEFAULT 0,
    usage_estimated    INTEGER NOT NULL DEFAULT 0,
    cost_nanos         INTEGER NOT NULL DEFAULT 0,
    saved_nanos        INTEGER NOT NULL DEFAULT 0,
    calls              INTEGER NOT NULL DEFAULT 0,
    hits               INTEGER NOT NULL DEFAULT 0,
    unpriced_calls     INTEGER NOT NULL DEFAULT 0
) STRICT;

-- Lists, newest first (an id is time-ordered).
CREATE INDEX runs_by_tenant ON runs (tenant, id);
CREATE INDEX runs_by_pipeline ON runs (tenant, pipeline, id);
CREATE INDEX runs_live ON runs (tenant, state, id) WHERE state IN ('queued', 'running', 'waiting');
CREATE INDEX runs_lost ON runs (tenant, state, id) WHERE state IN ('failed', 'cancelled', 'expired');
-- Leases. Each holds only the runs that it is about; a terminal run is in none of them.
CREATE INDEX runs_ready ON runs (priority DESC, ready_at, id) WHERE ready_at IS NOT NULL;
CREATE INDEX runs_wake ON runs (wake_at) WHERE wake_at IS NOT NULL;
CREATE INDEX runs_owned ON runs (owner) WHERE owner IS NOT NULL;
CREATE INDEX runs_signalled ON runs (owner) WHERE signalled = 1;

-- Inputs and outputs, written once each.
CREATE TABLE run_payloads (
    run_id BLOB NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
    -- 'input' or 'output'
    kind   TEXT NOT NULL,
    tenant TEXT NOT NULL,
    body   TEXT NOT NULL,
    PRIMARY KEY (run_id, kind)
) STRICT;

CREATE TABLE stages (
    run_id      BLOB NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
    stage       TEXT NOT NULL,
    tenant      TEXT NOT NULL,
    state       TEXT NOT NULL,
    attempt     INTEGER NOT NULL,
    round_start INTEGER NOT NULL,
    not_before  INTEGER,
    verdict     TEXT,
    score       REAL,
    model       TEXT,
    origin      TEXT,
    failure     TEXT,
    started_at  INTEGER,
    finished_at INTEGER,
    input_tokens       INTEGER NOT NULL,
    cache_read_tokens  INTEGER NOT NULL,
    cache_write_tokens INTEGER NOT NULL,
    output_tokens      INTEGER NOT NULL,
    reasoning_tokens   INTEGER NOT NULL,
    usage_estimated    INTEGER NOT NULL,
    cost_nanos         INTEGER NOT NULL,
    saved_nanos        INTEGER NOT NULL,
    calls              INTEGER NOT NULL,
    hits               INTEGER NOT NULL,
    unpriced_calls     INTEGER NOT NULL,
    PRIMARY KEY (run_id, stage)
) STRICT, WITHOUT ROWID;

-- Append-only from here to the ledger.
CREATE TABLE attempts (
    run_id      BLOB NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
    stage       TEXT NOT NULL,
    number      INTEGER NOT NULL,
    tenant      TEXT NOT NULL,
    started_at  INTEGER NOT NULL,
    finished_at INTEGER NOT NULL,
    verdict     TEXT NOT NULL,
    assessments TEXT NOT NULL,
    output      TEXT,
    failure     TEXT,
    PRIMARY KEY (run_id, stage, number)
) STRICT;

-- At most one per stage, ever.
CREATE TABLE checkpoints (
    run_id     BLOB NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
    stage      TEXT NOT NULL,
    tenant     TEXT NOT NULL,
    attempt    INTEGER NOT NULL,
    verdict    TEXT NOT NULL,
    score      REAL,
    model      TEXT,
    origin     TEXT NOT NULL,
    digest     TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    output     TEXT NOT NULL,
    PRIMARY KEY (run_id, stage)
) STRICT;

CREATE TABLE events (
    run_id BLOB NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
    seq    INTEGER NOT NULL,
    tenant TEXT NOT NULL,
    body   TEXT NOT NULL,
    PRIMARY KEY (run_id, seq)
) STRICT, WITHOUT ROWID;

-- One row per model call.
CREATE TABLE ledger (
    run_id   BLOB NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
    stage    TEXT NOT NULL,
    attempt  INTEGER NOT NULL,
    -- Counted from 1 in its attempt.
    call     INTEGER NOT NULL,
    tenant   TEXT NOT NULL,
    pipeline TEXT NOT NULL,
    -- When its attempt ended.
    at       INTEGER NOT NULL,
    purpose  TEXT NOT NULL,
    model    TEXT NOT NULL,
    origin   TEXT NOT NULL,
    input_tokens       INTEGER NOT NULL,
    cache_read_tokens  INTEGER NOT NULL,
    cache_write_tokens INTEGER NOT NULL,
    output_tokens      INTEGER NOT NULL,
    reasoning_tokens   INTEGER NOT NULL,
    usage_estimated    INTEGER NOT NULL,
    cost_nanos         INTEGER NOT NULL,
    saved_nanos        INTEGER NOT NULL,
    priced             INTEGER NOT NULL,
    latency_ms         INTEGER NOT NULL,
    error              TEXT,
    PRIMARY KEY (run_id, stage, attempt, call)
) STRICT, WITHOUT ROWID;

CREATE TABLE signals (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    run_id     BLOB NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
    tenant     TEXT NOT NULL,
    kind       TEXT NOT NULL,
    -- The stage that a decision is about.
    stage      TEXT,
    asked_by   TEXT,
    created_at INTEGER NOT NULL
) STRICT;

CREATE INDEX signals_by_run ON signals (run_id, id);

CREATE TABLE idempotency_keys (
    tenant     TEXT NOT NULL,
    key        TEXT NOT NULL,
    digest     BLOB NOT NULL,
    run_id     BLOB NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
    created_at INTEGER NOT NULL,
    PRIMARY KEY (tenant, key)
) STRICT, WITHOUT ROWID;

CREATE INDEX idempotency_keys_by_age ON idempotency_keys (created_at);
CREATE INDEX idempotency_keys_by_run ON idempotency_keys (run_id);

-- One row per life of a replica. A dead one is kept for a while, so that a return is told from a first entry.
CREATE TABLE replicas (
    id         BLOB NOT NULL PRIMARY KEY,
    name       TEXT NOT NULL,
    version    TEXT NOT NULL,
    draining   INTEGER NOT NULL,
    entered_at INTEGER NOT NULL,
    beat_at    INTEGER NOT NULL,
    -- Dead from here on, unless it beats again before somebody notices.
    expires_at INTEGER NOT NULL,
    -- When it was declared dead, or left.
    dead_at    INTEGER
) STRICT, WITHOUT ROWID;

CREATE TABLE api_keys (
    id         BLOB NOT NULL PRIMARY KEY,
    tenant     TEXT NOT NULL,
    role       TEXT NOT NULL,
    name       TEXT NOT NULL,
    -- SHA-256 of the secret.
    hash       BLOB NOT NULL UNIQUE,
    created_at INTEGER NOT NULL,
    expires_at INTEGER,
    revoked_at INTEGER
) STRICT, WITHOUT ROWID;

CREATE INDEX api_keys_by_tenant ON api_keys (tenant, created_at);

-- The response cache. An entry's rowid tells its age.
CREATE TABLE cache_entries (
    age        INTEGER PRIMARY KEY,
    tenant     TEXT NOT NULL,
    key        BLOB NOT NULL,
    generation INTEGER NOT NULL,
    expires_at INTEGER NOT NULL,
    bytes      INTEGER NOT NULL,
    entry      BLOB NOT NULL,
    UNIQUE (tenant, key)
) STRICT;

CREATE INDEX cache_entries_by_expiry ON cache_entries (expires_at);

-- A tenant's generation now.
CREATE TABLE cache_generations (
    tenant     TEXT NOT NULL PRIMARY KEY,
    generation INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- What an entry must not be below, by scope.
CREATE TABLE cache_floors (
    tenant TEXT NOT NULL,
    scope  TEXT NOT NULL,
    floor  INTEGER NOT NULL,
    PRIMARY KEY (tenant, scope)
) STRICT, WITHOUT ROWID;

-- How large the cache is, kept by the triggers below, so that a write need not count.
CREATE TABLE cache_size (
    one   INTEGER PRIMARY KEY CHECK (one = 1),
    bytes INTEGER NOT NULL
) STRICT;

INSERT INTO cache_size VALUES (1, 0);

CREATE TRIGGER cache_entries_added AFTER INSERT ON cache_entries BEGIN
    UPDATE cache_size SET bytes = bytes + new.bytes WHERE one = 1;
END;

CREATE TRIGGER cache_entries_removed AFTER DELETE ON cache_entries BEGIN
    UPDATE cache_size SET bytes = bytes - old.bytes WHERE one = 1;
END;
