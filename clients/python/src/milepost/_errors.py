"""The error of a call, and what follows from it: try again, or not, and when."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import grpc
from google.protobuf import any_pb2, descriptor_pool, message_factory
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

Code = grpc.StatusCode

# The codes that a broken connection has in one client or another.
_BROKEN = {Code.UNAVAILABLE, Code.UNKNOWN, Code.INTERNAL, Code.CANCELLED, Code.DEADLINE_EXCEEDED, Code.ABORTED}
_BROKEN |= {Code.RESOURCE_EXHAUSTED}
_REFUSALS = {Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.ALREADY_EXISTS, Code.FAILED_PRECONDITION}
_REFUSALS |= {Code.ABORTED, Code.OUT_OF_RANGE}
_FIRST_PAUSE_SECONDS = 0.1


class MilepostError(Exception):
    """An error of a call. `docs/errors.md` of milepost says what to do about each.

    The error of grpc is its `__cause__`, if there is one.
    """

    code: grpc.StatusCode
    """The status code."""
    message: str
    """The message of the status: text for people."""
    reason: str | None
    """The reason of milepost's ErrorInfo, such as "JOB_CLOSED". None: the error is not milepost's own."""
    metadata: dict[str, str]
    """The metadata of that ErrorInfo. `errors.proto` says which reason has which."""
    violations: tuple[BadRequest.FieldViolation, ...]
    """Each field at fault, with a description."""
    retry_delay: float | None
    """The shortest pause before the next attempt, in seconds. None: the server names none."""
    details: tuple[Message, ...]
    """All details that this version of the client knows, decoded: messages of google.rpc."""

    def __init__(self, code: grpc.StatusCode, message: str, details: Iterable[Message] = ()) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message
        self.reason = self.retry_delay = None
        self.metadata = {}
        self.violations = ()
        self.details = tuple(details)
        for detail in self.details:
            if isinstance(detail, ErrorInfo) and detail.domain == "milepost":
                self.reason, self.metadata = detail.reason, dict(detail.metadata)
            elif isinstance(detail, BadRequest):
                self.violations = tuple(detail.field_violations)
            elif isinstance(detail, RetryInfo):
                self.retry_delay = detail.retry_delay.ToTimedelta().total_seconds()

    @classmethod
    def of(cls, error: grpc.RpcError) -> MilepostError:
        """The same error, with its details decoded."""
        details: list[Message] = []
        metadata: Any = error.trailing_metadata() or ()
        for key, value in metadata:
            if key == "grpc-status-details-bin":
                details += filter(None, map(_decoded, Status.FromString(value).details))
        made = cls(error.code(), error.details() or "", details)
        made.__cause__ = error
        return made

    def __str__(self) -> str:
        lines = [" ".join(filter(None, (self.code.name, self.reason))) + f": {self.message}"]
        lines += [f"  {violation.field}: {violation.description}" for violation in self.violations]
        return "\n".join(lines)


def _decoded(packed: any_pb2.Any) -> Message | None:
    try:
        kind = descriptor_pool.Default().FindMessageTypeByName(packed.TypeName())
    except KeyError:
        return None
    return message_factory.GetMessageClass(kind).FromString(packed.value)


def is_transient(error: MilepostError, after_message: bool = False) -> bool:
    """Whether the same call may succeed later. `after_message`: the call is a stream that had sent one."""
    if error.reason is None:
        return after_message or error.code in _BROKEN
    if error.code is Code.RESOURCE_EXHAUSTED:
        return error.retry_delay is not None
    return error.code in (Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED)


def is_refusal(error: MilepostError) -> bool:
    """Whether the call was refused for its content, so that other calls may succeed."""
    return error.code in _REFUSALS and not is_transient(error)


def pause_seconds(failures: int, error: MilepostError, longest: float = 5.0) -> float:
    """The pause after so many failures in a row. Half of it is chance, so that not all clients come back at once."""
    whole = min(_FIRST_PAUSE_SECONDS * 2 ** min(failures, 16), longest)
    return max(random.uniform(whole / 2, whole), error.retry_delay or 0.0)
