"""What is read off an assignment once: when it is looked up, made anew, and left alone."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch

from mosa_kernels.backends.per_assignment import PerAssignment


class OnGPU(torch.Tensor):
    """A tensor that says it lies on a GPU."""

    is_cuda = True


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Streams that count how often they are waited for, and may be captured."""
    state = SimpleNamespace(capturing=False, stream_waits=0, device_waits=0)

    def count(name: str) -> None:
        setattr(state, name, getattr(state, name) + 1)

    stream = SimpleNamespace(synchronize=lambda: count("stream_waits"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: count("device_waits"))
    return state


def test_an_answer_is_kept_until_the_assignment_changes_or_dies() -> None:
    made: list[int] = []
    sums = PerAssignment(lambda assignment: made.append(1) or int(assignment.sum()))
    assignment = torch.ones(3, 2, dtype=torch.uint8)
    assert [sums.of(assignment) for _ in range(3)] == [6, 6, 6]
    assert len(made) == 1
    assignment[0, 0] = 5
    assert sums.of(assignment) == 10
    assert len(made) == 2
    del assignment
    gc.collect()
    assert not sums.entries


def test_a_captured_graph_is_given_nothing_that_may_change(gpu: SimpleNamespace) -> None:
    sums = PerAssignment(lambda assignment: int(assignment.as_subclass(torch.Tensor).sum()))
    assignment = torch.ones(3, 2, dtype=torch.uint8).as_subclass(OnGPU)
    gpu.capturing = True
    assert sums.of(assignment) is None
    gpu.capturing = False
    assert sums.of(assignment) == 6
    gpu.capturing = True  # known by now, and all the same not for a graph, which would outlive a change of it
    assert sums.of(assignment) is None


def test_other_streams_find_an_answer_that_is_there(gpu: SimpleNamespace) -> None:
    sums = PerAssignment(lambda assignment: int(assignment.as_subclass(torch.Tensor).sum()))
    assignment = torch.ones(3, 2, dtype=torch.uint8).as_subclass(OnGPU)
    assert [sums.of(assignment) for _ in range(2)] == [6, 6]
    assert (gpu.stream_waits, gpu.device_waits) == (1, 0)
    assignment += 1
    assert sums.of(assignment) == 12
    assert (gpu.stream_waits, gpu.device_waits) == (2, 1)  # who reads the old answer is waited for
