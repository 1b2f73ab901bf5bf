"""Registers, spills and shared memory of every kernel, read off the machine code that was built."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import cubins
import nvrtc
import pytest

from mosa_kernels._extension import extension


class Allowance(NamedTuple):
    """The most that a kernel may take, over all its instantiations."""

    registers: int
    shared: int  # bytes a block, without what a launch adds
    stack: int = 0  # bytes a thread


ALLOWED = {
    # A multiprocessor runs 2048 threads of 32 registers, half as many of 64.
    "merge_kernel": Allowance(registers=48, shared=32),
    "split_kernel": Allowance(registers=32, shared=0),
    "masked_adamw_kernel": Allowance(registers=64, shared=2052),
    # Two blocks of 256 threads share a multiprocessor's registers.
    "adapter_forward_kernel": Allowance(registers=128, shared=0, stack=128),
    "adapter_forward_kernel of plain calls": Allowance(registers=128, shared=0, stack=16),
    "adapter_backward_tokens_kernel": Allowance(registers=128, shared=0, stack=272),
    "adapter_backward_tokens_kernel of plain calls": Allowance(registers=128, shared=0, stack=24),
    "adapter_backward_weights_kernel": Allowance(registers=128, shared=0),
    "adapter_backward_cluster_kernel": Allowance(registers=128, shared=0, stack=40),
    "adapter_backward_reduce_kernel": Allowance(registers=40, shared=5376),
}
# Its compiler takes two registers more for the kernel over weights with lists of 64 units.
ALLOWED_ON_V100 = ALLOWED | {
    "adapter_backward_weights_kernel": ALLOWED["adapter_backward_weights_kernel"]._replace(stack=8),
}
needs_cuobjdump = pytest.mark.skipif(cubins.find_cuobjdump() is None, reason="no cuobjdump: no CUDA toolkit, no Triton")


def excess(usage: cubins.Usage) -> list[str]:
    """What a kernel takes beyond its allowance."""
    allowed = (ALLOWED_ON_V100 if usage.architecture == "sm_70" else ALLOWED).get(usage.kernel)
    if allowed is None:
        return [f"{usage.kernel} has no row in ALLOWED of {Path(__file__).name}: {usage}"]
    taken = (("registers", usage.registers), ("shared", usage.shared), ("stack", usage.stack))
    return [
        f"{usage.kernel} on {usage.architecture}: {value} {name}, {getattr(allowed, name)} are allowed"
        for name, value in taken
        if value > getattr(allowed, name)
    ]


def test_every_kernel_has_an_allowance() -> None:
    sources = cubins.kernel_sources()
    missing = {kernel: path.name for kernel, path in sources.items() if kernel not in ALLOWED}
    assert not missing, f"kernels without a row in ALLOWED of {Path(__file__).name}: {missing}"
    assert {name.removesuffix(cubins.PLAIN) for name in ALLOWED} == set(sources), "rows of ALLOWED without a kernel"


@needs_cuobjdump
def test_kernels_of_the_compiled_module_stay_within_it() -> None:
    built = extension()
    if built.cuda_reason is not None:
        pytest.skip(built.cuda_reason)
    assert built.module is not None
    architectures = built.module.build_info["cuda_architectures"].split()
    usages = cubins.resource_usage(Path(built.module.__file__))
    for architecture in (name.removesuffix("-real") for name in architectures if name.endswith("-real")):
        found = {usage.kernel for usage in usages if usage.architecture == f"sm_{architecture}"}
        missing = set(ALLOWED) - found
        assert not missing, f"mosa_kernels._C lacks {missing} for sm_{architecture}: build it again"
    assert not [line for usage in usages for line in excess(usage)]


def nvrtc_sources() -> list[Path]:
    """Files that launch kernels, that is all but the one that speaks with the driver."""
    return sorted(path for path in cubins.CSRC.glob("*.cu") if path.name != "cuda_device.cu")


@needs_cuobjdump
@pytest.mark.slow
@pytest.mark.skipif(nvrtc.why_not() is not None, reason=str(nvrtc.why_not()))
@pytest.mark.parametrize("source", nvrtc_sources(), ids=lambda path: path.name)
def test_v100_takes_every_kernel(source: Path, tmp_path: Path) -> None:
    """Compiled for sm_70 by NVRTC 12, which the nvcc of CUDA 13 no longer does, and within the same allowances."""
    cubin = tmp_path / "kernels.cubin"
    text = source.read_text(encoding="utf-8")
    cubin.write_bytes(nvrtc.compile_source(text, source.name, "sm_70", cubins.CSRC))
    usages = [usage._replace(architecture="sm_70") for usage in cubins.resource_usage(cubin)]
    defined = cubins.kernels_of(source)
    assert defined <= {usage.kernel for usage in usages}
    assert not [line for usage in usages for line in excess(usage)]


PRODUCTS = """
#include "adapter_units.h"
template <bool kTransposedA, bool kTransposedB>
__global__ void products(float* to, int row) {
  extern __shared__ __align__(128) unsigned char memory[];
  ELEMENT* const tiles = reinterpret_cast<ELEMENT*>(memory);
  mosa::Accumulator<ELEMENT, 2> sum;
  sum.clear();
  sum.multiply<kTransposedA, kTransposedB>(tiles, row, tiles + 4096, row, 16 * row, 64, false);
  for (int j = 0; j < 2; ++j) sum.store(j, to + 256 * j, 16);
}
template __global__ void products<false, true>(float*, int);
template __global__ void products<false, false>(float*, int);
template __global__ void products<true, false>(float*, int);
"""


@needs_cuobjdump
@pytest.mark.skipif(nvrtc.why_not() is not None, reason=str(nvrtc.why_not()))
@pytest.mark.parametrize(
    ("element", "architecture"),
    [("__half", "sm_75"), ("__nv_bfloat16", "sm_80"), ("__nv_bfloat16", "sm_90"), ("float", "sm_80")],
)
def test_products_read_tiles_by_addresses_of_shared_memory(element: str, architecture: str, tmp_path: Path) -> None:
    """Generic addresses take four loads for one of a 16-bit tile, and moves that exchange its rows and columns."""
    cubin = tmp_path / "products.cubin"
    cubin.write_bytes(
        nvrtc.compile_source(PRODUCTS.replace("ELEMENT", element), "products.cu", architecture, cubins.CSRC)
    )
    command = [str(cubins.find_cuobjdump()), "-sass", str(cubin)]
    instructions = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    loads = set(re.findall(r"\b(LDSM?|LD|MOVM)(?=[. ])", instructions))
    assert loads == {"LDS" if element == "float" else "LDSM"}


@pytest.mark.skipif(nvrtc.why_not() is not None, reason=str(nvrtc.why_not()))
def test_what_v100_lacks_is_found() -> None:
    """A test of these tests: bf16 matrix products came with sm_80."""
    text = """
    #include <cuda_bf16.h>
    #include <mma.h>
    using namespace nvcuda::wmma;
    __global__ void kernel(const __nv_bfloat16* from) {
      fragment<matrix_a, 16, 16, 16, __nv_bfloat16, row_major> tile;
      load_matrix_sync(tile, from, 16);
    }
    """
    assert nvrtc.compile_source(text, "new.cu", "sm_80", cubins.CSRC)
    with pytest.raises(RuntimeError, match="error"):
        nvrtc.compile_source(text, "new.cu", "sm_70", cubins.CSRC)


def test_more_than_allowed_is_found() -> None:
    """A test of these tests."""
    usage = cubins.Usage("sm_80", "split_kernel", registers=33, stack=8, shared=1)
    assert excess(usage._replace(registers=32, stack=0, shared=0)) == []
    assert [line.partition(": ")[2] for line in excess(usage)] == [
        *("33 registers, 32 are allowed", "1 shared, 0 are allowed", "8 stack, 0 are allowed")
    ]
    assert "newcomer has no row in ALLOWED" in excess(usage._replace(kernel="newcomer"))[0]


def test_names_of_kernels() -> None:
    namespace = "_ZN4mosa48_GLOBAL__N__00000000_15_masked_adamw_cu_f307708e"
    assert (
        cubins.kernel_name(namespace + "19masked_adamw_kernelILm4096EEEvNS_10AdamWTableIXT_EEE")
        == "masked_adamw_kernel"
    )
    assert cubins.kernel_name("_Z4kernILi2EEvPf") == "kern"
    plain = "_ZN4mosa12split_kernelIfNS_11PlainParamsIffEEEEvT0_"
    assert cubins.kernel_name(plain) == "split_kernel of plain calls"
    assert cubins.kernel_name("plain") == "plain"
