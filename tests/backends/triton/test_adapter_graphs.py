"""A training step in a CUDA graph and under torch.compile: experts are drawn on the device, anew at each replay."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from mosa_kernels.functional.alignment import feature_alignment
from mosa_kernels.functional.consistency import consistency
from mosa_kernels.nn.adapter import FusedMoSAAdapter
from mosa_kernels.nn.sampler import Draw, ExpertSampler
from mosa_kernels.optim import MoSAAdamW

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device"),
]
SIZES = {"bottleneck": 16, "num_experts": 4, "dropout": 0.1}


class _Observed:
    """What a sampler draws, in memory that a graph writes again at each replay."""

    def __init__(self, sampler: ExpertSampler, monkeypatch: pytest.MonkeyPatch) -> None:
        self.draw: Draw | None = None
        draw = sampler.draw

        def noting(batch_size: int, device: torch.device, dropout: bool) -> Draw:
            self.draw = draw(batch_size, device, dropout)
            return self.draw

        monkeypatch.setattr(sampler, "draw", noting)


class TestOnDevice:
    pytestmark = needs_gpu

    @staticmethod
    def layer(**options: object) -> FusedMoSAAdapter:
        layer = FusedMoSAAdapter(192, **{**SIZES, **options}, device="cuda")
        torch.nn.init.normal_(layer.up.weight, std=0.1)
        layer.backend = "triton"
        return layer

    @pytest.mark.parametrize(("granularity", "bottleneck"), [("element", 16), ("column", 128)])
    def test_a_step_in_a_graph_draws_new_experts(
        self, granularity: str, bottleneck: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        layer = self.layer(granularity=granularity, bottleneck=bottleneck)
        optimizer = MoSAAdamW(layer, lr=1e-3)
        observed = _Observed(layer.sampler, monkeypatch)
        x, target = (torch.randn(8, 50, 192, device="cuda") for _ in range(2))

        def step() -> tuple[Tensor, Tensor]:
            out = layer(x)
            (out * target).sum().backward()
            grad = layer.up.weight.grad.clone()
            optimizer.step()
            optimizer.zero_grad()
            return out.detach(), grad

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, grad = step()
        assert observed.draw is not None
        drawn = observed.draw
        assert isinstance(drawn.expert, Tensor)

        seen = set()
        for _ in range(20):
            before = copy.deepcopy(layer.state_dict())
            graph.replay()
            seen.add(tuple(drawn.expert.tolist()))
            moved = layer.up.weight.detach() != before["up.weight"]
            assert moved.any()
            assert not moved[~torch.isin(layer.up.assignment, drawn.expert.to(torch.uint8))].any()

            eager = self.layer(granularity=granularity, bottleneck=bottleneck)
            eager.load_state_dict(before)
            eager.sampler.plan = Draw(drawn.expert.clone(), None if drawn.seed is None else drawn.seed.clone())
            wanted = eager(x)
            (wanted * target).sum().backward()
            torch.testing.assert_close(out, wanted.detach())
            torch.testing.assert_close(grad, eager.up.weight.grad)
        assert len(seen) == 20

    @pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_compiled_without_a_break(self, mode: str, dtype: torch.dtype) -> None:
        layer = self.layer(dropout=0.0).to(dtype)
        compiled = torch.compile(layer, fullgraph=True, mode=mode)
        for seed in range(5):
            torch.manual_seed(seed)
            x = torch.randn(8, 50, 192, device="cuda", dtype=dtype)
            expert = torch.randint(4, (8,), device="cuda")
            found: list[list[Tensor]] = []
            for call in (compiled, layer):
                torch.compiler.cudagraph_mark_step_begin()
                layer.zero_grad()
                out = call(x, expert=expert)
                out.float().square().sum().backward()
                found.append([out.detach().clone(), *(parameter.grad.clone() for parameter in layer.parameters())])
            for a, b in zip(*found, strict=True):
                torch.testing.assert_close(a, b)

    def test_compiled_from_the_first_call_on_with_lists_of_units(self) -> None:
        """The lists lie outside of the graph's memory, and the graph finds its kernels, which take none, loaded."""
        layer = self.layer(granularity="column", bottleneck=128, dropout=0.0)
        compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
        x = torch.randn(8, 50, 192, device="cuda")
        expert = torch.randint(4, (8,), device="cuda")
        for _ in range(4):
            found: list[list[Tensor]] = []
            for call in (compiled, layer):
                torch.compiler.cudagraph_mark_step_begin()
                layer.zero_grad()
                out = call(x, expert=expert)
                out.square().sum().backward()
                found.append([out.detach().clone(), *(parameter.grad.clone() for parameter in layer.parameters())])
            for a, b in zip(*found, strict=True):  # by kernels that add in another order
                assert (a - b).norm() <= 1e-4 * b.norm()

    def test_compiled_losses_from_the_first_call_on(self) -> None:
        """Nor do the counters lie in the graph's memory by which the programs find the last of them."""

        def loss(features: Tensor, logits: Tensor, target: Tensor, backend: str) -> Tensor:
            aligned = feature_alignment([features[:4]], [features[4:]], backend=backend)
            return aligned + sum(consistency(logits[:4], logits[4:], target, backend=backend))

        compiled = torch.compile(loss, fullgraph=True, mode="reduce-overhead")
        for _ in range(4):
            features = torch.randn(8, 50, 192, device="cuda", requires_grad=True)
            logits = torch.randn(8, 100, device="cuda", requires_grad=True)
            target = torch.randint(100, (4,), device="cuda")
            torch.compiler.cudagraph_mark_step_begin()
            found = compiled(features, logits, target, "triton")
            grads = torch.autograd.grad(found, [features, logits])
            wanted = loss(features, logits, target, "reference")
            torch.testing.assert_close(found, wanted)
            for grad, other in zip(grads, torch.autograd.grad(wanted, [features, logits]), strict=True):
                torch.testing.assert_close(grad, other)

    def test_a_compiled_layer_draws_for_itself(self) -> None:
        layer = self.layer()
        compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
        x = torch.randn(8, 50, 192, device="cuda")
        outputs = []
        for _ in range(6):
            torch.compiler.cudagraph_mark_step_begin()
            outputs.append(compiled(x).detach().clone())
        for index, a in enumerate(outputs):
            assert all(not torch.equal(a, b) for b in outputs[index + 1 :])
