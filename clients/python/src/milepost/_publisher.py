"""The publisher: what those for threads and for asyncio share, and the former."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from datetime import datetime, timezone
from itertools import count
from typing import Any, cast

import grpc

from milepost._errors import Code, MilepostError, is_refusal, is_transient, pause_seconds
from milepost._outbox import (
    BATCH_EVENTS,
    Item,
    Job,
    Outbox,
    ProviderJobId,
    RecentJobs,
    append_request,
    log,
    with_id,
)
from milepost._spool import Spool
from milepost.v1.events_pb2 import AppendedEvent, AppendEventsResponse, NewEvent
from milepost.v1.events_pb2_grpc import EventServiceStub
from milepost.v1.jobs_pb2 import CreateJobRequest, CreateJobResponse
from milepost.v1.jobs_pb2_grpc import JobServiceStub

_TOLD_JOBS = 10_000


class PublisherBase:
    """The settings and the state of a publisher."""

    def __init__(
        self,
        channel: grpc.Channel | grpc.aio.Channel,
        *,
        max_events: int = 10_000,
        max_bytes: int = 16 * 1024 * 1024,
        max_requests: int = 16,
        timeout: float = 10.0,
        on_stored: Callable[[Job, AppendedEvent], object] | None = None,
        on_refused: Callable[[Job, NewEvent | CreateJobRequest, MilepostError], object] | None = None,
        on_interruption: Callable[[MilepostError, float], object] | None = None,
        on_cancellation_requested: Callable[[Job, datetime], object] | None = None,
        spool: Spool | None = None,
    ) -> None:
        """Starts a publisher. It makes no call before the first event.

        Arguments:
            channel: A channel that sends the credential of a provider, such as `connect` makes.
            max_events: The most events that the publisher holds in memory.
            max_bytes: The most bytes of events that the publisher holds in memory.
            max_requests: The most requests in flight.
            timeout: The deadline of each attempt, in seconds.
            on_stored: Called for each stored event, in the order of its job.
            on_refused: Called for each event that the server refuses for its content. Without
                it, `flush` and `close` raise the first refusal since the last flush.
            on_interruption: Called before a request is sent again, with the error of the last
                attempt and with the pause in seconds.
            on_cancellation_requested: Called with a job, as it was given, and with the time when
                its customer asked to stop it, after the first answer that says so. A publisher
                calls it once for a job. It can call it again if answers said so of 10,000 other
                jobs since the job's last answer. The next publisher calls it again, also with
                the same spool.
            spool: Keeps the events on disk instead. Not with asyncio.
        """
        self._events = EventServiceStub(cast(Any, channel))
        self._jobs = JobServiceStub(cast(Any, channel))
        self._outbox = Outbox(max_events, max_bytes)
        self._max_requests = max_requests
        self._timeout = timeout
        self._on_stored = on_stored
        self._on_refused = on_refused
        self._on_interruption = on_interruption
        self._on_cancellation_requested = on_cancellation_requested
        self._told = RecentJobs(_TOLD_JOBS)
        self._spool = spool
        self._failure: BaseException | None = None
        self._refusal: MilepostError | None = None
        self._closed = False
        if not spool:
            # Runs when the publisher is forgotten, and at the exit of the process.
            weakref.finalize(self, _say_what_is_lost, self._outbox)
        self._start()

    def _start(self) -> None:
        """Sets up what sends the batches."""
        raise NotImplementedError

    def _call(self, batch: list[Item]) -> Any:
        """Sends the batch."""
        first = batch[0]
        if isinstance(first.content, CreateJobRequest):
            return self._jobs.CreateJob(first.content, timeout=self._timeout)
        request = append_request(first.job, [cast(NewEvent, item.content) for item in batch])
        return self._events.AppendEvents(request, timeout=self._timeout)

    def _tell_cancellation(self, job: Job, answer: AppendEventsResponse | CreateJobResponse) -> object:
        """Calls `on_cancellation_requested` if this answer is the first to say so. Returns its result."""
        source = answer.job if isinstance(answer, CreateJobResponse) else answer
        call = self._on_cancellation_requested
        if not call or not source.HasField("cancellation_requested_at") or not self._told.add(job):
            return None
        return call(job, source.cancellation_requested_at.ToDatetime(timezone.utc))

    def _check(self) -> None:
        """Raises the error that every method of a failed or closed publisher raises."""
        if self._failure:
            raise self._failure
        if self._closed:
            raise RuntimeError("the publisher is closed")

    def _raise_refusal(self) -> None:
        refusal, self._refusal = self._refusal, None
        if refusal:
            raise refusal


def _say_what_is_lost(outbox: Outbox) -> None:
    if outbox.events:
        log.error("%d events are lost: their publisher was not closed, or failed", outbox.events)


class Publisher(PublisherBase):
    """Appends events to jobs: each once, and those of a job in their order.

        with milepost.Publisher(channel) as publisher:
            publisher.append(job_id, NewEvent(kind=EVENT_KIND_INFO, name="hello"))

    `append` does not wait for the server. What is appended to a job while a request of it is in
    flight becomes its next request. After a transient failure a request is sent again, with
    the same event ids, until it is answered. A refused event does not stop later ones. Any
    other error, such as UNAUTHENTICATED, fails the publisher: its methods raise it.

    One job is always named in the same way, by its id or by the provider's: the order holds
    between events with the same name of the job.

    Callbacks are called by threads of the publisher, one at a time. They must not call the
    publisher. An exception that a callback raises fails the publisher.

    With a `Spool` the events are kept on disk, see there.
    """

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._ready = threading.Condition(self._lock)
        self._settled = threading.Condition(self._lock)
        self._callbacks = threading.Lock()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, name="milepost-publisher", daemon=True)
            for _ in range(self._max_requests)
        ]
        for thread in self._threads:
            thread.start()

    def append(self, job: Job, event: NewEvent) -> str:
        """Takes a copy of the event, and returns its id, which is made if there is none.

        Waits while the publisher holds as much as it may. With a spool it never waits, and
        raises `SpoolFull` if the spool has no room.
        """
        event = with_id(event)
        self._add(Item(job, event, event.ByteSize()))
        return event.id

    def create_job(self, request: CreateJobRequest) -> None:
        """Writes the request to the spool, before the events of its job. Needs a spool.

        Raises `SpoolFull` if the spool has no room.
        """
        if not self._spool:
            raise RuntimeError("create_job needs a spool; without one, call JobService")
        copy = CreateJobRequest()
        copy.CopyFrom(request)
        self._add(Item(ProviderJobId(request.provider_job_id), copy, copy.ByteSize()))

    def _add(self, item: Item) -> None:
        if self._spool:
            with self._lock:
                self._check()
            self._spool.write(item)
            with self._lock:
                self._ready.notify()
            return
        with self._lock:
            self._settled.wait_for(lambda: self._stop.is_set() or self._outbox.has_room(item.size))
            self._check()
            if self._outbox.add(item):
                self._ready.notify()

    def flush(self, timeout: float | None = None) -> None:
        """Returns when all events that were appended before are stored or refused.

        Raises `TimeoutError` after so many seconds. The events stay in the publisher then.
        """
        with self._lock:
            self._check()
            is_reached = self._spool.barrier() if self._spool else self._outbox.barrier()
            if not self._settled.wait_for(lambda: self._stop.is_set() or is_reached(), timeout):
                raise TimeoutError(f"not all events were delivered in {timeout:g} s")
            if not is_reached():
                self._check()
            self._raise_refusal()

    def close(self) -> None:
        """Flushes and ends. With a spool it does not flush: what is not delivered stays in the spool."""
        if self._closed:
            return
        try:
            if not self._spool:
                self.flush()
        finally:
            with self._lock:
                self._closed = True
                self._end()
            for thread in self._threads:
                thread.join()
            if self._spool:
                self._spool.close()
        if self._failure:
            raise self._failure
        self._raise_refusal()

    def _end(self) -> None:
        self._stop.set()
        self._ready.notify_all()
        self._settled.notify_all()

    def __enter__(self) -> Publisher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self) -> None:
        try:
            while batch := self._take():
                self._deliver(batch)
                with self._lock:
                    self._outbox.release(batch[0].job)
        except BaseException as error:
            with self._lock:
                self._failure = self._failure or error
                self._end()

    def _take(self) -> list[Item]:
        """Waits for the next batch; empty if the publisher ends."""
        with self._lock:
            while not self._stop.is_set():
                more = self._refill()
                if batch := self._outbox.take():
                    return batch
                self._ready.wait(0 if more else None)
            return []

    def _refill(self) -> bool:
        """Moves some records from the spool to the outbox. Returns whether there may be more.

        Not all at once, since `append` waits for the lock.
        """
        spool, outbox = self._spool, self._outbox
        for _ in range(BATCH_EVENTS):
            if not spool or not spool.window_has_room(outbox.max_events, outbox.max_bytes):
                return False
            if not (item := spool.read()):
                self._settled.notify_all()  # Damaged records may have been all that was left.
                return False
            if outbox.add(item):
                self._ready.notify()
        return True

    def _deliver(self, batch: list[Item]) -> None:
        """Sends the batch until it is answered, or the publisher ends."""
        failures = 0
        while not self._stop.is_set():
            try:
                answer = self._call(batch)
            except grpc.RpcError as cause:
                error = MilepostError.of(cause)
            else:
                return self._stored(batch, answer)
            if is_refusal(error) and len(batch) == 1:
                return self._refused(batch[0], error)
            if is_refusal(error):
                for item in batch:
                    self._deliver([item])
                return
            if not is_transient(error) and not self._spool:
                raise error
            self._pause(failures, error)
            failures += 1

    def _pause(self, failures: int, error: MilepostError) -> None:
        pause = pause_seconds(failures, error, 5.0 if is_transient(error) else 60.0)
        if self._on_interruption:
            with self._callbacks:
                self._on_interruption(error, pause)
        self._stop.wait(pause)

    def _stored(self, batch: list[Item], answer: AppendEventsResponse | CreateJobResponse) -> None:
        if self._on_stored and isinstance(answer, AppendEventsResponse):
            with self._callbacks:
                for item, event in zip(batch, answer.events, strict=True):
                    self._on_stored(item.job, event)
        if self._on_cancellation_requested:
            with self._callbacks:
                self._tell_cancellation(batch[0].job, answer)
        self._settle(batch)

    def _refused(self, item: Item, error: MilepostError) -> None:
        if spool := self._spool:
            self._write(lambda: spool.reject(item, error))
        if self._on_refused:
            with self._callbacks:
                self._on_refused(item.job, item.content, error)
        else:
            with self._lock:
                self._refusal = self._refusal or error
        self._settle([item])

    def _settle(self, items: list[Item]) -> None:
        if spool := self._spool:
            self._write(lambda: spool.settle(items))
        with self._lock:
            self._outbox.settle(items)
            self._settled.notify_all()

    def _write(self, work: Callable[[], None]) -> None:
        """Writes to the folder of the spool, as soon as its disk has room."""
        for failures in count():
            try:
                return work()
            except OSError as cause:
                error = MilepostError(Code.RESOURCE_EXHAUSTED, f"the spool cannot be written: {cause}")
                error.__cause__ = cause
            self._pause(failures, error)
            if self._stop.is_set():
                return
