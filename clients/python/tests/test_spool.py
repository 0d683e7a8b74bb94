"""The spool: providers that are killed, a server that is away, full disks and damaged files."""

from __future__ import annotations

import base64
import json
import resource
import struct
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import milepost
import pytest
from milepost import MilepostError, ProviderJobId, Publisher, Spool, SpoolFull, SpoolLocked, _spool
from milepost.v1.events_pb2 import AppendEventsRequest, NewEvent
from milepost.v1.jobs_pb2 import CreateJobRequest
from support import World, event

NOBODY = "127.0.0.1:1"
"""An address where no server is."""


def offline(path: Path, **settings: Any) -> Publisher:
    return Publisher(milepost.connect(NOBODY, "mpk_any"), spool=Spool(path, **settings))


def deliver(world: World, path: Path) -> list[str | None]:
    """Delivers what is in the spool, and returns the reasons of refusals."""
    reasons: list[str | None] = []
    publisher = Publisher(
        world.channel, spool=Spool(path), on_refused=lambda job, content, error: reasons.append(error.reason)
    )
    with publisher:
        publisher.flush(timeout=60)
    return reasons


def segments(path: Path) -> list[Path]:
    return sorted(path.glob("*.spool"))


PROVIDER = """
import sys
import milepost
from milepost.v1.events_pb2 import EVENT_KIND_INFO, NewEvent
from milepost.v1.jobs_pb2 import CreateJobRequest
path, run, customer, tag, *jobs = sys.argv[1:]
with milepost.Publisher(milepost.connect("127.0.0.1:1", "mpk_any"), spool=milepost.Spool(path)) as publisher:
    for job in jobs:
        publisher.create_job(
            CreateJobRequest(provider_job_id=job, customer_id=customer, configuration_tag=tag)
        )
    for number in range(1_000_000):
        for job in jobs:
            publisher.append(milepost.ProviderJobId(job), NewEvent(kind=EVENT_KIND_INFO, name=f"{run}.{number}"))
        print(number, flush=True)
"""


def test_what_a_killed_provider_appended_without_a_server_is_delivered_once_and_in_order(
    world: World, tmp_path: Path
) -> None:
    new = [world.new_job() for _ in range(3)]
    jobs = [request.provider_job_id for request in new]
    appended = []
    for run in range(3):
        arguments = [str(tmp_path), str(run), world.customer_id, new[0].configuration_tag, *jobs]
        provider = subprocess.Popen([sys.executable, "-c", PROVIDER, *arguments], stdout=subprocess.PIPE, text=True)
        assert provider.stdout
        lines = [provider.stdout.readline() for _ in range(400)]
        provider.kill()
        lines += provider.stdout.readlines()
        provider.wait()
        provider.stdout.close()
        appended.append(len([line for line in lines if line.endswith("\n")]))
    assert min(appended) >= 400
    assert deliver(world, tmp_path) == []
    for job in jobs:
        names = world.names(ProviderJobId(job))
        for run, acknowledged in enumerate(appended):
            of_run = [name for name in names if name.startswith(f"{run}.")]
            # The last one may have been written before the kill, and acknowledged by nobody.
            assert of_run == [f"{run}.{number}" for number in range(len(of_run))]
            assert len(of_run) in (acknowledged, acknowledged + 1)


def test_append_and_create_job_wait_for_no_server_and_a_later_publisher_delivers(
    world: World, tmp_path: Path
) -> None:
    new = world.new_job()
    job = ProviderJobId(new.provider_job_id)
    with offline(tmp_path) as publisher:
        publisher.create_job(new)
        ids = [publisher.append(job, event(str(number))) for number in range(1_000)]
        with pytest.raises(TimeoutError):
            publisher.flush(timeout=0.1)
    assert deliver(world, tmp_path) == []
    assert [event.id for event in world.events(job)] == ids
    # What is delivered is not sent again, and it would be stored once if it were.
    (tmp_path / "delivered").write_text("0")
    assert deliver(world, tmp_path) == []
    assert [event.id for event in world.events(job)] == ids


def test_one_publisher_at_a_time_uses_a_spool(tmp_path: Path) -> None:
    with offline(tmp_path):
        with pytest.raises(SpoolLocked):
            Spool(tmp_path)
        program = f"import milepost; milepost.Spool({str(tmp_path)!r})"
        other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert "SpoolLocked" in other.stderr
    Spool(tmp_path).close()


def test_a_full_spool_refuses_events_until_others_are_delivered(world: World, tmp_path: Path) -> None:
    job = world.job()
    names = []
    with offline(tmp_path, max_bytes=1_000) as publisher, pytest.raises(SpoolFull):
        for number in range(1_000):
            publisher.append(job, event(str(number)))
            names.append(str(number))
    assert sum(file.stat().st_size for file in segments(tmp_path)) <= 1_000
    with Publisher(world.channel, spool=Spool(tmp_path, max_bytes=1_000)) as publisher:
        publisher.flush(timeout=60)
        publisher.append(job, event("later"))
        publisher.flush(timeout=60)
    assert world.names(job) == [*names, "later"]


def test_a_full_disk_refuses_events_and_leaves_the_spool_usable(world: World, tmp_path: Path) -> None:
    job = world.job()
    names = []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with offline(tmp_path) as publisher:
        # Like a full disk, a file that reaches the limit takes a part of a record.
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, limits[1]))
        try:
            with pytest.raises(SpoolFull):
                for number in range(1_000):
                    publisher.append(job, event(str(number)))
                    names.append(str(number))
                    size = segments(tmp_path)[0].stat().st_size
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert segments(tmp_path)[0].stat().st_size == size
        publisher.append(job, event("later"))
    assert deliver(world, tmp_path) == []
    assert world.names(job) == [*names, "later"]


def test_what_the_server_refuses_is_moved_to_rejected(world: World, tmp_path: Path) -> None:
    job, bad, worse = world.job(), event("x" * 300), event("nan")
    worse.metadata["ratio"] = float("nan")
    orphan = CreateJobRequest(provider_job_id="a", customer_id="nobody", configuration_tag="none")
    with offline(tmp_path) as publisher:
        bad.id = publisher.append(job, bad)
        publisher.append(job, event("good"))
        worse.id = publisher.append(job, worse)
        publisher.create_job(orphan)
        publisher.append(ProviderJobId("a"), event("orphan"))
    refused: list[tuple[milepost.Job, NewEvent | CreateJobRequest, str | None]] = []
    publisher = Publisher(
        world.channel,
        spool=Spool(tmp_path),
        on_refused=lambda job, content, error: refused.append((job, content, error.reason)),
    )
    with publisher:
        publisher.flush(timeout=60)
    assert world.names(job) == ["good"]
    invalid = [entry for entry in refused if entry[0] == job]
    assert [(entry[1], entry[2]) for entry in invalid[:1]] == [(bad, "FIELD_INVALID")]
    assert [entry[2] for entry in invalid] == ["FIELD_INVALID"] * 2
    assert [(entry[1] == orphan, entry[2]) for entry in refused if entry[0] == ProviderJobId("a")] == [
        (True, "FIELD_INVALID"),
        (False, "RESOURCE_NOT_FOUND"),
    ]
    files = [json.loads(file.read_text()) for file in sorted((tmp_path / "rejected").glob("*.json"))]
    assert [file["code"] for file in files] == ["INVALID_ARGUMENT"] * 3 + ["NOT_FOUND"]
    assert [file["kind"] for file in files] == [
        "AppendEventsRequest",
        "AppendEventsRequest",
        "CreateJobRequest",
        "AppendEventsRequest",
    ]
    assert list(AppendEventsRequest.FromString(base64.b64decode(files[0]["request"])).events) == [bad]
    assert CreateJobRequest.FromString(base64.b64decode(files[2]["request"])) == orphan
    assert files[0]["reason"] == "FIELD_INVALID"
    assert files[0]["details"][0]["field"] == "events[0].name"
    assert worse.id in files[1]["readable"]


def test_each_publisher_of_a_spool_tells_a_requested_cancellation_once(world: World, tmp_path: Path) -> None:
    new = world.new_job()
    at, job = world.request_cancellation(world.create(new)), ProviderJobId(new.provider_job_id)
    told: list[tuple[milepost.Job, datetime]] = []
    with offline(tmp_path) as publisher:
        # The answer to it says so as well.
        publisher.create_job(new)
    for run in (1, 2):
        publisher = Publisher(
            world.channel, spool=Spool(tmp_path), on_cancellation_requested=lambda *call: told.append(call)
        )
        with publisher:
            publisher.flush(timeout=60)
            assert told == [(job, at)]
            publisher.append(job, event("a"))
            publisher.append(job, event("b"))
            publisher.flush(timeout=60)
        assert told == [(job, at)] * run


def test_a_wrong_credential_does_not_fail_a_publisher_with_a_spool(world: World, tmp_path: Path) -> None:
    job = world.job()
    errors: list[MilepostError] = []
    with Publisher(
        milepost.connect(world.server.address, "mpk_wrong"),
        spool=Spool(tmp_path),
        on_interruption=lambda error, pause: errors.append(error),
    ) as publisher:
        publisher.append(job, event("a"))
        while len(errors) < 3:
            publisher.append(job, event("b"))
    assert {error.reason for error in errors} == {"CREDENTIAL_INVALID"}
    assert deliver(world, tmp_path) == []
    assert world.names(job)[:2] == ["a", "b"]


def written(path: Path, job: str, names: list[str]) -> list[int]:
    """Appends events without a server, and returns where each record ends."""
    with offline(path) as publisher:
        ends = []
        for name in names:
            publisher.append(job, event(name))
            ends.append(segments(path)[-1].stat().st_size)
    return ends


@pytest.mark.parametrize("lost", [1, 20])
@pytest.mark.parametrize("garbage", [b"", b"\0" * 100])
def test_a_torn_tail_is_cut(world: World, tmp_path: Path, lost: int, garbage: bytes) -> None:
    job = world.job()
    ends = written(tmp_path, job, ["a", "b", "c"])
    content = segments(tmp_path)[0].read_bytes()
    segments(tmp_path)[0].write_bytes(content[: -lost if not garbage else ends[1]] + garbage)
    with offline(tmp_path) as publisher:
        assert segments(tmp_path)[0].stat().st_size == ends[1]
        publisher.append(job, event("d"))
    assert deliver(world, tmp_path) == []
    assert world.names(job) == ["a", "b", "d"]
    assert list((tmp_path / "rejected").iterdir()) == []


def damaged(path: Path) -> dict[int, bytes]:
    """The damaged bytes in `rejected`, by their offsets."""
    found = {int(file.stem): json.loads(file.read_text()) for file in (path / "rejected").iterdir()}
    assert all((file["code"], file["kind"]) == ("DATA_LOSS", "damaged") for file in found.values())
    return {offset: base64.b64decode(file["request"]) for offset, file in found.items()}


def flip_content(data: bytearray, start: int, end: int) -> None:
    data[end - 1] ^= 0xFF


def flip_length(data: bytearray, start: int, end: int) -> None:
    data[start] ^= 0xFF


def overwrite(data: bytearray, start: int, end: int) -> None:
    data[start:end] = b"\0" * (end - start)


@pytest.mark.parametrize("damage", [flip_content, flip_length, overwrite])
def test_a_damaged_record_is_moved_to_rejected_and_the_others_are_delivered(
    world: World, tmp_path: Path, damage: Callable[[bytearray, int, int], None]
) -> None:
    job = world.job()
    ends = written(tmp_path, job, ["a", "b", "c"])
    data = bytearray(segments(tmp_path)[0].read_bytes())
    damage(data, ends[0], ends[1])
    segments(tmp_path)[0].write_bytes(data)
    assert deliver(world, tmp_path) == []
    assert world.names(job) == ["a", "c"]
    assert damaged(tmp_path) == {ends[0]: data[ends[0] : ends[1]]}
    assert (tmp_path / "delivered").read_text() == str(ends[2])


def test_a_damaged_last_record_that_was_written_to_its_end_is_not_cut(world: World, tmp_path: Path) -> None:
    job = world.job()
    ends = written(tmp_path, job, ["a", "b"])
    data = bytearray(segments(tmp_path)[0].read_bytes())
    flip_content(data, *ends)
    segments(tmp_path)[0].write_bytes(data)
    assert deliver(world, tmp_path) == []
    assert world.names(job) == ["a"]
    assert damaged(tmp_path) == {ends[0]: data[ends[0] :]}


def test_a_record_within_a_damaged_one_is_not_delivered(world: World, tmp_path: Path) -> None:
    job = world.job()
    written(tmp_path / "inner", job, ["inner"])
    inner = segments(tmp_path / "inner")[0].read_bytes()
    outer = struct.pack("<II", len(inner) + 1, 0) + b"\x02" + inner
    ends = written(tmp_path, job, ["a", "b"])
    data = segments(tmp_path)[0].read_bytes()
    segments(tmp_path)[0].write_bytes(data[: ends[0]] + outer + data[ends[0] :])
    assert deliver(world, tmp_path) == []
    assert world.names(job) == ["a", "b"]


def test_delivered_segments_are_deleted(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_spool, "_SEGMENT_BYTES", 1_000)
    job = world.job()
    names = [str(number) for number in range(200)]
    written(tmp_path, job, names)
    files = segments(tmp_path)
    assert len(files) > 5
    total = sum(file.stat().st_size for file in files)
    assert int(files[-1].stem) + files[-1].stat().st_size == total
    assert deliver(world, tmp_path) == []
    assert world.names(job) == names
    assert segments(tmp_path) == files[-1:]
    assert (tmp_path / "delivered").read_text() == str(total)


def test_a_part_of_a_segment_that_is_missing_is_told(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_spool, "_SEGMENT_BYTES", 1)
    job = world.job()
    written(tmp_path, job, ["a", "b", "c"])
    emptied = segments(tmp_path)[1]
    emptied.write_bytes(b"")
    assert deliver(world, tmp_path) == []
    assert world.names(job) == ["a", "c"]
    assert damaged(tmp_path) == {int(emptied.stem): b""}


def test_records_that_a_crash_of_the_system_lost_do_not_hide_later_ones(world: World, tmp_path: Path) -> None:
    job = world.job()
    written(tmp_path, job, ["a", "b"])
    assert deliver(world, tmp_path) == []
    # `delivered` has reached the disk, and the records have not.
    segments(tmp_path)[0].write_bytes(b"")
    written(tmp_path, job, ["c"])
    assert segments(tmp_path)[-1].stem.lstrip("0") == (tmp_path / "delivered").read_text()
    assert deliver(world, tmp_path) == []
    assert world.names(job) == ["a", "b", "c"]


def test_the_window_of_a_spool_is_bounded(tmp_path: Path) -> None:
    with Publisher(milepost.connect(NOBODY, "mpk_any"), spool=Spool(tmp_path), max_events=10) as publisher:
        for number in range(1_000):
            publisher.append("01980000-0000-7000-8000-000000000001", event(str(number)))
            assert publisher._outbox.events <= 10


def test_create_job_needs_a_spool(world: World) -> None:
    with Publisher(world.channel) as publisher, pytest.raises(RuntimeError):
        publisher.create_job(world.new_job())


def test_fsync_writes_each_record_to_the_disk(world: World, tmp_path: Path) -> None:
    job = world.job()
    with Publisher(world.channel, spool=Spool(tmp_path, fsync=True), on_refused=lambda *_: None) as publisher:
        publisher.append(job, event("a"))
        publisher.append(job, event("x" * 300))
        publisher.flush(timeout=60)
    assert world.names(job) == ["a"]
