-- Who goes next, and what goes: delayed starts, limits, lanes, lease ages, purges; and what an older binary may do.
--
-- Expand only: a binary that knows nothing of this reads and writes as before. What it accepts has no limits.

-- Which binaries may use a database: those whose newest migration is at least `oldest_binary`, whatever else they know.
CREATE TABLE schema_compat (
    migration     INTEGER NOT NULL PRIMARY KEY,
    oldest_binary INTEGER NOT NULL
) STRICT;

INSERT INTO schema_compat VALUES (2, 1);

-- Not to be claimed before.
ALTER TABLE runs ADD COLUMN start_at INTEGER;
-- When its owner took it; NULL without one.
ALTER TABLE runs ADD COLUMN leased_at INTEGER;
-- When its payloads were removed.
ALTER TABLE runs ADD COLUMN purged_at INTEGER;
-- Its limits, fixed when it was accepted: of its tenant's pipeline, of its key within that.
ALTER TABLE runs ADD COLUMN pipeline_max INTEGER;
ALTER TABLE runs ADD COLUMN key TEXT;
ALTER TABLE runs ADD COLUMN key_max INTEGER;
-- Which of its tenant's queues it waits in: the runs of one lane have the same limits.
ALTER TABLE runs ADD COLUMN lane TEXT NOT NULL DEFAULT '';

-- Lane by lane, each in the order in which it is taken. Holds no run that is parked, leased or done; so do those below.
DROP INDEX runs_ready;
CREATE INDEX runs_lanes ON runs (tenant, lane, priority DESC, ready_at, id, pipeline) WHERE ready_at IS NOT NULL;
-- What is only claimed to be cancelled.
CREATE INDEX runs_cancelled ON runs (id) WHERE ready_at IS NOT NULL AND cancel_requested = 1;
-- What is due, and what waits for its time.
DROP INDEX runs_wake;
CREATE INDEX runs_due ON runs (wake_at, tenant, pipeline) WHERE wake_at IS NOT NULL;
-- Leases, and what they count for.
DROP INDEX runs_owned;
CREATE INDEX runs_leased ON runs (owner, tenant, pipeline, key) WHERE owner IS NOT NULL;
-- What waits for a person.
CREATE INDEX runs_held ON runs (tenant, pipeline)
    WHERE owner IS NULL AND ready_at IS NULL AND wake_at IS NULL AND state IN ('queued', 'running', 'waiting');

-- The ledger keeps its rows when a run is deleted, so they no longer refer to it.
CREATE TABLE ledger_rows (
    run_id   BLOB NOT NULL,
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

INSERT INTO ledger_rows SELECT * FROM ledger;
DROP TABLE ledger;
ALTER TABLE ledger_rows RENAME TO ledger;
