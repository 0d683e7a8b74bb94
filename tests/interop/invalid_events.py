"""Sends 500 invalid events to a given job and prints the error that it receives.

Sends the batch ten times, since a client that drops large trailers may drop only some
of them.
"""

import sys

import grpc
from connection import connect
from milepost import MilepostError
from milepost.v1.events_pb2 import EVENT_KIND_INFO, AppendEventsRequest, NewEvent
from milepost.v1.events_pb2_grpc import EventServiceStub

request = AppendEventsRequest(
    job_id=sys.argv[1],
    events=[NewEvent(kind=EVENT_KIND_INFO, name="\0" + "🚧" * 300, step_tag="x" * 300)] * 500,
)
explanations = set()
with connect() as channel:
    for _ in range(10):
        try:
            EventServiceStub(channel).AppendEvents(request)
            sys.exit("the batch was not refused")
        except grpc.RpcError as error:
            explanations.add(str(MilepostError.of(error)))
[explanation] = explanations
print(explanation)
