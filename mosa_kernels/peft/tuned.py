"""Baselines that train the backbone's own parameters: all of them, or its biases (BitFit, arXiv 2106.10199).

The backbone stays as it was: what trains are copies, which take the place of the originals while they are active, as
the heads of several adapters do. So a baseline is one more adapter to switch, save and compare with. An adapter that
was trained with a part of the backbone unfrozen, and loaded from its file, has that part in the same way.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor, nn


class Tuned(nn.Module):
    """Parameters that can stand in for the backbone's.

    Args:
        values: what they begin with, by name in the model; copied.

    Attributes:
        paths: their names in the model.
        values: while they are active the backbone's own, otherwise the trained ones; in the order of `paths`.
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.paths = list(values)
        self.values = nn.ParameterList(nn.Parameter(value.detach().clone()) for value in values.values())

    def forget_gone(self, model: nn.Module) -> None:
        """Lets go of those that the model no longer has a place for."""
        places = dict(model.named_parameters(remove_duplicate=False))
        kept = {path: value for path, value in self.tensors().items() if path in places}
        if len(kept) < len(self.paths):
            self.paths, self.values = list(kept), nn.ParameterList(kept.values())

    def exchange(self, model: nn.Module) -> None:
        """Puts these into the model, wherever one parameter stands, and keeps what was there in their place."""
        places = defaultdict(list)
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                places[parameter].append((module, name))
        for number, path in enumerate(self.paths):
            mine, there = self.values[number], model.get_parameter(path)
            for module, name in places[there]:
                module.register_parameter(name, mine)
            self.values[number] = there

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Copies of more parameters, while the originals are all in the model."""
        self.paths += values.keys()
        self.values.extend(nn.Parameter(value.detach().clone()) for value in values.values())

    def beyond(self, method: str) -> list[str]:
        """Those paths that the method does not train by itself."""
        return [] if method == "full" else [path for path in self.paths if method != "bitfit" or not is_bias(path)]

    def tensors(self) -> dict[str, Tensor]:
        """What is kept here, by name in the model."""
        return dict(zip(self.paths, self.values, strict=True))

    def extra_repr(self) -> str:
        return f"{len(self.paths)} tensors"


def is_bias(path: str) -> bool:
    """Whether a parameter is an additive bias by timm's names: `bias`, or BEiT's and EVA's `q_bias` and `v_bias`."""
    name = path.rpartition(".")[2]
    return name == "bias" or name.endswith("_bias")
