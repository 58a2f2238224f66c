"""Limits on fetching pictures: the urllib opener that img2dataset fetches through, with limits that urllib lacks.

HTTP and HTTPS only; no private addresses; at most so many bytes and seconds for a picture, from the connection to the
last byte and over all redirects; so many requests per second to one host; and so many pixels.
"""

import http.client
import io
import socket
import ssl
import threading
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from urllib.error import URLError
from urllib.parse import urlsplit

from PIL import Image

from jest_core.run_file import Ingest

from .addresses import refusal

_HANDLERS = (
    urllib.request.ProxyHandler,
    urllib.request.UnknownHandler,
    urllib.request.HTTPDefaultErrorHandler,
    urllib.request.HTTPErrorProcessor,
)
_LOOK_SECONDS = 10.0  # after which it is seen that more fetch
_HEADERS = 1 << 20  # bytes of an exchange that are no part of a picture
# What Pillow and OpenCV both read
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "PPM", "AVIF", "SUN")
Resized = tuple[bytes | None, int | None, int | None, int | None, int | None, str | None]  # the last: an error


@contextmanager
def bounded(spec: Ingest, n_tasks: int, n_now: Callable[[], int] | None = None) -> Iterator[None]:
    """Within the block, urlopen of this process keeps to the limits of a run file.

    n_tasks: how many fetch at once, and share what a host is asked. n_now: how many may by now, where they become more.
    """
    opener = urllib.request.OpenerDirector()
    for handler in _HANDLERS:
        opener.add_handler(handler())
    for ours in (_Redirects(), _Handler(spec), _Bounds(spec, n_tasks, n_now)):
        opener.add_handler(ours)
    urllib.request.install_opener(opener)
    try:
        yield
    finally:
        urllib.request.install_opener(urllib.request.build_opener())


def bounded_pixels(resizer: Callable[..., Resized], spec: Ingest) -> Callable[..., Resized]:
    """img2dataset's resizer, which is not given a picture of more than max_pixels, or that would have more when it is
    enlarged."""
    enlarges = spec.resize_mode in ("keep_ratio", "center_crop") and not spec.resize_only_if_bigger
    too_large: Resized = (None, None, None, None, None, f"more than {spec.max_pixels:,} pixels")

    def resize(stream: io.BytesIO, *boxes: Any) -> Resized:
        try:
            with Image.open(io.BytesIO(stream.getbuffer()), formats=_FORMATS) as image:  # reads the header
                width, height = image.size
        except Image.DecompressionBombError:
            return too_large
        except Exception:  # not a picture to Pillow, in whichever way; OpenCV has the same bound
            return resizer(stream, *boxes)
        scale = spec.image_size / max(1, min(width, height)) if enlarges else 1
        return too_large if width * height * max(1, scale) ** 2 > spec.max_pixels else resizer(stream, *boxes)

    return resize


class _Exchange:
    """What is left of the time and bytes of one picture: all requests up to it have one of these."""

    def __init__(self, spec: Ingest) -> None:
        self.most_seconds, self.most_bytes = spec.max_seconds, spec.max_bytes
        self.until = time.monotonic() + spec.max_seconds
        self.n_bytes = 0  # of all that came

    def seconds(self, most: float) -> float:
        """How long a socket may wait. Raises TimeoutError after max_seconds."""
        left = self.until - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"slower than {self.most_seconds:g} seconds")
        return min(left, most)

    @contextmanager
    def in_words(self) -> Iterator[None]:
        """Within the block, a wait that max_seconds ended says so."""
        try:
            yield
        except TimeoutError:
            self.seconds(0)
            raise

    def count(self, n_bytes: int) -> None:
        self.n_bytes += n_bytes
        self.refuse_larger((self.n_bytes - _HEADERS) // 2)  # half of it may be the sizes of chunks

    def refuse_larger(self, n_bytes: int) -> None:
        """Raises OSError where a picture has more than max_bytes."""
        if n_bytes > self.most_bytes:
            raise OSError(f"larger than {self.most_bytes:,} bytes")


class _Socket(socket.socket):
    """A socket that waits for what is left of an exchange, and no longer."""

    exchange: _Exchange
    pause: float  # seconds of one wait

    def recv_into(self, *arguments: Any) -> int:
        self.settimeout(self.exchange.seconds(self.pause))
        with self.exchange.in_words():
            n_bytes = super().recv_into(*arguments)
        self.exchange.count(n_bytes)
        return n_bytes

    def send(self, *arguments: Any) -> int:
        self.settimeout(self.exchange.seconds(self.pause))
        return super().send(*arguments)


class _TLSSocket(_Socket, ssl.SSLSocket):
    """The same with TLS."""


class _Response(http.client.HTTPResponse):
    """An answer whose body is read whole, and has at most max_bytes."""

    def __init__(self, sock: Any, *arguments: Any, **named: Any) -> None:
        super().__init__(sock, *arguments, **named)
        self.exchange: _Exchange = sock.exchange

    def begin(self) -> None:
        super().begin()
        self.exchange.refuse_larger(self.length or 0)

    def read(self, _amount: int | None = None) -> bytes:
        body = bytearray()
        while part := self.read1(1 << 16):
            body += part
            self.exchange.refuse_larger(len(body))
        if self.length:
            raise OSError("ended early")
        return bytes(body)


class _Connection(http.client.HTTPConnection):
    """A connection to an address that may be fetched from, which is checked before it is connected to: a host's name
    may resolve to another address each time. refuses: of an address and its host, why. context: of TLS."""

    response_class = _Response
    _tunnel_host: str | None

    def __init__(
        self,
        host: str,
        *,
        timeout: float,
        exchange: _Exchange,
        refuses: Callable[[str, str], str | None],
        context: ssl.SSLContext | None,
    ) -> None:
        self.default_port = 443 if context else 80
        super().__init__(host, timeout=timeout)
        self.pause, self.exchange, self.refuses, self.context = timeout, exchange, refuses, context
        self._create_connection = self._connected

    def connect(self) -> None:
        super().connect()  # with the proxy's tunnel, if any
        if self.context:
            self.sock.settimeout(self.exchange.seconds(self.pause))  # for the handshake
            with self.exchange.in_words():
                self.sock = self.context.wrap_socket(self.sock, server_hostname=self._tunnel_host or self.host)
            self._limit(self.sock)

    def _connected(self, place: tuple[str, int], *_: Any) -> _Socket:
        error = OSError("no address")
        for family, kind, protocol, _name, address in socket.getaddrinfo(*place, type=socket.SOCK_STREAM):
            if reason := self.refuses(str(address[0]), place[0]):
                error = OSError(reason)
                continue
            sock = _Socket(family, kind, protocol)
            try:
                self._limit(sock)
                with self.exchange.in_words():
                    sock.connect(address)
                return sock
            except OSError as failed:
                sock.close()
                error = failed
        raise error

    def _limit(self, sock: Any) -> None:
        sock.exchange, sock.pause = self.exchange, self.pause
        sock.settimeout(self.exchange.seconds(self.pause))


class _Handler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """HTTP and HTTPS by such connections."""

    def __init__(self, spec: Ingest) -> None:
        super().__init__()
        self.refuses = partial(refusal, private=spec.private_addresses)
        self.context = ssl.create_default_context()
        self.context.set_alpn_protocols(["http/1.1"])
        self.context.sslsocket_class = _TLSSocket

    def http_open(self, request: Any) -> http.client.HTTPResponse:
        return self._open(request, request.has_proxy(), None)

    def https_open(self, request: Any) -> http.client.HTTPResponse:
        return self._open(request, request._tunnel_host, self.context)

    def _open(self, request: Any, by_proxy: Any, context: Any) -> http.client.HTTPResponse:
        if by_proxy:
            self._refuse_number(urlsplit(request.full_url).hostname or "")
        refuses = (lambda *_: None) if by_proxy else self.refuses  # a proxy may well be in a private network
        connection: Any = partial(_Connection, exchange=request.exchange, refuses=refuses, context=context)
        return self.do_open(connection, request)

    def _refuse_number(self, host: str) -> None:
        """Raises URLError where a proxy is asked for an address that may not be fetched from; it resolves names."""
        try:
            address = socket.getaddrinfo(host, None, flags=socket.AI_NUMERICHOST)[0][4][0]
        except OSError:
            return
        if reason := self.refuses(str(address), host):
            raise URLError(reason)


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request: Any, *arguments: Any) -> Any:
        redirected: Any = super().redirect_request(request, *arguments)
        redirected.exchange = request.exchange
        return redirected


class _Bounds(urllib.request.BaseHandler):
    """Sees every request, also those after a redirect."""

    def __init__(self, spec: Ingest, n_tasks: int, n_now: Callable[[], int] | None = None) -> None:
        self.spec, self.n_tasks, self.n_now = spec, n_tasks, n_now
        self.rate, self.looked = spec.requests_per_host_per_second, time.monotonic()
        self.free_at: dict[str, float] = defaultdict(float)  # by host: when the next request may be sent
        self.lock = threading.Lock()

    def http_request(self, request: Any) -> Any:
        waited = self._take_turns(urlsplit(request.full_url).hostname or "") if self.rate else 0.0
        if hasattr(request, "exchange"):
            request.exchange.until += waited
        else:
            request.exchange = _Exchange(self.spec)
        return request

    https_request = http_request

    def _take_turns(self, host: str) -> float:
        """Wait until a request may be sent to a host; returns the seconds."""
        now = time.monotonic()
        with self.lock:
            if self.n_now and now - self.looked > _LOOK_SECONDS:
                self.looked, self.n_tasks = now, max(self.n_tasks, self.n_now())
            start = max(now, self.free_at[host])
            self.free_at[host] = start + self.n_tasks / (self.rate or 1)
        time.sleep(start - now)
        return start - now
