"""Image files and other libraries' images as 8-bit RGB."""

from __future__ import annotations

import os
from typing import IO

import numpy as np
from PIL import Image

# What Pillow raises over a file that is broken, cut short, no image at all, or far too large.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def read_image(source: str | os.PathLike[str] | IO[bytes]) -> Image.Image:
    """Reads a file as an RGB image.

    Raises:
        ValueError: it cannot be read as an image; its path is named.
    """
    try:
        with Image.open(source) as image:
            return as_rgb(image)
    except UNREADABLE as error:
        named = f" {os.fspath(source)}" if isinstance(source, (str, os.PathLike)) else ""
        raise ValueError(f"cannot read the image{named}: {error}") from error


def as_rgb(image: Image.Image) -> Image.Image:
    """An image in 8-bit RGB.

    Of 16 bits the higher 8 are taken, as Pillow does in colour; its own conversion of grey images clips at 255, which
    turns nearly all of them white.

    Raises:
        ValueError: pixels of 32 bits, whose range no file format says.
    """
    # Pillow gives 16 grey bits of PNG (before its version 11) and of PGM as 32-bit integers.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(
            f"expected pixels of 8 or 16 bits, got mode {image.mode!r} (32 bits), whose black and white are unknown; "
            "convert it to 8 bits"
        )
    return image.convert("RGB")
