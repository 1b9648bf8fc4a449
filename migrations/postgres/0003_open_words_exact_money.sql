-- Capabilities of replicas, exact money, reasons that stay inside, and lists and claims that cost their own rows.
-- Same-numbered as the one in migrations/sqlite. It only expands: replicas of schema 2 go on working beside it with the
-- statements and the functions that they have (a function that changes gets a new, versioned name).

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
