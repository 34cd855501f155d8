"""A torch call's time in a CUDA graph, for the peers: launches are in it, the host is not."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch


def graph_microseconds(call: Callable[[], Any], calls: int) -> float:
    """Of one of `calls` calls that are captured together; the median of nine times two replays."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    graph.replay()
    times = []
    for _ in range(9):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times) * 1e3 / (2 * calls)
