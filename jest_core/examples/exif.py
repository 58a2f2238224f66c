"""How a picture has to be turned to be upright, as its EXIF block says.

Pillow's getexif copies what every tag points to: hundreds of megabytes, for a block of 64 kB whose tags overlap.
"""

import struct

_ORIENTATION, _SHORT = 0x0112, 3  # the tag, and the type that its value has


def of_jpeg(data: bytes) -> bytes:
    """The EXIF block in the header of a JPEG; empty where it has none."""
    at = 2
    while data[at : at + 1] == b"\xff" and at + 4 <= len(data):
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xFF:  # markers may be preceded by any number of these
            at += 1
            continue
        if marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            return data[at + 4 : at + 2 + length]
        if marker in (0xD9, 0xDA):  # the pixels, or the end
            break
        at += 2 + length
    return b""


def orientation(block: bytes) -> int:
    """The orientation 1 to 8 of an EXIF block; 1, which is upright, where it has none or another value."""
    block = block.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(block[:2])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(f"{order}I", block, 4)
        (n,) = struct.unpack_from(f"{order}H", block, directory)
        for i in range(n):
            tag, kind, _, value = struct.unpack_from(f"{order}HHIH", block, directory + 2 + 12 * i)
            if tag == _ORIENTATION:
                return value if kind == _SHORT and 1 <= value <= 8 else 1
    except struct.error:  # the block ends before its directory does
        pass
    return 1
