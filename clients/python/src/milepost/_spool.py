"""A queue on disk, of what a publisher has to deliver. README.md documents the format."""

from __future__ import annotations

import base64
import errno
import json
import os
import struct
import threading
import zlib
from collections import deque
from collections.abc import Callable
from pathlib import Path

from google.protobuf import text_format
from google.protobuf.message import DecodeError

from milepost._errors import Code, MilepostError
from milepost._outbox import Item, ProviderJobId, append_request, log
from milepost.v1.events_pb2 import AppendEventsRequest, NewEvent
from milepost.v1.jobs_pb2 import CreateJobRequest

_SEGMENT_BYTES = 8 * 1024 * 1024
_HEADER = struct.Struct("<II")  # The length of the payload and its CRC-32.
_CREATE_JOB = 1
_APPEND_EVENTS = 2


class SpoolFull(Exception):
    """The spool has as many undelivered bytes as it may, or its disk is full. Nothing was written."""


class SpoolLocked(Exception):
    """Another process, or another `Spool` of this one, uses the folder."""


class Spool:
    """Keeps on disk what a `Publisher` has to deliver, so that a provider never waits for a server.

        spool = milepost.Spool("/var/lib/provider/spool")
        with milepost.Publisher(channel, spool=spool) as publisher:
            publisher.create_job(CreateJobRequest(provider_job_id="scan-1", …))
            publisher.append(milepost.ProviderJobId("scan-1"), event)

    `create_job` and `append` write a record and return. The publisher delivers the records in the
    background, each once and those of a job in their order; what it has not delivered when
    the process ends, the next publisher with this folder delivers. Errors that would fail
    a publisher do not fail one with a spool: it tries again after pauses of up to a minute. What
    the server refuses for its content is moved to the folder `rejected`.

    One publisher uses a spool, and closes it. Needs a system with flock, so not Windows.
    """

    def __init__(self, path: str | os.PathLike[str], *, max_bytes: int = 1024**3, fsync: bool = False) -> None:
        """Opens the spool, and makes its folder if there is none.

        Raises `SpoolLocked` if the spool is in use.

        Arguments:
            path: The folder.
            max_bytes: The most bytes that are not delivered.
            fsync: Whether each record is written to the disk itself, so that it also survives
                a crash of the system. Without it, it survives the end of the process.
        """
        import fcntl  # Not on Windows, where the rest of the package works.

        self._path = Path(path)
        self._max_bytes = max_bytes
        self._fsync = fsync
        self._closed = False
        self._mutex = threading.Lock()
        self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
        (self._path / "rejected").mkdir(exist_ok=True)
        self._lock_file = os.open(self._path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._open()
        except BaseException as error:
            os.close(self._lock_file)
            if isinstance(error, BlockingIOError):
                raise SpoolLocked(f"{path} is in use") from error
            raise

    def _open(self) -> None:
        self._starts = sorted(int(file.stem) for file in self._path.glob("*.spool"))
        self._noted = self._read_delivered()
        # Lower than the first segment if the process ended between its removal and the note of it.
        self.delivered = max([self._noted, *self._starts[:1]])
        """The offset up to which everything was stored or rejected."""
        self._segment: int | None = None  # None: the next record begins a new one.
        self._end = max(self.delivered, self._open_last_segment())
        # The records that were read and are not delivered.
        self._window: deque[Item] = deque()
        self._position = self.delivered
        # What was read from the segment at the position, and how much of it was used.
        self._buffer, self._used = b"", 0

    def _read_delivered(self) -> int:
        try:
            return int((self._path / "delivered").read_text())
        except FileNotFoundError:
            return 0
        except ValueError:
            log.warning("%s is damaged: records are delivered again", self._path / "delivered")
            return 0

    def _open_last_segment(self) -> int:
        """The end of its last record. A record that was not written to its end is cut off."""
        if not self._starts:
            return 0
        file = self._file(self._starts[-1])
        data, used = file.read_bytes(), 0
        while used < len(data) and (end := _record_end(data, used) or _damage_end(data, used)):
            used = end
        end = self._starts[-1] + used
        if used < len(data):
            log.warning("%s: %d bytes of an unfinished record are cut off", file, len(data) - used)
            os.truncate(file, used)
        # Lower if a crash of the system lost records that were delivered.
        if end >= self.delivered:
            self._segment = os.open(file, os.O_RDWR)
        return end

    def _file(self, start: int) -> Path:
        return self._path / f"{start:020}.spool"

    def write(self, item: Item) -> None:
        """Appends the record of the item. Raises `SpoolFull` if there is no room."""
        record = _record(item)
        with self._mutex:
            if self._closed:
                raise RuntimeError("the spool is closed")
            if self._end - self.delivered + len(record) > self._max_bytes:
                raise SpoolFull(f"{self._path} has {self._end - self.delivered} undelivered bytes")
            try:
                self._append(record)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise SpoolFull(f"the disk of {self._path} is full") from error
                raise

    def _append(self, record: bytes) -> None:
        if self._segment is None or self._end - self._starts[-1] >= _SEGMENT_BYTES:
            segment = os.open(self._file(self._end), os.O_RDWR | os.O_CREAT, 0o600)
            if self._segment is not None:
                os.close(self._segment)
            self._segment = segment
            self._starts.append(self._end)
            if self._fsync:
                _fsync(self._path)
        offset = self._end - self._starts[-1]
        try:
            written = 0
            while written < len(record):
                written += os.pwrite(self._segment, record[written:], offset + written)
            if self._fsync:
                os.fsync(self._segment)
        except BaseException:
            os.ftruncate(self._segment, offset)
            raise
        self._end += len(record)

    def window_has_room(self, records: int, size: int) -> bool:
        """Whether fewer records and bytes than these were read and are not delivered."""
        return len(self._window) < records and self._position - self.delivered < size

    def read(self) -> Item | None:
        """The next record; None if all were read. What is damaged or missing is told in `rejected`."""
        with self._mutex:
            while self._position < self._end:
                if self._used == len(self._buffer):
                    self._load()
                    continue
                used, end = self._used, _record_end(self._buffer, self._used)
                item = _item(self._buffer[used + _HEADER.size : end]) if end else None
                if end and item:
                    self._used = end
                    self._pass(item, end - used)
                    return item
                self._used = _damage_end(self._buffer, used) or len(self._buffer)
                self._skip(self._used - used, self._buffer[used : self._used])
            return None

    def _load(self) -> None:
        """Reads what its segment has after the position."""
        start = max(start for start in self._starts if start <= self._position)
        stop = min([start for start in self._starts if start > self._position], default=self._end)
        with self._file(start).open("rb") as file:
            file.seek(self._position - start)
            self._buffer, self._used = file.read(stop - self._position), 0
        if not self._buffer:
            self._skip(stop - self._position, b"")

    def _skip(self, length: int, content: bytes) -> None:
        start, what = self._position, "damaged" if content else "missing"
        error = MilepostError(Code.DATA_LOSS, f"the bytes {start} to {start + length} of the spool are {what}")
        log.error("%s: %s", self._path, error.message)
        self._write_rejected(start, "damaged", content, "", error)
        self._pass(Item("", NewEvent(), 0, settled=True), length)
        self._advance()

    def _pass(self, item: Item, length: int) -> None:
        item.start = self._position
        item.end = self._position = self._position + length
        self._window.append(item)

    def reject(self, item: Item, error: MilepostError) -> None:
        """Writes the item and the error to the folder `rejected`."""
        request = _request(item)
        content, readable = request.SerializeToString(), text_format.MessageToString(request, as_utf8=True)
        self._write_rejected(item.start, type(request).__name__, content, readable, error)

    def _write_rejected(
        self, start: int, kind: str, content: bytes, readable: str, error: MilepostError
    ) -> None:
        fields = {
            "code": error.code.name,
            "reason": error.reason,
            "message": error.message,
            "details": [{"field": each.field, "description": each.description} for each in error.violations],
            "kind": kind,
            "request": base64.b64encode(content).decode(),
            "readable": readable,
        }
        file = self._path / "rejected" / f"{start:020}.json"
        file.write_text(json.dumps(fields, indent=2) + "\n")
        if self._fsync:
            _fsync(file)
            _fsync(file.parent)

    def settle(self, items: list[Item]) -> None:
        """Notes that these items are stored or rejected."""
        with self._mutex:
            for item in items:
                item.settled = True
            self._advance()

    def _advance(self) -> None:
        while self._window and self._window[0].settled:
            self.delivered = self._window.popleft().end
        while len(self._starts) > 1 and self._starts[1] <= self.delivered:
            self._file(self._starts[0]).unlink()
            del self._starts[0]
        if self._noted != self.delivered:
            new = self._path / "delivered.new"
            new.write_text(str(self.delivered))
            new.replace(self._path / "delivered")
            self._noted = self.delivered

    def barrier(self) -> Callable[[], bool]:
        """A function that tells whether all records of now are delivered."""
        end = self._end
        return lambda: self.delivered >= end

    def close(self) -> None:
        """Lets others open the spool."""
        with self._mutex:
            self._closed = True
            if self._segment is not None:
                os.close(self._segment)
            os.close(self._lock_file)


def _fsync(path: Path) -> None:
    """Writes a file or a folder to the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _request(item: Item) -> CreateJobRequest | AppendEventsRequest:
    if isinstance(item.content, CreateJobRequest):
        return item.content
    return append_request(item.job, [item.content])


def _record(item: Item) -> bytes:
    request = _request(item)
    kind = _CREATE_JOB if isinstance(request, CreateJobRequest) else _APPEND_EVENTS
    payload = bytes([kind]) + request.SerializeToString()
    return _HEADER.pack(len(payload), zlib.crc32(payload)) + payload


def _item(payload: bytes) -> Item | None:
    """None: the payload is not what this version writes."""
    try:
        if payload[0] == _CREATE_JOB:
            create = CreateJobRequest.FromString(payload[1:])
            return Item(ProviderJobId(create.provider_job_id), create, len(payload))
        append = AppendEventsRequest.FromString(payload[1:])
        [event] = append.events
    except (DecodeError, ValueError):
        return None
    job = append.job_id if append.HasField("job_id") else ProviderJobId(append.provider_job_id)
    return Item(job, event, len(payload))


def _record_end(data: bytes, at: int) -> int | None:
    """The end of the record that begins there; None if there is no undamaged one."""
    if at + _HEADER.size > len(data):
        return None
    length, crc = _HEADER.unpack_from(data, at)
    begin = at + _HEADER.size
    end: int = begin + length
    if length < 2 or end > len(data) or data[begin] not in (_CREATE_JOB, _APPEND_EVENTS):
        return None
    return end if zlib.crc32(memoryview(data)[begin:end]) == crc else None


def _damage_end(data: bytes, at: int) -> int | None:
    """The end of the damaged record that begins there; None if it was not written to its end."""
    if at + _HEADER.size < len(data):
        end: int = at + _HEADER.size + _HEADER.unpack_from(data, at)[0]
        # Only its content is damaged, not its length.
        if end == len(data) or _record_end(data, end):
            return end
    return next((start for start in range(at + 1, len(data)) if _record_end(data, start)), None)
