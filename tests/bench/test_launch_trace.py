"""Host events -> rows by program (bench/launch_trace)."""

from __future__ import annotations

from bench.launch_trace import rows_of


def call(name: str, begin: float, update: float) -> list[tuple[float, float, str]]:
    """As XLA traces a call: the call twice, one within the other, and its parts within both."""
    whole = f"PjitFunction(jit({name}))"
    events = [(begin, 100 + update, whole), (begin + 1, 99 + update, whole), (begin + 10, 30.0, "Thunks::Prepare")]
    if update:
        events.append((begin + 50, update, "command_buffer::update"))
    return [*events, (begin + 60 + update, 20.0, "cuGraphLaunch (CudaGraph:7)"), (begin - 5, 3.0, "Thunks::Prepare")]


def test_parts_are_those_of_their_call_and_medians_count_what_is_absent() -> None:
    events = [*call("step", 0, 0), *call("draw", 1000, 7), *call("step", 2000, 500), *call("step", 4000, 0)]
    rows = {row["program"]: row for row in rows_of(reversed(events))}
    assert rows["step"] == {
        "program": "step", "calls": 3, "dispatch_us": 100, "prepare_us": 30, "update_us": 0, "graph_us": 20
    }  # fmt: skip
    assert rows["draw"]["update_us"] == 7 and rows["draw"]["dispatch_us"] == 107
