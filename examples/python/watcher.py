"""A watcher: prints the events of a job, from the first to the last.

    MILEPOST_API_KEY=mpk_... python watcher.py --job-id UUID

Ends by itself when the job closes: with exit code 0 if the job is complete,
otherwise with 1. If the server becomes unavailable, the watcher resumes the watch.
"""

import argparse
import logging
import sys
from collections.abc import Iterator

import grpc
from connection import Connection, detail, explain, pause
from google.protobuf.struct_pb2 import Struct
from google.rpc.error_details_pb2 import ErrorInfo
from milepost.v1.events_pb2 import Event, EventKind, WatchEventsRequest, WatchEventsResponse
from milepost.v1.jobs_pb2 import JOB_STATUS_COMPLETE, JobStatus, Progress

BAR_CELLS = 24


def watch(connection: Connection, request: WatchEventsRequest) -> Iterator[WatchEventsResponse]:
    """Yields every message of the watch, and resumes it after broken connections."""
    attempt = 0
    while True:
        try:
            for message in connection.events.WatchEvents(request, metadata=connection.metadata):
                attempt = 0
                # The status of the stream follows `end`: OK after the job is
                # closed, UNAVAILABLE if the server shuts down.
                yield message
                request.resume_token = message.resume_token
            return
        except grpc.RpcError as error:
            if not is_broken(error, request):
                raise
            attempt += 1
            pause(error, attempt)


def is_broken(error: grpc.RpcError, request: WatchEventsRequest) -> bool:
    """Whether the server or the connection failed, and not the watch. Whatever breaks a stream
    that had sent messages has no ErrorInfo; its code depends on the client and on proxies."""
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        return True
    return bool(request.resume_token) and detail(error, ErrorInfo) is None


def bar(progress: Progress) -> str:
    full = BAR_CELLS * progress.percent // 100
    return f"[{'█' * full}{'░' * (BAR_CELLS - full)}] {progress.percent:>3} %"


def facts(metadata: Struct) -> str:
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in sorted(metadata.items())
    )


def line(event: Event) -> str:
    kind = EventKind.Name(event.kind).removeprefix("EVENT_KIND_").lower()
    text = f"{bar(event.progress)}  {event.sequence:>3} {kind:<8} {event.name or event.step_name}"
    return f"{text}  ({facts(event.metadata)})" if event.metadata.fields else text


def main() -> int:
    parser = argparse.ArgumentParser(description="Watch a job until it closes.")
    job = parser.add_mutually_exclusive_group(required=True)
    job.add_argument("--job-id", help="the job's id")
    job.add_argument("--provider-job-id", help="the provider's id of the job; only this provider may use it")
    arguments = parser.parse_args()

    status = None
    with Connection() as connection:
        request = WatchEventsRequest(job_id=arguments.job_id, provider_job_id=arguments.provider_job_id)
        try:
            for message in watch(connection, request):
                match message.WhichOneof("message"):
                    case "events":
                        for event in message.events.events:
                            print(line(event), flush=True)
                    case "caught_up":
                        print("--- live ---", flush=True)
                    case "end":
                        status = message.end.job.status
        except grpc.RpcError as error:
            print(explain(error), file=sys.stderr)
            return 1
    if status is None:
        print("the watch ended without an end message; run the watcher again", file=sys.stderr)
        return 1
    print(JobStatus.Name(status).removeprefix("JOB_STATUS_").lower())
    return 0 if status == JOB_STATUS_COMPLETE else 1


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    sys.exit(main())
