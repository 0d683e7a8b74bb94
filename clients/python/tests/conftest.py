"""One server for all tests, and both flavours of the client."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flavours import FLAVOURS, Flavour
from support import Proxy, Server, World

# For the programs that tests start.
os.environ["PYTHONPATH"] = str(Path(__file__).parent.parent / "src")


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.remove()


@pytest.fixture
def world(server: Server) -> Iterator[World]:
    world = World(server)
    yield world
    world.close()


@pytest.fixture
def proxy(world: World) -> Iterator[Proxy]:
    proxy = Proxy(world.server.address)
    yield proxy
    proxy.close()


@pytest.fixture(params=FLAVOURS, ids=lambda kind: kind.__name__)
def flavour(request: pytest.FixtureRequest) -> Iterator[Flavour]:
    flavour: Any = request.param()
    yield flavour
    flavour.close()
