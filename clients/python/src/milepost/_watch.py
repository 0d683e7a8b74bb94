"""A watch that resumes by itself: what `milepost.watch` and `milepost.aio.watch` share, and the former."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from datetime import timedelta
from typing import Any, cast

import grpc

from milepost._errors import Code, MilepostError, is_transient, pause_seconds
from milepost.v1.events_pb2 import (
    WATCH_END_REASON_JOB_CLOSED,
    AllJobs,
    CaughtUp,
    Event,
    EventKind,
    FromNow,
    JobState,
    WatchEventsRequest,
    WatchEventsResponse,
)
from milepost.v1.events_pb2_grpc import EventServiceStub


class WatchBase:
    """The state of a watch between its messages and between its streams."""

    resume_token: str | None
    """Starts another watch of the same scope and kinds after the last message whose events were all
    processed, that is, after which the next event was asked for. None: from the same start as this one."""
    end: JobState | None
    """The state of the closed job, once the watch has ended by itself."""

    def __init__(
        self,
        channel: grpc.Channel | grpc.aio.Channel,
        *,
        job_id: str | None = None,
        provider_job_id: str | None = None,
        all_jobs: AllJobs | None = None,
        kinds: Iterable[EventKind.ValueType] = (),
        after_sequence: int | None = None,
        resume_token: str | None = None,
        from_now: bool = False,
        heartbeat_interval: float = 15.0,
        on_caught_up: Callable[[CaughtUp], object] | None = None,
        on_heartbeat: Callable[[], object] | None = None,
        on_interruption: Callable[[MilepostError, float], object] | None = None,
    ) -> None:
        """Prepares a watch; the first call is made by the iteration.

        Arguments:
            channel: A channel that sends a credential, such as `connect` makes.
            job_id: Watch the job with this id. Exactly one scope is given.
            provider_job_id: Watch the job to which its provider, the caller, gave this id.
            all_jobs: Watch all jobs that the caller may see, or those that match `AllJobs`.
            kinds: Only events of these kinds. Default: of all kinds.
            after_sequence: Start after this event of the job. Default: before the first event.
            resume_token: Start where another watch of the same scope and kinds was.
            from_now: Start with the next event.
            heartbeat_interval: After so many seconds without a message, 5 to 60, the server sends
                a heartbeat. After two such intervals and 5 s of silence the watch is resumed.
            on_caught_up: Called when the past events were handed out, again after each resume. In a
                watch of one job the message has the state of the job and of each step.
            on_heartbeat: Called for each heartbeat.
            on_interruption: Called before the watch is resumed, with the error and with the
                pause in seconds.
        """
        if (job_id, provider_job_id, all_jobs).count(None) != 2:
            raise ValueError("give exactly one of job_id, provider_job_id and all_jobs")
        if (after_sequence, resume_token, from_now or None).count(None) < 2:
            raise ValueError("give at most one of after_sequence, resume_token and from_now")
        if not 5 <= heartbeat_interval <= 60:
            raise ValueError("heartbeat_interval is 5 to 60 seconds")
        fields: dict[str, Any] = {  # None leaves a field unset.
            "job_id": job_id,
            "provider_job_id": provider_job_id,
            "all_jobs": all_jobs,
            "kinds": kinds,
            "after_sequence": after_sequence,
            "resume_token": resume_token,
            "from_now": FromNow() if from_now else None,
            "heartbeat_interval": timedelta(seconds=heartbeat_interval),
        }
        # Its start is moved on by each message that is received.
        self._request = WatchEventsRequest(**fields)
        self.resume_token = resume_token
        self.end = None
        self._stub = EventServiceStub(cast(Any, channel))
        self._silence_seconds = 2 * heartbeat_interval + 5
        self._on_caught_up = on_caught_up
        self._on_heartbeat = on_heartbeat
        self._on_interruption = on_interruption
        # The message that is not processed to its end, and those of its events that were not handed out.
        self._message: WatchEventsResponse | None = None
        self._events: deque[Event] = deque()
        self._failures = 0
        self._stream_has_sent = False
        self._closed = threading.Event()

    def _receive(self, message: WatchEventsResponse) -> None:
        self._message = message
        self._events.extend(message.events.events)
        self._request.resume_token = message.resume_token
        self._stream_has_sent = True
        self._failures = 0

    def _notify(self) -> object:
        """Calls the callback of the message, if there is one, and returns its result."""
        message = self._message
        if message and message.HasField("heartbeat") and self._on_heartbeat:
            return self._on_heartbeat()
        if message and message.HasField("caught_up") and self._on_caught_up:
            return self._on_caught_up(message.caught_up)
        return None

    def _processed(self) -> None:
        if self._message:
            self.resume_token = self._message.resume_token
            if self._message.end.reason == WATCH_END_REASON_JOB_CLOSED:
                self.end = self._message.end.job
        self._message = None

    def _interrupted(self, cause: grpc.RpcError | None, silent: bool) -> tuple[MilepostError, float]:
        """Why the stream is over, and the pause before the next. Raises an error that ends the watch."""
        if silent:
            error = MilepostError(Code.UNAVAILABLE, f"no message for {self._silence_seconds:g} s")
        elif cause is None:
            error = MilepostError(Code.UNAVAILABLE, "the stream ended without an end message")
        else:
            error = MilepostError.of(cause)
            if not is_transient(error, self._stream_has_sent):
                raise error from cause
        pause = pause_seconds(self._failures, error)
        self._failures += 1
        self._stream_has_sent = False
        return error, pause


class watch(WatchBase):
    """The events of a scope, each once and in the order of its job, whatever happens to connections and servers.

        for event in milepost.watch(channel, job_id="…"):
            print(event.sequence, event.name)

    The iteration ends after the last event of a closed job; a watch of all jobs does not end by
    itself. An error that no further attempt cures is raised as `MilepostError`. Callbacks are
    called between the events, by the thread that iterates.

    To leave the loop ends the call. A later iteration of the same object goes on after the last
    event that was handed out.
    """

    _stream: _Stream | None = None

    def __iter__(self) -> Iterator[Event]:
        with closing(self._messages()) as messages:
            while True:
                while self._events:
                    if self._closed.is_set():
                        return
                    yield self._events.popleft()
                self._notify()
                self._processed()
                if self.end is not None or (message := next(messages, None)) is None:
                    return
                self._receive(message)

    def _messages(self) -> Generator[WatchEventsResponse, None, None]:
        """The messages of one stream after the other."""
        while not self._closed.is_set():
            cause = None
            with _Stream(self._stub.WatchEvents(self._request), self._silence_seconds) as stream:
                self._stream = stream
                if self._closed.is_set():
                    return
                try:
                    yield from stream
                except grpc.RpcError as error:
                    cause = error
            if self._closed.is_set():
                return
            failure, pause = self._interrupted(cause, stream.silent)
            if self._on_interruption:
                self._on_interruption(failure, pause)
            self._closed.wait(pause)

    def close(self) -> None:
        """Ends the watch, from any thread: its iteration ends without an error."""
        self._closed.set()
        if self._stream:
            self._stream.cancel()

    def __enter__(self) -> watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Stream:
    """The messages of a call, which is cancelled when a read of it takes too long.

    Time in which nothing is read does not count.
    """

    def __init__(self, call: Any, seconds: float) -> None:
        self._call = call
        self._seconds = seconds
        self._deadline = math.inf
        self._ended = threading.Event()
        self.silent = False

    def __enter__(self) -> _Stream:
        threading.Thread(target=self._guard, name="milepost-watch", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def cancel(self) -> None:
        self._ended.set()
        self._call.cancel()

    def __iter__(self) -> Iterator[WatchEventsResponse]:
        while True:
            self._deadline = time.monotonic() + self._seconds
            message = next(self._call, None)
            self._deadline = math.inf
            if message is None:
                return
            yield message

    def _guard(self) -> None:
        while not self._ended.wait(max(0.0, min(self._deadline - time.monotonic(), self._seconds))):
            if time.monotonic() >= self._deadline:
                self.silent = True
                self._call.cancel()
                return
