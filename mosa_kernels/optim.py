"""AdamW for mixtures of sparse adapters: an expert moves only when it was active (arXiv 2312.02923, Eq. 4)."""

from __future__ import annotations

import numbers
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from mosa_kernels.functional.masked_adamw import OPERATOR, masked_adamw
from mosa_kernels.nn.activity_history import ActivityHistory
from mosa_kernels.nn.options import check_flag
from mosa_kernels.nn.projection import taken_in_turns
from mosa_kernels.shards import check_sharding, is_sharded, local_part, local_rows

Parameters: TypeAlias = nn.Module | ParamsT


class MoSAAdamW(Optimizer):
    """AdamW that moves only the entries of experts that were active in the step.

    All other entries, their moments and their weight decay stand still, and each expert counts its own steps for the
    bias correction. It equals `torch.optim.AdamW` on N separate masked copies whose gradients are None while
    inactive. An expert is active when any forward pass that contributed to the gradient since it was last cleared ran
    it, on any rank of `torch.distributed`; merged passes run all experts. A gradient that no backward pass through
    the layer in training mode explains (`torch.autograd.grad`, `backward(inputs=...)`), or that the user puts in the
    place of what the passes left, counts for the experts that it is not zero for. Values copied *into* a gradient
    (`p.grad.copy_(...)`) do not: assign them (`p.grad = ...`). Parameters that experts share, and those of other
    modules, see ordinary AdamW.

    The host reads nothing from a GPU, so that a CUDA graph can hold the step, after a few steps outside of it; give
    `lr` as a tensor on the device to change it between replays.

    Args:
        params: a module (its trainable parameters), parameters, named parameters, or groups, each with any of these
            as its "params".
        lr: learning rate, a number or a tensor [].
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled, times lr.
        maximize: climb instead of descend.
        backend: of the `masked_adamw` operator; None for the automatic choice.

    Parameters may be sharded by FSDP2 (`torch.distributed.fsdp.fully_shard`), before the optimizer is made.

    State, per parameter: "exp_avg" and "exp_avg_sq" like the parameter, "step" float32, [] or [N] with experts.

    Raises:
        TypeError: `params` holds a tensor that is sharded otherwise (DTensor), or what no optimizer takes.
        ValueError: an option is out of range, or nothing is trainable; the message names it.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        maximize: bool = False,
        backend: str | None = None,
    ) -> None:
        OPERATOR.check_name(backend)
        if isinstance(params, nn.Module):
            params = _trainable(params)
        elif not isinstance(params, Iterable):
            raise TypeError(f"params: expected a module, parameters or groups of either, got {params!r}")
        self.backend = backend
        self._histories: dict[Tensor, ActivityHistory] = {}
        self._copied = False
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        _check_options(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in every optimizer; the group's options are checked, and its experts are watched from now on."""
        if isinstance(module := param_group.get("params"), nn.Module):
            param_group = {**param_group, "params": _trainable(module)}
        super().add_param_group(param_group)
        try:
            _check_options(param_group)
            for parameter in param_group["params"]:
                check_sharding("params", parameter)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._watch(param_group["params"])

    def _watch(self, parameters: Iterable[Tensor]) -> None:
        for parameter in parameters:
            projection = taken_in_turns(parameter)
            if projection is None or parameter in self._histories:
                continue
            owned = projection if parameter is projection.weight else None
            self._histories[parameter] = ActivityHistory(parameter, projection, owned)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "backend": self.backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        copied = "_histories" not in self.__dict__
        self.__dict__.setdefault("_histories", {})
        self._copied = copied
        for group in self.param_groups:
            group.setdefault("maximize", False)
            self._watch(group["params"])
            for parameter in group["params"]:
                if "step" in self.state.get(parameter, ()):
                    steps = torch.as_tensor(self.state[parameter]["step"], dtype=torch.float32, device=parameter.device)
                    if copied and steps.dim() and parameter not in self._histories:
                        continue  # the module that it is the parameter of may be copied yet, see `_watch_copies`
                    self.state[parameter]["step"] = self._loaded_steps(parameter, steps)

    def _watch_copies(self) -> None:
        """Finds the modules of a copy's parameters, which need not be there yet when the optimizer is copied."""
        if not self._copied:
            return
        for group in self.param_groups:
            self._watch(group["params"])
            for parameter in group["params"]:
                if "step" in self.state.get(parameter, ()):
                    self._loaded_steps(parameter, self.state[parameter]["step"])
        self._copied = False

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in every optimizer."""
        self._watch_copies()
        super().zero_grad(set_to_none)
        for history in self._histories.values():
            history.cleared()

    def _loaded_steps(self, parameter: Tensor, steps: Tensor) -> Tensor:
        """Counts as this optimizer keeps them; one count, as `torch.optim.AdamW` saves it, goes to every expert."""
        history = self._histories.get(parameter)
        shape = () if history is None else (history.num_experts,)
        if steps.shape not in ((), shape):
            raise ValueError(f"state_dict: expected step counts of shape {list(shape)}, got {list(steps.shape)}")
        return steps.expand(shape).clone()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Moves what was active. With `torch.distributed` initialised, every rank has to call it.

        Args:
            closure: computes the loss again and returns it.

        Returns:
            What the closure returned, or None.
        """
        self._watch_copies()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        active = self._active_experts()
        for group in self.param_groups:
            for parameters in _by_device(group["params"]):
                self._step_together(group, parameters, active)
        return loss

    def _step_together(self, group: dict[str, Any], parameters: list[Tensor], active: dict[Tensor, Tensor]) -> None:
        parts = [part for parameter in parameters if (part := self._part_of(parameter, active.get(parameter)))]
        if not parts:
            return
        params, grads, exp_avgs, exp_avg_sqs, steps, owners, moving = (
            list(column) for column in zip(*parts, strict=True)
        )
        if group["maximize"]:
            grads = list(torch._foreach_neg(grads))
        masked_adamw(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            steps,
            owners,
            moving,
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            backend=self.backend,
        )

    def _part_of(self, parameter: Tensor, active: Tensor | None) -> _Part | None:
        """What this rank moves of a parameter, if anything. Steps of experts with rows elsewhere are counted here."""
        assert parameter.grad is not None
        if parameter.grad.layout != torch.strided:
            raise TypeError(
                f"params: expected dense gradients, got layout {parameter.grad.layout} for shape "
                f"{list(parameter.shape)}"
            )
        state = self._state_of(parameter)
        history = self._histories.get(parameter)
        steps, owner = state["step"], None if history is None else history.owner
        if is_sharded(parameter):
            rows = local_rows(parameter)
            if owner is not None:
                owner = owner[rows]
            elif active is not None:  # row e belongs to expert e
                for elsewhere in (slice(0, rows.start), slice(rows.stop, None)):
                    steps[elsewhere] += active[elsewhere] != 0
                steps, active = steps[rows], active[rows]
            if rows.start == rows.stop:
                steps += 1 if active is None else active != 0
                return None
        return _Part(
            local_part(parameter),
            local_part(parameter.grad),
            local_part(state["exp_avg"]),
            local_part(state["exp_avg_sq"]),
            steps,
            owner,
            active,
        )

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            history = self._histories.get(parameter)
            shape = () if history is None else (history.num_experts,)
            state["step"] = torch.zeros(shape, dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state

    def _active_experts(self) -> dict[Tensor, Tensor]:
        """For each parameter that is split, the experts that this step moves on all ranks."""
        flags = [history.active() for history in self._histories.values()]
        if flags and _world_size() > 1:
            flags = _maximum_over_ranks(flags)
        return dict(zip(self._histories, flags, strict=True))


def _trainable(module: nn.Module) -> list[Tensor]:
    found: list[Tensor] = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not found:
        raise ValueError("params: expected a module with trainable parameters, got one without")
    return found


class _Part(NamedTuple):
    """One parameter as `masked_adamw` takes it, or this rank's rows of it."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    steps: Tensor
    owner: Tensor | None
    active: Tensor | None


def _by_device(parameters: list[Tensor]) -> Iterable[list[Tensor]]:
    """The parameters that have a gradient."""
    found: defaultdict[torch.device, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            found[parameter.device].append(parameter)
    return found.values()


def _world_size() -> int:
    available = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if available else 1


def _maximum_over_ranks(flags: list[Tensor]) -> list[Tensor]:
    """One message for all layers."""
    together = torch.cat([flag.to(flags[0].device) for flag in flags])
    torch.distributed.all_reduce(together, torch.distributed.ReduceOp.MAX)
    parts = together.split([flag.numel() for flag in flags])
    return [part.to(flag.device) for part, flag in zip(parts, flags, strict=True)]


def _is_number(value: Any) -> bool:
    """One of Python's, or of NumPy's."""
    return isinstance(value, numbers.Real)


def _check_options(options: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay"):
        value = options[name]
        single = _is_number(value) or (isinstance(value, Tensor) and value.numel() == 1)
        if not single or not 0 <= value < float("inf"):
            raise ValueError(f"{name}: expected a finite number of at least 0, got {value!r}")
    check_flag("maximize", options["maximize"])
    betas = options["betas"]
    pair = isinstance(betas, Sequence) and not isinstance(betas, str) and len(betas) == 2
    if not pair or not all((_is_number(beta) or isinstance(beta, Tensor)) and 0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas: expected two numbers from 0 to below 1, got {betas!r}")
