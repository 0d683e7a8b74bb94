"""Appends a large event to a given job, in a call and in a stream, compressed by gzip."""

import sys

import grpc
from connection import Connection
from milepost.v1.events_pb2 import (
    EVENT_KIND_INFO,
    AppendEventsRequest,
    NewEvent,
    PublishEventsRequest,
)

event = NewEvent(kind=EVENT_KIND_INFO, name="compressed")
event.metadata["text"] = "x" * 10_000
gzip = grpc.Compression.Gzip
with Connection() as connection:
    metadata = connection.metadata
    call = AppendEventsRequest(job_id=sys.argv[1], events=[event])
    connection.events.AppendEvents(call, metadata=metadata, compression=gzip)
    batches = [PublishEventsRequest(batch_id="1", job_id=sys.argv[1], events=[event])] * 3
    answers = connection.events.PublishEvents(iter(batches), metadata=metadata, compression=gzip)
    for answer in answers:
        print(answer.WhichOneof("outcome"))
