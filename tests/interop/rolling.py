"""Appends, reads, publishes and watches while replicas are replaced. Calls have no
retries but those of the service config. Streams that end are opened again.

    MILEPOST_API_KEY=mpk_... python rolling.py TARGET SERVICE_CONFIG JOB_ID...

Runs until its standard input ends. Then prints as JSON every failure and, for each job,
the ids of the acknowledged events in the order of their sequences.
"""

import collections
import itertools
import json
import os
import sys
import threading
import time
import traceback
import uuid
from pathlib import Path

import grpc
from google.protobuf.duration_pb2 import Duration
from milepost.v1 import events_pb2_grpc, jobs_pb2_grpc
from milepost.v1.events_pb2 import (
    EVENT_KIND_INFO,
    AllJobs,
    AppendEventsRequest,
    ListEventsRequest,
    NewEvent,
    PublishEventsRequest,
    WatchEventsRequest,
)
from milepost.v1.jobs_pb2 import GetJobRequest, ListJobsRequest

WATCHERS = 4
BATCH_EVENTS = 5
IN_FLIGHT = 8
CATCH_UP_SECONDS = 20

METADATA = [("authorization", f"Bearer {os.environ['MILEPOST_API_KEY']}")]
target, service_config, *jobs = sys.argv[1:]
channel = grpc.insecure_channel(
    target,
    options=[
        ("grpc.service_config", Path(service_config).read_text()),
        # The target is a list of addresses, which is not a valid authority.
        ("grpc.default_authority", "milepost"),
    ],
)
events_api = events_pb2_grpc.EventServiceStub(channel)
jobs_api = jobs_pb2_grpc.JobServiceStub(channel)

stopping = threading.Event()
failures: list[str] = []
# For each job, the event id of each sequence.
acknowledged: dict[str, dict[int, str]] = collections.defaultdict(dict)


def acknowledge(job: str, events) -> None:
    for event in events:
        if acknowledged[job].setdefault(event.sequence, event.id) != event.id:
            failures.append(f"{job} has two events {event.sequence}")


def new_events(count: int) -> list[NewEvent]:
    return [NewEvent(id=str(uuid.uuid4()), kind=EVENT_KIND_INFO, name="rolling") for _ in range(count)]


def write(job: str) -> None:
    while not stopping.is_set():
        request = AppendEventsRequest(job_id=job, events=new_events(1))
        acknowledge(job, events_api.AppendEvents(request, metadata=METADATA).events)


def read(job: str) -> None:
    while not stopping.is_set():
        jobs_api.GetJob(GetJobRequest(job_id=job), metadata=METADATA)
        jobs_api.ListJobs(ListJobsRequest(), metadata=METADATA)
        events_api.ListEvents(ListEventsRequest(job_id=job, page_size=1), metadata=METADATA)


def publish(job: str) -> None:
    """Sends each batch until it is answered, in order, over one stream after the other."""
    unanswered: dict[str, list[NewEvent]] = {}
    numbers = itertools.count()

    def batches(answered: threading.Semaphore, ended: threading.Event):
        resent = list(unanswered.items())
        while resent or not stopping.is_set():
            answered.acquire()
            if ended.is_set():
                return
            if resent:
                batch_id, events = resent.pop(0)
            else:
                batch_id, events = str(next(numbers)), new_events(BATCH_EVENTS)
                unanswered[batch_id] = events
            yield PublishEventsRequest(batch_id=batch_id, job_id=job, events=events)

    while unanswered or not stopping.is_set():
        answered, ended = threading.Semaphore(IN_FLIGHT), threading.Event()
        try:
            requests = batches(answered, ended)
            stream = events_api.PublishEvents(requests, metadata=METADATA, wait_for_ready=True)
            for answer in stream:
                if answer.WhichOneof("outcome") != "appended":
                    failures.append(f"a batch was refused: {answer}")
                acknowledge(job, answer.appended.events)
                del unanswered[answer.batch_id]
                answered.release()
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
        finally:
            ended.set()
            answered.release()


class Watcher:
    def __init__(self) -> None:
        self.received = {job: [] for job in jobs}

    def run(self) -> None:
        # A heartbeat makes a watcher check is_done() even if no further event comes.
        heartbeat = Duration(seconds=5)
        request = WatchEventsRequest(all_jobs=AllJobs(), heartbeat_interval=heartbeat)
        while not self.is_done():
            try:
                self.stream = events_api.WatchEvents(request, metadata=METADATA)
                for message in self.stream:
                    for event in message.events.events:
                        self.received[event.job_id].append((event.sequence, event.id))
                    request.resume_token = message.resume_token
                    if self.is_done():
                        return
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise

    def is_done(self) -> bool:
        return all_written.is_set() and all(
            len(self.received[job]) >= len(acknowledged[job]) for job in jobs
        )


def record_failure(work) -> None:
    try:
        work()
    except Exception:
        failures.append(traceback.format_exc())
        print(failures[-1], file=sys.stderr, flush=True)


def start(work, *arguments) -> threading.Thread:
    thread = threading.Thread(target=record_failure, args=[lambda: work(*arguments)], daemon=True)
    thread.start()
    return thread


all_written = threading.Event()
watchers = [Watcher() for _ in range(WATCHERS)]
watching = [start(watcher.run) for watcher in watchers]
published, *written = jobs
writing = [start(write, job) for job in written]
writing += [start(publish, published), start(read, written[0])]
sys.stdin.read()
stopping.set()
for thread in writing:
    thread.join(CATCH_UP_SECONDS)
    if thread.is_alive():
        failures.append("a writer does not end")
all_written.set()
deadline = time.monotonic() + CATCH_UP_SECONDS
for thread, watcher in zip(watching, watchers, strict=True):
    thread.join(max(0.0, deadline - time.monotonic()))
    for job in jobs:
        if watcher.received[job] != sorted(acknowledged[job].items()):
            counts = f"{len(watcher.received[job])} of {len(acknowledged[job])}"
            failures.append(f"{job}: a watcher received {counts} events")
log = {job: [id for _, id in sorted(events.items())] for job, events in acknowledged.items()}
json.dump({"failures": failures, "acknowledged": log}, sys.stdout)
sys.stdout.flush()
# A normal exit would wait for the streams that are still open.
os._exit(0)
