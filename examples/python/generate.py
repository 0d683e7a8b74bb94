"""Generates the stubs of milepost.v1 from proto/ into generated/.

Run it once, and again whenever proto/ changes:

    python generate.py
"""

import sys
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

HERE = Path(__file__).resolve().parent
PROTO = HERE.parent.parent / "proto"
GENERATED = HERE / "generated"


def main() -> int:
    GENERATED.mkdir(exist_ok=True)
    # google/rpc/status.proto is not generated: the package googleapis-common-protos
    # has it, and Python allows only one definition of each message.
    sources = sorted(str(path) for path in (PROTO / "milepost").rglob("*.proto"))
    return protoc.main(
        [
            "protoc",
            f"--proto_path={PROTO}",
            f"--proto_path={files('grpc_tools') / '_proto'}",
            f"--python_out={GENERATED}",
            f"--pyi_out={GENERATED}",
            f"--grpc_python_out={GENERATED}",
            *sources,
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
