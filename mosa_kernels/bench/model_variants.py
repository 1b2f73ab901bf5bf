"""The variants of a model: MoSA fused, eager and as N copies, AdaptFormer, LoRA, the backbone alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from mosa_kernels.backends.choice import available_backends
from mosa_kernels.backends.lookup import prefer_backends, preferred_backends
from mosa_kernels.bench.case import DENSE_COPIES, EAGER
from mosa_kernels.bench.dense_copies import DenseCopiesAdapter
from mosa_kernels.bench.gate import Expected
from mosa_kernels.losses import MoSALoss
from mosa_kernels.nn.dense import DenseAdapter
from mosa_kernels.nn.sampler import inference_experts, samplers
from mosa_kernels.optim import MoSAAdamW
from mosa_kernels.peft import MoSAConfig, inject_adapter, merge_and_unload, two_pass
from mosa_kernels.peft.book import book_of, find_book
from mosa_kernels.peft.placement import find_blocks
from mosa_kernels.train.backbones import data_config

Loss = Callable[[Tensor, Tensor], Tensor]
"""Of images and labels."""

CLASSES, LR = 100, 1e-4
TRAINING, INFERENCE = "training", "inference"
BACKBONE, NO_ADAPTERS = "backbone alone", "no adapters"
_CHECKED_IMAGES = 2  # that the error gate looks at: in float64 all would take long
_FLOAT32_ERROR = 1e-5  # relative, of what lies behind a dozen blocks, beside twice eager's error
_FLOORS = {False: _FLOAT32_ERROR, True: 1e-2}  # of a step; under bf16 autocast a loss or bias is exact by luck


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


class Kind(NamedTuple):
    """What a training step computes, whoever does it."""

    mode: str = "mosa"
    expert_per: str = "sample"
    aligned: bool = False


_USUAL = Kind()


class Ready(NamedTuple):
    """A variant, ready to run. `own` exists without its activations; `logits` and `step` show that it is right."""

    run: Callable[[], object]
    forward: Callable[[], object]
    own: list[Tensor]
    state: Callable[[], int]
    logits: Callable[[], Tensor] | None = None
    merged: bool = False  # whether these logits are of the merged adapters, or of expert 0 in each
    step: Callable[[], dict[str, Tensor]] | None = None  # the loss and every gradient of a small step
    like: Kind | None = None  # what this step has to agree with; None: with nothing, but it is finite


class Variant(NamedTuple):
    """One way to train or to infer."""

    part: str
    name: str
    build: Callable[[], Ready]
    reason: str | None  # why it is not available; None: it is
    ours: bool  # whether it runs the fused backends
    provider: str | None = None  # what runs its adapters; None: nothing that could be chosen


class Shop:
    """Makes the variants of one setting."""

    def __init__(self, setting: Setting, device: torch.device) -> None:
        self.setting, self.device = setting, device
        backbone: Any = timm.create_model(setting.model, num_classes=CLASSES, **dict(setting.options))
        self.backbone = backbone.to(device).requires_grad_(False)
        for parameter in backbone.get_classifier().parameters():
            parameter.requires_grad_(True)
        size = dict(setting.options).get("img_size") or data_config(backbone)["input_size"][-1]
        self.images = torch.randn(setting.batch, 3, size, size, device=device)
        self.labels = torch.randint(CLASSES, (setting.batch,), device=device)
        self.criterion = MoSALoss(beta=0)
        answers = available_backends()
        mine = ("cpu",) if device.type == "cpu" else ("triton", "cuda")
        self.fused = [name for name in mine if answers.get(name) is True]
        self.expected, self.expected_step = cache(self._expect), cache(self._expect_step)

    def variants(self) -> list[Variant]:
        """Of a training step, whose two passes see the same images, and of inference."""
        mosa = self._two_pass
        training: dict[str, Callable[[], Ready]] = {BACKBONE: self._plain}
        inference: dict[str, Callable[[], Ready]] = {
            NO_ADAPTERS: lambda: self._evaluated(self._copy(), None),
            "merged": lambda: self._evaluated(merge_and_unload(self._adapted()), None),
        }
        for name in self.fused:
            training |= {
                f"MoSA {name}, expert per sample": partial(mosa, name),
                f"MoSA {name}, expert per batch": partial(mosa, name, Kind(expert_per="batch")),
                f"MoSA {name}, expert per sample, alignment": partial(mosa, name, Kind(aligned=True)),
                f"AdaptFormer {name}": partial(mosa, name, Kind("dense")),
            }
            inference[f"unmerged, {name}"] = partial(self._unmerged, name)
        training |= {
            "MoSA eager, expert per sample": partial(mosa, EAGER),
            "MoSA N copies, expert per batch": self._copies,
            "LoRA (PEFT)": self._lora,
        }
        inference["unmerged, eager"] = partial(self._unmerged, EAGER)
        missing = {} if find_spec("peft") else {"LoRA (PEFT)": "the package peft is not installed: pip install peft"}
        return [
            Variant(part, name, build, missing.get(name), (provider := self._provider(name)) in self.fused, provider)
            for part, builders in ((TRAINING, training), (INFERENCE, inference))
            for name, build in builders.items()
        ]

    def _provider(self, name: str) -> str | None:
        return next((each for each in (EAGER, DENSE_COPIES, *self.fused) if f" {each}," in f"{name},"), None)

    def _expect(self, merged: bool) -> Expected:
        """Logits of the definition in float64 and at the precision of the setting: expert 0 everywhere, or merged."""
        model = self._adapted()
        with preferring(self.device.type, "reference"):
            eager, exact = ({"logits": self._logits(each, merged)} for each in (model, copy.deepcopy(model).double()))
        return Expected(exact, eager, {}, floor=_FLOAT32_ERROR)

    def _expect_step(self, kind: Kind) -> Expected:
        """Loss and gradients of the definition, in float64 and at the precision of the setting."""
        model = self._adapted(kind.mode, kind.expert_per).train()
        with preferring(self.device.type, "reference"):
            eager, exact = (
                self._step(each, partial(self._two_pass_loss, each, kind))
                for each in (model, copy.deepcopy(model).double())
            )
        return Expected(exact, eager, {}, floor=_FLOORS[self.setting.half])

    def _copy(self) -> Any:
        """The backbone with a head of its own. What is frozen lies in memory once: a dozen ViT-L would fill 15 GB."""
        frozen = (tensor for tensor in _tensors(self.backbone) if not tensor.requires_grad)
        return copy.deepcopy(self.backbone, {id(tensor): tensor for tensor in frozen})

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

    def _two_pass(self, backend: str, kind: Kind = _USUAL) -> Ready:
        model = self._adapted(kind.mode, kind.expert_per).train()
        loss = partial(self._two_pass_loss, model, kind)
        logits = (lambda: self._logits(model, merged=False)) if kind.mode == "mosa" else None
        return self._by(backend, self._ready(model, loss, MoSAAdamW(model, lr=LR), logits, kind))

    def _two_pass_loss(self, model: nn.Module, kind: Kind, images: Tensor, labels: Tensor) -> Tensor:
        with self._precision(images.dtype):
            out = two_pass(model, images, features=kind.aligned)
        return (MoSALoss() if kind.aligned else self.criterion)(out, labels)

    def _step(self, model: nn.Module, loss: Loss) -> dict[str, Tensor]:
        """The loss of a few images and every gradient, with the draws of a seed; a float64 model takes float64."""
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        images = self.images[:_CHECKED_IMAGES].to(next(iter(trained.values())).dtype)
        with torch.random.fork_rng(devices=[] if self.device.type == "cpu" else [self.device]):
            torch.manual_seed(2)
            value = loss(images, self.labels[:_CHECKED_IMAGES])
            gradients = torch.autograd.grad(value, list(trained.values()), allow_unused=True, materialize_grads=True)
        return {"loss": value.detach(), **dict(zip(trained, gradients, strict=True))}

    def _unmerged(self, backend: str) -> Ready:
        return self._evaluated(self._adapted(), backend)

    def _by(self, backend: str, ready: Ready) -> Ready:
        """Every operator of its calls by this backend, where that takes them."""

        def by(call: Callable[[], Any]) -> Callable[[], Any]:
            def run() -> Any:
                with preferring(self.device.type, "reference" if backend == EAGER else backend):
                    return call()

            return run

        logits = None if ready.logits is None else by(ready.logits)
        step = None if ready.step is None else by(ready.step)
        return ready._replace(run=by(ready.run), forward=by(ready.forward), logits=logits, step=step)

    def _copies(self) -> Ready:
        """Two passes one after the other: this layout runs one expert of an adapter at a time."""
        model = self._adapted()
        for _, site, adapter in list(book_of(model).adapters("default")):
            places = next(m for m in model.modules() if isinstance(m, nn.ModuleDict) and adapter in m.values())
            places[site] = DenseCopiesAdapter(adapter)
        model.train()

        def loss(images: Tensor, labels: Tensor) -> Tensor:
            with self._precision():
                logits1, logits2 = model(images), model(images)
            return self._consistent(logits1, logits2, labels)

        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=LR)
        return self._ready(model, loss, optimizer, lambda: self._logits(model, merged=False))

    def _lora(self) -> Ready:
        from peft import LoraConfig, get_peft_model  # type: ignore[import-not-found, unused-ignore]

        model: Any = get_peft_model(self._copy(), LoraConfig(r=16, lora_alpha=16, target_modules=["qkv"]))
        for parameter in model.get_base_model().get_classifier().parameters():
            parameter.requires_grad_(True)
        return self._doubled(model)

    def _plain(self) -> Ready:
        """The gradient goes through the frozen blocks from the first one's output on, where adapters would begin."""
        model = self._copy()
        first = model.get_submodule(find_blocks(model)[0].path)
        first.register_forward_hook(lambda _, __, out: out.detach().requires_grad_())
        return self._doubled(model)

    def _doubled(self, model: nn.Module) -> Ready:
        model.eval()  # as `inject_adapter` leaves a backbone: no dropout, no stochastic depth

        def loss(images: Tensor, labels: Tensor) -> Tensor:
            with self._precision():
                logits1, logits2 = model(torch.cat([images, images])).chunk(2)
            return self._consistent(logits1, logits2, labels)

        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return self._ready(model, loss, torch.optim.AdamW(parameters, lr=LR), None)

    def _consistent(self, logits1: Tensor, logits2: Tensor, labels: Tensor) -> Tensor:
        out = SimpleNamespace(logits1=logits1, logits2=logits2, features1=None, features2=None)
        return self.criterion(out, labels)

    def _ready(
        self,
        model: nn.Module,
        loss: Loss,
        optimizer: torch.optim.Optimizer,
        logits: Callable[[], Tensor] | None,
        like: Kind | None = None,
    ) -> Ready:
        forward = partial(loss, self.images, self.labels)

        def step() -> None:
            optimizer.zero_grad()
            forward().backward()
            optimizer.step()

        own, state = [*_tensors(model), self.images], partial(state_bytes, model, optimizer)
        return Ready(step, forward, own, state, logits, step=partial(self._step, model, loss), like=like)

    def _evaluated(self, model: nn.Module, backend: str | None) -> Ready:
        plain = find_book(model) is None and not any(isinstance(m, DenseAdapter) for m in model.modules())
        model.eval()

        def run() -> Tensor:
            with torch.inference_mode(), self._precision():
                return model(self.images)

        logits = None if plain else lambda: self._logits(model, merged=True)
        ready = Ready(run, run, [], lambda: 0, logits, merged=True)
        return ready if backend is None else self._by(backend, ready)

    def _precision(self, dtype: torch.dtype = torch.float32) -> torch.autocast:
        half = self.setting.half and dtype == torch.float32
        return torch.autocast(self.device.type, torch.bfloat16, enabled=half)

    def _logits(self, model: nn.Module, merged: bool) -> Tensor:
        """Of a few images, merged or with expert 0 in every adapter; a float64 model computes in float64."""
        training = model.training
        model.eval()
        images = self.images[:_CHECKED_IMAGES].to(next(model.parameters()).dtype)
        expert = 0 if not merged and samplers(model) and self.setting.experts > 1 else None
        with torch.no_grad(), inference_experts(model, expert), self._precision(images.dtype):
            logits = model(images)
        model.train(training)
        return logits


@contextmanager
def preferring(device_type: str, backend: str) -> Iterator[None]:
    """Within the context every operator runs by this backend where it can."""
    before = preferred_backends(device_type)
    prefer_backends(device_type, backend)
    try:
        yield
    finally:
        prefer_backends(device_type, *(before or ()))


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes that training keeps: trained weights, gradients, the optimizer's moments, and masks or owners."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kept = [*trained, *(p.grad for p in trained if p.grad is not None)]
    kept += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    kept += [buffer for name, buffer in model.named_buffers() if name.endswith((".mask", ".assignment"))]
    return sum(tensor.numel() * tensor.itemsize for tensor in kept)
