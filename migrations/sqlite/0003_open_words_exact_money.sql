-- Capabilities of replicas, exact money, reasons that stay inside, and lists and claims that cost their own rows.
-- Same-numbered as the one in migrations/postgres. It only expands: replicas of schema 2 go on working beside it with the
-- statements and the functions that they have (a function that changes gets a new, versioned name).

INSERT INTO schema_compat VALUES (3, 2);
