-- Claims leave runs in states of newer releases to those. Same-numbered as the one in migrations/sqlite.

INSERT INTO schema_compat VALUES (5, 2);

-- The first runs of a lane that can be taken, best first. A replica that calls this knows three states in which a run is to
-- be gone on with. It could not go on with a run in any other: it would take it, keep it until its next audit, and take
-- it again. This holds for replicas of schema 3 as well, so that the function keeps its name: they know the same three. A
-- release with a new state brings a function of its own.
CREATE OR REPLACE FUNCTION due_runs_3(of_tenant text, of_lane text, due timestamptz, passed_over uuid[], most integer)
RETURNS TABLE (id uuid, pipeline text, priority smallint, available_at timestamptz)
LANGUAGE plpgsql STABLE ROWS 10 AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT r.id, r.pipeline, r.priority, r.available_at FROM runs r
        -- What a replica of schema 2 parked may not be due.
        WHERE r.tenant = of_tenant AND r.lane = of_lane AND r.ready AND r.available_at <= due
          AND r.id <> ALL (passed_over) AND r.state IN ('queued', 'running', 'waiting')
        ORDER BY r.tenant, r.lane, r.priority DESC, r.available_at, r.id LIMIT most;
END $$;
