-- Runs that crash their owners. Same-numbered as the one in migrations/sqlite. It only expands: replicas of schema 2 and 3 go
-- on working beside it with the statements and the functions that they have. What they free is not counted.

-- In the order in which heartbeats and claims lock them, so that they and this wait for each other and nobody for ever.
LOCK TABLE replicas, runs IN ACCESS EXCLUSIVE MODE;

INSERT INTO schema_compat VALUES (4, 2);

-- How many owners in a row died or panicked, and the run's last event at the last time. Counted where a dead owner's runs are
-- freed, which writes the row anyway: no other step, and no run that is not disturbed, writes anything for it. An owner's
-- first step may be nothing but `run.resumed`; more events than that are progress, with which the count begins anew.
ALTER TABLE runs
    ADD COLUMN crashes integer,
    ADD COLUMN crashed_seq bigint;

-- A claim as before (claim_runs_3 in migration 0003, whose functions it calls), which also counts the crash of what it frees:
-- declares replicas dead that are out of time, frees some of what the dead own, notes what has become due, and takes runs for `me`: those that are to be cancelled, whatever their limits, since they end at once; then others from at
-- most `lanes_most` lanes.
--
-- Claims that take something wait for each other at an advisory lock, the same as claims of schema 2, which ends with the
-- transaction that this call is; what is counted is counted after it was got, so that no limit is ever exceeded. A caller
-- that freezes in the middle blocks nobody: the server goes on without it. A run that somebody else is just changing is
-- passed over. Lanes are found before the lock is asked for.
--
-- `last_tenant` (and where `of_all`, `last_lane`) is where the next look begins, null where nothing is left; `cut_*` is
-- where it goes on with a tenant that has many lanes; `wake_last` where the next look at what becomes due begins.
CREATE FUNCTION claim_runs_4(me uuid, most integer, named text[], weights integer[], maxima integer[],
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
    UPDATE runs SET
        owner = NULL, available_at = moment, ready = true,
        crashes = CASE WHEN last_seq <= crashed_seq + 1 THEN crashes + 1 ELSE 1 END, crashed_seq = last_seq
    WHERE id IN (
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
