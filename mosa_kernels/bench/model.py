"""Whole models: a training step with two passes, and inference, with adapters of several kinds and without."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mosa_kernels.bench.dense_copies import DenseCopiesAdapter
from mosa_kernels.bench.gate import TIMES_EAGER
from mosa_kernels.bench.memory import peak_bytes, saved_bytes
from mosa_kernels.bench.timing import in_turn
from mosa_kernels.functional.alignment import symmetric_kl
from mosa_kernels.losses import MoSALoss
from mosa_kernels.nn.sampler import inference_experts, samplers
from mosa_kernels.optim import MoSAAdamW
from mosa_kernels.peft import MoSAConfig, inject_adapter, merge_and_unload, two_pass
from mosa_kernels.peft.book import book_of
from mosa_kernels.peft.placement import find_blocks

CLASSES, LR = 100, 1e-4
BACKBONE = "backbone alone"
_FLOAT32_ERROR = 1e-5  # relative, of logits behind a dozen blocks, beside twice eager's error


@dataclass(frozen=True)
class Setting:
    """What is trained.

    Args:
        model: its name in timm.
        batch: images of one pass.
        bottleneck, experts: of the adapters.
        options: for `timm.create_model`.
        half: train under bf16 autocast.
    """

    model: str
    batch: int
    bottleneck: int = 64
    experts: int = 4
    options: tuple[tuple[str, Any], ...] = ()
    half: bool = False

    def key(self) -> dict[str, str | int]:
        extra = {name: str(value) for name, value in self.options}
        precision = "bf16 autocast" if self.half else "fp32"
        return {
            "model": self.model, "batch": self.batch, "r": self.bottleneck, "N": self.experts,
            "precision": precision, **extra,
        }  # fmt: skip


class Ready(NamedTuple):
    """A variant, ready to run. `own` exists without its activations; `logits` shows that it computes what it should."""

    run: Callable[[], object]
    forward: Callable[[], object]
    own: list[Tensor]
    state: Callable[[], int]
    logits: Callable[[], Tensor] | None = None


def settings(preset: str, device_type: str, models: list[str] | None = None, batch: int | None = None) -> list[Setting]:
    """The models of a preset, or those asked for."""
    on_gpu = device_type == "cuda"
    if models is None and preset == "smoke":
        small = (("depth", 2), ("img_size", 64))
        return [Setting("vit_tiny_patch16_224", batch or 2, 8, 2, small)]
    large = ["vit_base_patch16_224", "vit_large_patch16_224", "swin_base_patch4_window7_224"]
    if models is None and on_gpu:
        models = large[:1] if preset == "quick" else large
    elif models is None:
        models = ["vit_tiny_patch16_224", *(large[:1] if preset == "full" else [])]
    return [Setting(name, batch or (64 if on_gpu else 4), half=on_gpu) for name in models]


def measure_model(setting: Setting, device: torch.device, *, rounds: int, seconds: float) -> dict[str, Any]:
    """Rows for training and for inference, each variant with images a second and memory."""
    torch.manual_seed(0)
    shop = _Shop(setting, device)
    training = _measure(shop, shop.training(), device, rounds, seconds, images=2 * setting.batch)
    backbone = next((row for row in training if row["variant"] == BACKBONE and "ms" in row), None)
    for row in training:
        if "ms" in row and backbone is not None:
            row["share_in_adapters"] = max(0.0, 1 - backbone["ms"]["median"] / row["ms"]["median"])
    inference = _measure(shop, shop.inference(), device, rounds, seconds, images=setting.batch)
    return {"case": setting.key(), "training": training, "inference": inference}


_Builder = Callable[[], Ready]


class _Shop:
    """Makes the variants of one setting."""

    def __init__(self, setting: Setting, device: torch.device) -> None:
        self.setting, self.device = setting, device
        backbone: Any = timm.create_model(setting.model, num_classes=CLASSES, **dict(setting.options))
        self.backbone = backbone.to(device)
        size = backbone.patch_embed.img_size
        self.images = torch.randn(setting.batch, 3, *size, device=device)
        self.labels = torch.randint(CLASSES, (setting.batch,), device=device)
        self.criterion = MoSALoss(beta=0)

    def training(self) -> Iterator[tuple[str, _Builder | str]]:
        """Name, and what builds it or the reason why nothing does. The two passes see the same images."""
        yield BACKBONE, self._plain
        for per in ("sample", "batch"):
            yield f"MoSA fused, expert per {per}", partial(self._two_pass, expert_per=per)
        yield "MoSA fused, expert per sample, alignment", lambda: self._two_pass(criterion=MoSALoss())
        yield "MoSA eager, expert per sample", lambda: self._two_pass(backend="reference")
        yield "MoSA N copies, expert per batch", self._copies
        yield "AdaptFormer fused", lambda: self._two_pass(mode="dense")
        yield "LoRA (PEFT)", self._lora if find_spec("peft") else "the package peft is not installed"

    def inference(self) -> Iterator[tuple[str, _Builder | str]]:
        yield "no adapters", lambda: self._evaluated(self._copy())
        yield "merged", lambda: self._evaluated(merge_and_unload(self._adapted()))
        yield "unmerged, fused", lambda: self._evaluated(self._adapted())
        yield "unmerged, eager", lambda: self._evaluated(_with_backend(self._adapted(), "reference"))

    def expected(self, merged: bool) -> tuple[Tensor, Tensor]:
        """Logits of the definition in float64 and in float32: expert 0 everywhere, or the merged adapters."""
        model = _with_backend(self._adapted(), "reference")
        eager = self._logits(model, merged)
        return self._logits(model.double(), merged), eager

    def _copy(self) -> Any:
        return copy.deepcopy(self.backbone)

    def _adapted(self, mode: str = "mosa", expert_per: str = "sample") -> nn.Module:
        """With adapters that add something: a fresh one adds zeros, which any error would survive."""
        config = MoSAConfig(
            mode=mode, bottleneck=self.setting.bottleneck, num_experts=self.setting.experts, expert_per=expert_per
        )
        torch.manual_seed(1)  # every variant draws the same down-projections
        model = inject_adapter(self._copy(), config)
        draws = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for _, _, adapter in book_of(model).adapters("default"):
                weight = adapter.up.weight
                weight.copy_(0.05 * torch.randn(weight.shape, generator=draws))
        return model

    def _two_pass(
        self,
        mode: str = "mosa",
        expert_per: str = "sample",
        backend: str | None = None,
        criterion: MoSALoss | None = None,
    ) -> Ready:
        model = _with_backend(self._adapted(mode, expert_per), backend).train()
        loss = criterion or self.criterion

        def forward() -> Tensor:
            with self._precision():
                out = two_pass(model, self.images, features=criterion is not None)
            return loss(out, self.labels)

        logits = (lambda: self._logits(model, merged=False)) if mode == "mosa" else None
        return self._ready(model, forward, MoSAAdamW(model, lr=LR), logits)

    def _copies(self) -> Ready:
        """Two passes one after the other: this layout runs one expert of an adapter at a time."""
        model = self._adapted()
        for _, site, adapter in list(book_of(model).adapters("default")):
            places = next(m for m in model.modules() if isinstance(m, nn.ModuleDict) and adapter in m.values())
            places[site] = DenseCopiesAdapter(adapter)
        model.train()

        def forward() -> Tensor:
            with self._precision():
                logits1, logits2 = model(self.images), model(self.images)
            return self._consistent(logits1, logits2)

        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return self._ready(
            model, forward, torch.optim.AdamW(parameters, lr=LR), lambda: self._logits(model, merged=False)
        )

    def _lora(self) -> Ready:
        from peft import LoraConfig, get_peft_model  # type: ignore[import-not-found, unused-ignore]

        model = get_peft_model(self._copy(), LoraConfig(r=16, lora_alpha=16, target_modules=["qkv"]))
        for parameter in model.get_base_model().get_classifier().parameters():
            parameter.requires_grad_(True)
        return self._doubled(model)

    def _plain(self) -> Ready:
        """The gradient goes through the frozen blocks from the first one's output on, where adapters would begin."""
        model = self._copy().requires_grad_(False)
        for parameter in model.get_classifier().parameters():
            parameter.requires_grad_(True)
        first = model.get_submodule(find_blocks(model)[0].path)
        first.register_forward_hook(lambda _, __, out: out.detach().requires_grad_())
        return self._doubled(model)

    def _doubled(self, model: nn.Module) -> Ready:
        model.eval()  # as `inject_adapter` leaves a backbone: no dropout, no stochastic depth

        def forward() -> Tensor:
            with self._precision():
                logits = model(torch.cat([self.images, self.images]))
            return self._consistent(*logits.chunk(2))

        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return self._ready(model, forward, torch.optim.AdamW(parameters, lr=LR), None)

    def _consistent(self, logits1: Tensor, logits2: Tensor) -> Tensor:
        return F.cross_entropy(logits1.float(), self.labels) + symmetric_kl(logits1, logits2) / 2

    def _ready(
        self,
        model: nn.Module,
        forward: Callable[[], Tensor],
        optimizer: torch.optim.Optimizer,
        logits: Callable[[], Tensor] | None,
    ) -> Ready:
        def step() -> None:
            optimizer.zero_grad()
            forward().backward()
            optimizer.step()

        return Ready(step, forward, [*_tensors(model), self.images], lambda: state_bytes(model, optimizer), logits)

    def _evaluated(self, model: nn.Module) -> Ready:
        model.eval()

        def run() -> Tensor:
            with torch.inference_mode(), self._precision():
                return model(self.images)

        return Ready(run, run, [], lambda: 0, lambda: self._logits(model, merged=True))

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.setting.half)

    def _logits(self, model: nn.Module, merged: bool) -> Tensor:
        """Of two images in the model's own dtype, merged or with expert 0 in every adapter."""
        training = model.training
        model.eval()
        images = self.images[:2].to(next(model.parameters()).dtype)
        expert = 0 if not merged and samplers(model) and self.setting.experts > 1 else None
        with torch.no_grad(), inference_experts(model, expert):
            logits = model(images)
        model.train(training)
        return logits


def _measure(
    shop: _Shop,
    variants: Iterator[tuple[str, _Builder | str]],
    device: torch.device,
    rounds: int,
    seconds: float,
    images: int,
) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    ready: dict[str, Ready] = {}
    expected: dict[bool, tuple[Tensor, Tensor]] = {}
    for name, builder in variants:
        row: dict[str, Any] = {"variant": name}
        rows[name] = row
        if isinstance(builder, str):
            row |= {"status": "unavailable", "reason": builder}
            continue
        try:
            made = builder()
            reason = None
            if made.logits is not None and name != "no adapters":
                merged = not name.startswith("MoSA")
                if merged not in expected:
                    expected[merged] = shop.expected(merged)
                reason = _gate(made.logits(), *expected[merged])
            made.run()
        except Exception as error:
            row |= {"status": "failed", "reason": (str(error).strip() or type(error).__name__).splitlines()[0][:300]}
            continue
        row |= {"status": "ok" if reason is None else "red", "reason": reason}
        if reason is None:
            ready[name] = made
    if not ready:
        return list(rows.values())
    calls = {name: made.run for name, made in ready.items()}
    times = in_turn(calls, device, rounds=rounds, seconds=seconds, cold=False)
    for name, made in ready.items():
        graph = made.state() > 0
        rows[name] |= {
            "ms": times[name]._asdict(),
            "images_per_second": images / times[name].median * 1e3,
            "peak_bytes": peak_bytes(made.run, device),
            "saved_bytes": saved_bytes(made.forward, made.own) if graph else None,
            "state_bytes": made.state() if graph else None,
        }
    return list(rows.values())


def _gate(found: Tensor, exact: Tensor, eager: Tensor) -> str | None:
    size = exact.square().mean().sqrt()
    error, theirs = (float((logits.double() - exact).square().mean().sqrt() / size) for logits in (found, eager))
    if error <= TIMES_EAGER * theirs + _FLOAT32_ERROR:
        return None
    return f"error gate red: logits: relative error {error:.2g}, eager PyTorch has {theirs:.2g}"


def _with_backend(model: nn.Module, backend: str | None) -> nn.Module:
    for _, _, adapter in book_of(model).adapters("default"):
        adapter.backend = backend
    return model


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes that training keeps: trained weights, gradients, the optimizer's moments, and masks or owners."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kept = [*trained, *(p.grad for p in trained if p.grad is not None)]
    kept += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    kept += [buffer for name, buffer in model.named_buffers() if name.endswith((".mask", ".assignment"))]
    return sum(tensor.numel() * tensor.itemsize for tensor in kept)
