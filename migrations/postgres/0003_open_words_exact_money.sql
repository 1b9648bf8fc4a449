-- Capabilities of replicas, exact money, reasons that stay inside, and lists and claims that cost their own rows.
-- Same-numbered as the one in migrations/sqlite. It only expands: replicas of schema 2 go on working beside it with the
-- statements and the functions that they have (a function that changes gets a new, versioned name).

-- In the order in which heartbeats and claims lock them, so that they and this wait for each other and nobody for ever.
LOCK TABLE replicas, runs, checkpoints, run_payloads, ledger IN ACCESS EXCLUSIVE MODE;

INSERT INTO schema_compat VALUES (3, 2);

-- Lists cost their own tenant's rows, whatever others have. The order of a list begins with the tenant, and its page is a
-- range of one of these indexes, all of whose columns ascend for that: no other index has this order, so that no plan
-- walks through other tenants' runs. (A run's entry also lands beside its tenant's last one, which splits fewer pages.)
DROP INDEX runs_by_tenant, runs_by_pipeline, runs_active, runs_unsuccessful, runs_by_label;
CREATE INDEX runs_by_tenant ON runs (tenant, id);
CREATE INDEX runs_by_pipeline ON runs (tenant, pipeline, id);
CREATE INDEX runs_active ON runs (tenant, id) WHERE state IN ('queued', 'running', 'waiting');
CREATE INDEX runs_unsuccessful ON runs (tenant, id) WHERE state IN ('failed', 'cancelled', 'expired');
-- A label that many tenants use is found by tenant: the tenant is one more element. What was added since the index was last
-- put in order is read by each look, whoever added it; so it is kept short.
CREATE INDEX runs_by_label ON runs USING gin ((array_append(labels, tenant) COLLATE "C"))
    WITH (gin_pending_list_limit = 128) WHERE labels <> '{}';

-- ---- Capabilities ----------------------------------------------------------------------------------------------------

-- What a replica can read and do, as words. A replica of schema 2 tells none; what its `schema` says counts.
ALTER TABLE replicas ADD COLUMN capabilities text[] NOT NULL DEFAULT '{}';

-- Capabilities that are used only once no replica without them can come back. `common_since` is when every replica had it;
-- `settled_at` is since when it is so for good. `compact_rows` is settled in `compact`, where schema 2 looks for it.
CREATE TABLE capabilities (
    word text COLLATE "C" PRIMARY KEY,
    common_since timestamptz NOT NULL,
    settled_at timestamptz
);

-- On a new database there is no older replica to wait for.
INSERT INTO capabilities
SELECT 'open_vocabulary', clock_timestamp(), clock_timestamp()
WHERE NOT EXISTS (SELECT FROM replicas) AND NOT EXISTS (SELECT FROM runs);

-- The capabilities that are common to all live replicas, for a heartbeat of a replica that has `mine`, of which `settling` are settled
-- first. Heartbeats share the advisory lock: a replica that came before is counted, one that comes later finds
-- what is settled. It is only tried for: the next heartbeat tries again.
CREATE FUNCTION common_capabilities_3(me uuid, mine text[], settling text[], way_back interval) RETURNS text[]
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    settled text[];
    open text;
BEGIN
    SELECT coalesce(array_agg(c.word), '{}') INTO settled FROM capabilities c WHERE c.settled_at IS NOT NULL;
    IF compact_2() THEN
        settled := settled || 'compact_rows'::text;
    END IF;
    -- The statements after the lock see what was committed before it was got.
    IF NOT settling <@ (settled || 'compact_rows'::text) AND pg_try_advisory_xact_lock(7394116, 4) THEN
        FOREACH open IN ARRAY settling LOOP
            CONTINUE WHEN open = ANY (settled) OR open = 'compact_rows';
            IF EXISTS (
                SELECT FROM replicas p WHERE p.id <> me AND NOT open = ANY (p.capabilities) AND (
                    p.dead_at IS NULL AND p.expires_at > clock_timestamp()
                    -- One that vanished without its farewell may wake, and answer readers before it is refused.
                    OR coalesce(p.dead_at >= p.expires_at, true) AND p.seen_at > clock_timestamp() - interval '10 minutes'
                )
            ) THEN
                DELETE FROM capabilities c WHERE c.word = open AND c.settled_at IS NULL;
            ELSE
                INSERT INTO capabilities AS c VALUES (open, clock_timestamp(), NULL) ON CONFLICT DO NOTHING;
                UPDATE capabilities c SET settled_at = clock_timestamp()
                WHERE c.word = open AND c.settled_at IS NULL AND c.common_since + way_back <= clock_timestamp();
                IF FOUND THEN
                    settled := settled || open;
                END IF;
            END IF;
        END LOOP;
    END IF;
    RETURN settled || ARRAY(
        SELECT w.word FROM unnest(mine) AS w(word)
        WHERE NOT w.word = ANY (settling) AND NOT EXISTS (
            SELECT FROM replicas p
            WHERE p.id <> me AND p.dead_at IS NULL AND p.expires_at > clock_timestamp() AND NOT w.word = ANY (p.capabilities)
        )
    );
END $$;

-- A replica that lacks a settled capability is refused when it reports itself, and so does no work.
CREATE FUNCTION refuse_without_settled_3() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(7394116, 4);
    IF EXISTS (SELECT FROM capabilities c WHERE c.settled_at IS NOT NULL AND NOT c.word = ANY (NEW.capabilities)) THEN
        RAISE EXCEPTION 'this version cannot read what newer ones have written: start the newer one'
            USING ERRCODE = 'SG503';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER refuse_without_settled BEFORE INSERT ON replicas
FOR EACH ROW EXECUTE FUNCTION refuse_without_settled_3();
