"""Follows a run with httpx-sse and with sseclient-py: stream.py URL RUN APPROVE_URL.

The run is held at first, so that comments come between events; APPROVE_URL lets it go on. Exits 1 where a client makes an
event of anything but an event.
"""

import json
import sys
import threading
import time

import httpx
from httpx_sse import connect_sse
from sseclient import SSEClient

URL, APPROVE = sys.argv[1], sys.argv[2]


def with_httpx_sse():
    with httpx.Client(timeout=20, trust_env=False) as client:
        with connect_sse(client, "GET", URL) as source:
            return [(event.id, event.event, event.data, event.retry) for event in source.iter_sse()]


def with_sseclient():
    with httpx.Client(timeout=20, trust_env=False) as client:
        with client.stream("GET", URL, headers={"accept": "text/event-stream"}) as answer:
            return [(event.id, event.event, event.data, None) for event in SSEClient(answer.iter_bytes()).events()]


def follow(name, client, seen):
    try:
        seen[name] = client()
    except Exception as error:
        seen[name] = error


seen = {}
clients = {"httpx-sse": with_httpx_sse, "sseclient-py": with_sseclient}
threads = [threading.Thread(target=follow, args=(name, client, seen)) for name, client in clients.items()]
for thread in threads:
    thread.start()
# The daemon of this test sends a comment each 100 ms: some come now.
time.sleep(1)
httpx.post(APPROVE, trust_env=False).raise_for_status()
for thread in threads:
    thread.join(30)
for name in clients:
    events = seen.get(name, "nothing: it still follows")
    assert isinstance(events, list), f"{name}: {events!r}"
    assert all(data for _, _, data, _ in events), f"{name} made events of nothing: {events}"
    assert [int(id) for id, *_ in events] == list(range(1, len(events) + 1)), f"{name}: {events}"
    for id, kind, data, _ in events:
        event = json.loads(data)
        assert (event["type"], event["seq"]) == (kind, int(id)), f"{name}: {event}"
    assert events[-1][1] == "run.finished", f"{name}: {events[-1]}"
    print(f"{name}: {len(events)} events")
