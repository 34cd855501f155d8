"""Requests that nobody should send: broken protobuf, absurd parameters, huge fields, grammars that blow up, readers
that do not read, calls that are gone at once. Each says which statuses may answer it; INTERNAL and UNKNOWN never may.

`python -m bench.fuzz_service` runs thousands of them against a server; tests/server/test_hostile.py a sample.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from typing import Any

from jqserve.server.pb import jqserve_pb2 as pb
from jqserve.server.pb import vllm_engine_pb2 as vll

NATIVE, COMPAT = "jqserve.v1.Inference", "vllm.grpc.engine.VllmEngine"
STREAMS = {f"/{NATIVE}/Generate", f"/{COMPAT}/Generate", f"/{COMPAT}/GetTokenizer"}
METHODS = [f"/{NATIVE}/{m}" for m in ("Generate", "Abort", "Tokenize", "Detokenize", "GetModelInfo", "Score")]
METHODS += [f"/{COMPAT}/{m}" for m in ("Generate", "Abort", "GetLoads", "HealthCheck", "GetTokenizer")]

BAD = {"INVALID_ARGUMENT"}
#: what a request that may by chance be a good one may get
ANY = BAD | {"OK", "NOT_FOUND", "UNIMPLEMENTED", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "CANCELLED"}
LIMITED = {"RESOURCE_EXHAUSTED", *BAD}


@dataclasses.dataclass(frozen=True)
class Attack:
    """One call. `allowed`: status names; `read`: messages to read before it is cancelled (None: all)."""

    kind: str
    method: str
    data: bytes
    allowed: frozenset[str]
    timeout: float = 20.0
    read: int | None = None
    pause: float = 0.0  # seconds before the first read


def generate(**fields: Any) -> bytes:
    sampling = pb.SamplingParams(**({"max_new_tokens": 4} | fields.pop("sampling", {})))
    fields = {"token_ids": pb.TokenIds(ids=[5, 6, 7])} | fields
    if fields.keys() & {"text", "chat"}:
        del fields["token_ids"]
    return pb.GenerateRequest(sampling=sampling, **fields).SerializeToString()


def compat(**sampling: Any) -> bytes:
    return vll.GenerateRequest(
        tokenized=vll.TokenizedInput(input_ids=[5, 6, 7]),
        sampling_params=vll.SamplingParams(**({"max_tokens": 4} | sampling)),
        stream=True,
    ).SerializeToString()


NAN, INF = float("nan"), float("inf")
SAMPLING: list[dict[str, Any]] = [
    *({"temperature": x} for x in (NAN, INF, -INF, -1.0, 1e9)),
    *({"top_p": x} for x in (NAN, 0.0, -0.5, 1.5, INF)),
    *({"top_k": x} for x in (-2, -(2**31))),
    *({"min_p": x} for x in (NAN, -0.1, 1.1)),
    *({"repetition_penalty": x} for x in (NAN, 0.0, -1.0, 11.0)),
    *({"presence_penalty": x} for x in (NAN, 3.0, -3.0)),
    *({"frequency_penalty": x} for x in (INF, 100.0)),
    *({"n": x} for x in (0, 129, 2**32 - 1)),
    *({"logprobs": x} for x in (21, 2**32 - 1)),
    *({"max_new_tokens": x} for x in (0,)),
    {"min_new_tokens": 9},
    {"stop": [""]},
    {"stop": ["x"] * 1000},
    {"stop_token_ids": [2**32 - 1]},
    {"stop_token_ids": list(range(5, 105))},
    {"logit_bias": dict.fromkeys(range(5, 1005), 1.0)},
    {"logit_bias": {2**31: 1.0}},
    {"logit_bias": {5: NAN}},
    {"logit_bias": {5: 1e30}},
]
COMPAT_SAMPLING: list[dict[str, Any]] = [
    {"temperature": NAN}, {"top_p": -1.0}, {"n": 2**31}, {"logprobs": -1}, {"logprobs": 1000}, {"seed": -1, "n": 999},
    {"stop": [""]}, {"logit_bias": {-5: 1.0}}, {"truncate_prompt_tokens": 1}, {"structural_tag": "{}"},
    {"min_tokens": 99}, {"repetition_penalty": -1.0},
]  # fmt: skip
DEEP = "[" * 50_000
CHATS: list[dict[str, Any]] = [
    {"messages_json": DEEP},
    {"messages_json": "{}"},
    {"messages_json": "[]"},
    {"messages_json": "[1]"},
    {"messages_json": '[{"role": "user", "content": [{"type": "image_url"}]}]'},
    {"messages_json": '[{"role": 5, "content": "x"}]'},
    {"messages": [pb.ChatMessage(role="", content="x")]},
    {"messages": [pb.ChatMessage(role="user", content="x")], "template_kwargs_json": '{"messages": []}'},
    {"messages": [pb.ChatMessage(role="user", content="x")], "template_kwargs_json": "[]"},
    {"messages": [pb.ChatMessage(role="user", content="x")], "tools_json": "{"},
    {},
]
GRAMMARS: list[dict[str, Any]] = [
    {"regex": "(a{1000}){1000}"}, {"regex": "(a|aa)+" * 200}, {"regex": "((a|b)*c){500}"}, {"regex": "(.*a){80}b"},
    {"regex": "("}, {"regex": "\\p{nope}"}, {"regex": "a" * 300_000}, {"regex": ""},
    {"ebnf": "start: start start | "}, {"ebnf": "start: nobody"}, {"ebnf": "%"},
    {"ebnf": "start: " + " ".join(f'"x{i}"' for i in range(3000))},
    {"json_schema": DEEP}, {"json_schema": '{"$ref": "#"}'}, {"json_schema": '{"type": "nope"}'},
    {"json_schema": json.dumps({"anyOf": [{"const": i} for i in range(3000)]})},
    {"json_schema": '{"type": "string", "minLength": 1000000000}'},
    {"json_schema": '{"type": "array", "items": {}, "minItems": 100000000}'},
    {"json_schema": '{"$ref": "file:///etc/passwd"}'},
    {"ebnf": "start: A\nA: " + " & ".join(f"/.*a{i}.*/" for i in range(40))},  # 2^40 of something
    {"ebnf": "start: a0\n" + "\n".join(f"a{i}: a{i + 1}" for i in range(9000)) + '\na9000: "x"'},  # deeper than a stack
    {"choice": pb.Choice()}, {"choice": pb.Choice(options=[""])}, {"choice": pb.Choice(options=["x"] * 5000)},
]  # fmt: skip


def broken_bytes(rng: random.Random) -> Attack:
    return Attack("garbage", rng.choice(METHODS), rng.randbytes(rng.randint(1, 200)), frozenset(ANY))


def flipped(rng: random.Random) -> Attack:
    compatible = rng.random() < 0.5
    data = bytearray(compat(seed=1, stop=["zz"]) if compatible else generate(sampling={"seed": 1, "stop": ["zz"]}))
    for _ in range(rng.randint(1, 6)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    if rng.random() < 0.3:
        data = data[: rng.randrange(len(data))]
    service = COMPAT if compatible else NATIVE
    return Attack("flipped", f"/{service}/Generate", bytes(data), frozenset(ANY), read=50)


def bad_utf8(rng: random.Random) -> Attack:
    native = rng.random() < 0.5
    field = rng.choice((1, 2, 3) if native else (1, 3))  # string fields of either GenerateRequest
    text = rng.choice((b"\xff", b"\xc3", b"\xed\xa0\x80", b"ok\xf8\x88\x80\x80\x80"))
    data = bytes([field << 3 | 2, len(text)]) + text
    return Attack("utf8", f"/{NATIVE if native else COMPAT}/Generate", data, frozenset(BAD))


def absurd(rng: random.Random) -> Attack:
    if rng.random() < 0.3:
        data = compat(**rng.choice(COMPAT_SAMPLING))
        return Attack("absurd", f"/{COMPAT}/Generate", data, frozenset(BAD))
    return Attack("absurd", f"/{NATIVE}/Generate", generate(sampling=rng.choice(SAMPLING)), frozenset(BAD))


def bad_prompt(rng: random.Random) -> Attack:
    fields: dict[str, Any] = rng.choice(
        [
            {"token_ids": pb.TokenIds()},
            {"token_ids": pb.TokenIds(ids=[5] * 100_000)},
            {"token_ids": pb.TokenIds(ids=[2**32 - 1])},
            {"request_id": "x" * 100_000},
            {"flush_tokens": 0},
            {"output": 99},
            *({"chat": pb.Chat(**chat)} for chat in CHATS),
        ]
    )
    return Attack("prompt", f"/{NATIVE}/Generate", generate(**fields), frozenset(BAD))


def unknown_field(rng: random.Random) -> Attack:
    number = rng.randint(100, 10_000)
    key, varint = number << 3, bytearray()
    while key > 127:
        varint.append(key & 127 | 128)
        key >>= 7
    data = bytes([*varint, key, 1])
    native = rng.random() < 0.5
    return Attack(
        "unknown field", f"/{NATIVE if native else COMPAT}/Generate", (generate() if native else compat()) + data,
        frozenset(BAD),
    )  # fmt: skip


def huge(rng: random.Random) -> Attack:
    """Small parts by the million, or one part that has no end."""
    size = rng.choice((300_000, 2_000_000, 20_000_000))
    method, data = rng.choice(
        [
            ("Generate", lambda: generate(text="x " * (size // 2))),
            ("Generate", lambda: generate(chat=pb.Chat(messages_json='[{"role": "user", "content": "' + "y" * size))),
            ("Generate", lambda: generate(token_ids=pb.TokenIds(ids=[5] * (size // 2)))),
            ("Generate", lambda: generate(sampling={"stop": ["z" * size]}, text="x " * (size // 2))),
            ("Generate", lambda: generate(sampling={"stop": ["z"] * (size // 3)})),
            ("Generate", lambda: generate(sampling={"logit_bias": dict.fromkeys(range(size // 10), 1.0)})),
            ("Generate", lambda: generate(model="m" * size)),
            ("Generate", lambda: generate(json_schema="[" * size)),
            ("Generate", lambda: generate() + b"\x9a\x3f\x00" * (size // 3)),  # empty fields that nobody declared
            ("Detokenize", lambda: pb.DetokenizeRequest(token_ids=[5] * size).SerializeToString()),
            ("Score", lambda: pb.ScoreRequest(inputs=[pb.ScoreInput()] * (size // 2)).SerializeToString()),
        ]
    )
    return Attack("huge", f"/{NATIVE}/{method}", data(), frozenset(LIMITED | {"NOT_FOUND"}))


def grammar(rng: random.Random) -> Attack:
    data = generate(**rng.choice(GRAMMARS))
    return Attack("grammar", f"/{NATIVE}/Generate", data, frozenset({"OK", "UNIMPLEMENTED", *LIMITED}), timeout=60)


def slow_reader(rng: random.Random) -> Attack:
    data = generate(sampling={"max_new_tokens": 100, "ignore_eos": True}, flush_tokens=1)
    return Attack("slow", f"/{NATIVE}/Generate", data, frozenset(ANY), read=rng.randint(1, 3), pause=rng.random())


def gone(rng: random.Random) -> Attack:
    """Cancelled, or out of time, at any moment."""
    data = generate(sampling={"max_new_tokens": 100, "n": rng.randint(1, 4), "ignore_eos": True})
    timeout = rng.choice((0.001, 0.01, 0.1))
    return Attack("gone", f"/{NATIVE}/Generate", data, frozenset(ANY), timeout=timeout, read=rng.randint(0, 5))


def no_method(rng: random.Random) -> Attack:
    method = rng.choice([f"/{NATIVE}/Nope", "/nobody.Here/Generate", f"/{COMPAT}/Embed", f"/{COMPAT}/" + "x" * 2000])
    return Attack("no method", method, generate(), frozenset({"UNIMPLEMENTED"}))


def bad_score(rng: random.Random) -> Attack:
    request = rng.choice(
        [
            pb.ScoreRequest(),
            pb.ScoreRequest(inputs=[pb.ScoreInput()] * 100),
            pb.ScoreRequest(inputs=[pb.ScoreInput(token_ids=pb.TokenIds(ids=[5]))]),
            pb.ScoreRequest(inputs=[pb.ScoreInput(token_ids=pb.TokenIds(ids=[5, 6]), context=7)]),
            pb.ScoreRequest(inputs=[pb.ScoreInput(token_ids=pb.TokenIds(ids=[5, 6]))], top_logprobs=2**31),
        ]
    )
    return Attack("score", f"/{NATIVE}/Score", request.SerializeToString(), frozenset(BAD))


KINDS: list[tuple[int, Callable[[random.Random], Attack]]] = [
    (3, broken_bytes), (4, flipped), (2, bad_utf8), (6, absurd), (4, bad_prompt), (1, unknown_field), (1, huge),
    (2, grammar), (2, slow_reader), (3, gone), (1, no_method), (1, bad_score),
]  # fmt: skip


def attacks(count: int, seed: int = 0) -> list[Attack]:
    """The same for the same seed."""
    rng = random.Random(seed)
    weights, makers = zip(*KINDS)
    return [rng.choices(makers, weights)[0](rng) for _ in range(count)]
