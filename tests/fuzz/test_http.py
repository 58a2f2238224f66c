"""Answers of servers -> a whole body, or an error, within the bounds of time and bytes."""

import contextlib
import http.client
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import pytest
from numpy.random import Generator

from jest_core.run_file import Ingest
from pipelines.data import fetch
from tests.fuzz.harness import SIZES, fuzz, mutated, one_of

MAX_BYTES, MAX_SECONDS = 4000, 0.3
SPEC = Ingest(urls="", shards="", private_addresses=True, max_bytes=MAX_BYTES, max_seconds=MAX_SECONDS)
OK = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n"
UNITS = [b"HTTP/1.1 100 Continue\r\n\r\n", b"X: y\r\n", b"x", b"\0", b"1\r\nx\r\n", b"0;a=b\r\n", b"HTTP", b"\r\n"]
LOCATIONS = ["", "/", "//", "/\r\nX: y", "http://[::1", "http://[::1]:99999/", "http://x:y/", "file:///etc/hostname"]
LOCATIONS += ["data:,x", "/ü \0", "https://127.0.0.1:1/", "http:" + "/" * 3000, "?" * 70_000]


@dataclass
class Answer:
    """Bytes sent at once, then a unit again and again, one each `pause` seconds, while the client listens.

    body: what the client has to get if it gets anything; None where the bytes do not decide it. is_whole: it has to.
    """

    start: bytes
    body: bytes | None
    unit: bytes = b""
    pause: float = 0.0
    is_whole: bool = False


class Server:
    """Gives the same answer to every request, on a socket of this machine."""

    def __init__(self) -> None:
        self.answer = Answer(b"", None)
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=(self.socket.accept()[0], self.answer), daemon=True).start()

    @staticmethod
    def _serve(client: socket.socket, answer: Answer) -> None:
        until, pause = time.monotonic() + MAX_SECONDS + 3, threading.Event()
        with contextlib.suppress(OSError), client:
            client.recv(1 << 16)
            client.sendall(answer.start)
            while answer.unit and time.monotonic() < until:
                pause.wait(answer.pause)
                client.sendall(answer.unit)
            client.shutdown(socket.SHUT_WR)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.socket.close()


def make(rng: Generator) -> Answer:
    body = rng.bytes(int(rng.integers(1, MAX_BYTES + 500)))
    cuts = sorted({0, len(body), *rng.integers(len(body), size=2).tolist()})
    chunks = [body[i:j] for i, j in pairwise(cuts)]
    chunked = b"".join(b"%x;a=b\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
    until_it_closes = OK + b"\r\n" + body
    whole = [
        OK + b"Content-Length: %d\r\n\r\n" % len(body) + body,
        OK + b"Transfer-Encoding: chunked\r\n\r\n" + chunked + b"0\r\nTrailer: x\r\n\r\n",
        until_it_closes,
    ]
    start = one_of(whole, rng)
    cut = start[: int(rng.integers(len(start)))]
    match int(rng.integers(8)):
        case 0:
            return Answer(start, body, is_whole=len(body) <= MAX_BYTES)
        case 1 | 2:
            return Answer(cut, None if start is until_it_closes else body)
        case 3 | 4:
            return Answer(mutated(start[:200], rng, one_of(whole, rng)) + start[200:], None)
        case 5:
            status = one_of([301, 302, 303, 307, 308], rng)
            head = b"HTTP/1.1 %d Found\r\nLocation: %b\r\n" % (status, one_of(LOCATIONS, rng).encode())
            return Answer(head + one_of([b"Content-Length: 0\r\n\r\n", b"\r\n", b""], rng), None)
        case 6:
            size = one_of([*map(str, SIZES), "-1", "abc", "1e3", "", "1, 2", "²", "9" * 5000], rng).encode()
            head = one_of([b"Content-Length: %b\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n%b\r\n"], rng) % size
            return Answer(OK + head + body, None)
        case _:
            at = one_of([start.index(b"\r\n") - 1, start.index(b"\r\n\r\n") + 1, len(start), len(cut)], rng)
            return Answer(start[:at], None, one_of(UNITS, rng), one_of([0.0, 0.02], rng))


def test_http(server: Server):
    def check(answer: Answer) -> None:
        server.answer = answer
        began = time.monotonic()
        try:
            with urllib.request.urlopen(server.url, timeout=MAX_SECONDS) as response:
                body = response.read()
        except (OSError, http.client.HTTPException, ValueError):  # ValueError: no URL, no number
            body = None
        took = time.monotonic() - began
        assert took < MAX_SECONDS + 1, f"{took:.1f} seconds"
        if body:  # an empty body is no picture
            assert len(body) <= MAX_BYTES
            assert answer.body is None or body == answer.body
        assert body == answer.body or not answer.is_whole, "a whole answer was refused"

    with fetch.bounded(SPEC, 1):
        fuzz("http", 100, make, check)
