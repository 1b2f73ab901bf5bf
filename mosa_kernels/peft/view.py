"""A module for the length of one call, with stand-ins for some of what it has.

timm's own forward runs with a view in the place of `self`. Forward hooks that keep or replace tensors would do the
same, but `torch.compile` refuses those under activation checkpointing, and `torch.fx` loses them.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.hooks import BackwardHook


class ModuleView:
    """What is set here stands in for what the module has; everything else is the module's.

    Calling it is calling the module: its own hooks run, with the module as their first argument.
    """

    def __init__(self, module: nn.Module, forward: Any = None) -> None:
        self._module = module
        self._forward = type(module).forward if forward is None else forward

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self._module
        if has_own_forward(module):
            raise RuntimeError(
                f"model: expected timm's own forward of {type(module).__name__}, within which low-rank updates and "
                "prompts run, got one in its place, which would not run; take it out, or use another style"
            )
        for key, hook in module._forward_pre_hooks.items():
            if key in module._forward_pre_hooks_with_kwargs:
                changed = hook(module, args, kwargs)
                args, kwargs = (args, kwargs) if changed is None else changed
            else:
                changed = hook(module, args)
                args = args if changed is None else changed if isinstance(changed, tuple) else (changed,)
        backward = _backward_hook(module)
        if backward is not None:
            args = backward.setup_input_hook(args)
        out = self._forward(self, *args, **kwargs)
        for key, hook in module._forward_hooks.items():
            given = (args, kwargs, out) if key in module._forward_hooks_with_kwargs else (args, out)
            changed = hook(module, *given)
            out = out if changed is None else changed
        return out if backward is None else backward.setup_output_hook(out)


def has_own_forward(module: nn.Module) -> bool:
    """Whether somebody has put another `forward` into the module itself, as over that of its class."""
    return "forward" in vars(module)


def _backward_hook(module: nn.Module) -> BackwardHook | None:
    """What runs the module's full backward hooks, if it has any."""
    if not (module._backward_hooks or module._backward_pre_hooks):
        return None
    return BackwardHook(module, module._get_backward_hooks()[0], module._get_backward_pre_hooks())
