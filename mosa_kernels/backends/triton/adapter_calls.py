"""What calls that are alike share, so that the host spends little time on each.

Two calls are alike when shapes, strides, dtypes and options agree. The first one makes the plan, compiles the kernels
and notes which tensor goes where; for the others a launch is a tuple of addresses. Both passes with launches
that do nothing, without and with this: 18 and 13 us forward, 42 and 25 us backward, of which the tensors that they
allocate take 3 and 10 (CPU time, EPYC 9004 under other load).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from mosa_kernels.backends.arguments import TENSORS, AdapterArguments
from mosa_kernels.backends.triton import configs as table
from mosa_kernels.backends.triton import launch as launching
from mosa_kernels.backends.triton.launch import Launch
from mosa_kernels.backends.triton.plan import Parts, Plan, float32_precision

_CONSTANT = AdapterArguments._fields.index("norm_eps")  # options from here on are part of the key, ids and seeds not
_MOST = 4096  # calls and kernels kept
_FIELDS = AdapterArguments._fields[:TENSORS]
# Of each tensor's address, the bits that have to be zero in an aligned call; what the kernels allocate comes last.
_WIDE = launching.ALIGNMENT - 1
_ADDRESS_BITS = (*(0 if name in launching.BY_ELEMENT else _WIDE for name in _FIELDS), *[_WIDE] * 32)
_DYNAMIC = ("expert_id", "seed_id")  # the numbers that differ between calls that are alike


class Call:
    """One kind of call.

    Attributes:
        plans: of the launches over tokens, and whether each takes the lists of units.
        parts: of the weight gradients, in a backward pass.
        together: whether that takes one launch over tokens and weights.
    """

    def __init__(self, plans: list[Plan], parts: Parts | None = None, together: bool = False) -> None:
        self.plans, self.parts, self.together = plans, parts, together
        self._ready: dict[bool, list[_Ready]] = {}  # by whether all addresses are as `_ADDRESS_BITS` says

    def run(
        self,
        args: AdapterArguments,
        further: Sequence[Tensor | None],
        build: Callable[..., list[Launch]],
        *constants: Any,
    ) -> None:
        """Launches what `build(call, args, further, *constants)` describes, with the addresses of these tensors."""
        if launching.INTERPRETED:
            for launch in build(self, args, further, *constants):
                launch.run()
            return
        tensors: Any = (*args[:TENSORS], *further)
        values = [None, args.expert_id, args.seed_id]
        bits = 0
        for tensor, mask in zip(tensors, _ADDRESS_BITS, strict=False):
            if tensor is None:
                values.append(None)
            else:
                address = tensor.data_ptr()
                bits |= address & mask
                values.append(address)
        aligned = bits == 0
        ready = self._ready.get(aligned)
        if ready is None:
            ready = self._make_ready(aligned, args, tensors, build, constants)
        for each in ready:
            each(values)

    def prepare(
        self,
        args: AdapterArguments,
        further: Sequence[Tensor | None],
        build: Callable[..., list[Launch]],
        *constants: Any,
    ) -> None:
        """Compiles and loads what `run` launches, and launches nothing."""
        tensors: Any = (*args[:TENSORS], *further)
        aligned = not any(t is not None and t.data_ptr() & m for t, m in zip(tensors, _ADDRESS_BITS, strict=False))
        if not launching.INTERPRETED and aligned not in self._ready:
            self._make_ready(aligned, args, tensors, build, constants)

    def _make_ready(
        self,
        aligned: bool,
        args: AdapterArguments,
        tensors: Sequence[Tensor | None],
        build: Callable[..., list[Launch]],
        constants: tuple[Any, ...],
    ) -> list[_Ready]:
        # Tensors of their own, so that one which is passed twice is told apart.
        sources: Any = [None if tensor is None else tensor.detach() for tensor in tensors]
        alike = AdapterArguments(*sources[:TENSORS], *args[TENSORS:])
        described = build(self, alike, sources[TENSORS:], *constants)
        ready = self._ready[aligned] = [_Ready(launch, sources, aligned) for launch in described]
        return ready


class _Ready:
    """A compiled launch on the current device that waits for addresses and numbers."""

    def __init__(self, launch: Launch, sources: Sequence[Tensor | None], aligned: bool) -> None:
        kernel: Any = launch._replace(aligned=aligned).compiled()
        position = {id(tensor): index for index, tensor in enumerate(sources, 1 + len(_DYNAMIC))}
        dynamic = [1 + _DYNAMIC.index(name) for name in launch.dynamic]
        self._pick = itemgetter(*(0 if each is None else position[id(each)] for each in launch.tensors), *dynamic)
        self._constants = (*launch.scalars[len(dynamic) :], *launch.constants)
        self._run, self._kernel, self._grid = kernel.run, kernel, launch.grid
        self._device = torch.cuda.current_device()

    def __call__(self, values: Sequence[int | None]) -> None:
        kernel = self._kernel
        self._run(
            *self._grid, torch._C._cuda_getCurrentRawStream(self._device), kernel.function, kernel.packed_metadata,
            None, None, None, *self._pick(values), *self._constants,
        )  # fmt: skip


def warms_up(lists: Tensor | None) -> bool:
    """Whether a call may warm up for a CUDA graph, which would not take the lists that the call takes.

    (`PerAssignment` has none while a graph is captured, and not every driver loads machine code then.) That happens on
    a side stream; on the default one nothing is compiled that may never run.
    """
    if lists is None or launching.INTERPRETED:
        return False
    return torch._C._cuda_getCurrentRawStream(torch.cuda.current_device()) != 0


def call_like(
    kind: str, args: AdapterArguments, lists: Tensor | None, others: tuple[Any, ...], make: Callable[..., Call]
) -> Call:
    """The call that is like this one, or `make(args, lists, *others)`.

    `others`: what else the plan depends on, hashable. All tensors of `args` have to be on the current device.
    """
    if launching.INTERPRETED:
        return make(args, lists, *others)
    b_up, expert, seed, activity = args.b_up, args.expert, args.seed, args.activity
    tensors: Any = args[:TENSORS]
    dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
    key = (
        kind, others, *dtypes, args[_CONSTANT:], args.x.shape, args.w_down.shape[0],
        None if lists is None else lists.shape,
        None if b_up is None else b_up.shape,
        None if expert is None else expert.shape,
        None if seed is None else seed.shape,
        None if activity is None else activity.shape,
        float32_precision() if args.matmul_dtype is torch.float32 else None,
        table.ONE_LAUNCH,
        args.x.get_device(),
    )  # fmt: skip
    known = launching._compiled
    found: Call | None = known.get(key)
    if found is None:
        if len(known) >= _MOST:  # a schedule of the scale, say, makes a call of its own at each step
            # A backward pass on another thread may add to them meanwhile: copied at once, and nothing has to be there.
            for stale in [each for each, kept in list(known.items()) if isinstance(kept, Call)]:
                known.pop(stale, None)
        found = known[key] = make(args, lists, *others)
    return found
