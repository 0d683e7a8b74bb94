"""A provider: analyses a CT slice for a customer and appends its progress to milepost.

    MILEPOST_API_KEY=mpk_... python provider.py --provider-job-id scan-1 --customer-id UUID

The provider makes the id of every event. If the connection breaks, it sends the
same events again with the same ids, and each event is stored once.

The analysis takes a moment only. A pause before each event makes it long enough to
be watched, and to see what happens if the server is killed meanwhile.
"""

import argparse
import logging
import os
import sys
import time
import uuid

import grpc
from connection import Connection, explain
from ct import Done, Note, analyse
from google.protobuf.timestamp_pb2 import Timestamp
from milepost.v1.configurations_pb2 import (
    METADATA_KIND_LINK,
    METADATA_KIND_NUMBER,
    MetadataConfiguration,
    RegisterJobConfigurationRequest,
    StepConfiguration,
)
from milepost.v1.events_pb2 import (
    EVENT_KIND_COMPLETE,
    EVENT_KIND_ERROR,
    EVENT_KIND_INFO,
    EVENT_KIND_STEP,
    AppendedEvent,
    AppendEventsRequest,
    NewEvent,
)
from milepost.v1.jobs_pb2 import CreateJobRequest, Job


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


def uuid7() -> str:
    """A UUID of version 7 (RFC 9562): 48 bits of Unix time in ms, then random bits."""
    random_bits = int.from_bytes(os.urandom(10))
    value = time.time_ns() // 1_000_000 << 80 | random_bits
    value = value & ~(0xF << 76) | 7 << 76
    value = value & ~(0x3 << 62) | 2 << 62
    return str(uuid.UUID(int=value))


class Report:
    """Appends events to the log of one job."""

    def __init__(self, connection: Connection, job: Job, pause_s: float) -> None:
        self.connection = connection
        self.job = job
        self.pause_s = pause_s

    def append(self, kind: int, name: str, step: str = "", measured: dict | None = None) -> AppendedEvent:
        """Pauses and appends one event, which is durable when this returns."""
        time.sleep(self.pause_s)
        event = NewEvent(id=uuid7(), kind=kind, name=name, step_tag=step, occurred_at=now())
        event.metadata.update(measured or {})
        request = AppendEventsRequest(job_id=self.job.id, events=[event])
        response = self.connection.call(self.connection.events.AppendEvents, request)
        [appended] = response.events
        print(f"{appended.sequence:>3}  {appended.progress.percent:>3} %  {name}", flush=True)
        return appended


def now() -> Timestamp:
    timestamp = Timestamp()
    timestamp.GetCurrentTime()
    return timestamp


def run(report: Report) -> None:
    """Runs the analysis and appends an event for each step and note."""
    names = {step.tag: step.name for step in CONFIGURATION.steps}
    try:
        for result in analyse():
            match result:
                case Done(step, measured):
                    report.append(EVENT_KIND_STEP, names[step], step, measured)
                case Note(step, note, measured):
                    report.append(EVENT_KIND_INFO, note, step, measured)
    except grpc.RpcError:
        raise
    except Exception as error:
        # The job is FAILED until a new attempt appends a STEP event.
        report.append(EVENT_KIND_ERROR, f"{type(error).__name__}: {error}"[:256])
        raise
    report.append(EVENT_KIND_COMPLETE, "Analysis complete")


def main() -> int:
    parser = argparse.ArgumentParser(description="Analyse a CT slice and report to milepost.")
    parser.add_argument("--provider-job-id", required=True, help="the provider's id of the job")
    parser.add_argument("--customer-id", required=True, help="the user id of the customer")
    parser.add_argument("--pause-s", type=float, default=3.0, help="pause before each event (default: 3)")
    arguments = parser.parse_args()

    with Connection() as connection:
        try:
            connection.call(connection.configurations.RegisterJobConfiguration, CONFIGURATION)
            created = connection.call(
                connection.jobs.CreateJob,
                CreateJobRequest(
                    provider_job_id=arguments.provider_job_id,
                    provider_job_name="CT_small.dcm",
                    customer_id=arguments.customer_id,
                    configuration_tag=CONFIGURATION.tag,
                    configuration_version=CONFIGURATION.version,
                ),
            )
            print(f"job {created.job.id}", flush=True)
            if created.job.HasField("closed_at"):
                print("was done before")
                return 0
            run(Report(connection, created.job, arguments.pause_s))
        except grpc.RpcError as error:
            print(explain(error), file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    sys.exit(main())
