"""Attention maps made ready to be compared, against their formulas."""

from __future__ import annotations

import pytest
import torch

from compose.attention import Map
from compose.maps import mean_map, mean_values, smoothed, smoothing_kernel


def test_smoothing_has_the_published_weights_and_mirrors_edges() -> None:
    assert smoothing_kernel().sum(0).tolist() == pytest.approx([0.2119, 0.5761, 0.2119], abs=1e-4)
    maps = torch.rand(2, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    got = smoothed(maps)
    assert got[1, 2, 2, 3] == pytest.approx(float((maps[1, 2, 1:4, 2:5] * smoothing_kernel()).sum()), abs=1e-6)
    torch.testing.assert_close(smoothed(maps[0]), got[0])
    flat = torch.full((1, 5, 4), 0.3)
    torch.testing.assert_close(smoothed(flat), flat)
    one = torch.zeros(1, 3, 3)
    one[0, 1, 1] = 1
    # The centre is seen twice by its neighbours beyond the edge.
    assert float(smoothed(one)[0, 0, 1]) == pytest.approx(0.5761 * 2 * 0.2119, abs=1e-3)


def test_the_mean_is_over_layers_and_a_picture_is_its_values_in_rows() -> None:
    first, second = (torch.rand(2, 12, 3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    maps = [Map("a", first, (3, 4)), Map("b", second, (3, 4))]
    torch.testing.assert_close(mean_values(maps), (first + second) / 2)
    assert mean_map(maps)[1, 2, 2, 1] == pytest.approx(float(first[1, 9, 2] + second[1, 9, 2]) / 2)
