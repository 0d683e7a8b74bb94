"""A real server with a provider and a customer, and a proxy between client and server that breaks connections."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import uuid
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

import grpc
import milepost
from milepost.v1.auth_pb2 import (
    API_KEY_SCOPE_APPEND,
    API_KEY_SCOPE_READ,
    USER_ROLE_CUSTOMER,
    USER_ROLE_PROVIDER,
    CreateApiKeyRequest,
    SignUpRequest,
)
from milepost.v1.auth_pb2_grpc import AuthServiceStub
from milepost.v1.configurations_pb2 import RegisterJobConfigurationRequest, StepConfiguration
from milepost.v1.configurations_pb2_grpc import ConfigurationServiceStub
from milepost.v1.events_pb2 import (
    EVENT_KIND_COMPLETE,
    EVENT_KIND_INFO,
    EVENT_KIND_PROGRESS,
    Event,
    ListEventsRequest,
    NewEvent,
)
from milepost.v1.events_pb2_grpc import EventServiceStub
from milepost.v1.jobs_pb2 import CreateJobRequest, RequestCancellationRequest
from milepost.v1.jobs_pb2_grpc import JobServiceStub

TAG = "build"
STEP = "compile"


def event(name: str, **fields: Any) -> NewEvent:
    return NewEvent(kind=EVENT_KIND_INFO, name=name, **fields)


def progress(name: str, step_percent: int) -> NewEvent:
    return NewEvent(kind=EVENT_KIND_PROGRESS, name=name, step_tag=STEP, step_percent=step_percent)


COMPLETE = NewEvent(kind=EVENT_KIND_COMPLETE, name="complete")


def read_to_end(stream: IO[str]) -> None:
    with stream:
        for _ in stream:
            pass


class Server:
    """A server with a database of its own. It keeps its port when it is started again."""

    STREAMS = 10
    """The most streams of one user."""

    def __init__(self) -> None:
        # Not below the folders of pytest, which the user of Postgres cannot read.
        self.folder = Path(tempfile.mkdtemp(prefix="milepost-"))
        self.folder.chmod(0o755)
        self.address = "127.0.0.1:0"
        self.start()

    def start(self) -> None:
        options = {"listen": self.address, "bcrypt-cost": "4", "streams-per-user": str(self.STREAMS)}
        self.process = subprocess.Popen(
            [os.environ["MILEPOST_BIN"], "serve", *(f"--{name}={value}" for name, value in options.items())],
            env=os.environ | {"MILEPOST_DATA_DIR": str(self.folder / "data"), "DATABASE_URL": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self.process.stdout
        lines = []
        for line in self.process.stdout:
            lines.append(line)
            if found := re.search(r"milepost listens on (\S+),", line):
                self.address = found[1]
                break
        else:
            raise AssertionError("".join(lines))
        threading.Thread(target=read_to_end, args=(self.process.stdout,), daemon=True).start()

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(how)
        self.process.wait(60)

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self.folder)


class World:
    """A provider and a customer on a server."""

    def __init__(self, server: Server) -> None:
        self.server = server
        with milepost.connect(server.address) as channel:
            users = {
                role: AuthServiceStub(channel).SignUp(
                    SignUpRequest(role=role, email=f"{uuid.uuid4()}@example.com", password="correct horse"),
                    wait_for_ready=True,
                )
                for role in (USER_ROLE_PROVIDER, USER_ROLE_CUSTOMER)
            }
        self.customer_id = users[USER_ROLE_CUSTOMER].user.id
        self.customer = milepost.connect(server.address, users[USER_ROLE_CUSTOMER].session.secret)
        self.session = milepost.connect(server.address, users[USER_ROLE_PROVIDER].session.secret)
        request = CreateApiKeyRequest(scopes=[API_KEY_SCOPE_READ, API_KEY_SCOPE_APPEND])
        self.key = AuthServiceStub(self.session).CreateApiKey(request).secret
        self.channel = milepost.connect(server.address, self.key)
        ConfigurationServiceStub(self.channel).RegisterJobConfiguration(
            RegisterJobConfigurationRequest(
                tag=TAG,
                name="Build",
                version="1.0.0",
                steps=[StepConfiguration(tag=STEP, name="Compile", points=1)],
            )
        )

    def close(self) -> None:
        self.customer.close()
        self.session.close()
        self.channel.close()

    def new_job(self) -> CreateJobRequest:
        return CreateJobRequest(
            provider_job_id=str(uuid.uuid4()), customer_id=self.customer_id, configuration_tag=TAG
        )

    def create(self, request: CreateJobRequest) -> str:
        return JobServiceStub(self.channel).CreateJob(request, wait_for_ready=True).job.id

    def job(self) -> str:
        return self.create(self.new_job())

    def request_cancellation(self, job_id: str) -> datetime:
        """Has the customer ask to stop a job, and returns when that was."""
        request = RequestCancellationRequest(job_id=job_id, reason="enough")
        answer = JobServiceStub(self.customer).RequestCancellation(request, wait_for_ready=True)
        return answer.job.cancellation_requested_at.ToDatetime(timezone.utc)

    def events(self, job: milepost.Job) -> list[Event]:
        """The log of a job."""
        request = ListEventsRequest(page_size=500)
        if isinstance(job, milepost.ProviderJobId):
            request.provider_job_id = job.value
        else:
            request.job_id = job
        events: list[Event] = []
        while True:
            page = EventServiceStub(self.channel).ListEvents(request, wait_for_ready=True)
            events += page.events
            if not page.next_page_token:
                return events
            request.page_token = page.next_page_token

    def names(self, job: milepost.Job) -> list[str]:
        events = self.events(job)
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        return [event.name for event in events]


class Proxy:
    """Forwards TCP connections to an address, until told to break or to stall them."""

    def __init__(self, target: str) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = "127.0.0.1:%d" % self._listener.getsockname()[1]
        self._flows = threading.Event()
        self._flows.set()
        self._sockets: set[socket.socket] = set()
        self._start(self._accept)

    def _start(self, work: Callable[..., None], *arguments: Any) -> None:
        threading.Thread(target=work, args=arguments, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # Closed.
            while True:
                client, _ = self._listener.accept()
                self._start(self._connect, client)

    def _connect(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection((self._host, self._port))
        except OSError:
            client.close()
            return
        self._sockets |= {client, server}
        self._start(self._copy, client, server)
        self._start(self._copy, server, client)

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):  # Cut.
            while data := source.recv(65536):
                self._flows.wait()
                target.sendall(data)
        source.close()
        target.close()
        self._sockets -= {source, target}

    def cut(self) -> None:
        """Ends all connections."""
        for each in list(self._sockets):
            with contextlib.suppress(OSError):  # Closed meanwhile.
                each.shutdown(socket.SHUT_RDWR)

    def stall(self) -> None:
        """Keeps all connections open, and forwards nothing."""
        self._flows.clear()

    def flow(self) -> None:
        self._flows.set()

    def connections(self) -> int:
        return len(self._sockets) // 2

    def close(self) -> None:
        self._listener.close()
        self.flow()
        self.cut()
