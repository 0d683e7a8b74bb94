"""A watcher: prints the events of a job, from the first to the last.

    MILEPOST_API_KEY=mpk_... python watcher.py --job-id UUID

Ends by itself when the job closes: with exit code 0 if the job is complete,
otherwise with 1. If the server becomes unavailable, the watcher resumes the watch.
"""

import argparse
import sys

import milepost
from connection import connect, interrupted
from google.protobuf.struct_pb2 import Struct
from milepost.v1.events_pb2 import Event, EventKind
from milepost.v1.jobs_pb2 import JOB_STATUS_COMPLETE, JobStatus, Progress

BAR_CELLS = 24


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
    if event.HasField("step_percent"):
        text += f", {event.step_percent} %"
    return f"{text}  ({facts(event.metadata)})" if event.metadata.fields else text


def main() -> int:
    parser = argparse.ArgumentParser(description="Watch a job until it closes.")
    job = parser.add_mutually_exclusive_group(required=True)
    job.add_argument("--job-id", help="the job's id")
    job.add_argument("--provider-job-id", help="the provider's id of the job; only this provider may use it")
    arguments = parser.parse_args()

    with connect() as channel:
        watch = milepost.watch(
            channel,
            job_id=arguments.job_id,
            provider_job_id=arguments.provider_job_id,
            on_caught_up=lambda _: print("--- live ---", flush=True),
            on_interruption=interrupted,
        )
        try:
            for event in watch:
                print(line(event), flush=True)
        except milepost.MilepostError as error:
            print(error, file=sys.stderr)
            return 1
    print(JobStatus.Name(watch.end.status).removeprefix("JOB_STATUS_").lower())
    return 0 if watch.end.status == JOB_STATUS_COMPLETE else 1


if __name__ == "__main__":
    sys.exit(main())
