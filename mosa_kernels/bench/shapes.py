"""The shapes that are measured: widths of the usual backbones, and presets of points over all axes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import product
from typing import NamedTuple

import torch

MODELS: dict[str, tuple[int, int]] = {
    "vit_ti": (197, 192),
    "vit_s": (197, 384),
    "vit_b": (197, 768),
    "vit_l": (197, 1024),
    "vit_g": (257, 1408),
    "swin_b_1": (3136, 128),
    "swin_b_2": (784, 256),
    "swin_b_3": (196, 512),
    "swin_b_4": (49, 1024),
}
"""Tokens an image and width: ViTs at 224 pixels (ViT-g with patches of 14), and the four stages of Swin-B."""

BOTTLENECKS = (8, 16, 32, 64, 128, 256)
EXPERTS = (1, 2, 4, 8)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
EXPERT_PER = ("call", "sample")
PRESETS = ("smoke", "quick", "full")
OPTIONS = {
    "model": "shapes",
    "images": "images",
    "bottleneck": "bottlenecks",
    "experts": "experts",
    "dtype": "dtypes",
    "expert_per": "expert-per",
}
"""Axes of a point, and the options of `mosa-kernels bench` that set them."""

_IMAGES = (1, 8, 64, 256)


class Point(NamedTuple):
    """One shape of an adapter call."""

    model: str = "vit_b"
    images: int = 64
    bottleneck: int = 64
    experts: int = 4
    dtype: str = "fp32"
    expert_per: str = "sample"
    layers: int = 1  # adapters, one after the other

    @property
    def tokens(self) -> int:
        return self.images * MODELS[self.model][0]

    @property
    def width(self) -> int:
        return MODELS[self.model][1]

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def key(self) -> dict[str, str | int]:
        """What names this point in a report."""
        return {
            "shape": f"{self.model}, {self.images} x {MODELS[self.model][0]}",
            "d": self.width,
            "r": self.bottleneck,
            "N": self.experts,
            "dtype": self.dtype,
            "expert per": self.expert_per,
            "layers": self.layers,
        }


@dataclass(frozen=True)
class Axes:
    """Values asked for by hand; the points are all their combinations. None takes the base's value: the preset's."""

    model: tuple[str, ...] | None = None
    images: tuple[int, ...] | None = None
    bottleneck: tuple[int, ...] | None = None
    experts: tuple[int, ...] | None = None
    dtype: tuple[str, ...] | None = None
    expert_per: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name, known in (("model", tuple(MODELS)), ("dtype", tuple(DTYPES)), ("expert_per", EXPERT_PER)):
            for value in getattr(self, name) or ():
                if value not in known:
                    raise ValueError(f"{OPTIONS[name]}: expected some of {', '.join(known)}, got {value!r}")
        for name, most in (("images", None), ("bottleneck", None), ("experts", 255)):
            for value in getattr(self, name) or ():
                if value < 1 or (most is not None and value > most):
                    bounds = f"at least 1{f', at most {most}' if most else ''}"
                    raise ValueError(f"{OPTIONS[name]}: expected {bounds}, got {value}")

    @staticmethod
    def names() -> tuple[str, ...]:
        """As in `Point`."""
        return tuple(field.name for field in fields(Axes))

    @property
    def any(self) -> bool:
        return any(getattr(self, name) is not None for name in self.names())


def base_point(device_type: str) -> Point:
    """ViT-B at a usual batch: where the axes cross."""
    return Point(images=128, dtype="bf16") if device_type == "cuda" else Point()


def points(preset: str, device_type: str, axes: Axes | None = None) -> list[Point]:
    """The points of a preset, or all combinations of the values asked for.

    Raises:
        ValueError: there is no such preset.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
    base = base_point(device_type)
    if axes is not None and axes.any:
        base = _SMALL if preset == "smoke" else base
        values = [getattr(axes, name) or (getattr(base, name),) for name in Point._fields[:-1]]
        return [Point(*chosen) for chosen in product(*values)]
    return {"smoke": _smoke, "quick": _quick, "full": _full}[preset](base, device_type)


_SMALL = Point("vit_ti", images=2, bottleneck=8, experts=2)


def _smoke(base: Point, device_type: str) -> list[Point]:
    return [_SMALL, _SMALL._replace(dtype="bf16", expert_per="call")]


def _quick(base: Point, device_type: str) -> list[Point]:
    if device_type == "cuda":
        call, sample = ([base._replace(model=m, expert_per=per) for m in ("vit_b", "vit_l")] for per in EXPERT_PER)
        return [*call, base._replace(images=1, expert_per="call"), *sample]
    large = [base._replace(dtype=dtype, expert_per=per) for dtype in ("fp32", "bf16") for per in EXPERT_PER]
    sizes = (("vit_b", 64), ("vit_s", 16), ("vit_ti", 8))
    small = [Point(model, 1, r, dtype=dtype, expert_per="call") for model, r in sizes for dtype in ("fp32", "bf16")]
    return [*large, *small]


def _full(base: Point, device_type: str) -> list[Point]:
    """Each axis varied alone from the base, in every dtype."""
    arms: list[Iterable[Point]] = [
        _quick(base, device_type),
        _varied(base, "model", tuple(MODELS)),
        _varied(base, "images", _IMAGES),
        _varied(base, "bottleneck", BOTTLENECKS),
        _varied(base, "experts", EXPERTS),
        _varied(base, "expert_per", EXPERT_PER),
    ]
    dtypes = DTYPES if device_type == "cuda" else {"fp32", "bf16"}
    every = [point._replace(dtype=dtype) for arm in arms for point in arm for dtype in DTYPES if dtype in dtypes]
    return list(dict.fromkeys(every))


def _varied(base: Point, axis: str, values: Sequence[str | int]) -> list[Point]:
    return [base._replace(**{axis: value}) for value in values]  # type: ignore[arg-type]
