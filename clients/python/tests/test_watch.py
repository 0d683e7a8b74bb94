"""Watches against a real server that is killed, drained, cut off and stalled."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from flavours import Flavour
from milepost import MilepostError
from milepost.v1.auth_pb2 import API_KEY_SCOPE_READ, CreateApiKeyRequest, ExpireApiKeyRequest
from milepost.v1.auth_pb2_grpc import AuthServiceStub
from milepost.v1.events_pb2 import EVENT_KIND_COMPLETE, AllJobs, AppendEventsRequest, CaughtUp, NewEvent
from milepost.v1.events_pb2_grpc import EventServiceStub
from milepost.v1.jobs_pb2 import JOB_STATUS_COMPLETE
from support import COMPLETE, STEP, Proxy, World, event, progress


def append(world: World, job: str, *events: NewEvent) -> None:
    EventServiceStub(world.channel).AppendEvents(
        AppendEventsRequest(job_id=job, events=events), wait_for_ready=True
    )


class Reader:
    """Iterates over a watch in a thread."""

    def __init__(self, watch: Any) -> None:
        self.names: list[str] = []
        self.error: Exception | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._read, args=(watch,))
        self._thread.start()

    def _read(self, watch: Any) -> None:
        try:
            for event in watch:
                with self._changed:
                    self.names.append(event.name)
                    self._changed.notify_all()
        except Exception as error:
            self.error = error

    def wait_for(self, name: str) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: name in self.names, 60), self.names

    def end(self) -> list[str]:
        self._thread.join(50)
        assert not self._thread.is_alive()
        if self.error:
            raise self.error
        return self.names


def test_a_watch_hands_out_past_and_new_events_and_ends_with_the_job(flavour: Flavour, world: World) -> None:
    job = world.job()
    append(world, job, event("a"), progress("b", 40))
    story: list[object] = []

    def caught_up(message: CaughtUp) -> None:
        [step] = message.steps
        story.append(("caught up", message.job.last_sequence, step.step_tag, step.percent))
        append(world, job, event("c"), COMPLETE)

    watch = flavour.watch(
        flavour.connect(world.server.address, world.key), job_id=job, on_caught_up=caught_up
    )
    for received in watch:
        story.append(received.name)
        if received.HasField("step_percent"):
            story.append((received.step_percent, received.progress.percent))
    assert story == ["a", "b", (40, 40), ("caught up", 2, STEP, 40), "c", "complete"]
    assert (watch.end.last_sequence, watch.end.status) == (4, JOB_STATUS_COMPLETE)
    assert list(watch) == []


@pytest.mark.parametrize(
    ("start", "expected"),
    [({"after_sequence": 1}, ["b", "complete"]), ({"kinds": [EVENT_KIND_COMPLETE]}, ["complete"])],
)
def test_a_watch_starts_where_it_is_told(
    flavour: Flavour, world: World, start: dict[str, Any], expected: list[str]
) -> None:
    job = world.job()
    append(world, job, event("a"), event("b"), COMPLETE)
    channel = flavour.connect(world.server.address, world.key)
    assert [event.name for event in flavour.watch(channel, job_id=job, **start)] == expected


def test_a_resume_token_covers_messages_whose_events_were_all_processed(flavour: Flavour, world: World) -> None:
    job = world.job()
    append(world, job, event("a"), event("b"), event("c"))
    channel = flavour.connect(world.server.address, world.key)
    first = flavour.watch(channel, job_id=job)
    for received in first:
        if received.name == "b":
            break
    # The three events came in one message, whose last event was not handed out.
    assert first.resume_token is None
    caught_up = threading.Event()
    second = flavour.watch(channel, job_id=job, on_caught_up=lambda _: caught_up.set())
    reader = Reader(second)
    assert caught_up.wait(60)
    second.close()
    assert reader.end() == ["a", "b", "c"]
    append(world, job, event("d"), COMPLETE)
    third = flavour.watch(channel, job_id=job, resume_token=second.resume_token)
    assert [received.name for received in third] == ["d", "complete"]
    # A later iteration of the same watch goes on.
    assert [received.name for received in first] == ["c", "d", "complete"]


def kill(world: World, proxy: Proxy) -> None:
    world.server.stop(signal.SIGKILL)
    world.server.start()


def drain(world: World, proxy: Proxy) -> None:
    world.server.stop(signal.SIGTERM)
    world.server.start()


def cut(world: World, proxy: Proxy) -> None:
    proxy.cut()


def stall(world: World, proxy: Proxy) -> None:
    proxy.stall()
    threading.Timer(2, proxy.flow).start()


@pytest.mark.parametrize("fault", [kill, drain, cut, stall])
def test_every_event_arrives_once_and_in_order_after_a_fault(
    flavour: Flavour, world: World, proxy: Proxy, fault: Callable[[World, Proxy], None]
) -> None:
    job = world.job()
    interruptions: list[MilepostError] = []
    watch = flavour.watch(
        flavour.connect(proxy.address, world.key),
        job_id=job,
        on_interruption=lambda error, pause: interruptions.append(error),
    )
    watch._silence_seconds = 1.0  # Heartbeats do not come that often.
    reader = Reader(watch)
    for round in range(3):
        append(world, job, *(event(f"{round}.{number}") for number in range(3)))
        reader.wait_for(f"{round}.2")
        fault(world, proxy)
    append(world, job, COMPLETE)
    assert reader.end() == [f"{round}.{number}" for round in range(3) for number in range(3)] + ["complete"]
    assert interruptions


def test_time_in_which_nothing_is_read_is_not_silence(flavour: Flavour, world: World) -> None:
    job = world.job()
    append(world, job, event("a"))
    interruptions: list[MilepostError] = []
    watch = flavour.watch(
        flavour.connect(world.server.address, world.key),
        job_id=job,
        on_interruption=lambda error, pause: interruptions.append(error),
    )
    watch._silence_seconds = 2.0
    for received in watch:
        if received.name == "a":
            time.sleep(3)
            append(world, job, COMPLETE)
    assert interruptions == []


def test_silence_of_an_open_connection_interrupts_a_watch(flavour: Flavour, world: World, proxy: Proxy) -> None:
    job = world.job()
    append(world, job, event("a"))
    interruptions: list[MilepostError] = []

    def interrupted(error: MilepostError, pause: float) -> None:
        interruptions.append(error)
        proxy.flow()

    watch = flavour.watch(flavour.connect(proxy.address, world.key), job_id=job, on_interruption=interrupted)
    watch._silence_seconds = 1.0
    reader = Reader(watch)
    reader.wait_for("a")
    proxy.stall()
    append(world, job, COMPLETE)
    assert reader.end() == ["a", "complete"]
    assert interruptions[0].message == "no message for 1 s"


def test_a_loop_that_is_left_ends_its_call(flavour: Flavour, world: World) -> None:
    job = world.job()
    append(world, job, event("a"))
    channel = flavour.connect(world.server.address, world.key)
    interruptions: list[MilepostError] = []
    watches = []  # The garbage collector would end calls as well.
    for _ in range(3 * world.server.STREAMS):
        watch = flavour.watch(channel, job_id=job, on_interruption=lambda error, _: interruptions.append(error))
        watches.append(watch)
        for _ in watch:
            break
    assert interruptions == []
    for thread in threading.enumerate():
        if thread.name == "milepost-watch":
            thread.join(10)
            assert not thread.is_alive()


def test_a_watch_of_all_jobs_ends_when_it_is_closed(flavour: Flavour, world: World) -> None:
    caught_up = threading.Event()
    watch = flavour.watch(
        flavour.connect(world.server.address, world.key),
        all_jobs=AllJobs(),
        from_now=True,
        heartbeat_interval=60,  # No heartbeat ends the wait.
        on_caught_up=lambda message: None if message.HasField("job") else caught_up.set(),
    )
    reader = Reader(watch)
    assert caught_up.wait(60)
    append(world, world.job(), event("a"))
    reader.wait_for("a")
    time.sleep(0.5)  # By then it most likely waits for the next message.
    watch.close()
    assert reader.end() == ["a"]
    assert list(watch) == []


def test_a_closed_channel_ends_a_watch(flavour: Flavour, world: World) -> None:
    channel = flavour.connect(world.server.address, world.key)
    job = world.job()
    append(world, job, event("a"))
    reader = Reader(flavour.watch(channel, job_id=job))
    reader.wait_for("a")
    flavour.disconnect(channel)
    with pytest.raises((ValueError, grpc.aio.UsageError), match="closed"):
        reader.end()


def test_a_wrong_credential_ends_a_watch(flavour: Flavour, world: World) -> None:
    watch = flavour.watch(flavour.connect(world.server.address, "mpk_wrong"), job_id=world.job())
    with pytest.raises(MilepostError) as caught:
        list(watch)
    assert caught.value.code is grpc.StatusCode.UNAUTHENTICATED
    assert caught.value.reason == "CREDENTIAL_INVALID"
    assert isinstance(caught.value.__cause__, grpc.RpcError)


def test_a_revoked_credential_ends_a_watch_after_its_events(flavour: Flavour, world: World) -> None:
    job = world.job()
    append(world, job, event("a"))
    keys = AuthServiceStub(world.session)
    key = keys.CreateApiKey(CreateApiKeyRequest(scopes=[API_KEY_SCOPE_READ]))
    reader = Reader(flavour.watch(flavour.connect(world.server.address, key.secret), job_id=job))
    reader.wait_for("a")
    keys.ExpireApiKey(ExpireApiKeyRequest(api_key_id=key.api_key.id))
    with pytest.raises(MilepostError) as caught:
        reader.end()
    assert caught.value.reason == "CREDENTIAL_INVALID"
    assert reader.names == ["a"]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"job_id": "a", "all_jobs": AllJobs()},
        {"job_id": "a", "from_now": True, "after_sequence": 0},
        {"job_id": "a", "heartbeat_interval": 4},
    ],
)
def test_arguments_that_contradict_are_refused(
    flavour: Flavour, world: World, arguments: dict[str, Any]
) -> None:
    channel = flavour.connect(world.server.address, world.key)
    with pytest.raises(ValueError):
        flavour.watch(channel, **arguments)
