"""Limits on fetching pictures: the urllib opener that img2dataset fetches through, with limits that urllib lacks.

HTTP and HTTPS only; no private addresses; at most so many bytes and seconds for the body of a response, and so many
requests per second to one host.
"""

import http.client
import ipaddress
import threading
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.error import URLError
from urllib.parse import urlsplit

from jest_core.run_file import Ingest

_HANDLERS = (
    urllib.request.ProxyHandler,
    urllib.request.UnknownHandler,
    urllib.request.HTTPDefaultErrorHandler,
    urllib.request.HTTPRedirectHandler,
    urllib.request.HTTPErrorProcessor,
)
_PRIVATE = (urllib.request.HTTPHandler, urllib.request.HTTPSHandler)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # addresses in it stand for any IPv4 address


@contextmanager
def bounded(spec: Ingest, n_tasks: int) -> Iterator[None]:
    """Within the block, urlopen of this process keeps to the limits of a run file. n_tasks: how many fetch at once."""
    opener = urllib.request.OpenerDirector()
    for handler in _HANDLERS:
        opener.add_handler(handler())
    for connecting in _PRIVATE if spec.private_addresses else (_PublicHTTP, _PublicHTTPS):
        opener.add_handler(connecting())
    opener.add_handler(_Bounds(spec, n_tasks))
    urllib.request.install_opener(opener)
    try:
        yield
    finally:
        urllib.request.install_opener(urllib.request.build_opener())


class _Bounds(urllib.request.BaseHandler):
    """Sees every request, also those after a redirect, and every response before its body is read."""

    handler_order = 100  # before the handler that turns a response's status into an error

    def __init__(self, spec: Ingest, n_tasks: int) -> None:
        self.spec = spec
        rate = spec.requests_per_host_per_second
        self.interval = n_tasks / rate if rate else 0.0
        self.free_at: dict[str, float] = defaultdict(float)  # by host: when the next request may be sent
        self.lock = threading.Lock()

    def http_request(self, request: urllib.request.Request) -> urllib.request.Request:
        host = urlsplit(request.full_url).hostname or ""
        if self.interval:
            self._take_turns(host)
        return request

    def http_response(self, request: urllib.request.Request, response: Any) -> Any:
        most, until = self.spec.max_bytes, time.monotonic() + self.spec.max_seconds
        too_large = URLError(f"larger than {most:,} bytes")
        if int(response.headers.get("Content-Length") or 0) > most:
            raise too_large

        def read() -> bytes:
            body = bytearray()
            while part := response.read1(1 << 16):
                body += part
                if len(body) > most:
                    raise too_large
                if time.monotonic() > until:
                    raise URLError(f"slower than {self.spec.max_seconds:g} seconds")
            if response.length:
                raise URLError("ended early")
            return bytes(body)

        response.read = read
        return response

    https_request, https_response = http_request, http_response

    def _take_turns(self, host: str) -> None:
        now = time.monotonic()
        with self.lock:
            start = max(now, self.free_at[host])
            self.free_at[host] = start + self.interval
        time.sleep(start - now)


def _refuse_private(connection: http.client.HTTPConnection) -> None:
    """Check the address that is connected to, since a host's name may resolve to another one each time."""
    address = ipaddress.ip_address(connection.sock.getpeername()[0])
    if not address.is_global or address in _NAT64:
        connection.close()
        raise OSError("address of a private network")


class _PublicConnection(http.client.HTTPConnection):
    def connect(self) -> None:
        super().connect()
        _refuse_private(self)


class _PublicTLSConnection(http.client.HTTPSConnection):
    def connect(self) -> None:
        super().connect()
        _refuse_private(self)


class _PublicHTTP(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        plain = request.has_proxy()  # the proxy may well be in a private network
        return self.do_open(http.client.HTTPConnection if plain else _PublicConnection, request)


class _PublicHTTPS(urllib.request.HTTPSHandler):
    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        plain = getattr(request, "_tunnel_host", None)
        return self.do_open(http.client.HTTPSConnection if plain else _PublicTLSConnection, request)
