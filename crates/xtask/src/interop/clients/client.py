"""Drives a daemon with the client that openapi-python-client made of its document.

client.py FOLDER URL: FOLDER holds the package `stagegate_client`. Exits 1 where something is not as it should be.
"""

import importlib
import pkgutil
import sys
import time

sys.path.insert(0, sys.argv[1])

import stagegate_client
from stagegate_client import Client
from stagegate_client.api.pipelines import list_pipelines, register_pipeline, validate_pipeline
from stagegate_client.api.plan import plan_run
from stagegate_client.api.probes import get_readyz
from stagegate_client.api.runs import get_events, get_run, list_runs, submit_run
from stagegate_client.api.stages import approve_stage, get_stage
from stagegate_client.models import (
    ApproveRequest, EventStageSucceeded, PlanRequest, PlanRequestInput, Problem, StagegatePipelineDefinition,
    SubmitRequest, SubmitRequestInput,
)

DEFINITION = {
    "name": "python",
    "input": {"type": "object", "required": ["text"]},
    "defaults": {"model": "sim/quick"},
    "stages": [{
        "id": "draft", "prompt": "Summarise {{ input.text }}",
        "gate": {"checks": [{"matches": "^Summary"}], "on_fail": "hold"},
    }],
}
INPUT = {"text": "t", "any": {"depth": [1, "two", None, {"x": 1.5}]}}

for module in pkgutil.walk_packages(stagegate_client.__path__, "stagegate_client."):
    importlib.import_module(module.name)

client = Client(base_url=sys.argv[2], raise_on_unexpected_status=True)
definition = StagegatePipelineDefinition.from_dict(DEFINITION)
assert validate_pipeline.sync(client=client, body=definition).valid
registered = register_pipeline.sync(client=client, body=definition)
assert (registered.name, registered.version) == ("python", 1), registered
assert "python" in [item.name for item in list_pipelines.sync(client=client).items]
plan = plan_run.sync(client=client, body=PlanRequest(input_=PlanRequestInput.from_dict(INPUT), pipeline="python"))
assert plan.stages[0].id == "draft", plan
submit = SubmitRequest(pipeline="python", input_=SubmitRequestInput.from_dict(INPUT))
run = submit_run.sync(client=client, body=submit)
assert run.links.self_.endswith(str(run.id)), run
refused = submit_run.sync(client=client, body=SubmitRequest(pipeline="python", input_=SubmitRequestInput()))
assert isinstance(refused, Problem) and refused.code == "SG0200", refused

events, cursor, until = [], None, time.monotonic() + 30
while not any(event.type_ in ("run.waiting", "run.finished") for event in events):
    assert time.monotonic() < until, events
    page = get_events.sync(run.id, client=client, **({"cursor": cursor} if cursor else {}))
    events += page.items
    cursor = page.next_cursor
body = ApproveRequest(comment="mended", output="Summary: it works.")
assert not isinstance(approve_stage.sync(run.id, "draft", client=client, body=body), Problem)
while cursor:
    assert time.monotonic() < until, events
    page = get_events.sync(run.id, client=client, cursor=cursor)
    events += page.items
    cursor = page.next_cursor
assert [event.seq for event in events] == list(range(1, len(events) + 1)), events
decided = [event for event in events if isinstance(event, EventStageSucceeded)]
assert decided[0].decision.comment == "mended" and decided[0].decision.edited, decided
stage = get_stage.sync(run.id, "draft", client=client)
assert stage.checkpoint.output == "Summary: it works." and stage.decisions[0].comment == "mended", stage
detail = get_run.sync(run.id, client=client)
assert detail.state == "succeeded" and detail.input_ == INPUT, detail
assert str(run.id) in [str(item.id) for item in list_runs.sync(client=client, state=["succeeded"]).items]
assert get_readyz.sync(client=client).ready
print(f"{len(events)} events, {detail.state}")
