"""Decisions that need no server."""

from __future__ import annotations

import uuid

import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from grpc import StatusCode
from milepost import MilepostError, connect
from milepost._channel import parse_server
from milepost._errors import is_refusal, is_transient, pause_seconds
from milepost._outbox import Item, Outbox, ProviderJobId, RecentJobs, uuid7
from milepost.v1.events_pb2 import NewEvent

OURS = ErrorInfo(domain="milepost", reason="ANY")
FOREIGN = ErrorInfo(domain="example.com", reason="ANY")
RETRY = RetryInfo(retry_delay=Duration(seconds=7))


@pytest.mark.parametrize(
    ("server", "target", "encrypted"),
    [
        ("127.0.0.1:50051", "127.0.0.1:50051", False),
        ("127.9.9.9:1", "127.9.9.9:1", False),
        ("[::1]:50051", "[::1]:50051", False),
        ("localhost:50051", "localhost:50051", False),
        ("localhost.example.com:50051", "localhost.example.com:50051", True),
        ("10.0.0.1:50051", "10.0.0.1:50051", True),
        ("[2001:db8::1]:50051", "[2001:db8::1]:50051", True),
        ("http://10.0.0.1:50051", "10.0.0.1:50051", False),
        ("https://127.0.0.1:50051/", "127.0.0.1:50051", True),
        ("HTTPS://a:1", "a:1", True),
    ],
)
def test_only_loopback_and_http_addresses_are_unencrypted(server: str, target: str, encrypted: bool) -> None:
    assert parse_server(server) == (target, encrypted)


def test_settings_of_tls_encrypt_a_loopback_address() -> None:
    assert parse_server("localhost:1", has_tls=True) == ("localhost:1", True)
    assert parse_server("http://localhost:1", has_tls=True) == ("localhost:1", False)


@pytest.mark.parametrize("server", ["localhost", "ftp://a:1", "unix:///a", "a b:1", "https://user@a:1", ""])
def test_other_texts_are_no_addresses(server: str) -> None:
    with pytest.raises(ValueError):
        parse_server(server)


def test_a_credential_with_a_line_break_is_refused_without_being_shown() -> None:
    with pytest.raises(ValueError) as caught:
        connect("127.0.0.1:1", "mpk_secret\n")
    assert "mpk_secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("code", "details", "transient", "transient_later"),
    [
        (StatusCode.UNAVAILABLE, [], True, True),
        (StatusCode.CANCELLED, [], True, True),
        (StatusCode.CANCELLED, [FOREIGN], True, True),
        (StatusCode.RESOURCE_EXHAUSTED, [], True, True),
        (StatusCode.UNIMPLEMENTED, [], False, True),
        (StatusCode.UNAUTHENTICATED, [], False, True),
        (StatusCode.UNAVAILABLE, [OURS], True, True),
        (StatusCode.DEADLINE_EXCEEDED, [OURS], True, True),
        (StatusCode.RESOURCE_EXHAUSTED, [OURS, RETRY], True, True),
        (StatusCode.RESOURCE_EXHAUSTED, [OURS], False, False),
        (StatusCode.INTERNAL, [OURS], False, False),
        (StatusCode.ABORTED, [OURS], False, False),
        (StatusCode.UNAUTHENTICATED, [OURS, RETRY], False, False),
    ],
)
def test_what_may_succeed_later(
    code: StatusCode, details: list[ErrorInfo | RetryInfo], transient: bool, transient_later: bool
) -> None:
    error = MilepostError(code, "", details)
    assert is_transient(error) == transient
    assert is_transient(error, after_message=True) == transient_later


def test_what_is_refused_for_its_content() -> None:
    refusals = {code for code in StatusCode if is_refusal(MilepostError(code, "", [OURS]))}
    assert {code.name for code in refusals} == {
        "INVALID_ARGUMENT",
        "NOT_FOUND",
        "ALREADY_EXISTS",
        "FAILED_PRECONDITION",
        "ABORTED",
        "OUT_OF_RANGE",
    }
    assert not is_refusal(MilepostError(StatusCode.ABORTED, ""))


def test_pauses_double_up_to_a_limit_and_are_as_long_as_the_server_asks() -> None:
    error = MilepostError(StatusCode.UNAVAILABLE, "")
    for failures, longest, shortest in [(0, 0.1, 0.05), (3, 0.8, 0.4), (6, 5.0, 2.5), (9_999, 5.0, 2.5)]:
        assert shortest <= pause_seconds(failures, error) <= longest
    assert 30 <= pause_seconds(99, error, 60.0) <= 60
    assert pause_seconds(0, MilepostError(StatusCode.UNAVAILABLE, "", [RETRY])) == 7


def test_an_error_tells_reason_fields_and_details() -> None:
    violation = BadRequest.FieldViolation(field="events[0].name", description="too long")
    details = [OURS, BadRequest(field_violations=[violation]), RETRY]
    error = MilepostError(StatusCode.INVALID_ARGUMENT, "the request is invalid", details)
    assert (error.reason, error.violations, error.retry_delay) == ("ANY", (violation,), 7.0)
    assert error.details == tuple(details)
    assert str(error) == "INVALID_ARGUMENT ANY: the request is invalid\n  events[0].name: too long"
    assert MilepostError(StatusCode.UNKNOWN, "", [FOREIGN]).reason is None


def test_a_batch_has_at_most_500_events_and_900_kib_of_one_job() -> None:
    outbox = Outbox(max_events=10_000, max_bytes=2**30)
    for number in range(1_200):
        outbox.add(Item("many", NewEvent(name=str(number)), 10))
        outbox.add(Item("large", NewEvent(name=str(number)), 100_000))
    outbox.add(Item("huge", NewEvent(), 2_000_000))
    for job, count in [("many", 500), ("large", 9), ("huge", 1)]:
        batch = outbox.take()
        assert {item.job for item in batch} == {job}
        assert len(batch) == count
    assert outbox.take() == []


def test_a_job_is_known_until_so_many_others_were_added_and_their_number_is_bounded() -> None:
    for before in range(3):
        jobs = RecentJobs(3)
        for number in range(before):
            assert jobs.add(f"before {number}")
        assert jobs.add("a")
        assert [jobs.add(job) for job in ("b", "c", "a", "b", "c", "a")] == [True, True] + [False] * 4
        assert jobs.add(ProviderJobId("a"))
        for number in range(100):
            assert jobs.add(f"after {number}")
            assert len(jobs._new) + len(jobs._old) <= 6
        assert jobs.add("a")


def test_ids_are_uuids_of_version_7_in_the_order_of_time() -> None:
    made = uuid.UUID(uuid7())
    assert (made.version, made.variant) == (7, uuid.RFC_4122)
    assert made.int >> 80 <= uuid.UUID(uuid7()).int >> 80
