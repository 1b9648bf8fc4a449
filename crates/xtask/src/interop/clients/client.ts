// Drives a daemon with the types that openapi-typescript made of its document. `tsc --strict` checks this file, node runs it:
// client.ts URL.
import createClient from "openapi-fetch";
import type { components, paths } from "./api.ts";

const url = process.argv[2] ?? "";
const client = createClient<paths>({ baseUrl: url });

function must<T>(answer: { data?: T; error?: unknown; response: Response }): T {
  if (answer.data === undefined) throw new Error(`${answer.response.status}: ${JSON.stringify(answer.error)}`);
  return answer.data;
}

const definition: components["schemas"]["Definition"] = {
  name: "typescript",
  defaults: { model: "sim/quick" },
  stages: [{ id: "one", prompt: "Say {{ input.text }}" }],
};
const version = must(await client.POST("/v1/pipelines", { body: definition }));
// Whatever JSON an input is made of is taken.
const input = { text: "t", nested: { list: [1, "two", null, { deep: true }] }, when: null };
const run = must(await client.POST("/v1/runs", { body: { pipeline: version.name, input, labels: { by: "ts" } } }));
const events: components["schemas"]["Event"][] = [];
let cursor: string | null | undefined;
const until = Date.now() + 30_000;
do {
  if (Date.now() > until) throw new Error(`it does not end: ${JSON.stringify(events)}`);
  const query = cursor ? { cursor } : {};
  const page = must(await client.GET("/v1/runs/{id}/events", { params: { path: { id: run.id }, query } }));
  // The same route answers with a stream to those who ask for one.
  if (typeof page !== "object") throw new Error(`a page of events is ${page}`);
  events.push(...page.items);
  cursor = page.next_cursor;
} while (cursor);
const last = events.at(-1);
if (last?.type !== "run.finished" || !("state" in last) || last.state !== "succeeded") {
  throw new Error(`the last event is ${JSON.stringify(last)}`);
}
const detail = must(await client.GET("/v1/runs/{id}", { params: { path: { id: run.id } } }));
if (JSON.stringify(detail.input) !== JSON.stringify(input)) throw new Error(`the input is ${JSON.stringify(detail.input)}`);
const page = must(await client.GET("/v1/runs", { params: { query: { limit: 1, state: ["succeeded"] } } }));
if (page.items.length !== 1) throw new Error("the list is empty");
const missing = await client.GET("/v1/runs/{id}", { params: { path: { id: "018f0000-0000-7000-8000-000000000000" } } });
if (missing.error?.code !== "SG0203") throw new Error(`a missing run is ${JSON.stringify(missing.error)}`);
console.log(`${events.length} events, ${detail.state}`);
