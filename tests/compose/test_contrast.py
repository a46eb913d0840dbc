"""NT-Xent on maps: its formula, its fixed points, and what it must bear."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from compose.contrast import nt_xent
from compose.maps import min_max


def random_maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_contrast_is_its_formula() -> None:
    """Written out pair by pair; a second row does not matter to the first."""
    maps, classes = random_maps(2, 7, 20), [0, 0, 0, 1, 1, 2, 2]
    unit = maps / maps.norm(dim=-1, keepdim=True)
    for row in range(2):
        s = (unit[row] @ unit[row].T).tolist()
        terms = []
        for a in range(7):
            negatives = sum(math.exp(s[a][n] / 0.5) for n in range(7) if classes[n] != classes[a])
            for p in range(7):
                if p != a and classes[p] == classes[a]:
                    terms.append(-math.log(math.exp(s[a][p] / 0.5) / (math.exp(s[a][p] / 0.5) + negatives)))
        assert float(nt_xent(maps, classes)[row]) == pytest.approx(sum(terms) / len(terms), abs=1e-12)
    torch.testing.assert_close(nt_xent(maps[:1], classes), nt_xent(maps, classes)[:1])


def test_fixed_points_and_invariances_of_contrast() -> None:
    same = torch.ones(1, 4, 9)
    assert float(nt_xent(same, [0, 0, 1, 1])) == pytest.approx(math.log(3), abs=1e-6)
    ideal = torch.eye(9)[[0, 0, 4, 4]][None]
    assert float(nt_xent(ideal, [0, 0, 1, 1])) == pytest.approx(0.2395, abs=1e-4)
    maps = random_maps(1, 5, 12)
    value = nt_xent(maps, [0, 0, 1, 1, 1])
    torch.testing.assert_close(nt_xent(maps * torch.tensor([1.0, 3, 0.2, 9, 5]).view(1, 5, 1), [0, 0, 1, 1, 1]), value)
    torch.testing.assert_close(nt_xent(maps, [4, 4, 2, 2, 2]), value)
    torch.testing.assert_close(
        nt_xent(maps, [0, 0, 1, 1, 1], tau=1e6), torch.log(torch.tensor([1 + 2.4]).double()), rtol=0.1, atol=0
    )
    for classes in ([0, 0, 1], [0, 0, 0], [0, 1]):
        with pytest.raises(ValueError, match="two classes with two maps"):
            nt_xent(maps[:, : len(classes)], classes)


def test_min_max_takes_offsets_out_and_bears_a_constant_map() -> None:
    maps = random_maps(1, 2, 30) * 0.01 + 5
    before, after = (torch.nn.functional.cosine_similarity(m[0, 0], m[0, 1], dim=0) for m in (maps, min_max(maps)))
    assert before > 0.9999 and after < 0.9
    flat = torch.cat([maps, torch.full((1, 1, 30), 0.3, dtype=torch.float64), maps[:, :1]], dim=1).requires_grad_()
    value = nt_xent(min_max(flat), [0, 1, 1, 0])
    (gradient,) = torch.autograd.grad(value.sum(), flat)
    assert value.isfinite().all() and gradient.isfinite().all() and gradient.abs().max() > 0
