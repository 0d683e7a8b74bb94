"""The channel to the server that the environment names."""

import os
import sys

import grpc
import milepost


def connect() -> grpc.Channel:
    """Reads MILEPOST_SERVER (default 127.0.0.1:50051) and MILEPOST_API_KEY."""
    server = os.environ.get("MILEPOST_SERVER", "127.0.0.1:50051")
    key = os.environ.get("MILEPOST_API_KEY") or sys.exit("set MILEPOST_API_KEY")
    return milepost.connect(server, key)


def interrupted(error: milepost.MilepostError, pause_s: float) -> None:
    """Tells that a watch or a publisher tries again."""
    print(f"{error.code.name}: trying again in {pause_s:.1f} s", file=sys.stderr)
