"""The conformance program of the clients: watches and publishes as the environment says, and prints what happens.

    python main.py threads
    python main.py asyncio
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import datetime
from typing import Any

import milepost
import milepost.aio
from milepost import MilepostError
from milepost.v1.events_pb2 import EVENT_KIND_COMPLETE, EVENT_KIND_INFO, AllJobs, AppendedEvent, Event, NewEvent

SERVER = os.environ["MILEPOST_SERVER"]
API_KEY = os.environ["MILEPOST_API_KEY"]
JOBS = os.environ["MILEPOST_JOBS"].split(",")
ROUNDS = int(os.environ["MILEPOST_ROUNDS"])
PAUSE_SECONDS = int(os.environ["MILEPOST_PAUSE_MS"]) / 1000


def say(kind: str, **fields: Any) -> None:
    # One write, so that lines of several threads do not mix.
    sys.stdout.write(json.dumps({"kind": kind, **fields}) + "\n")
    sys.stdout.flush()


def rounds() -> list[list[NewEvent]]:
    """What each job gets in each round. The server refuses a name of 300 characters."""
    names = [[str(number)] + ["x" * 300] * (number % 10 == 0) for number in range(1, ROUNDS + 1)]
    return [[NewEvent(kind=EVENT_KIND_INFO, name=name) for name in round] for round in names]


COMPLETE = NewEvent(kind=EVENT_KIND_COMPLETE, name="complete")


def stored(job: milepost.Job, event: AppendedEvent) -> None:
    say("stored", job=job, sequence=event.sequence, id=event.id)


def refused(job: milepost.Job, event: Any, error: MilepostError) -> None:
    say("refused", job=job, id=event.id, reason=error.reason)


def interrupted(error: MilepostError, pause: float) -> None:
    say("interruption", watch="publisher", error=str(error))


def cancellation_requested(job: milepost.Job, at: datetime) -> None:
    say("cancellation_requested", job=job)


PUBLISHER: dict[str, Any] = {
    "on_stored": stored,
    "on_refused": refused,
    "on_interruption": interrupted,
    "on_cancellation_requested": cancellation_requested,
}


class Watched:
    """Prints what a watch receives. The watch of all jobs is over when it has seen the end of each."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._open = set(JOBS)
        self.arguments: dict[str, Any] = {
            **({"all_jobs": AllJobs()} if name == "all" else {"job_id": name}),
            "heartbeat_interval": 5.0,
            "on_caught_up": lambda _: say("caught_up", watch=name),
            "on_heartbeat": lambda: say("heartbeat", watch=name),
            "on_interruption": lambda error, pause: say("interruption", watch=name, error=str(error)),
        }

    def is_over(self, event: Event) -> bool:
        say("event", watch=self.name, job=event.job_id, sequence=event.sequence, id=event.id, name=event.name)
        if event.kind == EVENT_KIND_COMPLETE:
            self._open.discard(event.job_id)
        return not self._open

    def end(self, watch: milepost.watch | milepost.aio.watch) -> None:
        if self.name != "all":
            assert watch.end
            say("end", watch=self.name, last_sequence=watch.end.last_sequence)


def threads() -> None:
    def watch(channel: Any, watched: Watched) -> None:
        watch = milepost.watch(channel, **watched.arguments)
        for event in watch:
            if watched.is_over(event) and watched.name == "all":
                break
        watched.end(watch)

    def publish(channel: Any) -> None:
        with milepost.Publisher(channel, **PUBLISHER) as publisher:
            for events in rounds():
                for job in JOBS:
                    for event in events:
                        publisher.append(job, event)
                time.sleep(PAUSE_SECONDS)
            for job in JOBS:
                publisher.append(job, COMPLETE)
            publisher.flush()
            say("flushed")

    with milepost.connect(SERVER, API_KEY) as channel, ThreadPoolExecutor(len(JOBS) + 2) as pool:
        work = [pool.submit(watch, channel, Watched(name)) for name in [*JOBS, "all"]]
        work.append(pool.submit(publish, channel))
        for each in as_completed(work):
            try:
                each.result()
            except Exception:
                traceback.print_exc()
                os._exit(1)  # The other threads would go on.


async def tasks() -> None:
    async def watch(channel: Any, watched: Watched) -> None:
        watch = milepost.aio.watch(channel, **watched.arguments)
        async for event in watch:
            if watched.is_over(event) and watched.name == "all":
                break
        watched.end(watch)

    async def publish(channel: Any) -> None:
        async with milepost.aio.Publisher(channel, **PUBLISHER) as publisher:
            for events in rounds():
                for job in JOBS:
                    for event in events:
                        await publisher.append(job, event)
                await asyncio.sleep(PAUSE_SECONDS)
            for job in JOBS:
                await publisher.append(job, COMPLETE)
            await publisher.flush()
            say("flushed")

    async with milepost.aio.connect(SERVER, API_KEY) as channel:
        await asyncio.gather(publish(channel), *(watch(channel, Watched(name)) for name in [*JOBS, "all"]))


if __name__ == "__main__":
    if sys.argv[1:] == ["asyncio"]:
        asyncio.run(tasks())
    else:
        threads()
