"""Channels with a credential and with settings that suit watches."""

from __future__ import annotations

import re
from collections.abc import Callable
from ipaddress import ip_address
from typing import Any

import grpc

OPTIONS: list[tuple[str, Any]] = [
    # Pings detect a server that disappeared without closing its connection.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),  # No limit: a watch sends no data.
    # The defaults wait up to two minutes before the next attempt to connect, and 20 s for its end.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 5_000),
]


def connect(
    server: str,
    credential: str | None = None,
    *,
    tls: grpc.ChannelCredentials | None = None,
) -> grpc.Channel:
    """Makes a channel that sends the credential with each call. It connects with its first call.

    Arguments:
        server: `https://HOST:PORT`, encrypted; `http://HOST:PORT`, so that the network can
            read the credential; or `HOST:PORT`, encrypted unless the host is loopback.
        credential: The secret of a session, an API key or a watch token. None: the calls
            have no credential, as SignUp and LogIn need none.
        tls: How the server is verified; it then is encrypted unless `server` begins with
            `http://`. Default: by the authorities that grpc trusts.
    """
    target, encrypted = parse_server(server, tls is not None)
    if encrypted:
        channel = grpc.secure_channel(target, tls or grpc.ssl_channel_credentials(), options=OPTIONS)
    else:
        channel = grpc.insecure_channel(target, options=OPTIONS)
    return grpc.intercept_channel(channel, _Credential(credential)) if credential else channel


def parse_server(server: str, has_tls: bool = False) -> tuple[str, bool]:
    """The host and port in the address, and whether the connection is encrypted."""
    match = re.fullmatch(r"(?:(https?)://)?(\[[^\[\]/@]+\]|[^\[\]/:@\s]+):(\d+)/?", server, re.IGNORECASE)
    if not match:
        raise ValueError(f"{server!r} is not an address: write HOST:PORT, https://HOST:PORT or http://HOST:PORT")
    scheme, host, port = match.groups()
    encrypted = scheme.lower() == "https" if scheme else has_tls or not _is_loopback(host.strip("[]"))
    return f"{host}:{port}", encrypted


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:  # Another name.
        return False


def authorization(credential: str) -> tuple[str, str]:
    """The metadata of a call with this credential."""
    if not re.fullmatch("[!-~]+", credential):
        # An error of grpc would quote the secret.
        raise ValueError("the credential has characters that no credential of milepost has: copy it again")
    return "authorization", f"Bearer {credential}"


class _Details(grpc.ClientCallDetails):
    def __init__(self, details: grpc.ClientCallDetails, pair: tuple[str, str]) -> None:
        self.method = details.method
        self.timeout = details.timeout
        self.credentials = details.credentials
        self.wait_for_ready = details.wait_for_ready
        self.compression = details.compression
        self.metadata = (*(details.metadata or ()), pair)


class _Credential(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Adds the credential to each call. milepost has no other kinds of calls."""

    def __init__(self, credential: str) -> None:
        self._pair = authorization(credential)

    def _add(self, continuation: Callable[..., Any], details: grpc.ClientCallDetails, request: Any) -> Any:
        return continuation(_Details(details, self._pair), request)

    intercept_unary_unary: Any = _add
    intercept_unary_stream: Any = _add
    intercept_stream_stream: Any = _add
