"""What Python and pyarrow ask of a file that is read at any place."""

import io
from abc import abstractmethod


class RawFile(io.RawIOBase):
    """A file of so many bytes, of which a subclass knows how to get a range."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size, self._at = size, 0

    @abstractmethod
    def range(self, start: int, stop: int) -> bytes:
        """The bytes from start on, at most to stop; start < stop."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, n: int | None = -1) -> bytes:
        stop = self._size if n is None or n < 0 else min(self._size, self._at + n)
        data = self.range(self._at, stop) if self._at < stop else b""
        self._at += len(data)
        return data
