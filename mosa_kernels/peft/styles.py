"""The styles of adapters: their defaults, and the places in a block where they sit."""

from __future__ import annotations

from typing import Literal, NamedTuple

Site = Literal["parallel_ffn", "after_attention", "after_ffn", "q", "k", "v", "proj"]

LORA_TARGETS: tuple[Site, ...] = ("q", "k", "v", "proj")
"""The linear layers of attention that low-rank updates go to: query, key, value, and the output projection."""


class Style(NamedTuple):
    """One row of the table of styles."""

    sites: tuple[Site, ...]
    activation: str
    scale: float
    norm: bool


STYLES: dict[str, Style] = {
    "adaptformer": Style(("parallel_ffn",), "gelu", 0.1, True),
    "pfeiffer": Style(("after_ffn",), "relu", 1.0, True),
    "houlsby": Style(("after_attention", "after_ffn"), "silu", 1.0, False),
    "lora": Style(("q", "v"), "identity", 1.0, False),
}
"""AdaptFormer (parallel to the FFN), Pfeiffer (after the FFN), Houlsby (after attention and after the FFN) and LoRA
(added to query and value); see arXiv 2312.02923, Tables 5 and 14."""
