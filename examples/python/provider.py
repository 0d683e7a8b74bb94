"""A provider: analyses a CT slice for a customer and appends its progress to milepost.

    MILEPOST_API_KEY=mpk_... python provider.py --provider-job-id scan-1 --customer-id UUID

The publisher makes the id of every event. If the connection breaks, it sends the
same events again with the same ids, and each event is stored once.

If the customer asks to stop, the provider ends the analysis and closes the job.

The analysis takes a moment only. A pause before each event makes it long enough to
be watched, and to see what happens if the server is killed meanwhile.
"""

import argparse
import sys
import threading
import time
from datetime import datetime

import grpc
import milepost
from connection import connect, interrupted
from ct import Done, Note, UnderWay, analyse
from google.protobuf.timestamp_pb2 import Timestamp
from milepost.v1.configurations_pb2 import (
    METADATA_KIND_LINK,
    METADATA_KIND_NUMBER,
    MetadataConfiguration,
    RegisterJobConfigurationRequest,
    StepConfiguration,
)
from milepost.v1.configurations_pb2_grpc import ConfigurationServiceStub
from milepost.v1.events_pb2 import (
    EVENT_KIND_COMPLETE,
    EVENT_KIND_ERROR,
    EVENT_KIND_INFO,
    EVENT_KIND_PROGRESS,
    EVENT_KIND_STEP,
    AppendedEvent,
    NewEvent,
)
from milepost.v1.jobs_pb2 import CloseJobRequest, CreateJobRequest, Job
from milepost.v1.jobs_pb2_grpc import JobServiceStub

CALL_SECONDS = 30.0


def number(name: str, units: str) -> MetadataConfiguration:
    return MetadataConfiguration(name=name, kind=METADATA_KIND_NUMBER, units=units)


def text(name: str) -> MetadataConfiguration:
    return MetadataConfiguration(name=name)


def link(name: str) -> MetadataConfiguration:
    return MetadataConfiguration(name=name, kind=METADATA_KIND_LINK)


# The points of a step are its expected effort, relative to the other steps.
CONFIGURATION = RegisterJobConfigurationRequest(
    tag="ct-slice-analysis",
    name="CT slice analysis",
    version="1.0.0",
    steps=[
        StepConfiguration(
            tag="load",
            name="Load the slice",
            points=20,
            metadata=[
                number("rows", "px"),
                number("columns", "px"),
                number("thickness", "mm"),
                text("scanner"),
                link("source"),
            ],
        ),
        StepConfiguration(
            tag="calibrate",
            name="Calibrate to Hounsfield units",
            points=10,
            metadata=[number("lowest", "HU"), number("mean", "HU"), number("highest", "HU")],
        ),
        StepConfiguration(
            tag="segment",
            name="Segment the tissues",
            points=40,
            metadata=[number(tissue, "%") for tissue in ("air", "fat", "soft_tissue", "bone")],
        ),
        StepConfiguration(
            tag="measure",
            name="Measure areas and densities",
            points=25,
            metadata=[number(f"{tissue}_area", "mm²") for tissue in ("air", "fat", "soft_tissue", "bone")]
            + [number(f"{tissue}_mean", "HU") for tissue in ("air", "fat", "soft_tissue", "bone")],
        ),
        StepConfiguration(tag="report", name="Write the report", points=5, metadata=[text("finding")]),
    ],
)


class Report:
    """Appends events to the log of one job."""

    def __init__(self, publisher: milepost.Publisher, job: Job, pause_s: float) -> None:
        self.publisher = publisher
        self.job = job
        self.pause_s = pause_s

    def append(
        self, kind: int, name: str, step: str = "", measured: dict | None = None, percent: int | None = None
    ) -> None:
        """Pauses and hands one event to the publisher."""
        time.sleep(self.pause_s)
        event = NewEvent(kind=kind, name=name, step_tag=step, step_percent=percent, occurred_at=now())
        event.metadata.update(measured or {})
        self.publisher.append(self.job.id, event)


def now() -> Timestamp:
    timestamp = Timestamp()
    timestamp.GetCurrentTime()
    return timestamp


def run(report: Report, stop: threading.Event) -> bool:
    """Runs the analysis and appends an event for each thing that it tells.

    Returns whether it is complete: it ends earlier if it has to stop.
    """
    names = {step.tag: step.name for step in CONFIGURATION.steps}
    try:
        for result in analyse():
            if stop.is_set():
                return False
            match result:
                case Done(step, measured):
                    report.append(EVENT_KIND_STEP, names[step], step, measured)
                case UnderWay(step, percent):
                    report.append(EVENT_KIND_PROGRESS, "", step, percent=percent)
                case Note(step, note, measured):
                    report.append(EVENT_KIND_INFO, note, step, measured)
    except milepost.MilepostError:
        raise
    except Exception as error:
        # The job is FAILED until a new attempt appends a PROGRESS or STEP event.
        report.append(EVENT_KIND_ERROR, f"{type(error).__name__}: {error}"[:256])
        raise
    report.append(EVENT_KIND_COMPLETE, "Analysis complete")
    return True


def create_job(channel: grpc.Channel, provider_job_id: str, customer_id: str) -> Job:
    """Registers the configuration and creates the job, unless a former attempt did it."""
    try:
        ConfigurationServiceStub(channel).RegisterJobConfiguration(
            CONFIGURATION, timeout=CALL_SECONDS, wait_for_ready=True
        )
        request = CreateJobRequest(
            provider_job_id=provider_job_id,
            provider_job_name="CT_small.dcm",
            customer_id=customer_id,
            configuration_tag=CONFIGURATION.tag,
            configuration_version=CONFIGURATION.version,
        )
        return JobServiceStub(channel).CreateJob(request, timeout=CALL_SECONDS, wait_for_ready=True).job
    except grpc.RpcError as error:
        raise milepost.MilepostError.of(error) from error


def close_job(channel: grpc.Channel, job: Job) -> None:
    """Closes a job that will not be complete."""
    request = CloseJobRequest(job_id=job.id, reason="Stopped, as the customer asked")
    try:
        JobServiceStub(channel).CloseJob(request, timeout=CALL_SECONDS, wait_for_ready=True)
    except grpc.RpcError as error:
        raise milepost.MilepostError.of(error) from error


def stored(_job: milepost.Job, event: AppendedEvent) -> None:
    print(f"event {event.sequence} is stored: {event.progress.percent} %", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Analyse a CT slice and report to milepost.")
    parser.add_argument("--provider-job-id", required=True, help="the provider's id of the job")
    parser.add_argument("--customer-id", required=True, help="the user id of the customer")
    parser.add_argument("--pause-s", type=float, default=3.0, help="pause before each event (default: 3)")
    arguments = parser.parse_args()

    with connect() as channel:
        try:
            job = create_job(channel, arguments.provider_job_id, arguments.customer_id)
            print(f"job {job.id}", flush=True)
            if job.HasField("closed_at"):
                print("was done before")
                return 0
            stop = threading.Event()

            def cancellation_requested(_job: milepost.Job, at: datetime) -> None:
                print(f"the customer asked to stop, at {at:%H:%M:%S} UTC", flush=True)
                stop.set()

            with milepost.Publisher(
                channel,
                on_stored=stored,
                on_interruption=interrupted,
                on_cancellation_requested=cancellation_requested,
            ) as publisher:
                is_complete = run(Report(publisher, job, arguments.pause_s), stop)
            if not is_complete:
                close_job(channel, job)
        except milepost.MilepostError as error:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
