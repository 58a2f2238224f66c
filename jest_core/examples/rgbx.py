"""Pictures as arrays (H, W, 4) of uint8: red, green, blue, and a byte that nothing reads.

libjpeg-turbo and Pillow write pixels of four bytes as fast as of three, and they are resized as fast; parted into
planes they are in half the time.
"""

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

try:
    import cykooz_resizer
except ImportError:  # it has no wheel for Linux on ARM
    cykooz_resizer = None

Pixels = NDArray[np.uint8]

_KERNELS = {"bicubic": "catmull_rom", "bilinear": "bilinear"}
_BLOCK = 1 << 17  # pixels whose rows are scaled at once
_BAND = 1 << 20  # pixels that are copied out of Pillow at once: all of a large picture would take its memory twice more


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG that simplejpeg decodes to RGB; None of anything else, and of damaged headers."""
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except (ValueError, KeyError):  # KeyError: colours that it has no name for
        return None
    return (int(width), int(height)) if colours in ("YCbCr", "Gray", "RGB") else None


def of_jpeg(data: bytes, smallest: tuple[int, int]) -> Pixels | None:
    """The pixels of a JPEG, exactly those of Pillow; None where libjpeg-turbo finds anything wrong with it.

    smallest: width and height; a JPEG that is at least twice as large is decoded at an eighth to half of its size, as
    long as it stays as large as that.
    """
    width, height = smallest
    try:
        return simplejpeg.decode_jpeg(data, "RGBX", min_height=height, min_width=width, min_factor=2)
    except ValueError:
        return None


def of_rgb(picture: Image.Image) -> Pixels:
    """The pixels of an RGB picture."""
    width, height = picture.size
    out = np.empty((height, width, 4), np.uint8)
    rows = max(1, _BAND // max(1, width))
    for top in range(0, height, rows):
        band = picture if rows >= height else picture.crop((0, top, width, min(height, top + rows)))
        out[top : top + rows] = np.frombuffer(band.tobytes("raw", "RGBX"), np.uint8).reshape(-1, width, 4)
    return out


def on_white(picture: Image.Image) -> Image.Image:
    """A picture of any mode in RGB, in front of white where it is transparent; of 16-bit grey, the upper 8 bits."""
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    without_palette = picture.mode == "P" and picture.palette is None  # a PNG may lack it
    if without_palette or not picture.has_transparency_data:
        return picture if picture.mode == "RGB" else picture.convert("RGB")
    transparent = picture.convert("RGBA")
    white = Image.new("RGB", picture.size, "white")
    white.paste(transparent, mask=transparent)
    return white


def upright(pixels: Pixels, orientation: int) -> Pixels:
    """Turned and mirrored as an orientation 1 to 8 of EXIF asks for; a view."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    vertical = orientation in (3, 4, 7, 8)
    horizontal = orientation in (2, 3, 6, 7)
    return pixels[:: -1 if vertical else 1, :: -1 if horizontal else 1]


def resized(pixels: Pixels, width: int, height: int, interpolation: str) -> Pixels:
    """By Pillow's filters, bicubic or bilinear with antialiasing, vectorised: the pixels of PyTorch's interpolation of
    uint8. All rows first and then all columns, as those two do: where pixels saturate, the order shows.

    Raises ValueError for a width or height of 0, as Pillow does.
    """
    if not width or not height:
        raise ValueError("height and width must be > 0")
    if cykooz_resizer is None:
        return _resized_by_pytorch(pixels, width, height, interpolation)
    for axis, size in ((1, width), (0, height)):
        if pixels.shape[axis] != size:
            pixels = _along(axis, pixels, size, interpolation)
    return pixels


def _along(axis: int, pixels: Pixels, size: int, interpolation: str) -> Pixels:
    """One side made `size` long; the other stays. In blocks, as copies of a whole large picture leave the CPU's cache
    and take its memory several times."""
    height, width = pixels.shape[:2]
    out = np.empty((height, size, 4) if axis else (size, width, 4), np.uint8)
    each = max(8, _BLOCK // pixels.shape[axis])  # the filter's weights are computed for each block anew
    for start in range(0, out.shape[1 - axis], each):
        block = np.s_[start : start + each] if axis else np.s_[:, start : start + each]
        rows, columns = out[block].shape[:2]
        out[block] = _scaled(pixels[block], columns, rows, interpolation)
    return out


def _scaled(pixels: Pixels, width: int, height: int, interpolation: str) -> Pixels:
    of_bytes, kind = cykooz_resizer.ImageData, cykooz_resizer.PixelType.U8x4
    source = of_bytes(pixels.shape[1], len(pixels), kind, pixels.tobytes())
    out = of_bytes(width, height, kind)
    kernel = cykooz_resizer.ResizeAlg.convolution(cykooz_resizer.FilterType[_KERNELS[interpolation]])
    # without the alpha channel: here that byte means nothing
    cykooz_resizer.Resizer().resize(source, out, cykooz_resizer.ResizeOptions(kernel, use_alpha=False))
    return np.frombuffer(out.get_buffer(), np.uint8).reshape(height, width, 4)


def _resized_by_pytorch(pixels: Pixels, width: int, height: int, interpolation: str) -> Pixels:
    import torch  # here: it takes 1.3 CPU seconds and 290 MB in each process that reads

    planes = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
    try:
        out = torch.nn.functional.interpolate(planes, (height, width), mode=interpolation, antialias=True)
    except RuntimeError as error:
        if "allocate memory" in str(error):
            raise MemoryError from error
        raise
    resized: Pixels = out[0].permute(1, 2, 0).numpy()
    return resized


def padded(pixels: Pixels, size: int) -> Pixels:
    """A picture of at most `size` a side, in the middle of a black square of that."""
    height, width = pixels.shape[:2]
    if (height, width) == (size, size):
        return pixels
    square = np.zeros((size, size, 4), np.uint8)
    top, left = (size - height) // 2, (size - width) // 2
    square[top : top + height, left : left + width] = pixels
    return square


def centre(pixels: Pixels, size: int) -> Pixels:
    """The square of `size` a side in the middle of a picture that is at least that large; a view."""
    height, width = pixels.shape[:2]
    top, left = round((height - size) / 2), round((width - size) / 2)
    return pixels[top : top + size, left : left + size]


def to_planes(pixels: Pixels, out: NDArray[np.uint8]) -> None:
    """Copy red, green and blue into out (3, H, W)."""
    if pixels.strides[-1] != 1:  # planes already, as PyTorch returns them
        out[:] = pixels[..., :3].transpose(2, 0, 1)
        return
    words = pixels.view("<u4")[..., 0]  # shifted and cut as a whole: half the time of copying every fourth byte
    np.copyto(out[0], words, casting="unsafe")
    np.copyto(out[1], words >> 8, casting="unsafe")
    np.copyto(out[2], words >> 16, casting="unsafe")
