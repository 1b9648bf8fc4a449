// Follows a run with node's eventsource: stream.mjs URL APPROVE_URL. The run is held at first, so that comments come between
// events. When the stream ends the client reconnects with the last id, gets 204, and stops.
import { EventSource } from "eventsource";

const [url, approve] = process.argv.slice(2);
const kinds = [
  "run.accepted", "run.started", "run.resumed", "run.waiting", "run.retried", "run.finished",
  "stage.started", "stage.retrying", "stage.held", "stage.succeeded", "stage.failed",
];
const seen = [];
const source = new EventSource(url);
const fail = (what) => {
  console.error(`${what}; seen: ${JSON.stringify(seen)}`);
  process.exit(1);
};
source.onmessage = (event) => fail(`an event without a name: ${JSON.stringify(event.data)}`);
for (const kind of kinds) {
  source.addEventListener(kind, (event) => {
    const data = JSON.parse(event.data);
    if (data.type !== kind || String(data.seq) !== event.lastEventId) fail(`${kind}: ${event.data}`);
    seen.push(data.seq);
  });
}
source.onerror = () => {
  if (source.readyState !== EventSource.CLOSED) return; // It reconnects.
  if (seen.some((seq, at) => seq !== at + 1) || seen.length < 4) fail("not every event once, in order");
  console.log(`eventsource: ${seen.length} events`);
  clearTimeout(late);
};
const late = setTimeout(() => fail("it does not end"), 30_000);
// The daemon of this test sends a comment each 100 ms: some come now.
setTimeout(() => fetch(approve, { method: "POST" }), 1_000);
