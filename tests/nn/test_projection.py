"""A projection on its own: what it takes from a state dict."""

from __future__ import annotations

import pytest
import torch

from mosa_kernels.nn.adapter import FusedMoSAAdapter
from mosa_kernels.nn.lora import FusedMoSALoRA


@pytest.mark.parametrize("make", [FusedMoSAAdapter, FusedMoSALoRA])
@pytest.mark.parametrize(("saved", "loaded"), [(4, 2), (2, 4)])
def test_owners_of_another_number_of_experts_are_refused(make: type, saved: int, loaded: int) -> None:
    """No shape depends on N where the experts share their bias."""
    options = {} if make is FusedMoSALoRA else {"expert_bias": False}
    one, other = (make(16, bottleneck=4, num_experts=n, **options) for n in (saved, loaded))
    before = other.up.assignment.clone()
    message = rf"up.assignment: expected owners for num_experts={loaded}, got {saved} experts"
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=message):
            other.load_state_dict(one.state_dict(), strict=strict)
    assert torch.equal(other.up.assignment, before)
    by_hand = before.clone()
    by_hand[1:] = 0  # the last expert owns nothing
    other.load_state_dict({**other.state_dict(), "up.assignment": by_hand.clamp(max=loaded - 2)})
    other.load_state_dict(make(16, bottleneck=4, num_experts=loaded, seed=9, **options).state_dict())
    assert not torch.equal(other.up.assignment, before)
