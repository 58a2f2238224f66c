"""A local web server that serves pictures, and answers in the other ways that web servers do."""

import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


class Website:
    """Serves picture N at /ok/N, /redirect/N, /flaky/N (fails once), /noai/N and /forbidden/N (for one user agent).

    Other paths fail: /missing /hang /drip /huge /endless /short/N /loop /page /file. requests: their number by path.
    """

    def __init__(self, pictures: list[bytes]) -> None:
        self.requests: Counter[str] = Counter()
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.requests[self.path] += 1
                kind, _, number = self.path.partition("?")[0].strip("/").partition("/")
                getattr(site, f"_{kind}")(self, int(number or 0))

            def log_message(self, *_: Any) -> None:
                pass

        self.pictures = pictures
        self.server = _Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def _answer(self, to: BaseHTTPRequestHandler, status: int, body: bytes, **headers: str) -> None:
        to.send_response(status)
        for name, value in ({"Content_Length": str(len(body))} | headers).items():
            to.send_header(name.replace("_", "-"), value)
        to.end_headers()
        to.wfile.write(body)

    def _ok(self, to: BaseHTTPRequestHandler, number: int) -> None:
        self._answer(to, 200, self.pictures[number], Content_Type="image/jpeg")

    def _redirect(self, to: BaseHTTPRequestHandler, number: int) -> None:
        self._answer(to, 302, b"", Location=f"/ok/{number}")

    def _loop(self, to: BaseHTTPRequestHandler, _: int) -> None:
        self._answer(to, 302, b"", Location="/loop")

    def _file(self, to: BaseHTTPRequestHandler, _: int) -> None:
        self._answer(to, 302, b"", Location="file:///etc/hostname")

    def _flaky(self, to: BaseHTTPRequestHandler, number: int) -> None:
        if self.requests[to.path] == 1:
            self._answer(to, 503, b"later")
        else:
            self._ok(to, number)

    def _noai(self, to: BaseHTTPRequestHandler, number: int) -> None:
        self._answer(to, 200, self.pictures[number], X_Robots_Tag="noai, noimageai")

    def _forbidden(self, to: BaseHTTPRequestHandler, number: int) -> None:
        self._answer(to, 200, self.pictures[number], X_Robots_Tag="jest: noindex")

    def _missing(self, to: BaseHTTPRequestHandler, _: int) -> None:
        self._answer(to, 404, b"no such page")

    def _page(self, to: BaseHTTPRequestHandler, _: int) -> None:
        self._answer(to, 200, b"<html>a page</html>", Content_Type="text/html")

    def _hang(self, to: BaseHTTPRequestHandler, _: int) -> None:
        time.sleep(30)

    def _huge(self, to: BaseHTTPRequestHandler, _: int) -> None:
        self._answer(to, 200, b"begins", Content_Length="1000000000000")

    def _short(self, to: BaseHTTPRequestHandler, number: int) -> None:
        whole = self.pictures[number]
        self._answer(to, 200, whole[: len(whole) // 2], Content_Length=str(len(whole)))

    def _endless(self, to: BaseHTTPRequestHandler, _: int) -> None:
        self._pour(to, b"x" * 65536, 0.0)

    def _drip(self, to: BaseHTTPRequestHandler, _: int) -> None:
        self._pour(to, b"x", 0.2)

    def _pour(self, to: BaseHTTPRequestHandler, part: bytes, seconds: float) -> None:
        to.send_response(200)
        to.end_headers()
        try:
            while True:
                to.wfile.write(part)
                to.wfile.flush()
                time.sleep(seconds)
        except OSError:
            pass
