-- Runs that crash their owners. Same-numbered as the one in migrations/postgres. It only expands.

INSERT INTO schema_compat VALUES (4, 2);

-- How many owners in a row died or panicked, and the run's last event at the last time. Counted where a dead owner's runs are
-- freed, which writes the row anyway. An owner's first step may be nothing but `run.resumed`; more events than that are
-- progress, with which the count begins anew.
ALTER TABLE runs ADD COLUMN crashes INTEGER;
ALTER TABLE runs ADD COLUMN crashed_seq INTEGER;
