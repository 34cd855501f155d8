"""`jqserve-server`: serves a checkpoint over gRPC. The front end runs in this process, which never imports jax."""

from __future__ import annotations

import argparse
import asyncio
import functools
import gc
import importlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jqserve
from jqserve.cli.defaults_shown import DefaultsShown
from jqserve.cli.foreign_flags import Parser
from jqserve.cli.scheme_flags import add_scheme_flags, quantization_of
from jqserve.credentials import read_by_others, read_tokens, usable_token
from jqserve.errors import JqserveError, UnsupportedError

if TYPE_CHECKING:  # imported where serving begins: --help and `jqserve plan`, which takes the same flags, need none
    from jqserve.server.config import ServerConfig
    from jqserve.server.launch import Launch

DEMO_MODEL = Path(__file__).resolve().parent.parent / "demo" / "model"

#: flags that are the engine's: they go to it under `EngineConfig`'s names, when given
ENGINE_FLAGS = (
    "revision",
    "load_format",
    "dtype",
    "quantization",
    "calibration",
    "activations",
    "kv_dtype",
    "max_running_requests",
    "max_queued",
    "context_length",
    "mem_fraction_static",
    "chunked_prefill_size",
    "page_size",
    "num_pages",
    "random_seed",
    "num_continuous_decode_steps",
    "disable_overlap_schedule",
    "disable_mixed_chunk",
    "disable_radix_cache",
    "disable_warmup",
    "disable_cuda_graph",
    "compilation_cache_dir",
    "log_level",
    "profile_dir",
    "constraint_warmup",
)

#: flags that are the front end's alone, under `ServerConfig`'s names
SERVING_FLAGS = (
    "grpc_compat",
    "admin",
    "unix_socket",
    "tls_cert",
    "tls_key",
    "tls_client_ca",
    "max_message_bytes",
    "max_prompt_bytes",
    "max_concurrent_rpcs",
    "stream_interval",
    "max_request_seconds",
    "unread_seconds",
    "metrics_port",
    "metrics_host",
    "otlp_traces_endpoint",
)

#: the same, but their zero means something
GIVEN_FLAGS = ("max_queued", "random_seed", "schedule_conservativeness", "self_test", "mem_fraction_static")


def parser() -> argparse.ArgumentParser:
    """SGLang's names where SGLang has the flag."""
    parser = Parser(
        prog="jqserve-server",
        usage="%(prog)s [-h] [--model-path DIR|HUB_ID] [flags]",  # all of them would be 35 lines above every error
        description="Serve a Hugging Face checkpoint (AWQ, GPTQ, compressed-tensors, FP8 or unquantized) over gRPC.",
        formatter_class=DefaultsShown,
    )
    parser.add_argument("--version", action="version", version=f"jqserve {jqserve.__version__}")
    add_flags(parser)
    return parser


def add_flags(parser: argparse.ArgumentParser) -> None:
    """All of the server's, for the server and for what plans one."""
    model = parser.add_argument_group("model")
    add = functools.partial(model.add_argument, default=None)
    add("--model-path", metavar="DIR|HUB_ID", help="a checkpoint directory or Hub id; without it, the demo model")
    add("--revision", help="the Hub branch, tag or commit")
    add("--load-format", choices=("auto", "dummy"), help="dummy: random weights in the checkpoint's scheme")
    add("--tokenizer-path", metavar="DIR|HUB_ID", help="where the tokenizer is, if not with the model")
    add("--chat-template", metavar="FILE|TEMPLATE", help="a Jinja chat template instead of the checkpoint's")
    add("--served-model-name", metavar="NAME", help="the name that requests may give; else the path's last part")
    add_scheme_flags(model)
    add("--dtype", choices=("auto", "bfloat16", "float16", "float32"), help="of activations and unquantized weights")
    add("--activations", choices=("config", "none"), help="none: leave activations unquantized")
    add("--context-length", type=positive, metavar="TOKENS", help="of prompt and answer together")

    engine = parser.add_argument_group("engine")
    add = functools.partial(engine.add_argument, default=None)
    add("--max-running-requests", type=positive, metavar="N", help="sequences that run at once")
    add("--max-queued", type=count, metavar="N", help="sequences that may wait; more are refused")
    add("--mem-fraction-static", type=float, metavar="F", help="share of GPU memory for weights and KV pages")
    add(
        "--chunked-prefill-size",
        type=positive,
        metavar="TOKENS",
        help="most prompt tokens in one step; default: up to 2,048 (GPU), by the step times measured at the start",
    )
    add(
        "--num-continuous-decode-steps",
        type=positive,
        metavar="K",
        help="decode steps at once when nobody waits (on a GPU 2 for up to 8 running requests, else 1)",
    )
    add("--schedule-conservativeness", type=float, metavar="F", help="of the forecast of KV pages; 0: admit what fits")
    add(
        "--kv-cache-dtype",
        "--kv-dtype",
        dest="kv_dtype",
        metavar="DTYPE",
        help="auto (fp8 where the checkpoint has scales, else the model's), bf16, fp8_e4m3, fp8_e5m2",
    )
    add("--page-size", type=positive, metavar="TOKENS", help="of a KV page")
    add("--num-pages", type=positive, metavar="N", help="KV pages, instead of as many as memory holds")
    add("--random-seed", type=int, metavar="N", help="makes the seeds drawn for requests without one reproducible")
    add(
        "--compilation-cache-dir",
        metavar="DIR",
        help="keeps compiled programs between starts; only you may write there; off: none",
    )
    add("--disable-overlap-schedule", action="store_true", help="read each step before dispatching the next")
    add("--disable-mixed-chunk", action="store_true", help="never compute prompts and answers in one step")
    add("--disable-radix-cache", action="store_true", help="never reuse the KV pages of a prompt's beginning")
    add(
        "--constraint-warmup",
        action="store_true",
        help="compile the programs for constrained and scored requests before serving, too. Without it the first such "
        "request starts that in the background, waits for it, and the log says so. Not the default, for it makes half "
        "as much again to compile at a first start, also for those who never ask for it (demo on two cores: 14 and 9 s "
        "became 19 and 14, the first request 4 to 7 s then 0.1); kept programs make it 0.3 s either way",
    )
    add("--disable-warmup", action="store_true", help="compile each shape when it first comes")
    add("--disable-cuda-graph", action="store_true", help="no CUDA graphs (XLA's command buffers) around the steps")
    add(
        "--self-test",
        action=argparse.BooleanOptionalAction,
        help="compare each kernel with plain dequantization before serving (default: on a GPU)",
    )

    serving = parser.add_argument_group("serving")
    serving.add_argument("--host", default="127.0.0.1", help="0.0.0.0 serves everybody who can reach this machine")
    serving.add_argument("--port", type=port, default=30000, help="0 picks a free one and prints it")
    serving.add_argument(
        "--frontend", choices=("process", "inline"), default="process", help="inline: one process (tests)"
    )
    serving.add_argument(
        "--drain-timeout", type=seconds, default=300.0, metavar="S", help="for running requests at SIGTERM"
    )
    serving.add_argument("--ready-file", metavar="FILE", help="written when ready: JSON {host, port, pid, engine_pid}")
    serving.add_argument(
        "--grpc-compat",
        choices=("vllm", "sglang", "none"),
        default="vllm",
        help="the engine protocol that gateways (smg) drive, beside the native service",
    )
    serving.add_argument("--admin", action="store_true", help="serve FlushCache and the profiler's start and stop")
    serving.add_argument("--profile-dir", metavar="DIR", default=None, help="where --admin's traces go")
    serving.add_argument("--log-requests", action="store_true", help="one line per request (sizes and times, no text)")
    serving.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    add_security(parser)
    add_observability(parser)


def add_security(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("security and limits")
    add = functools.partial(group.add_argument, default=None)
    add("--api-key-file", metavar="FILE", help="bearer tokens, one a line: every RPC but health needs one of them")
    add("--api-key", metavar="TOKEN", help="the same on the command line, where other users of the machine can see it")
    add("--tls-cert", metavar="PEM", help="the server's certificate chain")
    add("--tls-key", metavar="PEM", help="its private key")
    add("--tls-client-ca", metavar="PEM", help="clients must show a certificate that this authority signed (mTLS)")
    add("--unix-socket", metavar="PATH", help="listen here, for this user only, and not on --host and --port")
    group.add_argument(
        "--max-message-bytes", type=positive, default=4 * 2**20, metavar="N", help="of one request message"
    )
    group.add_argument(
        "--max-prompt-bytes", type=count, default=0, metavar="N", help="of a text or chat; 0: 32 a context token"
    )
    group.add_argument(
        "--max-concurrent-rpcs", type=positive, default=4096, metavar="N", help="more are refused: RESOURCE_EXHAUSTED"
    )
    group.add_argument(
        "--max-request-seconds", type=seconds, default=0.0, metavar="S", help="then DEADLINE_EXCEEDED; 0: no limit"
    )
    group.add_argument(
        "--stream-interval", type=count, default=0, metavar="N",
        help="tokens of a message where a request does not say; 0: 4, and more among many streams",
    )  # fmt: skip
    group.add_argument(
        "--unread-seconds", type=seconds, default=60.0, metavar="S", help="cancel a stream unread for so long; 0: never"
    )


def add_observability(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("metrics and traces")
    group.add_argument(
        "--metrics-port", type=port, default=None, metavar="PORT", help="Prometheus metrics; 0: a free one"
    )
    group.add_argument("--metrics-host", default="127.0.0.1", metavar="HOST", help="where --metrics-port listens")
    group.add_argument(
        "--otlp-traces-endpoint", default=None, metavar="URL", help="an OTLP/gRPC collector, http(s)://host:4317"
    )


def seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds")
    return value


def api_keys(args: argparse.Namespace) -> tuple[str, ...]:
    """Raises `UnsupportedError` for a file that cannot be read or holds no token, and for one that nobody can send."""
    keys = []
    if args.api_key is not None:
        try:
            keys = [usable_token(args.api_key)]
        except UnsupportedError as error:
            raise UnsupportedError(f"--api-key {error}") from None
    if args.api_key_file is not None:
        keys += read_tokens("--api-key-file", args.api_key_file)
        if problem := read_by_others(args.api_key_file):
            logging.getLogger("jqserve.server").warning("--api-key-file %s: %s", args.api_key_file, problem)
    return tuple(keys)


def count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def port(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"{value} is not a port (0 to 65535)")
    return value


def server_config(args: argparse.Namespace) -> ServerConfig:
    """Raises `UnsupportedError` for a model path that cannot be one."""
    from jqserve.checkpoint.gguf_file import gguf_of
    from jqserve.checkpoint.gguf_tokenizer import tokenizer_folder
    from jqserve.server.config import ServerConfig
    from jqserve.server.tokenizer import has_tokenizer

    if args.model_path == "":  # a variable of the shell that is not set
        raise UnsupportedError(
            "--model-path is empty; give a directory or a Hub id, or leave it out for the demo model"
        )
    if args.profile_dir is not None and not args.admin:
        raise UnsupportedError("--profile-dir belongs to --admin, which serves the profiler; give both or none")
    model_path = args.model_path or str(DEMO_MODEL)
    looks_local = model_path.startswith((".", "/", "~")) or model_path.count("/") > 1
    folder = Path(model_path).expanduser()
    gguf = gguf_of(folder)
    if looks_local and not folder.is_dir() and gguf is None:
        what = (
            "is a file; expected the checkpoint's directory, or a .gguf file" if folder.is_file() else "does not exist"
        )
        raise UnsupportedError(f"--model-path {model_path} {what}")
    model_path = str(folder.resolve()) if folder.exists() else model_path
    if gguf is not None and args.tokenizer_path is None and args.load_format != "dummy":
        args.tokenizer_path = tokenizer_folder(gguf)
    values: dict[str, Any] = vars(args)
    dtype = None if args.dtype == "auto" else args.dtype
    engine = {name: values[name] for name in ENGINE_FLAGS if values[name]} | {"model_path": model_path}
    engine |= {name: values[name] for name in GIVEN_FLAGS if values[name] is not None}
    engine.pop("dtype", None)
    engine |= {"quantization": quantization_of(args)} if args.torchao_config else {}
    if dtype:
        engine["dtype"] = dtype
    source = args.tokenizer_path or model_path
    ids_only = args.load_format == "dummy" and not has_tokenizer(source)
    if ids_only:
        logging.getLogger("jqserve.server").warning("%s has no tokenizer: serving token ids only", source)
    return ServerConfig(
        model_path=model_path,
        host=args.host,
        port=args.port,
        revision=args.revision,
        tokenizer_path=args.tokenizer_path,
        chat_template=args.chat_template,
        served_model_name=args.served_model_name or (None if args.model_path else "demo"),
        frontend=args.frontend,
        random_seed=args.random_seed,
        log_requests=args.log_requests,
        drain_timeout=args.drain_timeout,
        ready_file=args.ready_file,
        **{name: values[name] for name in SERVING_FLAGS},
        api_keys=api_keys(args),
        ids_only=ids_only,
        engine=engine | {"tokenizer_path": None if ids_only else args.tokenizer_path},
        arguments={name: value for name, value in values.items() if value is not None and name != "api_key"},
    )


def launcher(config: ServerConfig) -> Launch:
    """How the engine is started."""
    from jqserve.server.launch import launch_process, launch_thread

    if config.frontend == "process":
        return launch_process
    from jqserve.engine.process import serve  # the inline front end shares its process with jax

    return functools.partial(launch_thread, serve=serve)


async def serve(config: ServerConfig) -> int:
    from jqserve.server.app import Server

    return await Server(config, launcher(config)).run()


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 after a drain, 1 when the engine died, 2 when the user has to change something."""
    args = parser().parse_args(argv)
    logging.basicConfig(
        level=args.log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname).1s %(name)s: %(message)s"
    )
    try:
        config = server_config(args)
        importlib.import_module("jqserve.server.app")  # `serve` takes it from there: it is to be frozen with the rest
        gc.freeze()  # modules and the like: the collector need not look at them again
        return asyncio.run(serve(config))
    except JqserveError as error:
        print(f"jqserve-server: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
