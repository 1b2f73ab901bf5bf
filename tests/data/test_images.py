"""Images of every depth as 8-bit RGB, and those whose depth says nothing of black and white."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mosa_kernels.data.images import as_rgb, read_image

DEEP = np.array([[0, 255, 256, 0x1234, 0xFFFF]], dtype=np.uint16)
SHALLOW = [0, 0, 1, 0x12, 255]


def test_16_bits_become_8(tmp_path: Path) -> None:
    for suffix in ("png", "tif", "pgm"):
        path = tmp_path / f"deep.{suffix}"
        Image.fromarray(DEEP).save(path)
        image = read_image(path)
        assert image.mode == "RGB"
        assert np.asarray(image)[0].tolist() == [[value] * 3 for value in SHALLOW], suffix


def test_16_bits_of_the_other_byte_order() -> None:
    swapped = Image.frombytes("I;16B", (5, 1), DEEP.astype(">u2").tobytes())
    assert np.asarray(as_rgb(swapped))[0, :, 1].tolist() == SHALLOW


@pytest.mark.parametrize(("mode", "dtype"), [("I", np.int32), ("F", np.float32)])
def test_an_unknown_range_is_refused_by_name(tmp_path: Path, mode: str, dtype: type) -> None:
    path = tmp_path / "unknown.tif"
    Image.fromarray(np.ones((2, 2), dtype)).save(path)
    with pytest.raises(
        ValueError, match=rf"cannot read the image .*unknown\.tif: expected pixels .* got mode '{mode}'"
    ):
        read_image(path)


def test_other_modes_are_converted_as_pillow_does() -> None:
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK"):
        image = Image.new("RGB", (2, 2), (255, 255, 255)).convert(mode)
        assert as_rgb(image).tobytes() == image.convert("RGB").tobytes()
