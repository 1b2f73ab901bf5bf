"""The short way to a launch, with kernels that only note what they are given: every address in its place."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy import all_needs
from torch import Tensor

from mosa_kernels.backends.arguments import AdapterArguments, AdapterNeeds
from mosa_kernels.backends.triton import backend
from mosa_kernels.nn.adapter import FusedMoSAAdapter
from mosa_kernels.optim import MoSAAdamW

pytest.importorskip("triton", reason="PyTorch came without Triton")
from mosa_kernels.backends.triton import adapter_backward, adapter_calls, adapter_forward, configs, launch

pytestmark = pytest.mark.skipif(launch.INTERPRETED, reason="the interpreter is given tensors, not addresses")

Noted = dict[str, Any]
INPUTS = {
    "w_down": "w_down", "b_down": "b_down", "w_up": "w_up", "b_up": "b_up", "owner_up": "assignment",
    "owner_down": "assignment_down", "w_down_init": "w_down_init", "expert": "expert", "gamma": "norm_weight",
    "beta": "norm_bias", "scale_tensor": "scale_tensor", "seed": "seed", "expert_id": "expert_id",
    "seed_id": "seed_id",
}  # fmt: skip
"""Which argument of the call each parameter of the kernels is."""


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Noted]]:
    """The launches: the kernel's name, and its parameters by name."""
    found: list[tuple[str, Noted]] = []

    class Kernel:
        function, packed_metadata = None, None

        def __init__(self, description: launch.Launch) -> None:
            self.name, self.names = description.function.__name__, description.function.arg_names

        def _init_handles(self) -> None: ...

        def run(self, *arguments: Any) -> None:  # grid, stream, handles and hooks come first
            found.append((self.name, dict(zip(self.names, arguments[9:], strict=True))))

    monkeypatch.setattr(launch.Launch, "compiled", lambda description: Kernel(description))
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 0, raising=False)
    return found


def call(options: dict[str, Any]) -> AdapterArguments:
    values: dict[str, Any] = {
        "x": torch.randn(4, 6, 32),
        "residual": torch.randn(4, 6, 32),
        "w_down": torch.randn(8, 32),
        "b_down": torch.randn(8),
        "w_up": torch.randn(32, 8),
        "b_up": torch.randn(3, 32),
        "assignment": torch.randint(3, (32, 8), dtype=torch.uint8),
        "assignment_down": None,
        "w_down_init": None,
        "expert": torch.randint(3, (4,)),
        "norm_weight": torch.randn(32),
        "norm_bias": torch.randn(32),
        "scale_tensor": torch.randn(()),
        "seed": torch.tensor(5),
        "activity": torch.zeros(3),
        "dropout_p": 0.1,
    }
    return AdapterArguments(**{**values, **options})


def address(value: Any) -> Any:
    return value.data_ptr() if isinstance(value, Tensor) else value


GRADIENTS = {
    "dw_down": "w_down",
    "dw_up": "w_up",
    "dgamma": "norm_weight",
    "dbeta": "norm_bias",
    "db_up": "b_up",
    "db_down": "b_down",
    "dscale": "scale",
    "activity": "activity",
}

OPTIONS: list[dict[str, Any]] = [
    {},
    {"expert": None, "expert_id": 2, "seed": None, "seed_id": 2**40},
    {"expert": None, "expert_id": 1, "seed": None, "seed_id": 7},
    {"norm_weight": None, "norm_bias": None, "residual": None, "scale_tensor": None, "b_down": None},
    {"assignment_down": torch.zeros(8, 32, dtype=torch.uint8), "w_down_init": torch.randn(8, 32)},
]


@pytest.mark.parametrize("one_launch", [0, 16])
def test_every_address_in_its_place(
    one_launch: int, noted: list[tuple[str, Noted]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configs, "ONE_LAUNCH", one_launch)
    for options in [*OPTIONS, *OPTIONS]:
        args = call(options)
        needs = AdapterNeeds(*(True,) * 7, scale=args.scale_tensor is not None, activity=True)
        same = {} if args.residual is None else {"residual": args.x}
        for each in (args, args._replace(**same)):  # one tensor in two places
            out, mean, rstd = backend.adapter_forward(each)
            grad = each.x if each is not args else torch.randn_like(each.x)
            gradients = backend.adapter_backward(each, grad, mean, rstd, needs)
            outputs = {"x": each.x, "residual": each.residual, "out": out, "grad": grad, "dx": gradients.x}
            if each.norm_weight is not None:
                outputs |= {"mean": mean, "rstd": rstd}
            *_, (last, found) = noted
            assert last == ("reduce_kernel" if one_launch else "adapter_backward_weights_kernel")
            for name, gradient in GRADIENTS.items():
                assert found[name] == address(getattr(gradients, gradient)), name
            assert len(noted) == 3
            for kernel, found in noted:
                if kernel == "reduce_kernel":
                    continue
                for name, value in found.items():
                    if name in INPUTS:
                        assert value == address(getattr(each, INPUTS[name])), name
                    elif name in outputs:
                        assert value == address(outputs[name]), name
                assert found["num_tokens"] == 24
            parts = [found["parts"] for _, found in noted if "parts" in found]
            assert len(parts) == 2
            assert parts[0] == parts[1]
            noted.clear()


@pytest.mark.parametrize("per", ["sample", "batch"])
def test_the_host_reads_nothing_of_a_training_step(
    per: str, noted: list[tuple[str, Noted]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meta tensors have no values: whoever asks for one gets an error. So a CUDA graph can capture the step."""
    monkeypatch.setattr(backend, "_found", (True, ""))
    monkeypatch.setattr(backend, "_INTERPRETING", True)  # takes tensors that are not on a GPU
    layer = FusedMoSAAdapter(32, 16, dropout=0.1, learnable_scale=True, expert_per=per, device="meta")
    layer.backend = "triton"
    optimizer = MoSAAdamW(layer, lr=1e-3, backend="reference")
    x = torch.randn(4, 5, 32, device="meta", requires_grad=True)
    for residual in (None, x.detach(), x.detach()):
        out = layer(x, residual)
        out.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [name for name, _ in noted][-3:] == [
        "adapter_forward_kernel", "adapter_backward_tokens_kernel", "adapter_backward_weights_kernel",
    ]  # fmt: skip
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        out.detach().sum().item()


def test_a_plan_is_made_once(noted: list[tuple[str, Noted]], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    plans_of = adapter_forward.plans_of
    monkeypatch.setattr(adapter_forward, "plans_of", lambda *args: made.append(args) or plans_of(*args))
    for _ in range(3):
        backend.adapter_forward(call({}))
    assert len(made) == 1
    for change in ({"x": torch.randn(8, 6, 32), "residual": None}, {"activation": "relu"}, {"dropout_p": 0.2}):
        backend.adapter_forward(call(change))
    assert len(made) == 4


@pytest.fixture
def aligned(noted: list[tuple[str, Noted]], monkeypatch: pytest.MonkeyPatch) -> list[bool | None]:
    """Of each kernel that is made, whether it is one for aligned addresses."""
    found: list[bool | None] = []
    kernel: Any = launch.Launch.compiled

    def compiled(description: launch.Launch) -> Any:
        found.append(description.aligned)
        return kernel(description)

    monkeypatch.setattr(launch.Launch, "compiled", compiled)
    return found


def test_addresses_that_are_not_aligned_have_kernels_of_their_own(
    noted: list[tuple[str, Noted]], aligned: list[bool | None]
) -> None:
    backend.adapter_forward(call({}))
    shifted = torch.randn(4 * 6 * 32 + 1)[1:].view(4, 6, 32)
    for _ in range(2):
        backend.adapter_forward(call({"residual": shifted}))
    backend.adapter_forward(call({}))
    assert aligned == [True, False]
    assert [found["residual"] == shifted.data_ptr() for _, found in noted] == [False, True, True, False]


def test_ids_seeds_and_scales_may_lie_anywhere(aligned: list[bool | None]) -> None:
    """As one layer's out of a table: what is read element by element has no say in how the rest is loaded."""
    for change in (
        {"expert": torch.zeros(9, dtype=torch.int64)[1:5]},
        {"seed": torch.zeros(9, dtype=torch.int64)[1:5], "dropout_p": 0.1},
        {"scale_tensor": torch.ones(3)[1].requires_grad_()},
    ):
        args = call(change)
        _, mean, rstd = backend.adapter_forward(args)
        backend.adapter_backward(args, torch.ones_like(args.x), mean, rstd, all_needs(args))
    assert aligned
    assert all(aligned)


def test_a_number_that_changes_at_each_step_fills_no_memory(
    noted: list[tuple[str, Noted]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_calls, "_MOST", 5)
    launch._compiled["a kernel"] = "machine code"
    for step in range(12):
        adapter_forward.adapter_forward(call({"scale": 1 / (1 + step)}))
    assert len(noted) == 12
    assert len(launch._compiled) <= 5
    assert launch._compiled["a kernel"] == "machine code"


@pytest.mark.parametrize(("stream", "ahead"), [(0, False), (7, True)])
def test_a_warm_up_makes_ready_what_a_graph_takes(
    stream: int, ahead: bool, noted: list[tuple[str, Noted]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lists of units are not for a graph, whose capture must not be the first to need other kernels."""
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: stream, raising=False)
    compiled: list[str] = []
    kernel: Any = launch.Launch.compiled

    def compiling(description: launch.Launch) -> Any:
        compiled.append(description.function.__name__)
        return kernel(description)

    monkeypatch.setattr(launch.Launch, "compiled", compiling)
    columns = (torch.arange(128) // 32).to(torch.uint8).expand(32, 128).contiguous()
    r128 = {"w_down": torch.randn(128, 32), "w_up": torch.randn(32, 128), "b_down": torch.randn(128)}
    args = call({**r128, "assignment": columns, "b_up": torch.randn(4, 32), "activity": torch.zeros(4)})
    needs = AdapterNeeds(*(True,) * 9)

    def both_passes() -> list[str]:
        compiled.clear()
        noted.clear()
        out, mean, rstd = backend.adapter_forward(args)
        backend.adapter_backward(args, torch.randn_like(out), mean, rstd, needs)
        return [name for name, _ in noted]

    forward, tokens, weights = (
        "adapter_forward_kernel", "adapter_backward_tokens_kernel", "adapter_backward_weights_kernel",
    )  # fmt: skip
    listed = [forward, forward, tokens, tokens, weights]  # merged tokens have launches of their own
    whole = [forward, tokens, weights]
    assert both_passes() == listed
    assert sorted(compiled) == sorted([*listed, *whole] if ahead else listed)
    assert both_passes() == listed
    assert compiled == []
    for module in (adapter_forward, adapter_backward):
        monkeypatch.setattr(module, "lists_for", lambda _: None)  # as while a graph is captured
    assert both_passes() == whole
    assert compiled == ([] if ahead else whole)


@pytest.mark.parametrize(("value", "units"), [(None, 0), ("", 0), ("16", 16)])
def test_the_environment_sets_where_one_launch_is_used(value: str | None, units: int) -> None:
    done = import_configs(value)
    assert (done.returncode, done.stdout.strip()) == (0, str(units)), done.stderr


def test_a_wrong_number_of_units_for_one_launch_is_named() -> None:
    done = import_configs("-1")
    assert done.returncode != 0
    assert "MOSA_TRITON_ONE_LAUNCH: expected a number of units such as 16, or 0 for none, got '-1'" in done.stderr


def import_configs(value: str | None) -> subprocess.CompletedProcess[str]:
    """A process that prints `ONE_LAUNCH` with the variable at a value, or without it."""
    environment = {name: kept for name, kept in os.environ.items() if name != "MOSA_TRITON_ONE_LAUNCH"}
    environment |= {"PYTHONPATH": str(Path(configs.__file__).parents[3])}
    environment |= {} if value is None else {"MOSA_TRITON_ONE_LAUNCH": value}
    code = "from mosa_kernels.backends.triton.configs import ONE_LAUNCH; print(ONE_LAUNCH)"
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
