"""Launching a kernel with little host time: each variant is compiled once and then called without Triton's binder.

Triton's own ``kernel[grid](...)`` inspects every argument at every call to find the variant to run. Here a variant is
known by what can change: the constants, the dtypes of the tensors, whether their addresses are multiples of 16 bytes,
and the device. The same description of a launch can be compiled for a GPU that is not there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import ASTSource, CompiledKernel
from triton.compiler.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from mosa_kernels.backends.triton.capture import unrestricted

_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float64: "*fp64",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint16: "*u16",
    torch.uint32: "*u32",
    torch.uint64: "*u64",
}
ALIGNMENT = 16  # bytes of the widest load, and what Triton calls divisible

BY_ELEMENT = frozenset({"expert", "seed", "scale_tensor", "activity"})
"""Parameters that a kernel reads, or writes, element by element: they may lie anywhere. Ids of one layer out of a table
of int64 [layers] do, and without this its kernel would load 126 single elements in place of 27 asynchronous copies of
16 bytes (forward, d = 768, r = 64, bf16, sm_90)."""

INTERPRETED: bool = knobs.runtime.interpret

_compiled: dict[tuple[Any, ...], Any] = {}  # kernels; and what `adapter_calls` makes of them


def interpreted(function: Any) -> bool:
    """Whether this kernel runs in Triton's interpreter (TRITON_INTERPRET=1 when it was defined)."""
    return not isinstance(function, JITFunction)


class Launch(NamedTuple):
    """One launch. The kernel's parameters are the tensors, the scalars and the constants, in this order."""

    function: Any
    grid: tuple[int, int, int]
    tensors: Sequence[Tensor | None]
    scalars: Sequence[int | float]
    scalar_types: Sequence[str]
    constants: tuple[Any, ...]
    num_warps: int
    num_stages: int
    aligned: bool | None = None  # whether all addresses but `BY_ELEMENT` are multiples of 16; None: as the tensors'
    dynamic: tuple[str, ...] = ()  # which numbers of the call the first scalars are; the others follow from its shapes

    def run(self) -> None:
        """Launches on the current stream of the current device."""
        if interpreted(self.function):
            self.function[self.grid](*self.tensors, *self.scalars, *self.constants)
            return
        self.compiled()[self.grid](*self.tensors, *self.scalars, *self.constants)

    def compiled(self) -> CompiledKernel:
        """The kernel for the current device, compiled and loaded at most once."""
        kinds = [None if tensor is None else tensor.dtype for tensor in self.tensors]
        key = (id(self.function), *kinds, self._aligned(), self.constants, self.num_warps, self.num_stages)
        key = (*key, torch.cuda.current_device())
        kernel = _compiled.get(key)
        if kernel is None:
            with unrestricted():
                driver = triton.runtime.driver.active
                limit = driver.utils.get_device_properties(torch.cuda.current_device())["max_shared_mem"]
                kernel = self.compile(driver.get_current_target(), limit)
                self._load(kernel)
            _compiled[key] = kernel
        return kernel

    def _load(self, kernel: Any) -> None:
        try:
            kernel._init_handles()
        except RuntimeError as error:
            if not torch.cuda.is_current_stream_capturing():
                raise
            raise RuntimeError(
                f"{self.function.__name__} is needed for the first time while a CUDA graph is captured, and CUDA did "
                "not load it: run the same step once before the capture"
            ) from error

    def compile(self, target: GPUTarget, shared_limit: int) -> CompiledKernel:
        """This variant's machine code for a target, which need not be present.

        Tiles of float32 weights in a half precision product, and those of a sparse down-projection, need more memory
        than the table counts on: a variant over the limit (bytes of shared memory) prefetches less far.
        """
        kernel = self._compile(target, self.num_stages)
        for stages in range(self.num_stages - 1, 0, -1):
            if kernel.metadata.shared <= shared_limit:
                break
            kernel = self._compile(target, stages)
        return kernel

    def _compile(self, target: GPUTarget, num_stages: int) -> CompiledKernel:
        names = self.function.arg_names
        kinds = ["constexpr" if tensor is None else _POINTERS[tensor.dtype] for tensor in self.tensors]
        kinds += [*self.scalar_types, *("constexpr" for _ in self.constants)]
        values = [*self.tensors, *self.scalars, *self.constants]
        signature = dict(zip(names, kinds, strict=True))
        constants = {(i,): values[i] for i, kind in enumerate(kinds) if kind == "constexpr"}
        divisible = [["tt.divisibility", ALIGNMENT]]
        wide = [i for i, kind in enumerate(kinds) if kind[0] == "*" and names[i] not in BY_ELEMENT]
        attributes = {(i,): divisible for i in wide} if self._aligned() else {}
        source = ASTSource(self.function, signature, constants, attributes)
        options = {"num_warps": self.num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
        return triton.compile(source, target=target, options=options)

    def _aligned(self) -> bool:
        if self.aligned is not None:
            return self.aligned
        addresses = 0
        for name, tensor in zip(self.function.arg_names, self.tensors, strict=False):  # scalars follow
            if tensor is not None and name not in BY_ELEMENT:
                addresses |= tensor.data_ptr()
        return addresses % ALIGNMENT == 0
