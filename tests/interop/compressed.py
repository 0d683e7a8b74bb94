"""Appends a large event to a given job, in a call and in a stream, compressed by gzip."""

import sys

import grpc
from connection import connect
from milepost.v1.events_pb2 import (
    EVENT_KIND_INFO,
    AppendEventsRequest,
    NewEvent,
    PublishEventsRequest,
)
from milepost.v1.events_pb2_grpc import EventServiceStub

event = NewEvent(kind=EVENT_KIND_INFO, name="compressed")
event.metadata["text"] = "x" * 10_000
gzip = grpc.Compression.Gzip
with connect() as channel:
    events = EventServiceStub(channel)
    events.AppendEvents(AppendEventsRequest(job_id=sys.argv[1], events=[event]), compression=gzip)
    batches = [PublishEventsRequest(batch_id="1", job_id=sys.argv[1], events=[event])] * 3
    for answer in events.PublishEvents(iter(batches), compression=gzip):
        print(answer.WhichOneof("outcome"))
