-- Claims leave runs in states of newer releases to those: here the statements of the claim say so. Same-numbered as the one
-- in migrations/postgres.

INSERT INTO schema_compat VALUES (5, 2);
