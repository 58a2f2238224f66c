"""How pictures are fetched: the opener of urllib that img2dataset fetches through, with bounds that it has not.

Only HTTP and HTTPS; no private addresses; no more than so many bytes and seconds of an answer's body, nor so many
requests to a host a second.
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
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # stands for any IPv4 address


@contextmanager
def bounded(spec: Ingest, n_tasks: int) -> Iterator[None]:
    """Meanwhile urlopen keeps to the bounds of a run file, in this process. n_tasks: how many fetch at once."""
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
    """Sees every request, those too that a redirect makes, and every answer before its body is read."""

    handler_order = 100  # before what turns an answer's status into an error

    def __init__(self, spec: Ingest, n_tasks: int) -> None:
        self.spec = spec
        rate = spec.requests_per_host_per_second
        self.interval = n_tasks / rate if rate else 0.0
        self.free_at: dict[str, float] = defaultdict(float)  # of each host: when its next request may go out
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
            found = bytearray()
            while part := response.read1(1 << 16):
                found += part
                if len(found) > most:
                    raise too_large
                if time.monotonic() > until:
                    raise URLError(f"slower than {self.spec.max_seconds:g} seconds")
            if response.length:
                raise URLError("ended early")
            return bytes(found)

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
    """By the address that it is connected to, whatever its name led to before."""
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
        plain = request.has_proxy()  # which may well be in a private network
        return self.do_open(http.client.HTTPConnection if plain else _PublicConnection, request)


class _PublicHTTPS(urllib.request.HTTPSHandler):
    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        plain = getattr(request, "_tunnel_host", None)
        return self.do_open(http.client.HTTPSConnection if plain else _PublicTLSConnection, request)
