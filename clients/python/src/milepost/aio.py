"""The client for asyncio."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import grpc
import grpc.aio

from milepost._channel import OPTIONS, authorization, parse_server
from milepost._errors import MilepostError, is_refusal, is_transient, pause_seconds
from milepost._outbox import Item, Job, with_id
from milepost._publisher import PublisherBase
from milepost._watch import WatchBase
from milepost.v1.events_pb2 import Event, NewEvent, WatchEventsResponse

__all__ = ["Publisher", "connect", "watch"]

_Result = TypeVar("_Result")


def connect(
    server: str,
    credential: str | None = None,
    *,
    tls: grpc.ChannelCredentials | None = None,
) -> grpc.aio.Channel:
    """Makes a channel of grpc.aio, as `milepost.connect` makes one of grpc."""
    target, encrypted = parse_server(server, tls is not None)
    interceptors = [kind(authorization(credential)) for kind in _INTERCEPTORS] if credential else None
    if encrypted:
        tls = tls or grpc.ssl_channel_credentials()
        return grpc.aio.secure_channel(target, tls, options=OPTIONS, interceptors=interceptors)
    return grpc.aio.insecure_channel(target, options=OPTIONS, interceptors=interceptors)


class _Credential:
    """Adds the credential to each call. grpc.aio needs a class for each kind of call."""

    def __init__(self, pair: tuple[str, str]) -> None:
        self._pair = pair

    async def _add(
        self, continuation: Callable[..., Any], details: grpc.aio.ClientCallDetails, request: Any
    ) -> Any:
        metadata = grpc.aio.Metadata(*(details.metadata or ()), self._pair)
        return await continuation(
            grpc.aio.ClientCallDetails(
                details.method, details.timeout, metadata, details.credentials, details.wait_for_ready
            ),
            request,
        )


class _UnaryUnary(_Credential, grpc.aio.UnaryUnaryClientInterceptor):
    intercept_unary_unary: Any = _Credential._add


class _UnaryStream(_Credential, grpc.aio.UnaryStreamClientInterceptor):
    intercept_unary_stream: Any = _Credential._add


class _StreamStream(_Credential, grpc.aio.StreamStreamClientInterceptor):
    intercept_stream_stream: Any = _Credential._add


_INTERCEPTORS = (_UnaryUnary, _UnaryStream, _StreamStream)


class watch(WatchBase):
    """The events of a scope, as those of `milepost.watch`, for `async for`.

        async for event in milepost.aio.watch(channel, job_id="…"):
            print(event.sequence, event.name)

    A callback may be a coroutine function: what it returns is awaited.
    """

    _waiting: asyncio.Future[Any] | None = None

    async def __aiter__(self) -> AsyncIterator[Event]:
        async with aclosing(self._messages()) as messages:
            while True:
                while self._events:
                    if self._closed.is_set():
                        return
                    yield self._events.popleft()
                await _result(self._notify())
                self._processed()
                if self.end is not None or (message := await anext(messages, None)) is None:
                    return
                self._receive(message)

    async def _messages(self) -> AsyncGenerator[WatchEventsResponse, None]:
        """The messages of one stream after the other."""
        while not self._closed.is_set():
            cause, silent = None, False
            call: Any = self._stub.WatchEvents(self._request)
            try:
                # EOF, at the end of the stream, is false.
                while not self._closed.is_set() and (
                    message := await self._wait(call.read(), self._silence_seconds)
                ):
                    yield message
            except grpc.aio.AioRpcError as error:
                cause = error
            except TimeoutError:
                silent = True
            finally:
                call.cancel()
            if self._closed.is_set():
                return
            failure, pause = self._interrupted(cause, silent)
            if self._on_interruption:
                await _result(self._on_interruption(failure, pause))
            await self._wait(asyncio.sleep(pause), None)

    async def _wait(self, work: Coroutine[Any, Any, _Result], seconds: float | None) -> _Result | None:
        """The result of the work; None if it was cancelled, as by `close`."""
        self._waiting = task = asyncio.ensure_future(work)
        try:
            done, _ = await asyncio.wait([task], timeout=seconds)
            if not done:
                raise TimeoutError
            return None if task.cancelled() else task.result()
        finally:
            task.cancel()

    def close(self) -> None:
        """Ends the watch: its iteration ends without an error."""
        self._closed.set()
        if self._waiting:
            self._waiting.cancel()

    async def __aenter__(self) -> watch:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()


class Publisher(PublisherBase):
    """Appends events to jobs, as `milepost.Publisher` does, without a spool.

        async with milepost.aio.Publisher(channel) as publisher:
            await publisher.append(job_id, NewEvent(kind=EVENT_KIND_INFO, name="hello"))

    A callback may be a coroutine function: what it returns is awaited. The callbacks of one job
    are called one at a time.
    """

    def _start(self) -> None:
        if self._spool:
            raise TypeError("a spool needs milepost.Publisher")
        self._settled = asyncio.Condition()
        self._workers: set[asyncio.Task[None]] = set()

    async def append(self, job: Job, event: NewEvent) -> str:
        """Takes a copy of the event, and returns its id, which is made if there is none.

        Waits while the publisher holds as much as it may.
        """
        event = with_id(event)
        item = Item(job, event, event.ByteSize())
        await self._until(lambda: self._outbox.has_room(item.size))
        self._check()
        self._outbox.add(item)
        if len(self._workers) < self._max_requests:
            self._workers.add(asyncio.create_task(self._work()))
        return event.id

    async def flush(self) -> None:
        """Returns when all events that were appended before are stored or refused."""
        self._check()
        is_reached = self._outbox.barrier()
        await self._until(is_reached)
        if not is_reached():
            self._check()
        self._raise_refusal()

    async def close(self) -> None:
        """Flushes and ends."""
        if self._closed:
            return
        try:
            await self.flush()
        finally:
            self._closed = True
            workers = list(self._workers)
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            await self._changed()

    async def __aenter__(self) -> Publisher:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Waits for the condition, or for the end of the publisher."""
        async with self._settled:
            await self._settled.wait_for(lambda: self._failure or self._closed or condition())

    async def _changed(self) -> None:
        async with self._settled:
            self._settled.notify_all()

    async def _work(self) -> None:
        """Sends batches until no job is ready."""
        try:
            while not self._failure and (batch := self._outbox.take()):
                await self._deliver(batch)
                self._outbox.release(batch[0].job)
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError):
                error = RuntimeError("a request was cancelled: was the channel closed?")
            self._failure = self._failure or error
            await self._changed()
        finally:
            # At once, so that `append` starts another worker.
            self._workers -= {asyncio.current_task()}

    async def _deliver(self, batch: list[Item]) -> None:
        """Sends the batch until it is answered, or the publisher failed."""
        failures = 0
        while not self._failure:
            try:
                answer = await self._call(batch)
            except grpc.aio.AioRpcError as cause:
                error = MilepostError.of(cause)
            else:
                if self._on_stored:
                    for item, event in zip(batch, answer.events, strict=True):
                        await _result(self._on_stored(item.job, event))
                await _result(self._tell_cancellation(batch[0].job, answer))
                return await self._settle(batch)
            if is_refusal(error) and len(batch) == 1:
                if self._on_refused:
                    await _result(self._on_refused(batch[0].job, batch[0].content, error))
                else:
                    self._refusal = self._refusal or error
                return await self._settle(batch)
            if is_refusal(error):
                for item in batch:
                    await self._deliver([item])
                return
            if not is_transient(error):
                raise error
            pause = pause_seconds(failures, error)
            failures += 1
            if self._on_interruption:
                await _result(self._on_interruption(error, pause))
            await asyncio.sleep(pause)

    async def _settle(self, items: list[Item]) -> None:
        self._outbox.settle(items)
        await self._changed()


async def _result(returned: object) -> None:
    if inspect.isawaitable(returned):
        await returned
