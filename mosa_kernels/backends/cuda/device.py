"""The device that is current while the compiled module launches."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

_UNCHANGED: AbstractContextManager[None] = nullcontext()


def current(device: torch.device) -> AbstractContextManager[object]:
    """Makes a CUDA device current for the calls within.

    The module does so too, but by CUDA's means alone: the device that it goes back to then gets a context, hundreds of
    megabytes, though it may have had none. PyTorch leaves such a device alone. Besides, PyTorch tells only of the
    current device whether its stream is captured.
    """
    if device.index is None or device.index == torch.cuda.current_device():
        return _UNCHANGED
    return torch.cuda.device(device)
