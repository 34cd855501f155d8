"""GetModelInfo and GetServerInfo: what the engine said of itself (`wire.Ready.info`) and what the front end knows."""

from __future__ import annotations

import importlib.metadata
import os
import time
from typing import Any

from google.protobuf import json_format, struct_pb2

from jqserve.engine.request import EngineStats
from jqserve.server.frontend import Frontend
from jqserve.server.pb import jqserve_pb2 as pb
from jqserve.server.requests import sampling_message

PACKAGES = ("jqserve", "jax", "jaxlib", "flax", "transformers", "tokenizers", "grpcio", "protobuf")
MODEL_FIELDS = ("model_path", "architecture", "model_type", "vocab_size", "context_length", "dtype", "quantization")


def model_info(frontend: Frontend) -> pb.GetModelInfoResponse:
    """Raises `EngineUnavailableError` until the engine is ready."""
    if not frontend.info:
        frontend.need_ready()
    info = frontend.info
    modules = [_message(pb.ModuleQuantization(), _row(row)) for row in info.get("plan") or ()]
    return _message(
        pb.GetModelInfoResponse(
            served_model_name=frontend.config.name,
            eos_token_ids=info.get("eos_token_ids") or (),
            modules=modules,
            kv_cache=_message(pb.KvCache(), info.get("kv") or {}),
            weight_bytes=info.get("weight_bytes") or sum(module.bytes for module in modules),
            has_chat_template=frontend.tokenizer is not None and frontend.tokenizer.chat is not None,
        ),
        {name: info.get(name) for name in MODEL_FIELDS},
    )


def server_info(frontend: Frontend) -> pb.GetServerInfoResponse:
    """In every state."""
    link = frontend.link
    rest = {k: v for k, v in frontend.info.items() if k not in {"plan", "sampling_defaults", *MODEL_FIELDS}}
    return pb.GetServerInfoResponse(
        version=versions().get("jqserve", ""),
        state=pb.ServerState.Name(frontend.state),
        status_text=frontend.status_text,
        arguments=_struct(frontend.config.arguments),
        sampling_defaults=sampling_message(frontend.defaults),
        load=load_message(link.stats if link else EngineStats()),
        uptime_seconds=time.monotonic() - frontend.began,
        frontend_pid=os.getpid(),
        engine_pid=frontend.engine_pid if link and link.up else 0,
        versions=versions(),
        engine=_struct(rest),
    )


def _row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the load plan by the proto's names."""
    n, k = row.get("shape") or (None, None)
    return {**row, "group_size": row.get("group"), "n": n, "k": k}


def load_message(stats: EngineStats) -> pb.Load:
    return _message(pb.Load(), {name: getattr(stats, name) for name in EngineStats.__dataclass_fields__})


def versions() -> dict[str, str]:
    """Of the installed packages, read without importing them."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _message[M: Any](message: M, values: dict[str, Any]) -> M:
    """Sets the fields that the message has; the engine's JSON may say more than the contract."""
    for field in message.DESCRIPTOR.fields:
        value = values.get(field.name)
        if value is None:
            continue
        if field.cpp_type == field.CPPTYPE_STRING:
            setattr(message, field.name, str(value))
        elif field.cpp_type in (field.CPPTYPE_DOUBLE, field.CPPTYPE_FLOAT):
            setattr(message, field.name, float(value))
        else:
            setattr(message, field.name, int(value))
    return message


def _struct(values: dict[str, Any]) -> struct_pb2.Struct:
    return json_format.ParseDict(values, struct_pb2.Struct())
