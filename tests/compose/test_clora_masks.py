"""Masks from maps, and predictions joined by them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compose.clora_masks import above, changed, fused, owned, shares, with_background
from compose.schedulers import make_scheduler, set_steps
from studio.base import Base


def random_maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_masks_hold_what_is_above_a_share_of_the_largest() -> None:
    maps = random_maps(3, 2, 5, 5)
    peak = maps.amax((-2, -1), keepdim=True)
    torch.testing.assert_close(above(maps, 0.3), (maps > 0.3 * peak).any(1))
    only = above(maps[:, :1], 1 - 1e-12)
    assert only.flatten(1).sum(1).tolist() == [1, 1, 1]
    assert torch.equal(only, maps[:, 0] == peak[:, 0])
    sparse = maps * (maps > 0.5)
    assert torch.equal(above(sparse[:, :1], 0.0), sparse[:, 0] > 0)
    assert (above(maps, 0.5) | ~above(maps[:, :1], 0.5)).all()  # one word more never takes away
    assert not above(torch.zeros(1, 1, 3, 3), 0.3).any()


def test_other_rules_measure_from_the_smallest_value_and_choose_one_subject() -> None:
    """Maps with a common offset: by the paper's rule they cover everything."""
    one, other = torch.full((1, 1, 4, 4), 0.5), torch.full((1, 2, 4, 4), 0.5)
    one[..., :3], other[:, 0, :, 1:] = 0.7, 0.6
    one[0, 0, 0, 0], other[0, :, 3, 3] = 0.8, 0.9
    assert owned([one, other], 0.3, "max").all()
    wide = owned([one, other], 0.2, "range")
    assert wide[0, 0].sum() == 12 and wide[1, 0].sum() == 12 and (wide[0, 0] & wide[1, 0]).any()
    narrow = owned([one, other], 0.2, "winner")
    assert not (narrow[0, 0] & narrow[1, 0]).any() and torch.equal(narrow.any(0), wide.any(0))
    assert narrow[0, 0, 0, 0] and narrow[1, 0, 3, 3] and narrow[0, 0, :, :3].sum() == 12
    assert torch.equal(owned([one * 3, other * 3], 0.2, "winner"), narrow)


def test_the_base_has_what_nobody_has() -> None:
    subjects = random_maps(2, 1, 4, 4) > 0.6
    base = random_maps(1, 4, 4, seed=1) > 0.5
    masks = with_background(subjects)
    assert torch.equal(masks[0], ~(subjects[0] | subjects[1])) and torch.equal(masks[1:], subjects)
    assert torch.equal(with_background(subjects, base)[0], ~(subjects[0] | subjects[1]) | base)


def test_fusion_is_convex_and_disjoint_masks_select() -> None:
    masks = with_background(random_maps(2, 2, 4, 8) > 0.6)
    weights = shares(masks, 8, 16)
    assert weights.shape == (3, 2, 1, 8, 16) and (weights >= 0).all()
    torch.testing.assert_close(weights.sum(0), torch.ones(2, 1, 8, 16))
    assert torch.equal(weights[1, 0, 0, ::2, ::2] > 0, masks[1, 0])  # by repetition of cells
    parts = torch.randn(3, 2, 5, 8, 16, generator=torch.Generator().manual_seed(3))
    out = fused(parts, weights)
    assert (out >= parts.amin(0) - 1e-6).all() and (out <= parts.amax(0) + 1e-6).all()
    left = torch.zeros(1, 1, 4, 8, dtype=torch.bool)
    left[..., :4] = True
    split = fused(parts[:2, :1], shares(with_background(left), 8, 16))
    assert torch.equal(split[..., :8], parts[1, :1, ..., :8]) and torch.equal(split[..., 8:], parts[0, :1, ..., 8:])


@pytest.mark.parametrize("name", ["ddim", "euler", "dpmpp_2m"])
def test_fusing_predictions_is_fusing_latents(base: Base, name: str) -> None:
    """The paper fuses after the step; a step that is affine in the prediction cannot tell."""
    weights = shares(with_background(random_maps(2, 1, 4, 4) > 0.5), 8, 8).float()
    parts = torch.randn(3, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    z = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(1))

    def stepped(prediction: Tensor) -> Tensor:
        scheduler = make_scheduler(name, base.scheduler)
        set_steps(scheduler, 5, base.device)
        scheduler.scale_model_input(z, scheduler.timesteps[0])
        after: Tensor = scheduler.step(prediction, scheduler.timesteps[0], z, return_dict=False)[0]
        return after

    late = fused(torch.stack([stepped(each) for each in parts]), weights)
    torch.testing.assert_close(stepped(fused(parts, weights)), late, atol=1e-5, rtol=1e-5)


def test_morphology_in_the_published_order() -> None:
    dot = torch.zeros(1, 1, 7, 7, dtype=torch.bool)
    dot[0, 0, 3, 3] = True
    grown = changed(dot, ("dilate",))
    assert grown.sum() == 9 and grown[0, 0, 2:5, 2:5].all()
    assert torch.equal(changed(dot, ("erode", "dilate")), dot)  # dilation comes first, whatever the order asked
    assert torch.equal(changed(dot, ("erode",)), dot)  # would leave nothing
    ring = grown.clone()
    ring[0, 0, 3, 3] = False
    assert torch.equal(changed(ring, ("close",)), grown)
    speck = grown.clone()
    speck[0, 0, 6, 0] = True
    assert torch.equal(changed(speck, ("open",)), grown)
    assert changed(dot, ()) is dot
