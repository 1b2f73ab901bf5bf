"""Which shapes are measured, and what wrong wishes are told."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from mosa_kernels.bench.case import Work
from mosa_kernels.bench.environment import choose_device, describe
from mosa_kernels.bench.growth import growth_points
from mosa_kernels.bench.limits import Limits, known_roofline, measure_limits
from mosa_kernels.bench.model import settings
from mosa_kernels.bench.run import Request, measure
from mosa_kernels.bench.shapes import BOTTLENECKS, EXPERTS, MODELS, PRESETS, Axes, Point, points


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_presets_grow_and_the_full_one_covers_every_axis(device: str) -> None:
    sizes = [len(points(preset, device)) for preset in PRESETS]
    assert sizes == sorted(sizes)
    full = points("full", device)
    assert len(full) == len(set(full))
    assert {point.model for point in full} == set(MODELS)
    assert {point.bottleneck for point in full} == set(BOTTLENECKS)
    assert {point.experts for point in full} == set(EXPERTS)
    assert {point.expert_per for point in full} == {"call", "sample"}
    assert {"fp32", "bf16"} <= {point.dtype for point in full}
    vit_b = [point.tokens for point in full if point.model == "vit_b"]
    assert min(vit_b) == 197
    assert max(vit_b) == 256 * 197


def test_the_committed_cpu_figures_are_in_the_quick_preset() -> None:
    quick = points("quick", "cpu")
    for dtype in ("fp32", "bf16"):
        for per in ("call", "sample"):
            assert Point("vit_b", 64, 64, 4, dtype, per) in quick


def test_values_asked_for_are_combined() -> None:
    axes = Axes(model=("vit_s",), bottleneck=(8, 16), dtype=("fp32", "bf16"))
    found = points("quick", "cpu", axes)
    assert [(point.bottleneck, point.dtype) for point in found] == [
        (8, "fp32"),
        (8, "bf16"),
        (16, "fp32"),
        (16, "bf16"),
    ]
    assert {point.model for point in found} == {"vit_s"}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Axes(model=("vit_x",)), "shapes: expected some of vit_ti, .* got 'vit_x'"),
        (lambda: Axes(dtype=("fp8",)), "dtypes: expected some of fp32, fp16, bf16, got 'fp8'"),
        (lambda: Axes(experts=(0,)), "experts: expected at least 1, at most 255, got 0"),
        (lambda: Axes(experts=(256,)), "got 256"),
        (lambda: Request(preset="fast"), "preset: expected one of smoke, quick, full, got 'fast'"),
        (lambda: Request(only=("adaptor",)), "only: expected some of adapter_forward, .* got 'adaptor'"),
        (lambda: Request(providers=("nobody",)), "providers: expected some of eager, .* got 'nobody'"),
        (lambda: Request(rounds=0), "rounds: expected at least 1, got 0"),
        (
            lambda: Request(only=("model",), axes=Axes(model=("vit_s",))),
            "shapes: expected with adapter_forward, .*, not with model",
        ),
        (lambda: Request(only=("model",), axes=Axes(images=(1,))), "images: expected with adapter_forward"),
        (lambda: Request(only=("adapter",), models=("vit",)), "models: expected with model, not with adapter alone"),
        (lambda: Request(only=("merge", "masked_adamw"), axes=Axes(expert_per=("call",))), "expert-per: expected with"),
        (lambda: Request(only=("alignment",), axes=Axes(bottleneck=(8,))), "bottlenecks: expected with .*, merge"),
        (lambda: Request(only=("masked_adamw",), axes=Axes(dtype=("bf16",))), "dtypes: expected with"),
        (lambda: Request(processor_time=True, threads=2), "threads: expected without --processor-time"),
        (lambda: Request(only=("growth",), axes=Axes(dtype=("fp32", "bf16"))), "dtypes: expected one value"),
        (lambda: settings("smoke", "cpu", axes=Axes(dtype=("fp16",))), "dtypes: expected fp32 or bf16"),
        (lambda: points("fast", "cpu"), "preset: expected one of"),
        (lambda: choose_device("tpu"), "device: expected cpu or cuda, got 'tpu'"),
    ],
)
def test_wrong_wishes_name_what_was_expected(make, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_what_one_of_the_parts_takes_is_no_error() -> None:
    Request(only=("merge", "adapter"), axes=Axes(images=(1,), expert_per=("call",)), processor_time=True, threads=1)
    Request(models=("vit",), batch=3, axes=Axes(model=("vit_s",)))


def test_processor_time_is_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mosa_kernels.bench.run.choose_device", lambda name: torch.device("cuda"))
    with pytest.raises(ValueError, match="processor-time: expected with --device cpu, the device is cuda"):
        measure(Request(processor_time=True))


def test_one_value_of_the_smoke_preset_leaves_its_others() -> None:
    (point,) = points("smoke", "cpu", Axes(dtype=("bf16",)))
    assert point == Point("vit_ti", 2, 8, 2, "bf16", "sample")


def test_a_request_can_be_handed_on_as_words() -> None:
    axes = Axes(model=("vit_s",), images=(1, 2), expert_per=("call",))
    words = Request(preset="smoke", only=("adapter", "merge"), axes=axes, threads=1).arguments()
    assert words == [
        *("--preset", "smoke", "--only", "adapter,merge", "--threads", "1", "--shapes", "vit_s", "--images", "1,2"),
        *("--expert-per", "call"),
    ]


@pytest.mark.parametrize(
    ("name", "bandwidth"),
    [
        ("Tesla V100-SXM2-16GB", 900), ("Tesla V100-SXM2-32GB", 900), ("Tesla V100-PCIE-32GB", 900),
        ("Tesla V100S-PCIE-32GB", 1134), ("NVIDIA A100-SXM4-40GB", 1555), ("NVIDIA A100-PCIE-40GB", 1555),
        ("A100-PCIE-40GB", 1555), ("NVIDIA A100-SXM4-80GB", 2039), ("NVIDIA A100 80GB PCIe", 1935),
        ("NVIDIA H100 80GB HBM3", 3350), ("NVIDIA H100 PCIe", 2000), ("NVIDIA H100 NVL", 3938),
        ("NVIDIA H200", 4800), ("NVIDIA H200 NVL", 4800), ("NVIDIA GH200 480GB", 4000),
        ("NVIDIA GH200 144G HBM3e", 4900), ("NVIDIA L4", 300), ("NVIDIA GeForce RTX 4090", 1008),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 576), ("NVIDIA GeForce RTX 4090 D", None), ("NVIDIA L40S", None),
        ("NVIDIA L40", None), ("NVIDIA GeForce RTX 3090", None), ("NVIDIA RTX A1000", None),
        ("NVIDIA RTX A1000 Laptop GPU", None), ("NVIDIA RTX A4000", None), ("NVIDIA A10", None), ("NVIDIA A100X", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None), ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
        ("GRID A100-10C", None), ("NVIDIA H20", None), ("Tesla T4", None), ("NVIDIA B200", None),
    ],
)  # fmt: skip
def test_rooflines_by_name(name: str, bandwidth: float | None) -> None:
    known = known_roofline(name)
    assert (known and known.bandwidth) == bandwidth
    assert known is None or known.source


def test_the_limit_is_the_longer_of_copying_and_products() -> None:
    limits = Limits(copy=100.0, matrix={"fp32": 1.0})
    assert limits.seconds(Work(10**9, 10**9), "fp32") == pytest.approx(0.01)
    assert limits.seconds(Work(10**6, 10**12), "fp32") == pytest.approx(1)
    assert limits.seconds(Work(10**6, 10**12), "bf16") == pytest.approx(1e-5)  # nobody measured that rate
    slow = Limits(copy=100.0, matrix={"fp32": 1.0, "bf16": 0.5})
    assert slow.seconds(Work(10**6, 10**12), "bf16") == pytest.approx(1)  # it may multiply in fp32
    assert (slow.products("bf16"), slow.products("fp16")) == (1.0, None)


def test_limits_of_this_machine_and_its_description() -> None:
    limits = measure_limits(torch.device("cpu"), quick=True)
    assert limits.copy > 0.01
    assert set(limits.matrix) == {"fp32", "bf16"}
    described = describe(torch.device("cpu"))
    assert described["device_type"] == "cpu"
    assert described["gpu"] is None
    assert described["threads"] == torch.get_num_threads()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_that_was_freed_is_kept() -> None:
    program = (
        "import resource, torch\n"
        "from mosa_kernels.bench.environment import keep_memory\n"
        "assert keep_memory()\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for number in range(9):\n"
        "    before = faults()\n"
        "    torch.ones(1 << 24)\n"
        "print(faults() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000  # of the 16384 pages that a new block has


def test_growth_and_models_take_the_values_asked_for() -> None:
    asked = Axes(model=("vit_s",), bottleneck=(4, 12), experts=(3,), dtype=("bf16",))
    found = list(growth_points("smoke", "cpu", asked))
    assert {(point.model, point.dtype) for _, point in found} == {("vit_s", "bf16")}
    assert [point.bottleneck for axis, point in found if axis == "bottleneck"] == [4, 12]
    assert {point.bottleneck for axis, point in found if axis != "bottleneck"} == {4}
    assert {point.experts for axis, point in found if axis != "experts"} == {3}
    wishes = Axes(bottleneck=(4, 12), experts=(3,), dtype=("fp32", "bf16"))
    made = settings("smoke", "cpu", axes=wishes)
    assert [(s.bottleneck, s.experts, s.half) for s in made] == [
        (4, 3, False), (4, 3, True), (12, 3, False), (12, 3, True),
    ]  # fmt: skip


def test_growth_varies_one_axis_at_a_time() -> None:
    for preset in PRESETS:
        found = list(growth_points(preset, "cpu"))
        assert {axis for axis, _ in found} == {"images", "bottleneck", "experts", "layers"}
        for axis, point in found:
            base = next(p for a, p in found if a != axis)
            differing = {name for name in Point._fields if getattr(point, name) != getattr(base, name)}
            assert len(differing) <= 2  # its own axis, and the base's
