"""Limits on fetching, against servers that speak HTTP and TLS badly, slowly, or without end."""

import contextlib
import datetime
import io
import socket
import ssl
import threading
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from PIL import Image

from jest_core import run_file
from pipelines.data import fetch
from tests.websites import Website

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
FOUND = b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: /"
PAUSE = 0.1


def spec(**settings) -> run_file.Ingest:
    return run_file.Ingest(urls="x", shards="y", **{"private_addresses": True, "max_seconds": 1, **settings})


@contextmanager
def served(answer: Callable[[socket.socket], None], host: str = "127.0.0.1") -> Iterator[int]:
    """A server that answers each connection so, in a thread; its port."""
    server = socket.create_server((host, 0))

    def answered(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):  # the client has gone
            answer(connection)

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=answered, args=[connection], daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield server.getsockname()[1]
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()


def dripping(begin: bytes, byte: bytes = b"x", seconds: float = PAUSE) -> Callable[[socket.socket], None]:
    """An answer that begins at once, and never ends."""

    def answer(connection: socket.socket) -> None:
        connection.sendall(begin)
        while True:
            connection.sendall(byte)
            time.sleep(seconds)

    return answer


def redirecting(connection: socket.socket) -> None:
    connection.recv(1 << 16)
    time.sleep(2 * PAUSE)
    connection.sendall(FOUND + str(time.monotonic()).encode() + b"\r\n\r\n")


SLOW = {
    "the status line": dripping(b"HTTP/1.1 200"),
    "a header": dripping(OK + b"Server: "),
    "headers": dripping(OK, b"a: b\r\n"),
    "interim answers": dripping(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "the body": dripping(OK + b"\r\n"),
    "the body of a redirect": dripping(FOUND.replace(b"Length: 0", b"Length: 999") + b"x\r\n\r\n"),
    "the body of an error": dripping(b"HTTP/1.1 404 Not Found\r\nX: "),
    "a chunk's size": dripping(CHUNKED, b"0"),
    "a chunk's extension": dripping(CHUNKED + b"5;"),
    "a trailer": dripping(CHUNKED + b"0\r\n", b"a: b\r\n"),
    "many redirects": redirecting,
    "nothing": dripping(b"", b""),
    "the handshake of TLS": dripping(b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc"),
    "a record of TLS": dripping(b"\x16\x03\x03", b"\x01", 2 * PAUSE),
}


def body(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as response:
        return response.read()


def failure(url: str) -> tuple[str, float]:
    """Why a picture could not be fetched, and after how many seconds."""
    started = time.monotonic()
    with pytest.raises(Exception) as caught:  # noqa: PT011
        body(url)
    return str(caught.value), time.monotonic() - started


def test_one_bound_of_time_holds_for_all_that_a_server_can_drip(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with fetch.bounded(spec(), 1), ThreadPoolExecutor(len(SLOW)) as pool:

        def slow(name: str) -> tuple[str, float]:
            with served(SLOW[name]) as port:
                return failure(f"http{'s' * ('TLS' in name)}://127.0.0.1:{port}/")

        outcomes = dict(zip(SLOW, pool.map(slow, SLOW), strict=True))
    assert not {name: text for name, (text, _) in outcomes.items() if "slower than 1 seconds" not in text}
    assert max(seconds for _, seconds in outcomes.values()) < 3


def test_a_pause_is_bounded_too_and_so_is_what_is_no_picture(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with fetch.bounded(spec(max_seconds=20, max_bytes=1000), 1):
        with served(dripping(b"", b"")) as port, pytest.raises(TimeoutError, match="timed out"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=0.2)
        for begin, rest in (
            (CHUNKED + b"0\r\n", b"a: " + b"x" * 60_000 + b"\r\n"),
            (CHUNKED, b"1;" + b"x" * 60_000 + b"\r\nx\r\n"),
        ):
            with served(dripping(begin, rest, 0)) as port:
                assert "larger than 1,000 bytes" in failure(f"http://127.0.0.1:{port}/")[0]


def test_an_address_is_checked_before_the_connection(monkeypatch):
    """Of a host with several addresses, those that may be fetched from are tried; no other sees a connection."""
    monkeypatch.setenv("no_proxy", "*")
    seen: list[str] = []

    def answer(connection: socket.socket) -> None:
        seen.append(connection.getsockname()[0])
        connection.recv(1 << 16)
        connection.sendall(OK + b"Content-Length: 2\r\n\r\nhi")

    with served(answer, "127.0.0.1") as port:
        for scheme in ("http", "https"):
            for host in ("127.0.0.1", "localhost", "2130706433", "0x7f.1", "[::ffff:127.0.0.1]"):
                with fetch.bounded(spec(private_addresses=False), 1):
                    assert "private network" in failure(f"{scheme}://{host}:{port}/")[0]
        time.sleep(PAUSE)
        assert not seen
        several = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"127.0.0.{i}", port)) for i in (2, 1, 3)]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: several)
        with fetch.bounded(spec(private_addresses=["127.0.0.1"]), 1):
            assert body(f"http://several.example:{port}/") == b"hi"
        assert seen == ["127.0.0.1"]


def test_a_proxy_may_be_private_but_is_not_asked_for_private_addresses(monkeypatch):
    seen: list[bytes] = []

    def proxy(connection: socket.socket) -> None:
        seen.append(connection.recv(1 << 16).split(b"\r\n")[0])
        connection.sendall(OK + b"Content-Length: 2\r\n\r\nhi")

    with served(proxy) as port:
        for name in ("http_proxy", "https_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        with fetch.bounded(spec(private_addresses=False), 1):
            assert body("http://pictures.example/1") == b"hi"
            for url in ("http://169.254.169.254/", "https://[fd00:ec2::254]/", "http://0x7f.1/", "http://2852039166/"):
                assert "address of a" in failure(url)[0]
    assert seen == [b"GET http://pictures.example/1 HTTP/1.1"]


def test_the_name_of_a_host_is_what_tls_is_asked_for(tmp_path: Path, monkeypatch):
    """The connection goes to a checked address, the certificate is that of the host."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + datetime.timedelta(days=1))
    certificate = certificate.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
    certificate = certificate.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    pem = certificate.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (tmp_path / "certificate.pem").write_bytes(pem)
    (tmp_path / "both.pem").write_bytes(pem + private)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "both.pem")
    asked: list[str | None] = []
    context.sni_callback = lambda _socket, host, _context: asked.append(host)

    def answer(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as encrypted:
            encrypted.recv(1 << 16)
            encrypted.sendall(OK + b"Content-Length: 100000\r\n\r\n" + b"x" * 100_000)

    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "certificate.pem"))
    with served(answer) as port, fetch.bounded(spec(), 1):
        assert len(body(f"https://localhost:{port}/")) == 100_000
        assert "certificate" in failure(f"https://127.0.0.1:{port}/")[0]
    assert asked[0] == "localhost"

    def tunnel(connection: socket.socket) -> None:
        asked.append(connection.recv(1 << 16).split(b"\r\n")[0].decode())
        connection.sendall(OK + b"\r\n")
        answer(connection)

    monkeypatch.delenv("no_proxy")
    with served(tunnel) as port:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
        with fetch.bounded(spec(private_addresses=False), 1):
            assert len(body("https://localhost/")) == 100_000
    assert [str(each).split(" HTTP")[0] for each in asked[-2:]] == ["CONNECT localhost:443", "localhost"]


@pytest.fixture
def site() -> Iterator[Website]:
    website = Website([b"a picture"] * 4)
    yield website
    website.close()


def test_private_addresses_and_file_urls_are_not_requested(site: Website, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "x.internal")
    with fetch.bounded(spec(private_addresses=False), 1):
        for url in (f"{site.address}/ok/0", f"http://localhost:{site.server.server_port}/ok/0"):
            with pytest.raises(URLError, match="private network"):
                urllib.request.urlopen(url, timeout=1)
        with pytest.raises(URLError, match="unknown url type: file"):
            urllib.request.urlopen("file:///etc/hostname", timeout=1)
    assert not site.requests
    with urllib.request.urlopen(f"{site.address}/ok/0", timeout=5) as answer:  # the restriction ends with the context
        assert answer.read() == site.pictures[0]


def test_the_request_rate_per_host_is_limited(site: Website):
    with fetch.bounded(spec(requests_per_host_per_second=20), 2):  # each of two tasks may send ten requests a second
        started = time.monotonic()
        for i in range(4):
            urllib.request.urlopen(f"{site.address}/ok/{i}", timeout=5).close()
        assert time.monotonic() - started > 0.3


def picture(kind: str, width: int, height: int) -> io.BytesIO:
    Image.new("1" if kind == "PNG" else "L", (width, height)).save(sink := io.BytesIO(), kind)
    return sink


def png_header(width: int, height: int) -> io.BytesIO:
    """A PNG of a few bytes that claims a size."""
    head = b"IHDR" + width.to_bytes(4) + height.to_bytes(4) + b"\x08\x02\0\0\0"
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4) + head + zlib.crc32(head).to_bytes(4) + b"\0\0\0\0IDAT")


@pytest.mark.parametrize(
    ("stream", "settings", "passes"),
    [
        (picture("JPEG", 100, 100), {"max_pixels": 10_000}, True),
        (picture("JPEG", 101, 100), {"max_pixels": 10_000}, False),
        (picture("PNG", 101, 100), {"max_pixels": 10_000}, False),
        (picture("WEBP", 101, 100), {"max_pixels": 10_000}, False),
        (picture("TIFF", 101, 100), {"max_pixels": 10_000}, False),
        (picture("GIF", 101, 100), {"max_pixels": 10_000}, False),
        (png_header(16_000, 16_000), {}, False),
        (png_header(2**31 - 1, 2**31 - 1), {}, False),
        (io.BytesIO(b"no picture at all"), {}, True),  # OpenCV says so
        (picture("PNG", 5000, 2), {}, True),
        (picture("PNG", 5000, 2), {"resize_mode": "keep_ratio", "resize_only_if_bigger": False}, False),
        (picture("PNG", 5000, 2), {"resize_mode": "center_crop", "resize_only_if_bigger": True}, True),
    ],
)
def test_pixels_are_bounded_before_they_are_decoded(stream: io.BytesIO, settings: dict, passes: bool):
    passed: list[io.BytesIO] = []

    def resizer(data: io.BytesIO, boxes: object) -> fetch.Resized:
        passed.append(data)
        return b"", 1, 1, 1, 1, None

    *_, error = fetch.bounded_pixels(resizer, spec(**settings))(stream, None)
    assert (passed == [stream]) == passes == (error is None)
    assert passes or "pixels" in str(error)
