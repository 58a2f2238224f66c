"""Image bytes -> pixels (3, H, W) uint8: the one view of an image that learner and reference both score.

It is open_clip's evaluation transform, pixel for pixel, without its last step, the conversion to floats: a quarter of
the bytes are sent between processes. Both use Pillow, but a process that only reads examples does not have to import
PyTorch, torchvision and open_clip, which take 6 CPU seconds and 0.8 GB. The decoder `simplejpeg` takes about half of
Pillow's time; whatever it does not decode without fault goes through Pillow, so that a picture has the same status.
"""

import io
import math
import threading
from collections.abc import Sequence
from concurrent.futures import Executor
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from jest_core.choices import Decoder
from jest_core.examples import exif, rgbx
from jest_core.tables import SlotStatus

# Not all that Pillow opens: some of the others run programs
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
MAX_PIXELS = 89_478_485  # Pillow's limit for a decompression bomb, which is an error here; before and after the resize
MAX_PASSES = 20  # a progressive JPEG has about 10 scans, and each goes over all pixels: 120 bytes can take 0.1 s
_SCAN, _SCAN_BYTES = b"\xff\xda", 10  # the marker of a JPEG's scan, and the least that a scan takes
_LARGE = (
    20_000_000  # pixels of a picture that is decoded alone: MAX_PIXELS in each of many threads would fill a machine
)

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_alone = threading.Lock()


class BadImage(ValueError):
    """Bytes that do not decode to an image; status says why."""

    def __init__(self, status: SlotStatus) -> None:
        super().__init__(status)
        self.status = status

    def __str__(self) -> str:
        return self.status.label


@dataclass(frozen=True, repr=False)
class View:
    """Resize, then crop the centre, as open_clip does for evaluation.

    interpolation: bicubic or bilinear. resize_mode: `shortest` side to the size, and crop; `longest`, and pad with
    black; or `squash`. margin: resize to image_size / margin before the centre crop; 1 keeps the whole of the shorter
    side, 0.875 is what ImageNet is evaluated with. reduced: let the JPEG decoder halve the picture as often as it
    stays larger than the view. Several times faster, with slightly other pixels: for pictures that are scored but not
    trained on (`data.decode: late`). decoder: pillow, or simplejpeg and PyTorch, which shows pictures upright and in
    front of white (`data.decoder`).
    """

    image_size: int
    _: KW_ONLY
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    margin: float = 1.0
    reduced: bool = False
    decoder: Decoder = "pillow"

    def __post_init__(self) -> None:
        if self.resize_mode not in ("shortest", "longest", "squash"):
            raise ValueError(f"resize_mode is shortest, longest or squash, and not {self.resize_mode!r}")
        if self.interpolation not in _FILTERS:
            raise ValueError(f"interpolation is bicubic or bilinear, and not {self.interpolation!r}")

    def __call__(self, data: bytes | None) -> NDArray[np.uint8]:
        """Pixels (3, H, W). Raises BadImage where the bytes are not an image that decodes, or one whose pixels, before
        or after the resize, are more than MAX_PIXELS: what a picture can take of memory and time is bounded."""
        pixels = np.empty((3, self.image_size, self.image_size), dtype=np.uint8)
        self._fill(pixels, data)
        return pixels

    def _fill(self, pixels: NDArray[np.uint8], data: bytes | None) -> None:
        """pixels (3, H, W): written where the image decodes, and left as they are where it raises BadImage."""
        if not data:
            raise BadImage(SlotStatus.MISSING)
        try:
            decoded = self._by_simplejpeg(data) if self.decoder == "simplejpeg" else None
            if decoded is None:
                decoded = self._by_pillow(data)
        except UnidentifiedImageError:
            raise BadImage(SlotStatus.NO_IMAGE) from None
        except (Image.DecompressionBombError, MemoryError):
            raise BadImage(SlotStatus.TOO_LARGE) from None
        except (BadImage, ImportError):  # of PyTorch, which is no fault of the picture
            raise
        except Exception as error:  # whatever Pillow raises: it has nothing but these bytes
            raise BadImage(SlotStatus.DAMAGED) from error
        rgbx.to_planes(decoded, pixels)

    def _by_pillow(self, data: bytes) -> rgbx.Pixels:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            passes = data.count(_SCAN) if "progressive" in image.info else 1
            if self._is_too_large(image.size, passes):
                raise BadImage(SlotStatus.TOO_LARGE)
            if self.reduced:
                scale = self.image_size / min(image.size)
                image.draft("RGB", (math.ceil(image.width * scale), math.ceil(image.height * scale)))
            with _alone if math.prod(image.size) > _LARGE else nullcontext():
                if self.decoder == "simplejpeg":
                    pixels = rgbx.of_rgb(rgbx.on_white(image))
                    return self._cut(pixels, exif.orientation(image.info.get("exif", b"")))
                picture = image if image.mode == "RGB" else image.convert("RGB")
                shape = self._shape(*picture.size)
                if shape != picture.size:
                    picture = picture.resize(shape, _FILTERS[self.interpolation])
                return self._square(rgbx.of_rgb(picture))

    def _by_simplejpeg(self, data: bytes) -> rgbx.Pixels | None:
        """None of all that is not a JPEG without fault: Pillow decodes it, or says what is wrong with it."""
        size = rgbx.jpeg_size(data)
        if size is None:
            return None
        if self._is_too_large(size):
            raise BadImage(SlotStatus.TOO_LARGE)
        # few are large enough that their scans have to be counted, which takes a tenth of the time of decoding
        if self._is_too_large(size, len(data) // _SCAN_BYTES) and self._is_too_large(size, data.count(_SCAN)):
            return None
        orientation = exif.orientation(exif.of_jpeg(data))
        smallest = size
        if self.reduced:
            smallest = self._shape(*size) if orientation < 5 else self._shape(*size[::-1])[::-1]
        with _alone if math.prod(size) > _LARGE else nullcontext():
            pixels = rgbx.of_jpeg(data, smallest)
            return None if pixels is None else self._cut(pixels, orientation)

    def _is_too_large(self, size: tuple[int, int], passes: int = 1) -> bool:
        """By the header alone: nothing is decoded yet. passes: scans of a progressive JPEG."""
        shape = self._shape(*size)
        pixels, between = math.prod(size), shape[0] * size[1]  # rows are resized first
        return max(pixels, between, math.prod(shape), pixels * passes // MAX_PASSES) > MAX_PIXELS

    @property
    def _resized(self) -> int:
        return round(self.image_size / self.margin)

    def _cut(self, pixels: rgbx.Pixels, orientation: int) -> rgbx.Pixels:
        pixels = rgbx.upright(pixels, orientation)
        size = (pixels.shape[1], pixels.shape[0])
        shape = self._shape(*size)
        return self._square(pixels if shape == size else rgbx.resized(pixels, *shape, self.interpolation))

    def _square(self, pixels: rgbx.Pixels) -> rgbx.Pixels:
        """The middle of a picture of the resized shape."""
        if self.resize_mode == "longest":
            pixels = rgbx.padded(pixels, self._resized)
        return rgbx.centre(rgbx.centre(pixels, self._resized), self.image_size)

    def _shape(self, width: int, height: int) -> tuple[int, int]:
        """Width and height that a picture is resized to."""
        size = self._resized
        match self.resize_mode:
            case "shortest":
                shorter = min(width, height)
                return int(size * width / shorter), int(size * height / shorter)
            case "longest":
                ratio = max(width / size, height / size)
                return round(width / ratio), round(height / ratio)
            case _:
                return size, size

    def smaller(self, image_size: int) -> "View":
        """The same view at a lower resolution, reduced by the image decoder where it can."""
        return replace(self, image_size=image_size, margin=1.0, reduced=True)

    def batch(
        self, images: Sequence[bytes | None], pool: Executor | None = None
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Pixels (B, 3, H, W), black where an image does not decode, and the number of each one's SlotStatus.

        pool: threads to decode in; Pillow releases the global interpreter lock while it decodes.
        """
        pixels = np.zeros((len(images), 3, self.image_size, self.image_size), dtype=np.uint8)
        status = np.zeros(len(images), dtype=np.uint8)

        def fill(i: int) -> None:
            try:
                self._fill(pixels[i], images[i])
            except BadImage as error:
                status[i] = error.status

        for _ in map(fill, range(len(images))) if pool is None else pool.map(fill, range(len(images))):
            pass
        return pixels, status

    def __repr__(self) -> str:
        """The steps as open_clip's transform writes them, after the decoder where that is another one; the fingerprint
        of a score cache contains this text."""
        size, name = self._resized, self.interpolation
        resize = "Resize(size={}, interpolation={}, max_size=None, antialias=True)"
        crop = "CenterCrop(size=({0}, {0}))"
        steps = {
            "shortest": [resize.format(size, name), crop.format(size)],
            "squash": [resize.format((size, size), name)],
            "longest": [
                f"ResizeKeepRatio(size={(size, size)}, interpolation=InterpolationMode.{name.upper()}), longest=1.000)",
                f"CenterCropOrPad(size={(size, size)})",
            ],
        }[self.resize_mode]
        last = [crop.format(self.image_size)] * (size != self.image_size)
        decoder = [f"Decoder({self.decoder})"] * (self.decoder != "pillow")
        return "; ".join([*decoder, *steps, "MaybeConvertMode()", *last])
