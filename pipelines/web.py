"""How pictures are fetched: the opener of urllib that img2dataset fetches through, with bounds that it has not.

Only HTTP and HTTPS; no private addresses; no more than so many bytes and seconds a picture, nor so many requests to a
host a second.
"""

import ipaddress
import socket
import threading
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any
from urllib.error import URLError
from urllib.parse import urlsplit

from jest_core.config import Ingest

_HANDLERS = (
    urllib.request.ProxyHandler,
    urllib.request.UnknownHandler,
    urllib.request.HTTPHandler,
    urllib.request.HTTPSHandler,
    urllib.request.HTTPDefaultErrorHandler,
    urllib.request.HTTPRedirectHandler,
    urllib.request.HTTPErrorProcessor,
)


@contextmanager
def bounded(spec: Ingest, n_tasks: int) -> Iterator[None]:
    """Meanwhile urlopen keeps to the bounds of a run file, in this process. n_tasks: how many fetch at once."""
    opener = urllib.request.OpenerDirector()
    for handler in _HANDLERS:
        opener.add_handler(handler())
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
        if not self.spec.private_addresses and not urllib.request.getproxies() and not _is_public(host):
            raise URLError("address of a private network")
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
            return bytes(found)

        response.read = read
        return response

    https_request, https_response = http_request, http_response

    def _take_turns(self, host: str) -> None:
        now = time.monotonic()
        with self.lock:
            start = max(now, self.free_at[host])
            if start > now + self.spec.max_seconds:
                raise URLError("too many requests to this host")
            self.free_at[host] = start + self.interval
        time.sleep(start - now)


@lru_cache(maxsize=100_000)
def _is_public(host: str) -> bool:
    addresses = {entry[4][0] for entry in socket.getaddrinfo(host, None)}
    return all(ipaddress.ip_address(address).is_global for address in addresses)
