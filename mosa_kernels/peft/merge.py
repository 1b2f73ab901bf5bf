"""From a model with adapters to plain modules (arXiv 2312.02923, Eq. 7 and 8)."""

from __future__ import annotations

import warnings
from collections import OrderedDict

import torch
from timm.layers import LayerScale
from torch import nn

from mosa_kernels.backends.merge import MergedWeights
from mosa_kernels.functional.merge import merge_adapters
from mosa_kernels.nn.lora import FusedMoSALoRA
from mosa_kernels.peft.book import book_of, check_known, check_settled, holder_of, unwrap
from mosa_kernels.peft.fold import MERGE_WHOLE, check_rule, expert_of, fold, low_rank_updates
from mosa_kernels.peft.inject import remove_all
from mosa_kernels.peft.placement import BlockKind, block_parameter, find_blocks
from mosa_kernels.peft.plain import Branch, ParallelAdapter, SequentialAdapter
from mosa_kernels.peft.switch import set_adapter
from mosa_kernels.shards import check_unsharded


def merge_and_unload(
    model: nn.Module, rule: str | None = None, *, adapter_name: str | None = None, expert: int | None = None
) -> nn.Module:
    """Merges the experts of an adapter and leaves plain modules in the model, in place; other adapters are dropped.

    What evaluation mode computed is what the merged model computes, where the rule is the configuration's. Sums are in
    float32. In a half-precision model the merged weights are rounded to its dtype, and a warning says by how much. No
    kernel is left: the adapters are modules of `mosa_kernels.nn.dense` in modules of `mosa_kernels.peft.plain`, both in
    plain PyTorch without hooks, so the model exports (`torch.export`), traces (`torch.fx`, `torch.jit.trace`) and
    compiles as before. `torch.jit.script` does not take these modules; it takes what style "lora" leaves. Unpickling it
    imports these; an exported program needs nothing of this package. The FFN's norm and scale move into the branch
    beside the adapter (``mlp.branch.norm2``). Low-rank updates (style "lora") go into the frozen weights, the model is
    as large and as fast as it was, and nothing of this package is left in it. Of the baselines that train parameters,
    the trained ones stay in the model.

    Args:
        model: with adapters, or around one that has some.
        rule: "mean" or "jigsaw"; None: the `merge_rule` of the adapter's configuration.
        adapter_name: which adapter; None: the active one.
        expert: only this one, as it runs by itself, in place of all by a rule (see `experts_per_sample`).

    Returns:
        The model, with the adapter's head, and every parameter trainable that was before adapters came.

    Raises:
        TypeError: `expert` is no whole number.
        ValueError: the model has no adapters, none of this name, one is merged already (see `unmerge_adapter`), the
            rule is neither, there is no such expert, or it is a baseline with prompts, which are tokens that no
            weight can take in; of style "lora", if the weights are quantised, computed (as parametrisations do) or
            shared by blocks; or FSDP2 has sharded the model.
    """
    check_rule(rule, expert)
    whole, model = unwrap(model), holder_of(model)
    book = book_of(model)
    check_settled(book)
    check_unsharded(model, MERGE_WHOLE)
    name = book.active if adapter_name is None else adapter_name
    if name is None:
        raise ValueError("adapter_name: expected one, for within disable_adapter none is active")
    check_known(book, name)
    method = book.configs[name].method
    if method.startswith("vpt"):
        raise ValueError(f"method: {method!r} adds tokens, which do not merge into weights; keep the model as it is")
    if method != "adapter" and expert is not None:
        raise ValueError(f"expert: expected None for {method!r}, which has no experts, got {expert!r}")
    updates = low_rank_updates(book, name, rule, expert)
    placed = [each for each in book.adapters(name) if not isinstance(each[2], FusedMoSALoRA)]
    alone = expert_of(book, name, expert)
    inputs = [adapter.merge_input(rule, alone(adapter)) for _, _, adapter in placed]

    set_adapter(model, name)
    if updates:
        fold(model, updates)
    if not placed:
        remove_all(model, keep_head=True)
        return whole
    exact = merge_adapters(inputs, dtype=torch.promote_types(inputs[0].w_down.dtype, torch.float32))
    dtypes = [block_parameter(model.get_submodule(path)).dtype for path, _, _ in placed]  # adapters may be in float32
    merged = [_rounded(weights, dtype) for weights, dtype in zip(exact, dtypes, strict=True)]
    _tell_rounding(exact, merged)
    dense = [adapter.dense_from(weights) for weights, (_, _, adapter) in zip(merged, placed, strict=True)]
    paths = [(path, site) for path, site, _ in placed]
    remove_all(model, keep_head=True)
    kinds = {path: kind for path, _, kind in find_blocks(model)}
    for (path, site), adapter in zip(paths, dense, strict=True):
        _place(model, path, kinds[path], site, adapter)
    model.train(model.training)
    return whole


def _place(model: nn.Module, path: str, kind: BlockKind, site: str, adapter: nn.Module) -> None:
    block = model.get_submodule(path)
    if site == "after_ffn":
        block.mlp = SequentialAdapter(block.get_submodule("mlp"), adapter)
        return
    if site == "after_attention":  # an adapter works on each token alone, so it may as well run within windows
        block.attn = SequentialAdapter(block.get_submodule("attn"), adapter)
        return
    entry = kind.branch[0]
    if entry == "":
        pair = ParallelAdapter(block, adapter)
        places = [place for place, module in model.named_modules(remove_duplicate=False) if module is block]
        for place in places:  # one, unless layers share the block
            parent, _, name = place.rpartition(".")
            setattr(model.get_submodule(parent), name, pair)
    elif entry.endswith("[]"):
        branches = block.get_submodule(entry[:-2])
        assert isinstance(branches, nn.ModuleList)
        branches[0] = ParallelAdapter(branches[0], adapter)
    else:
        block.mlp = ParallelAdapter(_take_branch(block, kind.branch), adapter)


def _take_branch(block: nn.Module, names: tuple[str, ...]) -> Branch:
    """The FFN's branch as one module; the block keeps identities in the places of its parts."""
    branch: OrderedDict[str, nn.Module] = OrderedDict()
    for name in names:
        part = getattr(block, name)
        if isinstance(part, nn.Parameter):
            scale = LayerScale(part.shape[0])
            scale.gamma = part
            branch[name] = scale
            delattr(block, name)
            setattr(block, name, 1.0)
        elif isinstance(part, nn.Module) and not isinstance(part, nn.Identity):  # 1.0 after an earlier merge
            branch[name] = part
            setattr(block, name, nn.Identity())
    return Branch(branch)


def _rounded(weights: MergedWeights, dtype: torch.dtype) -> MergedWeights:
    return MergedWeights(*(None if tensor is None else tensor.to(dtype) for tensor in weights))  # type: ignore[arg-type]


def _tell_rounding(exact: list[MergedWeights], rounded: list[MergedWeights]) -> None:
    dtype = rounded[0].w_down.dtype
    if dtype == exact[0].w_down.dtype:
        return
    worst = {
        name: max((getattr(a, name) - getattr(b, name)).abs().max().item() for a, b in zip(exact, rounded, strict=True))
        for name in ("w_down", "w_up")
    }
    warnings.warn(
        f"merged into {dtype}: rounding moves an entry of the down-projection by at most {worst['w_down']:.2g} and of "
        f"the up-projection by at most {worst['w_up']:.2g}; merge in float32 and convert afterwards to compare",
        stacklevel=3,
    )
