"""LoRA-Composer's losses and its move of the noise against their formulas, written out slowly."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from compose.layout_losses import counted, enhancement, filling, leaking, middle_weight
from compose.reinit import Window, best_window, moved, window_around


def box(height: int, width: int, top: int, left: int, down: int, across: int) -> Tensor:
    region = torch.zeros(height, width, dtype=torch.bool)
    region[top : top + down, left : left + across] = True
    return region


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


REGION = box(16, 24, 1, 3, 14, 10)


def test_enhancement_of_full_empty_and_random_maps() -> None:
    full, empty = REGION.double()[None], torch.zeros(1, 16, 24, dtype=torch.float64)
    assert float(enhancement(full, REGION)) == pytest.approx(0.065, abs=5e-3)
    assert float(enhancement(empty, REGION)) == 1
    maps = some(3, 16, 24)
    weight = [
        [math.exp(-(((2 * i / 13 - 1) ** 2 + (2 * j / 9 - 1) ** 2) / 2)) for j in range(10)] for i in range(14)
    ]  # fmt: skip
    top = max(max(row) for row in weight)
    for one, got in zip(maps, enhancement(maps, REGION), strict=True):
        values = sorted((float(one[1 + i, 3 + j]) * weight[i][j] / top for i in range(14) for j in range(10)), reverse=True)
        assert float(got) == pytest.approx(1 - sum(values[:28]) / 28, abs=1e-6)


def test_enhancement_pulls_inside_its_region_only() -> None:
    maps = some(1, 16, 24).requires_grad_()
    (slope,) = torch.autograd.grad(enhancement(maps, REGION).sum(), maps)
    assert bool((slope[0][~REGION] == 0).all()) and bool((slope <= 0).all())
    assert int((slope < 0).sum()) == counted(REGION) == 28
    plain = maps.detach()
    assert float(enhancement(plain + 0.1 * REGION, REGION)) < float(enhancement(plain, REGION))


def test_filling_of_full_and_empty_maps() -> None:
    full = REGION.double()[None]
    assert float(filling(full, REGION)) == 0
    assert float(filling(torch.zeros_like(full), REGION)) == pytest.approx(10 / 24 + 14 / 16)
    one_row = torch.zeros_like(full)
    one_row[0, 5] = 1
    # Every column is touched, and one of the 14 rows.
    assert float(filling(one_row, REGION)) == pytest.approx(13 / 16)
    assert float(filling(torch.ones_like(full), REGION)) == 0  # what lies outside does not count


def test_leaking_of_identity_covered_and_random_maps() -> None:
    region = box(4, 4, 0, 0, 2, 4).flatten()
    assert float(leaking(torch.eye(16)[None], region)) == 0
    assert float(leaking(torch.ones(1, 16, 16), torch.ones(16, dtype=torch.bool))) == 0
    maps = some(2, 16, 16)
    for one, got in zip(maps, leaking(maps, region), strict=True):
        values = sorted((float(one[i, j]) for i in range(8) for j in range(8, 16)), reverse=True)
        assert float(got) == pytest.approx(values[0])
    wide = box(8, 8, 0, 0, 4, 8).flatten()
    every = some(1, 64, 64)
    values = sorted((float(every[0, i, j]) for i in range(32) for j in range(32, 64)), reverse=True)
    assert float(leaking(every, wide)) == pytest.approx(sum(values[:6]) / 6)


def test_the_weight_of_a_mask_is_that_of_its_box_inside_the_mask() -> None:
    mask = REGION.clone()
    mask[1:4, 3:6] = False
    whole, part = middle_weight(REGION), middle_weight(mask)
    assert torch.equal(part[mask], whole[mask]) and bool((part[~mask] == 0).all())
    assert float(whole.max()) == 1
    lonely = box(4, 4, 2, 2, 1, 1)
    assert float(middle_weight(lonely)[2, 2]) == 1


def test_the_best_window_is_the_largest_sum() -> None:
    attention = some(8, 12)
    got = best_window(attention, 3, 5)
    sums = {(i, j): float(attention[i : i + 3, j : j + 5].sum()) for i in range(6) for j in range(8)}
    assert (got.top, got.left) == max(sums, key=lambda place: sums[place])
    assert best_window(torch.ones(8, 12), 3, 5) == Window(0, 0, 3, 5)


def test_moved_noise_keeps_mean_and_deviation_and_holds_one_window_per_box() -> None:
    noise = torch.randn(4, 16, 24, generator=torch.Generator().manual_seed(0))
    regions = [box(8, 12, 0, 0, 4, 4), box(8, 12, 4, 6, 3, 5)]
    maps = [some(8, 12, seed=1), some(8, 12, seed=2)]
    got, windows = moved(noise, maps, regions, 2)
    assert windows == [best_window(maps[0], 4, 4), best_window(maps[1], 3, 5)]
    assert float(got.mean()) == pytest.approx(float(noise.mean()), abs=1e-6)
    assert float(got.std()) == pytest.approx(float(noise.std()), abs=1e-6)
    for region, window in zip(regions, windows, strict=True):
        rows, columns = window_around(region).scaled(2)
        there, source = got[:, rows, columns].flatten(), noise[:, window.scaled(2)[0], window.scaled(2)[1]].flatten()
        slope = float((there[1] - there[0]) / (source[1] - source[0]))
        assert torch.allclose(there, slope * source + (there[0] - slope * source[0]), atol=1e-4)
    again, _ = moved(noise, maps, regions, 2)
    assert torch.equal(got, again)


def test_noise_that_is_best_where_it_is_stays() -> None:
    noise = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0))
    region = box(4, 4, 1, 2, 2, 2)
    got, _ = moved(noise, [region.float()], [region], 2)
    assert torch.equal(got, noise)


def test_overlapping_boxes_do_not_chain_and_their_order_does_not_matter() -> None:
    noise = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0))
    regions = [box(8, 8, 0, 0, 6, 6), box(8, 8, 2, 2, 3, 3)]
    maps = [box(8, 8, 2, 2, 6, 6).double(), box(8, 8, 0, 0, 3, 3).double()]
    got, _ = moved(noise, maps, regions, 2)
    turned, _ = moved(noise, maps[::-1], regions[::-1], 2)
    assert torch.equal(got, turned)
    # The small box, on top, holds the corner of the noise as it was, not as the large box left it.
    small, corner = got[:, 4:10, 4:10].flatten(), noise[:, :6, :6].flatten()
    assert float(torch.corrcoef(torch.stack([small, corner]))[0, 1]) == pytest.approx(1, abs=1e-5)
