"""Decode steps of the engine, in process, in the shape of Llama-3.1-8B with random weights.

    python -m bench.decode [--schemes bf16,fp8,w4a16] [--points 1x1024,64x1024,256x1024] [--decode-steps 1,2]
                           [--budget SECONDS] [--quick] [--command-buffers off] [--out DIR]

One row per scheme, point (running sequences x context) and K, the decode steps of a dispatch:

    step_ms     wall clock of a step of the overlapped loop, the median of five windows; tokens_per_second from it
    host_ms     of one step, by phase of the loop: schedule, launch, emit; wait is what is left for the device; dispatch
                is beside them, on a thread of its own: programs handed over (compare --command-buffers off)
    kernel_ms   sum of the CUPTI durations of a step's kernels (`kernels`: how many), and step_ms / kernel_ms
    bound_ms    weights (without the embedding) and KV bytes of a step / the bandwidth measured first; share of step_ms
    vllm        vLLM 0.25.1's tokens/s with a bf16 cache: of the same call where --vllm names bench.peer_vllm's result
                (`vllm_beside` is true then), else of another day's H200 (KERNELS.md part B), where there is a figure

Prompts are not computed: their pages are declared to be in the prefix cache, whatever they hold, and only the last few
tokens of each go through one prefill program, whose step time is reported too (`prefill_step_ms`).
`--quick` shrinks the model until a CPU gets through in seconds: it checks the script, its figures mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jqserve.engine.engine import EngineCore

VLLM = {
    ("bf16", 1, 1024): 205, ("fp8", 1, 1024): 286, ("w4a16", 1, 1024): 271,
    ("bf16", 64, 1024): 8332, ("fp8", 64, 1024): 10439, ("w4a16", 64, 1024): 8676,
    ("bf16", 256, 1024): 13860, ("fp8", 256, 1024): 16252, ("w4a16", 256, 1024): 13906,
}  # fmt: skip
AIM = {
    ("bf16", 1, 1024): 215, ("fp8", 1, 1024): 340, ("w4a16", 1, 1024): 420,
    ("bf16", 64, 1024): 8800, ("fp8", 64, 1024): 12000, ("w4a16", 64, 1024): 11400,
    ("bf16", 256, 1024): 15000, ("fp8", 256, 1024): 18500, ("w4a16", 256, 1024): 16500,
}  # fmt: skip
WINDOWS = 5
TILES = 16  # of the one prefill program

Point = tuple[int, int]  # running sequences, context


def load(scheme: str, points: list[Point], decode_steps: list[int], room: int, args: argparse.Namespace) -> Any:
    """An engine with one prefill program and, for each batch and K, one decode program; its start by phase."""
    from bench.llama8b import QUICK, make_checkpoint
    from jqserve.engine.buckets import Bucket, Buckets
    from jqserve.engine.config import EngineConfig
    from jqserve.engine.load import load_engine

    most = max(batch for batch, _ in points)
    page = args.page_size or (16 if args.quick else 64)
    pages = max(batch * -(-(context + room) // page) for batch, context in points) + most
    with tempfile.TemporaryDirectory() as folder:
        path = make_checkpoint(Path(folder), scheme, **(QUICK if args.quick else {}))
        config = EngineConfig(
            model_path=str(path),
            load_format="dummy",
            max_running_requests=most,
            context_length=args.context_length or max(context for _, context in points) + room,
            chunked_prefill_size=TILES * (32 if args.quick else 128),
            page_size=page,
            num_pages=pages,
            kv_dtype=args.kv_dtype,
            num_continuous_decode_steps=max(decode_steps),
            schedule_conservativeness=0.0,
            disable_warmup=True,
        )
        engine = load_engine(config)
    runner = engine.runner
    rows = tuple(sorted({batch for batch, _ in points}))
    runner.buckets = Buckets(rows, (Bucket(most, engine.scheduler.tiles),), max(decode_steps))
    shapes = [*runner.buckets.mixed, *(Bucket(n, 0, k) for n in rows for k in decode_steps)]
    began = time.perf_counter()
    runner.warm_up(
        programs=[p for bucket in shapes for p in runner.programs.cheapest(bucket)], runs=1 if args.quick else 3
    )
    prefill = runner.idle_run(runner.programs.full_step(engine.scheduler.tiles), 2)
    facts = {
        "load_seconds": engine.model_info()["load_seconds"],
        "compile_seconds": round(time.perf_counter() - began, 2),
        "programs": len(shapes),
        "prefill_step_ms": round(prefill * 1e3, 3),
    }
    return engine, facts


def pretend_cached(engine: EngineCore, prompt: tuple[int, ...]) -> None:
    """Names pages as if they held this prompt, and lets them go: admission will find them."""
    from jqserve.engine.prefix import extend

    pool, size = engine.scheduler.pool, engine.scheduler.page_size
    count = (len(prompt) - 1) // size
    names: list[bytes] = []
    extend(names, prompt, size, count)
    pages = pool.allocate(count)
    for page, name in zip(pages, names):
        pool.name(page, name)
    pool.release(pages)


def begin(engine: EngineCore, batch: int, context: int, room: int) -> None:
    """`batch` sequences of `context` tokens that decode; nothing else runs."""
    from jqserve.engine.request import EngineRequest, SamplingParams

    engine.scheduler.pool.forget()
    vocabulary = engine.limits.vocab_size
    for i in range(batch):
        prompt = tuple((7 + 31 * i + 13 * j) % (vocabulary - 8) + 4 for j in range(context))
        pretend_cached(engine, prompt)
        sampling = SamplingParams(max_new_tokens=room, temperature=0.0, ignore_eos=True, seed=0)
        engine.add(EngineRequest(i, prompt, sampling))
    started: set[int] = set()
    while len(started) < batch:
        started |= {event.rid for event in step(engine)}


def end(engine: EngineCore, batch: int) -> None:
    """What `begin` began."""
    for rid in range(batch):
        engine.abort(rid)
    while engine.has_work():
        engine.step()


def points_of(text: str) -> list[Point]:
    """ "1x1024,64x1024", as the flag has it."""
    return [(int(batch), int(context)) for batch, context in (point.split("x") for point in text.split(","))]


def step(engine: EngineCore) -> list[Any]:
    events = engine.step()
    if failed := [event for event in events if event.error]:
        raise RuntimeError(failed[0].error)
    return events


def measure(engine: EngineCore, scheme: str, batch: int, context: int, k: int, room: int, args: Any) -> dict[str, Any]:
    engine.scheduler.steps = k
    begin(engine, batch, context, room)
    for _ in range(4):
        step(engine)
    began = time.perf_counter()
    step(engine)
    dispatches = int(min(max(2, 0.25 / (time.perf_counter() - began)), (room / k - 16) / WINDOWS))
    before, walls = dict(engine.host_seconds), []
    for _ in range(WINDOWS):
        began = time.perf_counter()
        for _ in range(dispatches):
            step(engine)
        walls.append((time.perf_counter() - began) / (dispatches * k))
    seconds = statistics.median(walls)
    host = {p: (engine.host_seconds[p] - before[p]) / (WINDOWS * dispatches * k) for p in before}
    row: dict[str, Any] = {
        "scheme": scheme,
        "batch": batch,
        "context": context,
        "decode_steps": k,
        "kv_dtype": engine.model_info()["kv"]["dtype"],
        "step_ms": round(seconds * 1e3, 4),
        "step_ms_windows": [round(w * 1e3, 4) for w in walls],
        "tokens_per_second": round(batch / seconds, 1),
        "host_ms": {p: round(host[p] * 1e3, 4) for p in ("schedule", "launch", "wait", "emit", "dispatch")},
    }
    row |= beside(scheme, batch, context, row["kv_dtype"], args.vllm)
    row |= kernels(engine, k, seconds, args.top)
    end(engine, batch)
    return row


def beside(scheme: str, batch: int, context: int, kv_dtype: str, vllm: str | None = None) -> dict[str, Any]:
    """The figures to compare with: there are none but for a bf16 cache, which reads twice the bytes of an fp8 one."""
    if kv_dtype != "bfloat16":
        return {"vllm": None, "aim": None}
    point = (scheme, batch, context)
    row: dict[str, Any] = {"vllm": VLLM.get(point), "aim": AIM.get(point)}
    if vllm is not None:
        from bench.peer_vllm import decode_rates

        if (measured := decode_rates(vllm).get(point)) is not None:
            row |= {"vllm": measured, "vllm_beside": True}
    return row


def kernels(engine: EngineCore, k: int, seconds: float, top: int) -> dict[str, Any]:
    """The same step's kernels alone, by CUPTI. Not overlapped, so that whole dispatches are counted."""
    from bench.kernel_times import by_kernel, kernel_times

    engine.overlap = False
    try:
        if (launched := engine._in_flight) is not None:  # the loop was overlapped until now
            engine._in_flight = None
            engine._emit(launched.plan, engine.runner.read(launched))
        step(engine)
        timings = kernel_times(lambda: [step(engine) for _ in range(3)])
    except Exception as error:
        return {"kernels_failed": repr(error)[:200]}
    finally:
        engine.overlap = True
    if not timings:
        return {}
    table = by_kernel(timings, 3 * k)
    total = sum(row["us"] for row in table) / 1e3
    return {
        "kernel_ms": round(total, 4),
        "kernels": round(len(timings) / (3 * k), 1),
        "step_to_kernels": round(seconds * 1e3 / total, 4),
        "costliest": table[:top],
    }


def run_scheme(scheme: str, points: list[Point], args: argparse.Namespace, bandwidth: float | None, left: Any) -> Any:
    decode_steps = [int(k) for k in args.decode_steps.split(",")]
    room = 160 if args.quick else 64 + 520 * max(1, max(decode_steps) // 2)
    engine, facts = load(scheme, points, decode_steps, room, args)
    weights = sum(x.nbytes for x in engine.runner.leaves) - engine.runner.leaves[0].nbytes
    cache = engine.runner.cache_shape
    for batch, context in points:
        for k in decode_steps:
            if left() < 5:
                yield {"scheme": scheme, "batch": batch, "context": context, "decode_steps": k, "skipped": "budget"}
                continue
            row = measure(engine, scheme, batch, context, k, room, args) | facts
            if bandwidth:
                kv = batch * context * cache.page_bytes / cache.page_size
                row["bound_ms"] = round((weights + kv) / bandwidth * 1e3, 4)
                row["share_of_bound"] = round(row["bound_ms"] / row["step_ms"], 4)
            row["weight_gib"] = round(weights / 2**30, 3)
            row["compilations_while_serving"] = engine.runner.compilations_after_warmup
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", default="bf16,fp8,w4a16", help="keys of bench.llama8b.SCHEMES")
    parser.add_argument("--points", default="1x1024,64x1024,256x1024", help="sequences x context, several")
    parser.add_argument("--decode-steps", default="1,2", help="K of a dispatch, several: each has its own programs")
    parser.add_argument("--kv-dtype", default="auto")
    parser.add_argument("--page-size", type=int)
    parser.add_argument("--context-length", type=int, help="of the page tables; default: what the points need")
    parser.add_argument("--command-buffers", choices=("on", "off"), default="on")
    parser.add_argument("--dump", help="folder for XLA's dump of the step programs (thunk sequences)")
    parser.add_argument("--top", type=int, default=12, help="kernels listed per row")
    parser.add_argument("--budget", type=float, default=600, help="seconds after which what is left is skipped")
    parser.add_argument("--vllm", help="peer_vllm.json that bench.peer_vllm wrote on this machine just now")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--name", default="decode", help="of the result file")
    parser.add_argument("--out", help="folder of the result file (default bench/results)")
    args = parser.parse_args()
    start = time.monotonic()
    flags = [os.environ.get("XLA_FLAGS", "")]
    if args.command_buffers == "off":
        flags.append("--xla_gpu_enable_command_buffer=")
    if args.dump:
        flags.append(f"--xla_dump_to={args.dump} --xla_dump_hlo_module_re=.*step_.*")
    os.environ["XLA_FLAGS"] = " ".join(flags).strip()
    os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.92")
    if args.quick:
        args.points = "1x40,4x40" if args.points == parser.get_default("points") else args.points
    points = points_of(args.points)

    from bench.bandwidth import read_bandwidth
    from bench.record import write

    bandwidth = read_bandwidth()
    rows: list[dict[str, Any]] = []
    for scheme in args.schemes.split(","):
        left = lambda: args.budget - (time.monotonic() - start)  # noqa: E731
        if left() < 20 and rows:
            rows.append({"scheme": scheme, "skipped": "budget"})
            continue
        try:
            for row in run_scheme(scheme, points, args, bandwidth, left):
                rows.append(row)
                print(json.dumps({k: v for k, v in row.items() if k != "costliest"}), flush=True)
        except Exception as error:  # the other schemes are measured all the same
            rows.append({"scheme": scheme, "failed": repr(error)[:500]})
            print(json.dumps(rows[-1]), flush=True)
        gc.collect()
    more = {"command_buffers": args.command_buffers, "read_tb_per_second": bandwidth and round(bandwidth / 1e12, 3)}
    print(write(args.name, rows, args.out, **more))
    if any("failed" in row for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
