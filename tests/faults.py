"""A proxy in front of a real S3 server that makes some requests fail as networks and servers do."""

import contextlib
import random
import socket
import struct
import threading
from collections import Counter
from urllib.parse import urlsplit

_METHODS = (b"GET ", b"PUT ", b"POST ", b"HEAD ", b"DELETE ")
_REFUSED = b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
_BROKEN = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class FaultyProxy:
    """Forwards bytes to `target`; each request is answered, refused, delayed or cut off at random.

    rates: the share of requests with each fault (503, 500, slow, reset). counts: how many had it.
    """

    def __init__(self, target: str, rates: dict[str, float], seed: int = 0) -> None:
        parts = urlsplit(target)
        self.target = (parts.hostname, parts.port)
        self.rates, self.random, self.counts = rates, random.Random(seed), Counter[str]()
        self.server = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.url = f"http://127.0.0.1:{self.server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self.server.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.server.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _fault(self) -> str | None:
        drawn = self.random.random()
        for name, rate in self.rates.items():
            if drawn < rate:
                return name
            drawn -= rate
        return None

    def _serve(self, client: socket.socket) -> None:
        """Serve one connection of a client until either side or a fault closes it."""
        with contextlib.suppress(OSError), client, socket.create_connection(self.target) as server:
            threading.Thread(target=self._answer, args=(server, client), daemon=True).start()
            while data := client.recv(1 << 16):
                if data.startswith(_METHODS):  # the beginning of a request
                    fault = self._fault()
                    self.counts[fault or "passed"] += 1
                    match fault:
                        case "503" | "500":
                            client.sendall(_REFUSED if fault == "503" else _BROKEN)
                            return
                        case "slow":
                            threading.Event().wait(self.random.uniform(0.5, 2.0))
                        case "reset":
                            server.sendall(data[: len(data) // 2])
                            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                            return
                server.sendall(data)

    @staticmethod
    def _answer(server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(1 << 16):
                client.sendall(data)
            client.shutdown(socket.SHUT_WR)
