"""jqserve-server with `bench.faulty_engine` as its engine: python -m bench.soak_server SETTINGS_JSON [FLAGS]."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import logging
import sys

from jqserve.cli import server as cli
from jqserve.server.app import Server
from jqserve.server.launch import launch_process


def main() -> int:
    settings = json.loads(sys.argv[1])
    logging.basicConfig(level="INFO", stream=sys.stderr, format="%(asctime)s %(levelname).1s %(name)s: %(message)s")
    config = cli.server_config(cli.parser().parse_args(sys.argv[2:]))
    config = dataclasses.replace(config, port=settings["port"], ready_file=settings["ready_file"])
    engine = ["bench.faulty_engine", str(settings["fault_seconds"])]
    if not settings["fault_seconds"]:
        engine = ["jqserve.engine.process"]
    launch = functools.partial(launch_process, command=(sys.executable, "-m", *engine, "--fd"))
    return asyncio.run(Server(config, launch).run())


if __name__ == "__main__":
    sys.exit(main())
