"""Whole models: a training step with two passes, and inference, with adapters of several kinds and without."""

from __future__ import annotations

import gc
from dataclasses import replace
from itertools import product
from typing import Any

import timm
import torch

from mosa_kernels.bench.case import first_line
from mosa_kernels.bench.memory import peak_bytes, saved_bytes
from mosa_kernels.bench.model_variants import BACKBONE, INFERENCE, TRAINING, Ready, Setting, Shop, Variant
from mosa_kernels.bench.shapes import Axes
from mosa_kernels.bench.timing import in_turn
from mosa_kernels.peft import MoSAConfig, inject_adapter
from mosa_kernels.train.backbones import bare_model


def settings(
    preset: str,
    device_type: str,
    models: list[str] | None = None,
    batch: int | None = None,
    axes: Axes | None = None,
) -> list[Setting]:
    """The models of a preset, or those asked for, with all combinations of the values asked for.

    Raises:
        ValueError: timm has no model of this name, or a dtype is fp16: models train in float32 or under bf16 autocast.
    """
    on_gpu = device_type == "cuda"
    if models is None and preset == "smoke":
        small = (("depth", 2), ("img_size", 64))
        usual = [Setting("vit_tiny_patch16_224", batch or 2, 8, 2, small)]
    else:
        large = ["vit_base_patch16_224", "vit_large_patch16_224", "swin_base_patch4_window7_224"]
        if models is None and on_gpu:
            models = large[:1] if preset == "quick" else large
        elif models is None:
            models = ["vit_tiny_patch16_224", *(large[:1] if preset == "full" else [])]
        for name in models:
            if not timm.is_model(name):
                raise ValueError(f"models: expected names of timm models, got {name!r}")
            _require_adapters_fit(name)
        usual = [Setting(name, batch or (64 if on_gpu else 4), half=on_gpu) for name in models]
    axes = axes or Axes()
    if "fp16" in (axes.dtype or ()):
        raise ValueError("dtypes: expected fp32 or bf16 (autocast) for the part model, got fp16")
    halves = None if axes.dtype is None else [dtype == "bf16" for dtype in axes.dtype]
    return [
        replace(setting, bottleneck=r, experts=n, half=half)
        for setting in usual
        for r, n, half in product(
            axes.bottleneck or [setting.bottleneck], axes.experts or [setting.experts], halves or [setting.half]
        )
    ]


def _require_adapters_fit(name: str) -> None:
    """Raises a ValueError where a model takes no adapters. One that is not made without weights is not looked at."""
    bare = bare_model(name)
    if bare is None:
        return
    try:
        inject_adapter(bare, MoSAConfig())
    except ValueError as error:
        raise ValueError(f"models: expected ones that take adapters, got {name}: {error}") from error


def measure_model(
    setting: Setting, device: torch.device, *, rounds: int, seconds: float, providers: tuple[str, ...] | None = None
) -> dict[str, Any]:
    """Rows for training and for inference, each variant with images a second and memory.

    `providers` leaves out the variants of others; what has no adapter of ours to run stays to compare with.
    """
    torch.manual_seed(0)
    shop = Shop(setting, device)
    variants = [v for v in shop.variants() if providers is None or v.provider is None or v.provider in providers]
    record: dict[str, Any] = {"case": setting.key()}
    for part, images in ((TRAINING, 2 * setting.batch), (INFERENCE, setting.batch)):
        rows, ready = [], {}
        for variant in variants:
            if variant.part == part:
                row, made = admit_variant(shop, variant)
                gc.collect()  # the float64 model of a check refers to itself: 2.4 GB of a ViT-L
                rows.append(row)
                if made is not None:
                    ready[variant.name] = (row, made)
        times = in_turn(
            {n: made.run for n, (_, made) in ready.items()}, device, rounds=rounds, seconds=seconds, cold=False
        )
        for name, (row, made) in ready.items():
            row |= {"ms": times[name]._asdict(), "images_per_second": images / times[name].median * 1e3}
            row["peak_bytes"] = peak_bytes(made.run, device)
            if part == TRAINING:
                row |= {"saved_bytes": saved_bytes(made.forward, made.own), "state_bytes": made.state()}
        record[part] = rows
    _share(record[TRAINING])
    return record


def _share(rows: list[dict[str, Any]]) -> None:
    """Adds what part of each step the backbone alone does not explain."""
    backbone = next((row for row in rows if row["variant"] == BACKBONE and "ms" in row), None)
    for row in rows:
        if "ms" in row and backbone is not None:
            row["share_in_adapters"] = max(0.0, 1 - backbone["ms"]["median"] / row["ms"]["median"])


def admit_variant(shop: Shop, variant: Variant) -> tuple[dict[str, Any], Ready | None]:
    """The variant, if it is there and its logits, loss and gradients are right, and a row that says so or why not."""
    row: dict[str, Any] = {"variant": variant.name, "ours": variant.ours, "status": "ok", "reason": None}
    if variant.reason is not None:
        return row | {"status": "unavailable", "reason": variant.reason}, None
    try:
        made = variant.build()
        reason = _red(shop, made)
        made.run()
    except Exception as error:
        return row | {"status": "failed", "reason": first_line(error)}, None
    if reason is not None:
        return row | {"status": "red", "reason": f"error gate red: {reason}"}, None
    return row, made


def _red(shop: Shop, made: Ready) -> str | None:
    """What is wrong with a variant's logits, or with the loss and the gradients of a step."""
    if made.logits is not None:
        verdict = shop.expected(made.merged).check({"logits": made.logits()})
        if not verdict.green:
            return verdict.reason
    step = {} if made.step is None else made.step()
    for name, tensor in step.items():
        if not bool(tensor.isfinite().all()):
            return f"{name}: not finite"
    return None if made.like is None else shop.expected_step(made.like).check(step).reason
