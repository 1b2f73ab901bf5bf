"""What outlives a call: made once, and not from memory that a thread allocates for a graph."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from mosa_kernels.backends import tickets
from mosa_kernels.backends.per_assignment import PerAssignment, owned_units, unit_lists

CUDA = torch.device("cuda", 0)


class OnGPU(torch.Tensor):
    """A tensor that says it lies on a GPU."""

    is_cuda, device = True, CUDA


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A current stream, which may be captured; of each thread the stream that it works on."""
    stream = SimpleNamespace(cuda_stream=7, synchronize=lambda: None)
    state = SimpleNamespace(capturing=False, stream=stream, of_thread={threading.get_ident(): stream})

    @contextmanager
    def on(stream: object) -> Iterator[None]:
        state.of_thread[threading.get_ident()] = stream
        yield

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: state.stream)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(tickets, "_tickets", {})
    return state


def test_what_lasts_is_made_on_a_thread_of_its_own_and_on_the_stream_of_the_call(gpu: SimpleNamespace) -> None:
    thread, stream = tickets.lasting(lambda: (threading.get_ident(), gpu.of_thread[threading.get_ident()]), CUDA)
    assert thread != threading.get_ident()
    assert stream is gpu.stream
    assert tickets.lasting(threading.get_ident, torch.device("cpu")) == threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        tickets.lasting(lambda: 1 // 0, CUDA)


def test_a_stream_keeps_its_ticket_and_a_graph_has_its_own(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    monkeypatch.setattr(tickets, "_zero", lambda _: threads.append(threading.get_ident()) or torch.zeros(1).int())
    first = tickets.ticket(CUDA)
    assert tickets.ticket(CUDA) is first
    gpu.stream.cuda_stream = 8
    assert tickets.ticket(CUDA) is not first
    gpu.capturing = True
    assert tickets.ticket(CUDA) is not tickets.ticket(CUDA)
    here = threading.get_ident()
    assert [thread == here for thread in threads] == [False, False, True, True]


def test_what_is_read_off_an_assignment_lasts(gpu: SimpleNamespace) -> None:
    threads = PerAssignment(lambda _: threading.get_ident())
    assignment = torch.ones(3, 2, dtype=torch.uint8).as_subclass(OnGPU)
    found = threads.of(assignment)
    assert found != threading.get_ident()
    assert threads.of(assignment) == found


@pytest.mark.parametrize("elsewhere", ["meta"])
def test_a_default_device_changes_nothing_on_the_host(elsewhere: str) -> None:
    assignment = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1]], dtype=torch.uint8)
    with torch.device(elsewhere):
        lists: Tensor = unit_lists(owned_units(assignment), 2)
    assert lists.tolist() == [[0, 1], [2, 3]]
