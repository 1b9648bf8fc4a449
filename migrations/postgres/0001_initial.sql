-- The first schema. Same-numbered as migrations/sqlite/0001_initial.sql.
--
-- How it is laid out:
-- * Hot rows are small. `runs` and `stages` change with each commit and hold no payload; a fill factor leaves room on
--   the page, and no index covers what changes with each commit, so that such an update is heap-only. Runs that were
--   accepted together sit on one page and commit together: half of it is free, so that all of them find room at once.
-- * Payloads, attempts, checkpoints, events and the ledger are written once and never changed.
-- * No foreign keys between them: each step of a run is one statement, fenced by the run's row, and a check per row
--   would cost more than it could find. Retention deletes children first.
-- * JSON is kept as text: it is never searched, comes back byte for byte, and may hold \u0000, which jsonb refuses.
-- * Money is whole nano-dollars. Times are UTC. Every row names its tenant.

CREATE TABLE pipelines (
    tenant text COLLATE "C" NOT NULL,
    name text COLLATE "C" NOT NULL,
    latest integer NOT NULL,
    PRIMARY KEY (tenant, name)
);

CREATE TABLE pipeline_versions (
    tenant text COLLATE "C" NOT NULL,
    name text COLLATE "C" NOT NULL,
    version integer NOT NULL,
    digest bytea NOT NULL,
    created_at timestamptz NOT NULL,
    definition text NOT NULL,
    PRIMARY KEY (tenant, name, version),
    UNIQUE (tenant, name, digest)
);

-- A replica that was declared dead keeps its row for a while, so that its heartbeat can be told, and so that a run
-- that it was still being given is found.
CREATE TABLE replicas (
    id uuid PRIMARY KEY,
    name text NOT NULL,
    version text NOT NULL,
    draining boolean NOT NULL,
    started_at timestamptz NOT NULL DEFAULT now(),
    seen_at timestamptz NOT NULL,
    expires_at timestamptz NOT NULL,
    dead_at timestamptz
) WITH (fillfactor = 50);

-- A run has an owner, or a time from which it can be claimed, or neither (it is parked for ever, or finished); never
-- both. `pending` counts its unconsumed signals; `signalled` is true while its owner has not read the newest.
CREATE TABLE runs (
    id uuid PRIMARY KEY,
    epoch bigint NOT NULL,
    last_seq bigint NOT NULL,
    created_at timestamptz NOT NULL,
    deadline_at timestamptz NOT NULL,
    available_at timestamptz,
    owner uuid,
    version integer NOT NULL,
    stages_total integer NOT NULL,
    stages_done integer NOT NULL DEFAULT 0,
    pending integer NOT NULL DEFAULT 0,
    priority smallint NOT NULL,
    signalled boolean NOT NULL DEFAULT false,
    cancel_requested boolean NOT NULL DEFAULT false,
    usage_estimated boolean NOT NULL DEFAULT false,
    calls integer NOT NULL DEFAULT 0,
    hits integer NOT NULL DEFAULT 0,
    unpriced_calls integer NOT NULL DEFAULT 0,
    input_tokens bigint NOT NULL DEFAULT 0,
    cache_read_tokens bigint NOT NULL DEFAULT 0,
    cache_write_tokens bigint NOT NULL DEFAULT 0,
    output_tokens bigint NOT NULL DEFAULT 0,
    reasoning_tokens bigint NOT NULL DEFAULT 0,
    cost_nanos bigint NOT NULL DEFAULT 0,
    saved_nanos bigint NOT NULL DEFAULT 0,
    started_at timestamptz,
    finished_at timestamptz,
    tenant text COLLATE "C" NOT NULL,
    pipeline text COLLATE "C" NOT NULL,
    state text COLLATE "C" NOT NULL,
    cache_mode text,
    request_id text,
    failure text,
    -- Each a JSON array of the label's key and value.
    labels text[] NOT NULL
) WITH (fillfactor = 50);

-- Lists, newest first: ids are ordered by time.
CREATE INDEX runs_by_tenant ON runs (tenant, id DESC);
CREATE INDEX runs_by_pipeline ON runs (tenant, pipeline, id DESC);
CREATE INDEX runs_active ON runs (tenant, id DESC) WHERE state IN ('queued', 'running', 'waiting');
CREATE INDEX runs_unsuccessful ON runs (tenant, id DESC) WHERE state IN ('failed', 'cancelled', 'expired');
CREATE INDEX runs_by_label ON runs USING gin (labels) WHERE labels <> '{}';
-- Claims, in their order. A run that is leased with its insert never enters it.
CREATE INDEX runs_claimable ON runs (priority DESC, available_at, id) WHERE available_at IS NOT NULL;
-- What a replica owns, and which of that has news.
CREATE INDEX runs_by_owner ON runs (owner) WHERE owner IS NOT NULL;
CREATE INDEX runs_signalled ON runs (owner) WHERE signalled;

CREATE TABLE run_payloads (
    run_id uuid PRIMARY KEY,
    tenant text COLLATE "C" NOT NULL,
    input text NOT NULL,
    output text
) WITH (fillfactor = 85);

CREATE TABLE stages (
    run_id uuid NOT NULL,
    started_at timestamptz,
    finished_at timestamptz,
    not_before timestamptz,
    score double precision,
    attempt integer NOT NULL,
    round_start integer NOT NULL,
    usage_estimated boolean NOT NULL,
    calls integer NOT NULL,
    hits integer NOT NULL,
    unpriced_calls integer NOT NULL,
    input_tokens bigint NOT NULL,
    cache_read_tokens bigint NOT NULL,
    cache_write_tokens bigint NOT NULL,
    output_tokens bigint NOT NULL,
    reasoning_tokens bigint NOT NULL,
    cost_nanos bigint NOT NULL,
    saved_nanos bigint NOT NULL,
    tenant text COLLATE "C" NOT NULL,
    stage_id text COLLATE "C" NOT NULL,
    state text COLLATE "C" NOT NULL,
    verdict text,
    model text,
    origin text,
    failure text,
    PRIMARY KEY (run_id, stage_id)
) WITH (fillfactor = 70);

-- `body` is JSON: assessments, calls, failure.
CREATE TABLE attempts (
    run_id uuid NOT NULL,
    started_at timestamptz NOT NULL,
    finished_at timestamptz NOT NULL,
    number integer NOT NULL,
    tenant text COLLATE "C" NOT NULL,
    stage_id text COLLATE "C" NOT NULL,
    verdict text NOT NULL,
    body text NOT NULL,
    output text,
    PRIMARY KEY (run_id, stage_id, number)
);

CREATE TABLE checkpoints (
    run_id uuid NOT NULL,
    created_at timestamptz NOT NULL,
    score double precision,
    attempt integer NOT NULL,
    tenant text COLLATE "C" NOT NULL,
    stage_id text COLLATE "C" NOT NULL,
    verdict text NOT NULL,
    origin text NOT NULL,
    model text,
    digest text NOT NULL,
    output text NOT NULL,
    PRIMARY KEY (run_id, stage_id)
);

-- `body` is JSON: the event without its seq and time.
CREATE TABLE events (
    run_id uuid NOT NULL,
    seq bigint NOT NULL,
    at timestamptz NOT NULL,
    tenant text COLLATE "C" NOT NULL,
    body text NOT NULL,
    PRIMARY KEY (run_id, seq)
);

-- One row per model call, for sums by tenant, pipeline, stage, model and day. It outlives its run.
CREATE TABLE ledger (
    run_id uuid NOT NULL,
    at timestamptz NOT NULL,
    input_tokens bigint NOT NULL,
    cache_read_tokens bigint NOT NULL,
    cache_write_tokens bigint NOT NULL,
    output_tokens bigint NOT NULL,
    reasoning_tokens bigint NOT NULL,
    cost_nanos bigint NOT NULL,
    saved_nanos bigint NOT NULL,
    latency_ms bigint NOT NULL,
    version integer NOT NULL,
    attempt integer NOT NULL,
    usage_estimated boolean NOT NULL,
    priced boolean NOT NULL,
    tenant text COLLATE "C" NOT NULL,
    pipeline text COLLATE "C" NOT NULL,
    stage_id text COLLATE "C" NOT NULL,
    purpose text NOT NULL,
    provider text NOT NULL,
    model text NOT NULL,
    origin text NOT NULL,
    error text
);
CREATE INDEX ledger_by_time ON ledger (tenant, at);

-- `body` is JSON: what is asked, and by whom. `stage_id` is the stage that a decision is about.
CREATE TABLE signals (
    id bigint GENERATED ALWAYS AS IDENTITY,
    run_id uuid NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    tenant text COLLATE "C" NOT NULL,
    stage_id text COLLATE "C",
    body text NOT NULL,
    PRIMARY KEY (run_id, id)
);

-- The key is bytes: a client may send what text cannot hold.
CREATE TABLE idempotency_keys (
    tenant text COLLATE "C" NOT NULL,
    key bytea NOT NULL,
    digest bytea NOT NULL,
    run_id uuid NOT NULL,
    created_at timestamptz NOT NULL,
    PRIMARY KEY (tenant, key)
);
CREATE INDEX idempotency_keys_by_time ON idempotency_keys (created_at);

-- `hash` is SHA-256 of the secret, which is kept nowhere.
CREATE TABLE api_keys (
    id uuid PRIMARY KEY,
    tenant text COLLATE "C" NOT NULL,
    role text NOT NULL,
    name text NOT NULL,
    hash bytea NOT NULL UNIQUE,
    created_at timestamptz NOT NULL,
    expires_at timestamptz,
    revoked_at timestamptz
);
CREATE INDEX api_keys_by_tenant ON api_keys (tenant, created_at, id);
