"""Generates src/milepost/v1 from the protos at the root of the repository.

    python generate.py

The packages of requirements.txt must be installed. google/rpc is not generated, since
the package googleapis-common-protos has it.
"""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROTO = HERE.parent.parent / "proto"
OUT = HERE / "src"


def main() -> None:
    for old in (OUT / "milepost/v1").glob("*_pb2*"):
        old.unlink()
    outputs = [f"--{kind}_out={OUT}" for kind in ("python", "grpc_python")]
    outputs += [f"--{kind}_out=quiet:{OUT}" for kind in ("mypy", "mypy_grpc")]
    protos = sorted(str(path) for path in (PROTO / "milepost/v1").glob("*.proto"))
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={PROTO}", *outputs, *protos],
        # protoc finds the plugins of mypy-protobuf by PATH.
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
        check=True,
    )


if __name__ == "__main__":
    main()
