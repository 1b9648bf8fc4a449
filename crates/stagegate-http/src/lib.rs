//! Routes, layers, problem details, OpenAPI, SSE.
