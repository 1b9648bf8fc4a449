-- Fairness, limits, delayed starts, retention; and less to write for each run. Same-numbered as the one in
-- migrations/sqlite. It only expands: replicas of schema 1 go on working beside it with the statements that they have.

-- In the order in which heartbeats and claims lock them, so that they and this wait for each other and nobody for ever.
LOCK TABLE replicas, runs, checkpoints, run_payloads, ledger IN ACCESS EXCLUSIVE MODE;

-- From here on each migration says which is the oldest schema whose binaries still work beside it.
CREATE TABLE schema_compat (
    migration bigint PRIMARY KEY,
    oldest_binary bigint NOT NULL
);
INSERT INTO schema_compat VALUES (2, 1);

-- `lane` is the queue of its tenant that a run waits in: all runs of a lane have the same limits. `key` is the
-- concurrency key. `leased_at` is when the present owner took it.
--
-- `first_attempts` holds the stages whose first attempt is under way and that have no row in `stages` yet: a JSON object
-- of the times at which they started, in microseconds since 1970. The row of the run is written with each step anyway,
-- so that a stage which succeeds at once costs one row, written once. Where a stage has a row, the row counts. A replica
-- of schema 1 takes such a stage for one that was not started, and starts it.
--
-- `output_of` names the stages, with commas between, whose outputs make the run's: then `run_payloads` has no copy. It is
-- part of the compact form.
ALTER TABLE runs
    ADD COLUMN start_at timestamptz,
    ADD COLUMN leased_at timestamptz,
    ADD COLUMN purged_at timestamptz,
    ADD COLUMN pipeline_max integer,
    ADD COLUMN key_max integer,
    ADD COLUMN key text COLLATE "C",
    ADD COLUMN lane text COLLATE "C" NOT NULL DEFAULT '',
    ADD COLUMN output_of text COLLATE "C",
    ADD COLUMN first_attempts jsonb;

-- An attempt that became a checkpoint at once is told of beside it, and has no row in `attempts`. A replica of schema 1
-- does not show it; it needs only the attempts of stages that have no checkpoint. It ended when the checkpoint was made,
-- and its verdict is the checkpoint's, where nothing else is told.
ALTER TABLE checkpoints
    ADD COLUMN attempt_started_at timestamptz,
    ADD COLUMN attempt_finished_at timestamptz,
    ADD COLUMN attempt_verdict text,
    ADD COLUMN attempt_body text;

-- The compact form, which a replica of schema 1 cannot read. What most steps write is one row: a checkpoint that tells of
-- its attempt, of its stage (which has a row in `stages` only where there is more to tell, and began with its attempt where
-- `stage_started_at` tells nothing else) and of the step's events.
-- `events` is a JSON array of their bodies, `null` for the one that tells of this checkpoint; they are of the time
-- `created_at`, and `seq` is the last one's. A row of `events`, too, may hold such an array, of events of one time.
ALTER TABLE checkpoints
    ADD COLUMN stage_started_at timestamptz,
    ADD COLUMN seq bigint,
    ADD COLUMN events text;

-- It is written once no replica that cannot read it is alive, and none is let in any more; then `compact` has a row.
ALTER TABLE replicas ADD COLUMN schema integer NOT NULL DEFAULT 1;
CREATE TABLE compact (since timestamptz NOT NULL);

-- Whether the compact form may be written. Those of schema 1 that report themselves share the lock: who came before us is
-- counted, who comes after us finds what we leave.
CREATE FUNCTION compact_2() RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT FROM compact) THEN
        RETURN true;
    END IF;
    -- A statement of its own: what the next one sees must be later than the lock.
    IF NOT pg_try_advisory_xact_lock(7394116, 3) THEN
        RETURN false;
    END IF;
    IF EXISTS (
        SELECT FROM replicas p WHERE p.schema < 2 AND (
            p.dead_at IS NULL AND p.expires_at > clock_timestamp()
            -- One that vanished without its farewell may wake, and answer readers before it is refused.
            OR coalesce(p.dead_at >= p.expires_at, true) AND p.seen_at > clock_timestamp() - interval '10 minutes'
        )
    ) THEN
        RETURN false;
    END IF;
    INSERT INTO compact VALUES (clock_timestamp());
    RETURN true;
END $$;

-- A replica of schema 1 that slept through all this is refused when it reports itself, and so does no work.
CREATE FUNCTION refuse_schema_1_2() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(7394116, 3);
    IF EXISTS (SELECT FROM compact) THEN
        RAISE EXCEPTION 'this version cannot read what newer ones have written: start the newer one';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER refuse_schema_1 BEFORE INSERT ON replicas
FOR EACH ROW WHEN (NEW.schema < 2) EXECUTE FUNCTION refuse_schema_1_2();

-- Claims: lanes are found by skipping from one to the next, and each is read from its head. A run that is leased with
-- its insert never enters it. The index of schema 1 goes: while replicas of schema 1 remain they sort the queue, which
-- is a quarter of a second at a hundred thousand waiting runs; to keep it would cost each queued run a second entry.
CREATE INDEX runs_waiting ON runs (tenant, lane, priority DESC, available_at, id) WHERE available_at IS NOT NULL;
DROP INDEX runs_claimable;
-- What is only claimed to be cancelled.
CREATE INDEX runs_cancelled ON runs (id) WHERE available_at IS NOT NULL AND cancel_requested;
-- What a replica owns, and how much of that counts towards which limit.
CREATE INDEX runs_leased ON runs (owner, tenant, pipeline, key) WHERE owner IS NOT NULL;
DROP INDEX runs_by_owner;

-- The output is added to the row of the input. On the same page it is an update without index entries whose record
-- holds only what is new; so half of each page is left free, and what fits a page is not moved out of line.
ALTER TABLE run_payloads SET (fillfactor = 45, toast_tuple_target = 4080);

-- The ledger is written in the order of time and read by spans of it: ranges of pages do, at no cost per row.
CREATE INDEX ledger_by_page ON ledger USING brin (at) WITH (pages_per_range = 32);
DROP INDEX ledger_by_time;

-- The functions below are one round trip each, and each statement inside of them sees what was committed before it
-- began. They are never replaced: a later migration adds others under other names, because replicas that call these
-- may still run.

-- The first runs of a lane that can be taken now, best first. Of each priority the head is read; one whose runs all
-- wait for their time costs two probes, however many there are.
CREATE FUNCTION due_runs_2(of_tenant text, of_lane text, due timestamptz, passed_over uuid[], most integer)
RETURNS TABLE (id uuid, pipeline text, key text, pipeline_max integer, key_max integer, priority smallint,
               available_at timestamptz)
LANGUAGE plpgsql STABLE ROWS 10 AS $$
#variable_conflict use_column
DECLARE
    level smallint;
    remaining integer := most;
    found integer;
BEGIN
    SELECT r.priority INTO level FROM runs r
    WHERE r.tenant = of_tenant AND r.lane = of_lane AND r.available_at IS NOT NULL
    ORDER BY r.tenant, r.lane, r.priority DESC LIMIT 1;
    WHILE level IS NOT NULL AND remaining > 0 LOOP
        RETURN QUERY
            SELECT r.id, r.pipeline, r.key, r.pipeline_max, r.key_max, r.priority, r.available_at FROM runs r
            WHERE r.tenant = of_tenant AND r.lane = of_lane AND r.priority = level AND r.available_at <= due
              AND r.id <> ALL (passed_over)
            ORDER BY r.available_at, r.id LIMIT remaining;
        GET DIAGNOSTICS found = ROW_COUNT;
        remaining := remaining - found;
        EXIT WHEN remaining <= 0;
        SELECT r.priority INTO level FROM runs r
        WHERE r.tenant = of_tenant AND r.lane = of_lane AND r.priority < level AND r.available_at IS NOT NULL
        ORDER BY r.tenant, r.lane, r.priority DESC LIMIT 1;
    END LOOP;
END $$;

-- Which runs of these lanes go next: the rule of `fair.rs` in the core.
--
-- What a limit leaves is counted over the leases of live replicas, no further than the limit goes; a tenant's share only
-- where it decides something. Then each tenant's candidates are walked through in their order, and those for which a
-- limit has no room are passed over. What is left of each tenant is a queue of its own; the n-th of it stands where its
-- tenant would have (leases + n - 1) / weight, and all queues are merged by that.
CREATE FUNCTION choose_runs_2(in_tenants text[], in_lanes text[], due timestamptz, passed_over uuid[], most integer,
                              named text[], weights integer[], maxima integer[], other_weight integer,
                              other_max integer)
RETURNS uuid[]
LANGUAGE plpgsql STABLE AS $$
#variable_conflict use_column
DECLARE
    c record;
    pipeline_taken integer[] := '{}';
    key_taken integer[] := '{}';
    of_tenant text;
    taken integer := 0;
    ids uuid[] := '{}';
    ratios float8[] := '{}';
    since timestamptz[] := '{}';
    whose text[] := '{}';
    chosen uuid[];
BEGIN
    FOR c IN
        WITH live AS MATERIALIZED (
            SELECT p.id FROM replicas p WHERE p.dead_at IS NULL AND p.expires_at > due
        ), head AS MATERIALIZED (
            SELECT l.tenant, l.lane, h.pipeline, h.key, h.pipeline_max, h.key_max
            FROM unnest(in_tenants, in_lanes) AS l(tenant, lane)
            CROSS JOIN LATERAL due_runs_2(l.tenant, l.lane, due, passed_over, 1) h
        ), shared AS MATERIALIZED (
            SELECT t.tenant, greatest(coalesce(s.weight, other_weight), 1) AS weight,
                   CASE WHEN s.tenant IS NULL THEN other_max ELSE s.max END AS max
            FROM (SELECT DISTINCT tenant FROM head) t
            LEFT JOIN unnest(named, weights, maxima) AS s(tenant, weight, max) ON s.tenant = t.tenant
        ), by_tenant AS MATERIALIZED (
            SELECT s.*, CASE WHEN s.max IS NOT NULL OR (SELECT count(*) FROM shared) > 1 THEN (
                SELECT sum(n.n) FROM live CROSS JOIN LATERAL (
                    SELECT count(*) AS n FROM runs r WHERE r.owner = live.id AND r.tenant = s.tenant
                ) n
            ) ELSE 0 END AS used FROM shared s
        ), by_pipeline AS MATERIALIZED (
            SELECT p.tenant, p.pipeline, (
                SELECT sum(n.n) FROM live CROSS JOIN LATERAL (
                    SELECT count(*) AS n FROM (
                        SELECT FROM runs r
                        WHERE r.owner = live.id AND r.tenant = p.tenant AND r.pipeline = p.pipeline LIMIT p.most
                    ) one
                ) n
            ) AS used
            FROM (
                SELECT tenant, pipeline, max(pipeline_max) AS most FROM head
                WHERE pipeline_max IS NOT NULL GROUP BY tenant, pipeline
            ) p
        ), by_key AS MATERIALIZED (
            SELECT k.tenant, k.pipeline, k.key, (
                SELECT sum(n.n) FROM live CROSS JOIN LATERAL (
                    SELECT count(*) AS n FROM (
                        SELECT FROM runs r
                        WHERE r.owner = live.id AND r.tenant = k.tenant AND r.pipeline = k.pipeline AND r.key = k.key
                        LIMIT k.most
                    ) one
                ) n
            ) AS used
            FROM (
                SELECT tenant, pipeline, key, max(key_max) AS most FROM head
                WHERE key IS NOT NULL GROUP BY tenant, pipeline, key
            ) k
        ), room AS MATERIALIZED (
            SELECT h.tenant, h.lane, t.weight, t.max, coalesce(t.used, 0) AS used,
                   coalesce(p.used, 0) AS pipeline_used, coalesce(k.used, 0) AS key_used,
                   least(most, t.max - coalesce(t.used, 0), h.pipeline_max - coalesce(p.used, 0),
                         h.key_max - coalesce(k.used, 0))::integer AS room
            FROM head h
            JOIN by_tenant t ON t.tenant = h.tenant
            LEFT JOIN by_pipeline p ON p.tenant = h.tenant AND p.pipeline = h.pipeline
            LEFT JOIN by_key k ON k.tenant = h.tenant AND k.pipeline = h.pipeline AND k.key = h.key
        )
        SELECT m.tenant, m.weight, m.max, m.used, m.pipeline_used, m.key_used,
               r.id, r.key, r.pipeline_max, r.key_max, r.available_at,
               dense_rank() OVER (ORDER BY m.tenant, r.pipeline) AS pipeline_no,
               dense_rank() OVER (ORDER BY m.tenant, r.pipeline, r.key) AS key_no
        FROM room m CROSS JOIN LATERAL due_runs_2(m.tenant, m.lane, due, passed_over, m.room) r
        WHERE m.room > 0
        ORDER BY m.tenant, r.priority DESC, r.available_at, r.id
    LOOP
        IF of_tenant IS DISTINCT FROM c.tenant THEN
            of_tenant := c.tenant;
            taken := 0;
        END IF;
        CONTINUE WHEN taken >= most
            OR c.used + taken >= c.max
            OR c.pipeline_used + coalesce(pipeline_taken[c.pipeline_no], 0) >= c.pipeline_max
            OR c.key_used + coalesce(key_taken[c.key_no], 0) >= c.key_max;
        ids := ids || c.id;
        ratios := ratios || (c.used + taken)::float8 / c.weight;
        since := since || c.available_at;
        whose := whose || of_tenant;
        taken := taken + 1;
        pipeline_taken[c.pipeline_no] := coalesce(pipeline_taken[c.pipeline_no], 0) + 1;
        key_taken[c.key_no] := coalesce(key_taken[c.key_no], 0) + 1;
    END LOOP;
    SELECT array_agg(o.id ORDER BY o.ratio, o.since, o.tenant, o.n) INTO chosen FROM (
        SELECT a.* FROM unnest(ids, ratios, since, whose) WITH ORDINALITY AS a(id, ratio, since, tenant, n)
        ORDER BY a.ratio, a.since, a.tenant, a.n LIMIT most
    ) o;
    RETURN coalesce(chosen, '{}');
END $$;

-- A claim: declares replicas dead that are out of time, frees some of what the dead own, and takes runs for `me`: those
-- that are to be cancelled, whatever their limits, since they end at once; then others from at most `lanes_most` lanes
-- after the given one.
--
-- Claims that take something wait for each other at an advisory lock, which ends with the transaction that this call
-- is; what is counted is counted after it was got, so that no limit is ever exceeded. A caller that freezes in the
-- middle blocks nobody: the server goes on without it. A run that somebody else is just changing is passed over.
--
-- `last_tenant` and `last_lane` are where the next look begins; null where no lane is left.
CREATE FUNCTION claim_runs_2(me uuid, most integer, named text[], weights integer[], maxima integer[],
                             other_weight integer, other_max integer, after_tenant text, after_lane text,
                             lanes_most integer, free_most integer,
                             OUT ids uuid[], OUT epochs bigint[], OUT freed integer, OUT lost integer,
                             OUT last_tenant text, OUT last_lane text)
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    moment timestamptz := clock_timestamp();
    tenants text[];
    lanes text[];
    chosen uuid[];
    passed_over uuid[] := '{}';
    taken_ids uuid[];
    taken_epochs bigint[];
BEGIN
    ids := '{}';
    epochs := '{}';
    UPDATE replicas SET dead_at = moment WHERE id IN (
        SELECT p.id FROM replicas p WHERE p.dead_at IS NULL AND p.expires_at <= moment FOR UPDATE SKIP LOCKED
    );
    GET DIAGNOSTICS lost = ROW_COUNT;
    UPDATE runs SET owner = NULL, available_at = moment WHERE id IN (
        SELECT x.id FROM replicas p CROSS JOIN LATERAL (
            SELECT r.id FROM runs r WHERE r.owner = p.id LIMIT free_most FOR UPDATE SKIP LOCKED
        ) x
        WHERE p.dead_at IS NOT NULL LIMIT free_most
    );
    GET DIAGNOSTICS freed = ROW_COUNT;
    IF most <= 0 THEN
        RETURN;
    END IF;
    WITH RECURSIVE found AS (
        (SELECT r.tenant, r.lane FROM runs r
         WHERE r.available_at IS NOT NULL AND (r.tenant, r.lane) > (after_tenant, after_lane)
         ORDER BY r.tenant, r.lane LIMIT 1)
        UNION ALL
        SELECT n.tenant, n.lane FROM found f CROSS JOIN LATERAL (
            SELECT r.tenant, r.lane FROM runs r
            WHERE r.available_at IS NOT NULL AND (r.tenant, r.lane) > (f.tenant, f.lane)
            ORDER BY r.tenant, r.lane LIMIT 1
        ) n
    )
    SELECT array_agg(w.tenant), array_agg(w.lane) INTO tenants, lanes FROM (SELECT * FROM found LIMIT lanes_most) w;
    IF tenants IS NULL THEN
        RETURN;
    END IF;
    IF cardinality(lanes) >= lanes_most THEN
        last_tenant := tenants[cardinality(tenants)];
        last_lane := lanes[cardinality(lanes)];
    END IF;
    PERFORM pg_advisory_xact_lock(7394116, 2);
    moment := clock_timestamp();
    IF NOT EXISTS (SELECT FROM replicas p WHERE p.id = me AND p.dead_at IS NULL AND p.expires_at > moment) THEN
        RETURN;
    END IF;
    WITH taken AS (
        UPDATE runs r SET owner = me, epoch = r.epoch + 1, available_at = NULL, signalled = r.pending > 0,
                          leased_at = moment
        WHERE r.id IN (
            SELECT c.id FROM runs c WHERE c.available_at <= moment AND c.cancel_requested
            -- At most half: they must not keep others' runs from their turn.
            ORDER BY c.id LIMIT (most + 1) / 2 FOR UPDATE SKIP LOCKED
        )
        RETURNING r.id, r.epoch
    )
    SELECT coalesce(array_agg(t.id ORDER BY t.id), '{}'), coalesce(array_agg(t.epoch ORDER BY t.id), '{}')
    INTO ids, epochs FROM taken t;
    FOR look IN 1..8 LOOP
        EXIT WHEN cardinality(ids) >= most;
        chosen := choose_runs_2(tenants, lanes, moment, passed_over, most - cardinality(ids), named, weights, maxima,
                                other_weight, other_max);
        EXIT WHEN chosen = '{}';
        WITH locked AS MATERIALIZED (
            -- A subquery with a limit can only be done run by run: a join that was planned while few waited reads them all.
            SELECT x.id, c.n FROM unnest(chosen) WITH ORDINALITY AS c(id, n) CROSS JOIN LATERAL (
                SELECT r.id FROM runs r WHERE r.id = c.id AND r.available_at <= moment LIMIT 1 FOR UPDATE SKIP LOCKED
            ) x
        ), taken AS (
            UPDATE runs r SET owner = me, epoch = r.epoch + 1, available_at = NULL, signalled = r.pending > 0,
                              leased_at = moment
            FROM locked l WHERE r.id = l.id
            RETURNING r.id, r.epoch, l.n
        )
        SELECT array_agg(t.id ORDER BY t.n), array_agg(t.epoch ORDER BY t.n) INTO taken_ids, taken_epochs FROM taken t;
        ids := ids || taken_ids;
        epochs := epochs || taken_epochs;
        EXIT WHEN cardinality(taken_ids) = cardinality(chosen);
        passed_over := passed_over || chosen;
    END LOOP;
END $$;

-- The unconsumed signals of leased runs. The marks are cleared first, and the signals read after that: whatever was
-- cleared is seen, and a signal that is left in between marks its run anew.
CREATE FUNCTION read_signals_2(in_runs uuid[], in_epochs bigint[])
RETURNS TABLE (run_id uuid, id bigint, body text)
LANGUAGE plpgsql ROWS 10 AS $$
#variable_conflict use_column
BEGIN
    UPDATE runs SET signalled = false WHERE id IN (
        SELECT r.id FROM unnest(in_runs, in_epochs) AS l(id, epoch)
        JOIN runs r ON r.id = l.id AND r.epoch = l.epoch
        WHERE r.owner IS NOT NULL AND r.signalled
        ORDER BY r.id FOR NO KEY UPDATE OF r
    );
    RETURN QUERY
        SELECT g.run_id, g.id, g.body FROM unnest(in_runs, in_epochs) AS l(id, epoch)
        CROSS JOIN LATERAL (
            SELECT r.id FROM runs r WHERE r.id = l.id AND r.epoch = l.epoch AND r.owner IS NOT NULL LIMIT 1
        ) r
        JOIN signals g ON g.run_id = r.id
        ORDER BY g.run_id, g.id;
END $$;

-- Removes the inputs, outputs, checkpoints' outputs and attempts' outputs of those of these runs that have ended. JSON's
-- null remains where a replica of schema 1 expects a document.
CREATE FUNCTION purge_runs_2(in_runs uuid[], at timestamptz) RETURNS integer
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    locked uuid[];
BEGIN
    SELECT array_agg(o.id) INTO locked FROM (
        SELECT r.id FROM runs r
        WHERE r.id = ANY (in_runs) AND r.state IN ('succeeded', 'failed', 'cancelled', 'expired') AND r.owner IS NULL
          AND r.purged_at IS NULL
        ORDER BY r.id FOR UPDATE
    ) o;
    UPDATE run_payloads SET input = 'null', output = NULL WHERE run_id = ANY (locked);
    UPDATE checkpoints SET output = 'null' WHERE run_id = ANY (locked);
    UPDATE attempts SET output = NULL WHERE run_id = ANY (locked) AND output IS NOT NULL;
    UPDATE runs SET purged_at = at, output_of = NULL WHERE id = ANY (locked);
    RETURN coalesce(cardinality(locked), 0);
END $$;

-- Removes those of these runs that have ended, payloads first. A run's idempotency key bears the time at which the run
-- was accepted, by which it is found.
CREATE FUNCTION delete_runs_2(in_runs uuid[]) RETURNS uuid[]
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    locked uuid[];
BEGIN
    SELECT array_agg(o.id) INTO locked FROM (
        SELECT r.id FROM runs r
        WHERE r.id = ANY (in_runs) AND r.state IN ('succeeded', 'failed', 'cancelled', 'expired') AND r.owner IS NULL
        ORDER BY r.id FOR UPDATE
    ) o;
    DELETE FROM run_payloads WHERE run_id = ANY (locked);
    DELETE FROM checkpoints WHERE run_id = ANY (locked);
    DELETE FROM attempts WHERE run_id = ANY (locked);
    DELETE FROM stages WHERE run_id = ANY (locked);
    DELETE FROM events WHERE run_id = ANY (locked);
    DELETE FROM signals WHERE run_id = ANY (locked);
    DELETE FROM idempotency_keys k USING runs r
    WHERE r.id = ANY (locked) AND k.tenant = r.tenant AND k.created_at = r.created_at AND k.run_id = r.id;
    DELETE FROM runs WHERE id = ANY (locked);
    RETURN coalesce(locked, '{}');
END $$;
