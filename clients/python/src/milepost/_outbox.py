"""The events that a publisher has not delivered yet, in one queue for each job."""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

from milepost.v1.events_pb2 import AppendEventsRequest, NewEvent
from milepost.v1.jobs_pb2 import CreateJobRequest

BATCH_EVENTS = 500
_BATCH_BYTES = 900 * 1024

log = logging.getLogger("milepost")


@dataclass(frozen=True)
class ProviderJobId:
    """Names a job by the id that its provider gave to it."""

    value: str


Job = str | ProviderJobId
"""A job: its id, or the provider's id of it."""


@dataclass(eq=False)
class Item:
    """An event to append, or, in a spool, a job to create."""

    job: Job
    content: NewEvent | CreateJobRequest
    size: int
    # Of its record in the spool, if there is one.
    start: int = 0
    end: int = 0
    settled: bool = False


class Queue(deque[Item]):
    """The items of one job that are not settled: neither stored nor refused."""

    settled = 0
    """How many were settled since the queue was made."""


class Outbox:
    """The queues of all jobs. Jobs that have items and no request in flight take turns."""

    def __init__(self, max_events: int, max_bytes: int) -> None:
        self.max_events = max_events
        self.max_bytes = max_bytes
        self.events = 0
        self._bytes = 0
        self._queues: dict[Job, Queue] = {}
        self._ready: deque[Job] = deque()

    def has_room(self, size: int) -> bool:
        """Whether an item of this size may be added. The first may have any size."""
        return self.events == 0 or (self.events < self.max_events and self._bytes + size <= self.max_bytes)

    def add(self, item: Item) -> bool:
        """Adds an item. Returns whether its job became ready for a request."""
        self.events += 1
        self._bytes += item.size
        is_new = item.job not in self._queues
        if is_new:
            self._queues[item.job] = Queue()
            self._ready.append(item.job)
        self._queues[item.job].append(item)
        return is_new

    def take(self) -> list[Item]:
        """The batch for a request of the next job that is ready; empty if none is."""
        if not self._ready:
            return []
        queue = self._queues[self._ready.popleft()]
        batch, size = [queue[0]], queue[0].size
        if isinstance(queue[0].content, NewEvent):
            for item in islice(queue, 1, BATCH_EVENTS):
                size += item.size
                if size > _BATCH_BYTES or not isinstance(item.content, NewEvent):
                    break
                batch.append(item)
        return batch

    def settle(self, items: list[Item]) -> None:
        """Removes the first items of a job."""
        queue = self._queues[items[0].job]
        for item in items:
            queue.popleft()
            self.events -= 1
            self._bytes -= item.size
        queue.settled += len(items)

    def release(self, job: Job) -> None:
        """Lets the job have another request after that of `take`."""
        if self._queues[job]:
            self._ready.append(job)
        else:
            del self._queues[job]

    def barrier(self) -> Callable[[], bool]:
        """A function that tells whether all items of now are settled."""
        targets = [(queue, queue.settled + len(queue)) for queue in self._queues.values()]

        def is_reached() -> bool:
            while targets and targets[-1][0].settled >= targets[-1][1]:
                targets.pop()
            return not targets

        return is_reached


class RecentJobs:
    """The jobs that were added last. Each is known at least until `count` others were added."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._new: set[Job] = set()
        self._old: set[Job] = set()

    def add(self, job: Job) -> bool:
        """Returns whether the job was not known."""
        is_new = job not in self._new and job not in self._old
        self._new.add(job)
        if len(self._new) >= self._count:
            self._new, self._old = set(), self._new
        return is_new


def append_request(job: Job, events: list[NewEvent]) -> AppendEventsRequest:
    """The request that appends the events to the job."""
    if isinstance(job, ProviderJobId):
        return AppendEventsRequest(provider_job_id=job.value, events=events)
    return AppendEventsRequest(job_id=job, events=events)


def with_id(event: NewEvent) -> NewEvent:
    """A copy of the event, with an id."""
    copy = NewEvent()
    copy.CopyFrom(event)
    copy.id = copy.id or uuid7()
    return copy


def uuid7() -> str:
    """A UUID of version 7 (RFC 9562): 48 bits of Unix time in ms, then random bits."""
    value = time.time_ns() // 1_000_000 << 80 | int.from_bytes(os.urandom(10), "big")
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return str(uuid.UUID(int=value))
