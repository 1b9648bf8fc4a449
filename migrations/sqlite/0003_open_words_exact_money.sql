-- Capabilities of replicas, exact money, reasons that stay inside, and lists and claims that cost their own rows.
-- Same-numbered as the one in migrations/postgres. It only expands: replicas of schema 2 go on working beside it with the
-- statements and the functions that they have (a function that changes gets a new, versioned name).

INSERT INTO schema_compat VALUES (3, 2);

-- What waits for its time, by tenant: what one tenant asks of it costs that tenant's rows.
CREATE INDEX runs_parked ON runs (tenant, pipeline, wake_at) WHERE wake_at IS NOT NULL;

-- ---- Capabilities: nothing here. One process uses the file at a time, and what it can do is common. ---------------------

-- ---- Exact money ------------------------------------------------------------------------------------------------------

-- A call whose end nobody heard is booked at the most that it can have cost; sums tell how many those are, and how much of
-- the cost they are. What was booked before is certain.
ALTER TABLE ledger ADD COLUMN unknown INTEGER NOT NULL DEFAULT 0;
ALTER TABLE runs ADD COLUMN unknown_calls INTEGER NOT NULL DEFAULT 0;
ALTER TABLE runs ADD COLUMN unknown_nanos INTEGER NOT NULL DEFAULT 0;
-- `former_owners` counts the owners that the attempt under way had before this one: each may have asked and not told.
ALTER TABLE stages ADD COLUMN unknown_calls INTEGER NOT NULL DEFAULT 0;
ALTER TABLE stages ADD COLUMN unknown_nanos INTEGER NOT NULL DEFAULT 0;
ALTER TABLE stages ADD COLUMN former_owners INTEGER NOT NULL DEFAULT 0;

-- ---- Waiting ----------------------------------------------------------------------------------------------------

-- What bounds the attempts at a stage. Null where a replica of schema 2 wrote the row, to which every attempt
-- counts.
ALTER TABLE stages ADD COLUMN judged INTEGER;
ALTER TABLE stages ADD COLUMN outages INTEGER;
ALTER TABLE stages ADD COLUMN outage_since INTEGER;
