"""The common part of milepost clients: the channel, the credential, retries and
readable errors."""

import itertools
import logging
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import grpc
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from grpc_status import rpc_status

sys.path.insert(0, str(Path(__file__).resolve().parent / "generated"))

from milepost.v1 import configurations_pb2_grpc, events_pb2_grpc, jobs_pb2_grpc  # noqa: E402

Request = TypeVar("Request")
Response = TypeVar("Response")

ATTEMPTS = 10
CALL_SECONDS = 10.0
LONGEST_PAUSE_SECONDS = 5.0

# With these codes a write may or may not have happened. A write with a natural key
# or with event ids happens once, however often it is sent.
UNCERTAIN = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}

log = logging.getLogger("milepost")


class Connection:
    """The services of one server, called with one credential.

    Reads MILEPOST_SERVER (default 127.0.0.1:50051) and MILEPOST_API_KEY.
    """

    def __init__(self) -> None:
        server = os.environ.get("MILEPOST_SERVER", "127.0.0.1:50051")
        key = os.environ.get("MILEPOST_API_KEY") or sys.exit("set MILEPOST_API_KEY")
        self.metadata = [("authorization", f"Bearer {key}")]
        # Keepalive pings detect a peer that disappeared without closing the connection.
        self.channel = grpc.insecure_channel(
            server,
            options=[
                ("grpc.keepalive_time_ms", 20_000),
                ("grpc.max_reconnect_backoff_ms", int(LONGEST_PAUSE_SECONDS * 1000)),
            ],
        )
        self.configurations = configurations_pb2_grpc.ConfigurationServiceStub(self.channel)
        self.jobs = jobs_pb2_grpc.JobServiceStub(self.channel)
        self.events = events_pb2_grpc.EventServiceStub(self.channel)

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()

    def call(self, method: Callable[..., Response], request: Request) -> Response:
        """Calls the method, and sends the same request again while the server is unavailable."""
        for attempt in itertools.count(1):
            try:
                return method(request, metadata=self.metadata, timeout=CALL_SECONDS)
            except grpc.RpcError as error:
                if error.code() not in UNCERTAIN or attempt == ATTEMPTS:
                    raise
                pause(error, attempt)


def pause(error: grpc.RpcError, attempt: int) -> None:
    """Waits longer after each attempt, with jitter, and at least as long as RetryInfo asks."""
    seconds = min(0.05 * 2**attempt, LONGEST_PAUSE_SECONDS) * random.uniform(0.5, 1.0)
    if retry := detail(error, RetryInfo):
        seconds = max(seconds, retry.retry_delay.ToTimedelta().total_seconds())
    log.warning("%s: trying again in %.1f s", error.code().name, seconds)
    time.sleep(seconds)


def detail(error: grpc.RpcError, kind: type[Response]) -> Response | None:
    """The google.rpc detail of this type in the error, or None."""
    status = rpc_status.from_call(error)
    for packed in status.details if status else ():
        unpacked = kind()
        if packed.Unpack(unpacked):
            return unpacked
    return None


def explain(error: grpc.RpcError) -> str:
    """The error as readable text: code, reason, message, each field at fault."""
    info = detail(error, ErrorInfo)
    lines = [f"{error.code().name} {info.reason if info else ''}".strip() + f": {error.details()}"]
    if fields := detail(error, BadRequest):
        lines += [f"  {v.field}: {v.description}" for v in fields.field_violations]
    return "\n".join(lines)
