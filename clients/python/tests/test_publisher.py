"""Publishers against a real server that is killed, cut off and refuses events."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from datetime import datetime
from typing import Any

import grpc
import milepost
import pytest
from flavours import Flavour
from milepost import MilepostError, ProviderJobId
from milepost.v1.events_pb2 import AppendedEvent, AppendEventsRequest, NewEvent
from milepost.v1.events_pb2_grpc import EventServiceStub
from support import Proxy, World, event

UNSTORABLE = "x" * 300


def test_events_are_stored_once_and_in_the_order_of_each_job(flavour: Flavour, world: World) -> None:
    stored: list[tuple[milepost.Job, int, str]] = []
    new = world.new_job()
    world.create(new)
    jobs: list[milepost.Job] = [world.job() for _ in range(20)] + [ProviderJobId(new.provider_job_id)]
    publisher = flavour.publisher(
        flavour.connect(world.server.address, world.key),
        on_stored=lambda job, appended: stored.append((job, appended.sequence, appended.id)),
    )
    ids: dict[milepost.Job, list[str]] = {job: [] for job in jobs}
    with publisher:
        for number in range(100):
            for job in jobs:
                ids[job].append(publisher.append(job, event(str(number))))
        publisher.flush()
        for job in jobs:
            assert [entry[1:] for entry in stored if entry[0] == job] == list(enumerate(ids[job], 1))
    assert world.names(jobs[0]) == [str(number) for number in range(100)]
    assert world.names(jobs[-1]) == [str(number) for number in range(100)]


def test_a_given_id_is_kept_and_the_event_of_the_caller_is_not_changed(flavour: Flavour, world: World) -> None:
    job, given = world.job(), "01980000-0000-7000-8000-000000000001"
    with flavour.publisher(flavour.connect(world.server.address, world.key)) as publisher:
        assert publisher.append(job, event("a", id=given)) == given
        same = event("b")
        made = [publisher.append(job, same), publisher.append(job, same)]
    assert same.id == ""
    assert [event.id for event in world.events(job)] == [given, *made]


def test_a_killed_server_and_cut_connections_lose_and_repeat_nothing(
    flavour: Flavour, world: World, proxy: Proxy
) -> None:
    interruptions: list[MilepostError] = []
    jobs = [world.job() for _ in range(3)]
    names = [str(number) for number in range(300)]
    publisher = flavour.publisher(
        flavour.connect(proxy.address, world.key),
        timeout=5.0,
        on_interruption=lambda error, pause: interruptions.append(error),
    )
    with publisher:
        for name in names:
            for job in jobs:
                publisher.append(job, event(name))
            if name == "100":
                world.server.stop(signal.SIGKILL)
            if name == "200":
                world.server.start()
            if int(name) > 200 and int(name) % 20 == 0:
                proxy.cut()
    assert interruptions
    assert [world.names(job) for job in jobs] == [names] * 3


def test_a_stalled_connection_is_given_up_at_the_deadline(flavour: Flavour, world: World, proxy: Proxy) -> None:
    job = world.job()
    interruptions: list[MilepostError] = []

    def interrupted(error: MilepostError, pause: float) -> None:
        interruptions.append(error)
        proxy.flow()

    publisher = flavour.publisher(
        flavour.connect(proxy.address, world.key), timeout=1.0, on_interruption=interrupted
    )
    with publisher:
        publisher.append(job, event("a"))
        publisher.flush()
        proxy.stall()
        publisher.append(job, event("b"))
    assert interruptions[0].code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert world.names(job) == ["a", "b"]


def test_only_the_event_at_fault_is_refused(flavour: Flavour, world: World) -> None:
    job = world.job()
    refused: dict[str, tuple[milepost.Job, str | None, list[str]]] = {}

    def on_refused(job: milepost.Job, event: Any, error: MilepostError) -> None:
        refused[event.id] = (job, error.reason, [violation.field for violation in error.violations])

    channel = flavour.connect(world.server.address, world.key)
    with flavour.publisher(channel, on_refused=on_refused) as publisher:
        for number in range(5):
            publisher.append(job, event(str(number)))
        at_fault = publisher.append(job, event(UNSTORABLE))
        for number in range(5, 10):
            publisher.append(job, event(str(number)))
        unknown = publisher.append("01980000-0000-7000-8000-000000000001", event("a"))
    assert refused == {
        at_fault: (job, "FIELD_INVALID", ["events[0].name"]),
        unknown: ("01980000-0000-7000-8000-000000000001", "RESOURCE_NOT_FOUND", []),
    }
    assert world.names(job) == [str(number) for number in range(10)]


def test_without_a_callback_flush_raises_a_refusal_once(flavour: Flavour, world: World) -> None:
    job = world.job()
    publisher = flavour.publisher(flavour.connect(world.server.address, world.key))
    publisher.append(job, event(UNSTORABLE))
    publisher.append(job, event("b"))
    with pytest.raises(MilepostError) as caught:
        publisher.flush()
    assert caught.value.reason == "FIELD_INVALID"
    publisher.flush()
    publisher.append(job, event(UNSTORABLE))
    with pytest.raises(MilepostError):
        publisher.close()
    assert world.names(job) == ["b"]


def test_a_requested_cancellation_is_told_once_for_each_name_of_a_job(flavour: Flavour, world: World) -> None:
    told: list[tuple[milepost.Job, datetime]] = []
    new = world.new_job()
    by_provider = ProviderJobId(new.provider_job_id)
    job, other = world.create(new), world.job()
    channel = flavour.connect(world.server.address, world.key)
    publisher = flavour.publisher(channel, on_cancellation_requested=lambda *call: told.append(call))
    with publisher:
        for name in ("before", "after", "later"):
            for each in (job, by_provider, other):
                publisher.append(each, event(name))
            publisher.flush()
            if name == "before":
                assert told == []
                at = world.request_cancellation(job)
            else:
                assert sorted(told, key=str) == sorted([(job, at), (by_provider, at)], key=str)
    with flavour.publisher(channel, on_cancellation_requested=lambda *call: told.append(call)) as restarted:
        restarted.append(job, event("restarted"))
    assert told[2:] == [(job, at)]


@pytest.mark.parametrize("limit", [{"max_events": 5}, {"max_bytes": 5 * 60}])
def test_append_waits_while_the_publisher_holds_its_maximum(
    flavour: Flavour, world: World, proxy: Proxy, limit: dict[str, int]
) -> None:
    job = world.job()
    interrupted = threading.Event()
    publisher = flavour.publisher(
        flavour.connect(proxy.address, world.key),
        timeout=1.0,
        on_interruption=lambda *_: interrupted.set(),
        **limit,
    )
    proxy.stall()
    appended: list[str] = []

    def append() -> None:
        for number in range(20):
            publisher.append(job, event(f"{number:011}"))  # 53 bytes.
            appended.append(f"{number:011}")

    thread = threading.Thread(target=append)
    thread.start()
    while len(appended) < 5:
        assert interrupted.wait(60)
    interrupted.clear()
    assert interrupted.wait(60)
    assert len(appended) == 5
    proxy.flow()
    thread.join(60)
    publisher.close()
    assert world.names(job) == appended


def test_a_wrong_credential_fails_the_publisher(flavour: Flavour, world: World) -> None:
    publisher = flavour.publisher(flavour.connect(world.server.address, "mpk_wrong"))
    publisher.append(world.job(), event("a"))
    for method in (publisher.flush, lambda: publisher.append("a", event("b")), publisher.close):
        with pytest.raises(MilepostError) as caught:
            method()
        assert caught.value.reason == "CREDENTIAL_INVALID"


def test_an_exception_of_a_callback_fails_the_publisher(flavour: Flavour, world: World) -> None:
    def on_stored(job: milepost.Job, appended: AppendedEvent) -> None:
        raise LookupError(appended.id)

    publisher = flavour.publisher(flavour.connect(world.server.address, world.key), on_stored=on_stored)
    publisher.append(world.job(), event("a"))
    for method in (publisher.flush, publisher.close):
        with pytest.raises(LookupError):
            method()


def test_a_closed_channel_fails_the_publisher(flavour: Flavour, world: World, proxy: Proxy) -> None:
    channel = flavour.connect(proxy.address, world.key)
    publisher = flavour.publisher(channel)
    publisher.append(world.job(), event("a"))
    publisher.flush()
    proxy.stall()
    publisher.append(world.job(), event("b"))
    flavour.disconnect(channel)
    for method in (publisher.flush, publisher.close):
        with pytest.raises((ValueError, RuntimeError, grpc.aio.UsageError), match="closed"):
            method()


def test_a_closed_publisher_takes_no_event(flavour: Flavour, world: World) -> None:
    publisher = flavour.publisher(flavour.connect(world.server.address, world.key))
    publisher.close()
    publisher.close()
    with pytest.raises(RuntimeError):
        publisher.append("a", event("b"))


SYNC = """
import milepost
from milepost.v1.events_pb2 import NewEvent
publisher = milepost.Publisher(milepost.connect("127.0.0.1:1", "mpk_any"))
for _ in range(3):
    publisher.append("job", NewEvent(name="a"))
"""
ASYNC = """
import asyncio, milepost.aio
from milepost.v1.events_pb2 import NewEvent
async def main():
    publisher = milepost.aio.Publisher(milepost.aio.connect("127.0.0.1:1", "mpk_any"))
    for _ in range(3):
        await publisher.append("job", NewEvent(name="a"))
    await asyncio.sleep(0.1)
asyncio.run(main())
"""


@pytest.mark.parametrize("program", [SYNC, ASYNC])
def test_an_abandoned_publisher_says_what_is_lost(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert "3 events are lost" in done.stderr
    assert done.stdout == ""
