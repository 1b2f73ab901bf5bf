"""Both passes by way of Triton's own launcher, on the driver of stub_driver.c: what reaches it is what was meant.

Run by test_driver.py in a process of its own, since a process has one driver: python stub_driver.py LIBRARY SCENARIO.
"""

from __future__ import annotations

import ctypes
import struct
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from mosa_kernels.backends.arguments import AdapterArguments, AdapterNeeds
from mosa_kernels.backends.triton import backend
from mosa_kernels.backends.triton import launch as launching

STREAM = 4321


class Launched(ctypes.Structure):
    _fields_ = (
        ("function", ctypes.c_uint64),
        ("stream", ctypes.c_uint64),
        ("parameters", ctypes.c_uint64 * 64),
        ("grid", ctypes.c_uint * 3),
        ("threads", ctypes.c_uint),
        ("shared", ctypes.c_uint),
        ("count", ctypes.c_uint),
    )


class Driver:
    """The stub, told of each kernel how many parameters it has, of which CUDA's interface says nothing."""

    def __init__(self, library: str) -> None:
        self.library = ctypes.CDLL(library)  # by its name, libcuda.so.1, Triton finds this one from now on
        self.seen = 0
        self.kernels: dict[int, tuple[launching.Launch, Any]] = {}
        compiled = launching.Launch.compiled

        def noting(launch: launching.Launch) -> Any:
            kernel: Any = compiled(launch)
            self.kernels[kernel.function] = launch, kernel
            self.library.stub_expect(ctypes.c_uint64(kernel.function), len(parameters_of(launch)) + 2)  # scratch memory
            return kernel

        launching.Launch.compiled = noting  # type: ignore[method-assign]

    def set(self, name: str, value: int) -> None:
        ctypes.c_int.in_dll(self.library, name).value = value

    def get(self, name: str) -> int:
        return ctypes.c_int.in_dll(self.library, name).value

    def launches(self) -> list[Launched]:
        """Those since the last time."""
        number = self.get("stub_num_launches")
        assert number - self.seen <= 64
        every = (Launched * 64).in_dll(self.library, "stub_launches")
        found = [every[index % 64] for index in range(self.seen, number)]
        self.seen = number
        return found

    def named(self, launched: Launched) -> tuple[str, dict[str, int]]:
        """The kernel's name, and its parameters as the driver was given them."""
        launch, kernel = self.kernels[launched.function]
        named = {}
        for index, (name, kind) in enumerate(parameters_of(launch)):
            size = {"i32": 4, "fp32": 4}.get(kind, 8)
            named[name] = launched.parameters[index] & ((1 << 8 * size) - 1)
        assert launched.threads == 32 * kernel.metadata.num_warps
        assert launched.shared == kernel.metadata.shared
        assert list(launched.parameters[launched.count - 2 : launched.count]) == [0, 0], "no scratch memory is used"
        return launch.function.__name__, named


def parameters_of(launch: launching.Launch) -> list[tuple[str, str]]:
    """Name and type of what is no constant."""
    kinds = ["" if tensor is None else "pointer" for tensor in launch.tensors] + [*launch.scalar_types]
    return [(name, kind) for name, kind in zip(launch.function.arg_names, kinds, strict=False) if kind]


def pretend() -> None:
    """That there is a GPU, of which PyTorch is asked nothing but its number."""
    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: 0  # type: ignore[assignment]
    torch.cuda.get_device_capability = lambda *_: (8, 0)  # type: ignore[assignment]
    torch._C._cuda_getCurrentRawStream = lambda device: STREAM
    backend._found, backend._INTERPRETING = (True, ""), True  # takes tensors that are not on a GPU


def call(shift: int = 0) -> AdapterArguments:
    """x lies `shift` elements beside an address that is a multiple of 16 bytes."""
    return AdapterArguments(
        x=torch.randn(4 * 6 * 32 + shift)[shift:].view(4, 6, 32),
        residual=None,
        w_down=torch.randn(8, 32),
        b_down=None,
        w_up=torch.randn(32, 8),
        b_up=torch.randn(3, 32),
        assignment=torch.randint(3, (32, 8), dtype=torch.uint8),
        assignment_down=None,
        w_down_init=None,
        expert=None,
        norm_weight=torch.randn(32),
        norm_bias=None,
        scale_tensor=None,
        seed=None,
        activity=None,
        expert_id=2,
        seed_id=-(2**40),
        scale=0.5,
        dropout_p=0.25,
    )


def word(number: float) -> int:
    """The bits of a float32."""
    return struct.unpack("<I", struct.pack("<f", number))[0]


def both_passes(driver: Driver, args: AdapterArguments) -> None:
    out, mean, rstd = backend.adapter_forward(args)
    needs = AdapterNeeds(*(True, True, False, True, True, True, False, False, False))
    grad = torch.randn_like(out)
    gradients = backend.adapter_backward(args, grad, mean, rstd, needs)
    launched = driver.launches()
    assert [each.stream for each in launched] == [STREAM] * 3
    (first, forward), (second, tokens), (third, weights) = map(driver.named, launched)
    assert [first, second, third] == [
        "adapter_forward_kernel", "adapter_backward_tokens_kernel", "adapter_backward_weights_kernel",
    ]  # fmt: skip
    wanted: dict[str, int | Tensor | None] = {
        "x": args.x, "out": out, "mean": mean, "rstd": rstd, "w_down": args.w_down, "w_up": args.w_up,
        "b_up": args.b_up, "owner_up": args.assignment, "gamma": args.norm_weight, "grad": grad, "dx": gradients.x,
        "dw_down": gradients.w_down, "dw_up": gradients.w_up, "db_up": gradients.b_up,
        "dgamma": gradients.norm_weight,
        "expert_id": 2, "seed_id": 2**64 - 2**40, "num_tokens": 24, "threshold": 2**30,
        "scale": word(0.5), "eps": word(1e-6), "keep_scale": word(1 / 0.75),
    }  # fmt: skip
    seen = set()
    for found in (forward, tokens, weights):
        for name, value in found.items():
            if name in wanted:
                expected = wanted[name]
                assert value == (expected.data_ptr() if isinstance(expected, Tensor) else expected), name
                seen.add(name)
    assert seen == wanted.keys()
    assert tokens["parts"] == weights["parts"] != 0
    assert tokens["h_out"] == weights["h"] != 0
    assert list(launched[2].grid)[2] == 2


def main(library: str, scenario: str) -> None:
    pretend()
    driver = Driver(library)
    torch.cuda.is_current_stream_capturing = lambda: driver.get("stub_capturing") != 0
    if scenario == "launches":
        both_passes(driver, call())
        assert driver.get("stub_loaded") == 3
        both_passes(driver, call())
        assert driver.get("stub_loaded") == 3, "each kernel is loaded once"
        both_passes(driver, call(shift=1))
        assert driver.get("stub_loaded") == 6, "addresses that are not multiples of 16 have kernels of their own"
        both_passes(driver, call())
        assert driver.get("stub_loaded") == 6
    elif scenario == "captured":
        driver.set("stub_capturing", 1)
        both_passes(driver, call())
    else:
        driver.set("stub_capturing", 2)
        with pytest.raises(RuntimeError, match="run the same step once before the capture"):
            backend.adapter_forward(call())
        driver.set("stub_capturing", 0)
        backend.adapter_forward(call())  # what failed is forgotten
        assert len(driver.launches()) == 1
    assert driver.library.stub_mode() == 0, "the mode of before holds again"


if __name__ == "__main__":
    main(*sys.argv[1:])
