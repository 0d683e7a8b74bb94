"""The client for threads and the one for asyncio, behind the same methods, so that one test is for both."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from typing import Any, Protocol, TypeVar

import grpc
import milepost
import milepost.aio
from milepost.v1.events_pb2 import Event, NewEvent

T = TypeVar("T")
LIMIT_SECONDS = 120.0


class Flavour(Protocol):
    def connect(self, server: str, credential: str) -> Any: ...
    def disconnect(self, channel: Any) -> None: ...
    def watch(self, channel: Any, **arguments: Any) -> Any: ...
    def publisher(self, channel: Any, **arguments: Any) -> Any: ...
    def close(self) -> None: ...


class Threads:
    def __init__(self) -> None:
        self._channels: list[grpc.Channel] = []

    def connect(self, server: str, credential: str) -> grpc.Channel:
        self._channels.append(milepost.connect(server, credential))
        return self._channels[-1]

    def disconnect(self, channel: grpc.Channel) -> None:
        channel.close()

    def watch(self, channel: grpc.Channel, **arguments: Any) -> milepost.watch:
        return milepost.watch(channel, **arguments)

    def publisher(self, channel: grpc.Channel, **arguments: Any) -> milepost.Publisher:
        return milepost.Publisher(channel, **arguments)

    def close(self) -> None:
        for channel in self._channels:
            channel.close()


class Asyncio:
    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()
        self._channels: list[grpc.aio.Channel] = []

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(LIMIT_SECONDS)

    def connect(self, server: str, credential: str) -> grpc.aio.Channel:
        async def connect() -> grpc.aio.Channel:
            return milepost.aio.connect(server, credential)

        self._channels.append(self.run(connect()))
        return self._channels[-1]

    def disconnect(self, channel: grpc.aio.Channel) -> None:
        self.run(channel.close(None))

    def watch(self, channel: grpc.aio.Channel, **arguments: Any) -> AsyncioWatch:
        return AsyncioWatch(self, milepost.aio.watch(channel, **arguments))

    def publisher(self, channel: grpc.aio.Channel, **arguments: Any) -> AsyncioPublisher:
        async def make() -> milepost.aio.Publisher:
            return milepost.aio.Publisher(channel, **arguments)

        return AsyncioPublisher(self, self.run(make()))

    def close(self) -> None:
        async def end() -> set[asyncio.Task[Any]]:
            for channel in self._channels:
                await channel.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            return (await asyncio.wait(tasks, timeout=10))[1] if tasks else tasks

        left = self.run(end())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()
        assert not left


class AsyncioWatch:
    def __init__(self, flavour: Asyncio, watch: milepost.aio.watch) -> None:
        self._flavour = flavour
        self._watch = watch

    def __iter__(self) -> Iterator[Event]:
        events = aiter(self._watch)

        async def following() -> Event | None:
            return await anext(events, None)

        async def leave() -> None:
            await events.aclose()  # type: ignore[attr-defined]

        try:
            while event := self._flavour.run(following()):
                yield event
        finally:
            self._flavour.run(leave())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._watch, name)

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self if name in ("_flavour", "_watch") else self._watch, name, value)

    def close(self) -> None:
        self._flavour.loop.call_soon_threadsafe(self._watch.close)


class AsyncioPublisher:
    def __init__(self, flavour: Asyncio, publisher: milepost.aio.Publisher) -> None:
        self._run = flavour.run
        self._publisher = publisher

    def append(self, job: milepost.Job, event: NewEvent) -> str:
        return self._run(self._publisher.append(job, event))

    def flush(self) -> None:
        self._run(self._publisher.flush())

    def close(self) -> None:
        self._run(self._publisher.close())

    def __enter__(self) -> AsyncioPublisher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


FLAVOURS = [Threads, Asyncio]
