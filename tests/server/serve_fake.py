"""A whole server as a program of its own, its engine the fake one in a child process. Prints what the server announces.

Usage: serve_fake.py READY_FILE [ENGINE_JSON [CONFIG_JSON]]     CONFIG_JSON: fields of ServerConfig to set
"""

import asyncio
import functools
import json
import logging
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# This checkout's jqserve, here and in the engine's process, whichever one is installed.
sys.path.insert(0, ROOT := str(HERE.parents[1]))
os.environ["PYTHONPATH"] = os.pathsep.join([ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])

from jqserve.server.app import Server  # noqa: E402
from jqserve.server.config import ServerConfig  # noqa: E402
from jqserve.server.launch import launch_process  # noqa: E402

if __name__ == "__main__":
    logging.basicConfig(level="INFO")
    settings = {
        "model_path": "/models/echo",
        "port": 0,
        "ids_only": True,  # no tokenizer: starts without transformers, at once
        "ready_file": sys.argv[1],
        "engine": json.loads(sys.argv[2]) if len(sys.argv) > 2 else {},
        "drain_timeout": 10,
    }
    config = ServerConfig(**settings | (json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}))
    launch = functools.partial(launch_process, command=(sys.executable, str(HERE / "fake_engine.py"), "--fd"))
    sys.exit(asyncio.run(Server(config, launch).run()))
