-- Capabilities of replicas, exact money, reasons that stay inside, and lists and claims that cost their own rows.
-- Same-numbered as the one in migrations/sqlite. It only expands: replicas of schema 2 go on working beside it with the
-- statements and the functions that they have (a function that changes gets a new, versioned name).

-- In the order in which heartbeats and claims lock them, so that they and this wait for each other and nobody for ever.
LOCK TABLE replicas, runs, stages, checkpoints, run_payloads, ledger IN ACCESS EXCLUSIVE MODE;

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

-- Claims cost what they take and the lanes that they look at, however many runs wait for their time, in however many lanes
-- and priorities, and however deep the queues of however many tenants are.
--
-- `ready` is true once a run that waits has become due: only such runs are in the index that claims read, so that its first
-- entry of a lane is the run that goes next. It says nothing of a run that is leased. A replica of schema 2 does not write
-- it, and claims by `runs_waiting`, which stays for that; the next claim of a newer one notes what is due.
ALTER TABLE runs ADD COLUMN ready boolean;
CREATE INDEX runs_ready ON runs (tenant, lane, priority DESC, available_at, id)
    WHERE available_at IS NOT NULL AND ready;
CREATE INDEX runs_unready ON runs (tenant, available_at) WHERE available_at IS NOT NULL AND ready IS NOT TRUE;

-- Notes that runs have become due: of at most `tenants_most` tenants after the given one, each the same number, so that no
-- tenant's many stand before another one's first. `last_tenant` is null where no tenant is left.
CREATE FUNCTION wake_runs_3(due timestamptz, after_tenant text, tenants_most integer, most integer,
                            OUT woken integer, OUT last_tenant text)
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    looked integer;
    tenants text[];
    of_each integer;
BEGIN
    woken := 0;
    WITH RECURSIVE found AS (
        (SELECT r.tenant, r.available_at FROM runs r
         WHERE r.available_at IS NOT NULL AND r.ready IS NOT TRUE AND r.tenant > after_tenant
         ORDER BY r.tenant, r.available_at LIMIT 1)
        UNION ALL
        SELECT n.tenant, n.available_at FROM found f CROSS JOIN LATERAL (
            SELECT r.tenant, r.available_at FROM runs r
            WHERE r.available_at IS NOT NULL AND r.ready IS NOT TRUE AND r.tenant > f.tenant
            ORDER BY r.tenant, r.available_at LIMIT 1
        ) n
    )
    SELECT count(*), max(l.tenant), array_agg(l.tenant) FILTER (WHERE l.available_at <= due)
    INTO looked, last_tenant, tenants FROM (SELECT * FROM found LIMIT tenants_most) l;
    IF looked < tenants_most THEN
        last_tenant := NULL;
    END IF;
    IF tenants IS NULL THEN
        RETURN;
    END IF;
    of_each := greatest(most / cardinality(tenants), 1);
    UPDATE runs SET ready = true WHERE id = ANY (ARRAY(
        SELECT x.id FROM unnest(tenants) AS t(tenant) CROSS JOIN LATERAL (
            SELECT r.id FROM runs r
            WHERE r.tenant = t.tenant AND r.available_at <= due AND r.ready IS NOT TRUE
            ORDER BY r.tenant, r.available_at LIMIT of_each FOR UPDATE SKIP LOCKED
        ) x
    ));
    GET DIAGNOSTICS woken = ROW_COUNT;
END $$;

-- How many runs of a tenant, or of one of its pipelines, live replicas own; not counted beyond `most`.
CREATE FUNCTION leases_3(due timestamptz, of_tenant text, of_pipeline text, most integer) RETURNS bigint
LANGUAGE plpgsql STABLE AS $$
#variable_conflict use_column
DECLARE
    n bigint;
BEGIN
    IF of_pipeline IS NULL THEN
        SELECT count(*) INTO n FROM (
            SELECT FROM replicas p CROSS JOIN LATERAL (
                SELECT FROM runs r WHERE r.owner = p.id AND r.tenant = of_tenant LIMIT most
            ) one
            WHERE p.dead_at IS NULL AND p.expires_at > due LIMIT most
        ) owned;
    ELSE
        SELECT count(*) INTO n FROM (
            SELECT FROM replicas p CROSS JOIN LATERAL (
                SELECT FROM runs r WHERE r.owner = p.id AND r.tenant = of_tenant AND r.pipeline = of_pipeline LIMIT most
            ) one
            WHERE p.dead_at IS NULL AND p.expires_at > due LIMIT most
        ) owned;
    END IF;
    RETURN n;
END $$;

-- Lanes in which something is ready, with their limits: of the given tenant and those after it, of each the same number
-- at most; or, where `of_all`, one lane after the other, from after the given one on. A tenant that has all it may have, and
-- the lanes of a pipeline that has all it may have, are skipped as a whole. That is a hint: what counts is counted again
-- by whoever takes.
--
-- A tenant that has more lanes than its part is cut: where it goes on is among `cut_*`, and was given so.
CREATE FUNCTION find_lanes_3(due timestamptz, named text[], maxima integer[], other_max integer, after_tenant text,
                             after_lane text, of_all boolean, INOUT cut_tenants text[], INOUT cut_lanes text[],
                             lanes_most integer, OUT tenants text[], OUT lanes text[], OUT pipelines text[],
                             OUT keys text[], OUT pipeline_maxima integer[], OUT key_maxima integer[],
                             OUT last_tenant text, OUT last_lane text)
LANGUAGE plpgsql STABLE AS $$
#variable_conflict use_variable
DECLARE
    from_tenants text[] := cut_tenants;
    from_lanes text[] := cut_lanes;
    names text[];
    name text;
    of_each integer;
    taken integer;
    n integer := 0;
    most integer;
    from_lane text COLLATE "C";
    known_pipeline text;
    known_max integer;
    full_pipeline boolean;
    head record;
BEGIN
    cut_tenants := '{}';
    cut_lanes := '{}';
    tenants := '{}';
    lanes := '{}';
    pipelines := '{}';
    keys := '{}';
    pipeline_maxima := '{}';
    key_maxima := '{}';
    -- The smallest text after another one is that one with the smallest character added.
    WITH RECURSIVE found AS (
        (SELECT r.tenant FROM runs r
         WHERE r.available_at IS NOT NULL AND r.ready
           AND r.tenant >= after_tenant
         ORDER BY r.tenant LIMIT 1)
        UNION ALL
        SELECT x.tenant FROM found f CROSS JOIN LATERAL (
            SELECT r.tenant FROM runs r
            WHERE r.available_at IS NOT NULL AND r.ready AND r.tenant > f.tenant
            ORDER BY r.tenant LIMIT 1
        ) x
    )
    SELECT array_agg(l.tenant) INTO names FROM (SELECT f.tenant FROM found f LIMIT lanes_most) l;
    IF names IS NULL THEN
        RETURN;
    END IF;
    IF cardinality(names) >= lanes_most THEN
        last_tenant := names[cardinality(names)] || chr(1);
        last_lane := '';
    END IF;
    of_each := CASE WHEN of_all THEN lanes_most ELSE greatest(lanes_most / cardinality(names), 1) END;
    FOREACH name IN ARRAY names LOOP
        most := CASE WHEN name = ANY (named) THEN maxima[array_position(named, name)] ELSE other_max END;
        CONTINUE WHEN most IS NOT NULL AND leases_3(due, name, NULL, most) >= most;
        from_lane := '';
        IF of_all AND name = after_tenant THEN
            from_lane := after_lane || chr(1);
        ELSIF NOT of_all AND name = ANY (from_tenants) THEN
            from_lane := from_lanes[array_position(from_tenants, name)] || chr(1);
        END IF;
        taken := 0;
        known_pipeline := NULL;
        LOOP
            SELECT r.lane, r.pipeline, r.key, r.pipeline_max, r.key_max INTO head FROM runs r
            WHERE r.available_at IS NOT NULL AND r.ready AND r.tenant = name AND r.lane >= from_lane
            ORDER BY r.tenant, r.lane LIMIT 1;
            EXIT WHEN NOT FOUND;
            from_lane := head.lane || chr(1);
            IF head.pipeline_max IS NOT NULL THEN
                IF known_pipeline IS DISTINCT FROM head.pipeline OR known_max IS DISTINCT FROM head.pipeline_max THEN
                    known_pipeline := head.pipeline;
                    known_max := head.pipeline_max;
                    full_pipeline := leases_3(due, name, known_pipeline, known_max) >= known_max;
                END IF;
                IF full_pipeline THEN
                    -- Past all lanes of this pipeline with this limit: a 0 comes after the slash that begins their keys.
                    from_lane := greatest(from_lane, (known_pipeline || '/' || known_max || '0') COLLATE "C");
                    CONTINUE;
                END IF;
            END IF;
            tenants := array_append(tenants, name);
            lanes := array_append(lanes, head.lane);
            pipelines := array_append(pipelines, head.pipeline);
            keys := array_append(keys, head.key);
            pipeline_maxima := array_append(pipeline_maxima, head.pipeline_max);
            key_maxima := array_append(key_maxima, head.key_max);
            taken := taken + 1;
            n := n + 1;
            IF of_all AND n >= lanes_most THEN
                last_tenant := name;
                last_lane := head.lane;
                RETURN;
            END IF;
            IF taken >= of_each THEN
                cut_tenants := array_append(cut_tenants, name);
                cut_lanes := array_append(cut_lanes, head.lane);
                EXIT;
            END IF;
        END LOOP;
    END LOOP;
END $$;

-- The first runs of a lane that can be taken, best first.
CREATE FUNCTION due_runs_3(of_tenant text, of_lane text, due timestamptz, passed_over uuid[], most integer)
RETURNS TABLE (id uuid, pipeline text, priority smallint, available_at timestamptz)
LANGUAGE plpgsql STABLE ROWS 10 AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT r.id, r.pipeline, r.priority, r.available_at FROM runs r
        -- What a replica of schema 2 parked may not be due.
        WHERE r.tenant = of_tenant AND r.lane = of_lane AND r.ready AND r.available_at <= due
          AND r.id <> ALL (passed_over)
        ORDER BY r.tenant, r.lane, r.priority DESC, r.available_at, r.id LIMIT most;
END $$;

-- Which runs of these lanes go next: the rule of `fair.rs` in the core.
--
-- What a limit leaves is counted over the leases of live replicas, no further than the limit goes; a tenant's share only
-- where it decides something. Then of each lane its first runs are read; only of a lane all of whose runs were chosen
-- more are, and it is chosen anew. So what is read is a few runs of each lane and a multiple of what is taken. Each
-- tenant's candidates are walked through in their order, and those for which a limit has no room are passed over. What is
-- left of each tenant is a queue of its own; the n-th of it stands where its tenant would have (leases + n - 1) / weight,
-- and all queues are merged by that.
CREATE FUNCTION choose_runs_3(in_tenants text[], in_lanes text[], in_pipelines text[], in_keys text[],
                              in_pipeline_maxima integer[], in_key_maxima integer[], due timestamptz,
                              passed_over uuid[], most integer, named text[], weights integer[], maxima integer[],
                              other_weight integer, other_max integer)
RETURNS uuid[]
LANGUAGE plpgsql STABLE AS $$
#variable_conflict use_column
DECLARE
    c record;
    of_weight integer[];
    of_max integer[];
    of_used bigint[];
    of_pipeline_used bigint[];
    of_key_used bigint[];
    of_key_no bigint[];
    rooms integer[];
    depths integer[];
    pipeline_taken integer[];
    key_taken integer[];
    of_tenant text;
    taken integer;
    ids uuid[];
    ratios float8[];
    since timestamptz[];
    whose text[];
    wheres integer[];
    chosen uuid[];
    chosen_lanes integer[];
    deeper boolean;
BEGIN
    WITH live AS MATERIALIZED (
        SELECT p.id FROM replicas p WHERE p.dead_at IS NULL AND p.expires_at > due
    ), head AS MATERIALIZED (
        SELECT l.*, dense_rank() OVER (ORDER BY l.tenant, l.pipeline, l.key) AS key_no
        FROM unnest(in_tenants, in_lanes, in_pipelines, in_keys, in_pipeline_maxima, in_key_maxima) WITH ORDINALITY
            AS l(tenant, lane, pipeline, key, pipeline_max, key_max, no)
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
        SELECT h.no, h.key_no, t.weight, t.max, coalesce(t.used, 0) AS used,
               coalesce(p.used, 0) AS pipeline_used, coalesce(k.used, 0) AS key_used,
               greatest(0, least(most, t.max - coalesce(t.used, 0), h.pipeline_max - coalesce(p.used, 0),
                                 h.key_max - coalesce(k.used, 0)))::integer AS room
        FROM head h
        JOIN by_tenant t ON t.tenant = h.tenant
        LEFT JOIN by_pipeline p ON p.tenant = h.tenant AND p.pipeline = h.pipeline
        LEFT JOIN by_key k ON k.tenant = h.tenant AND k.pipeline = h.pipeline AND k.key = h.key
    )
    SELECT array_agg(r.weight ORDER BY r.no), array_agg(r.max ORDER BY r.no), array_agg(r.used ORDER BY r.no),
           array_agg(r.pipeline_used ORDER BY r.no), array_agg(r.key_used ORDER BY r.no),
           array_agg(r.key_no ORDER BY r.no), array_agg(r.room ORDER BY r.no),
           array_agg(least(r.room, greatest(1, 2 * most / cardinality(in_lanes))) ORDER BY r.no)
    INTO of_weight, of_max, of_used, of_pipeline_used, of_key_used, of_key_no, rooms, depths
    FROM room r;
    LOOP
        pipeline_taken := '{}';
        key_taken := '{}';
        of_tenant := NULL;
        taken := 0;
        ids := '{}';
        ratios := '{}';
        since := '{}';
        whose := '{}';
        wheres := '{}';
        FOR c IN
            -- The lane of the runs without limits holds those of all pipelines, so that a run tells its own.
            SELECT m.tenant, m.no::integer AS no, r.id, r.available_at,
                   dense_rank() OVER (ORDER BY m.tenant, r.pipeline) AS pipeline_no
            FROM unnest(in_tenants, in_lanes, depths) WITH ORDINALITY AS m(tenant, lane, depth, no)
            CROSS JOIN LATERAL due_runs_3(m.tenant, m.lane, due, passed_over, m.depth) r
            WHERE m.depth > 0
            ORDER BY m.tenant, r.priority DESC, r.available_at, r.id
        LOOP
            IF of_tenant IS DISTINCT FROM c.tenant THEN
                of_tenant := c.tenant;
                taken := 0;
            END IF;
            CONTINUE WHEN taken >= most
                OR of_used[c.no] + taken >= of_max[c.no]
                OR of_pipeline_used[c.no] + coalesce(pipeline_taken[c.pipeline_no], 0) >= in_pipeline_maxima[c.no]
                OR of_key_used[c.no] + coalesce(key_taken[of_key_no[c.no]], 0) >= in_key_maxima[c.no];
            ids := ids || c.id;
            ratios := ratios || (of_used[c.no] + taken)::float8 / of_weight[c.no];
            since := since || c.available_at;
            whose := whose || of_tenant;
            wheres := wheres || c.no;
            taken := taken + 1;
            pipeline_taken[c.pipeline_no] := coalesce(pipeline_taken[c.pipeline_no], 0) + 1;
            key_taken[of_key_no[c.no]] := coalesce(key_taken[of_key_no[c.no]], 0) + 1;
        END LOOP;
        SELECT array_agg(o.id ORDER BY o.ratio, o.since, o.tenant, o.n), array_agg(o.lane)
        INTO chosen, chosen_lanes FROM (
            SELECT a.* FROM unnest(ids, ratios, since, whose, wheres) WITH ORDINALITY AS a(id, ratio, since, tenant, lane, n)
            ORDER BY a.ratio, a.since, a.tenant, a.n LIMIT most
        ) o;
        deeper := false;
        FOR c IN SELECT l.no, count(*) AS n FROM unnest(chosen_lanes) AS l(no) GROUP BY l.no LOOP
            IF c.n >= depths[c.no] AND depths[c.no] < rooms[c.no] THEN
                depths[c.no] := least(depths[c.no] * 4, rooms[c.no]);
                deeper := true;
            END IF;
        END LOOP;
        EXIT WHEN NOT deeper;
    END LOOP;
    RETURN coalesce(chosen, '{}');
END $$;

-- A claim: declares replicas dead that are out of time, frees some of what the dead own, notes what has become due, and
-- takes runs for `me`: those that are to be cancelled, whatever their limits, since they end at once; then others from at
-- most `lanes_most` lanes.
--
-- Claims that take something wait for each other at an advisory lock, the same as claims of schema 2, which ends with the
-- transaction that this call is; what is counted is counted after it was got, so that no limit is ever exceeded. A caller
-- that freezes in the middle blocks nobody: the server goes on without it. A run that somebody else is just changing is
-- passed over. Lanes are found before the lock is asked for.
--
-- `last_tenant` (and where `of_all`, `last_lane`) is where the next look begins, null where nothing is left; `cut_*` is
-- where it goes on with a tenant that has many lanes; `wake_last` where the next look at what becomes due begins.
CREATE FUNCTION claim_runs_3(me uuid, most integer, named text[], weights integer[], maxima integer[],
                             other_weight integer, other_max integer, after_tenant text, after_lane text,
                             of_all boolean, INOUT cut_tenants text[], INOUT cut_lanes text[], wake_after text,
                             lanes_most integer, free_most integer,
                             OUT ids uuid[], OUT epochs bigint[], OUT freed integer, OUT lost integer, OUT woken integer,
                             OUT last_tenant text, OUT last_lane text, OUT wake_last text)
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    moment timestamptz := clock_timestamp();
    found_lanes record;
    chosen uuid[];
    passed_over uuid[] := '{}';
    taken_ids uuid[];
    taken_epochs bigint[];
BEGIN
    ids := '{}';
    epochs := '{}';
    woken := 0;
    UPDATE replicas SET dead_at = moment WHERE id IN (
        SELECT p.id FROM replicas p WHERE p.dead_at IS NULL AND p.expires_at <= moment FOR UPDATE SKIP LOCKED
    );
    GET DIAGNOSTICS lost = ROW_COUNT;
    UPDATE runs SET owner = NULL, available_at = moment, ready = true WHERE id IN (
        SELECT x.id FROM replicas p CROSS JOIN LATERAL (
            SELECT r.id FROM runs r WHERE r.owner = p.id LIMIT free_most FOR UPDATE SKIP LOCKED
        ) x
        WHERE p.dead_at IS NOT NULL LIMIT free_most
    );
    GET DIAGNOSTICS freed = ROW_COUNT;
    IF most <= 0 THEN
        RETURN;
    END IF;
    -- A few times what can be taken, so that the best of what is due goes first, and no more: each is an update.
    SELECT w.woken, w.last_tenant INTO woken, wake_last
    FROM wake_runs_3(moment, wake_after, lanes_most, least(free_most, greatest(4 * most, 100))) w;
    SELECT * INTO found_lanes
    FROM find_lanes_3(moment, named, maxima, other_max, after_tenant, after_lane, of_all, cut_tenants, cut_lanes, lanes_most);
    cut_tenants := found_lanes.cut_tenants;
    cut_lanes := found_lanes.cut_lanes;
    last_tenant := found_lanes.last_tenant;
    last_lane := found_lanes.last_lane;
    IF found_lanes.tenants = '{}' AND NOT EXISTS (
        SELECT FROM runs r WHERE r.available_at <= moment AND r.cancel_requested
    ) THEN
        RETURN;
    END IF;
    PERFORM pg_advisory_xact_lock(7394116, 2);
    moment := clock_timestamp();
    IF NOT EXISTS (SELECT FROM replicas p WHERE p.id = me AND p.dead_at IS NULL AND p.expires_at > moment) THEN
        RETURN;
    END IF;
    WITH taken AS (
        UPDATE runs r SET owner = me, epoch = r.epoch + 1, available_at = NULL, ready = NULL, signalled = r.pending > 0,
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
        EXIT WHEN cardinality(ids) >= most OR found_lanes.tenants = '{}';
        chosen := choose_runs_3(found_lanes.tenants, found_lanes.lanes, found_lanes.pipelines, found_lanes.keys,
                                found_lanes.pipeline_maxima, found_lanes.key_maxima, moment, passed_over,
                                most - cardinality(ids), named, weights, maxima, other_weight, other_max);
        EXIT WHEN chosen = '{}';
        WITH locked AS MATERIALIZED (
            -- A subquery with a limit can only be done run by run: a join that was planned while few waited reads them all.
            SELECT x.id, c.n FROM unnest(chosen) WITH ORDINALITY AS c(id, n) CROSS JOIN LATERAL (
                SELECT r.id FROM runs r WHERE r.id = c.id AND r.available_at <= moment LIMIT 1 FOR UPDATE SKIP LOCKED
            ) x
        ), taken AS (
            UPDATE runs r SET owner = me, epoch = r.epoch + 1, available_at = NULL, ready = NULL,
                              signalled = r.pending > 0, leased_at = moment
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
-- ---- Exact money ------------------------------------------------------------------------------------------------------

-- A call whose end nobody heard is booked at the most that it can have cost; sums tell how many those are, and how much of
-- the cost they are. What was booked before is certain.
ALTER TABLE ledger ADD COLUMN unknown boolean NOT NULL DEFAULT false;
ALTER TABLE runs
    ADD COLUMN unknown_calls integer NOT NULL DEFAULT 0,
    ADD COLUMN unknown_nanos bigint NOT NULL DEFAULT 0;
-- `former_owners` counts the owners that the attempt under way had before this one: each may have asked and not told.
ALTER TABLE stages
    ADD COLUMN unknown_calls integer NOT NULL DEFAULT 0,
    ADD COLUMN unknown_nanos bigint NOT NULL DEFAULT 0,
    ADD COLUMN former_owners integer NOT NULL DEFAULT 0;

-- ---- Waiting ----------------------------------------------------------------------------------------------------

-- What bounds the attempts at a stage. Null where a replica of schema 2 wrote the row, to which every attempt
-- counts.
ALTER TABLE stages
    ADD COLUMN judged integer,
    ADD COLUMN outages integer,
    ADD COLUMN outage_since timestamptz;
