"""Regions on the grids of layers, and the groups of queries that see the same of them."""

from __future__ import annotations

import pytest
import torch

from compose.plan import AttentionPlan, KeyFrames, Regions, Role, Tap, Where, groups


def test_regions_never_vanish_and_round_as_published() -> None:
    # A box of 61..512 x 0..160 pixels (y, x) in 512 x 1024: rows 8..64 and columns 0..20 of the latent's 64 x 128.
    box = Regions(((0.0, 61 / 512, 160 / 1024, 1.0),))
    for height, width, rows, cols in ((64, 128, (8, 64), (0, 20)), (32, 64, (4, 32), (0, 10)), (16, 32, (2, 16), (0, 5)),
                                      (8, 16, (1, 8), (0, 2))):  # fmt: skip
        expected = torch.zeros(height, width, dtype=torch.bool)
        expected[rows[0] : rows[1], cols[0] : cols[1]] = True
        assert torch.equal(box.at(height, width)[0].view(height, width), expected)
    tiny = Regions(((0.51, 0.01, 0.55, 0.02), (0.9999, 0.9999, 1.0, 1.0)))
    assert tiny.at(4, 4).sum(1).tolist() == [1, 1]
    assert tiny.at(4, 4)[0, 2]
    assert tiny.at(4, 4)[1, 15]
    mask = torch.zeros(2, 8, 8)
    mask[0, 1, 6] = mask[1, :4, :4] = 1
    assert Regions(mask).at(2, 2).tolist() == [[False, True, False, False], [True, False, False, False]]
    assert Regions(mask[1:]).at(16, 16).sum() == 64


def test_groups_partition_the_queries() -> None:
    found = groups(Regions(((0.0, 0.0, 0.4, 1.0), (0.5, 0.25, 1.0, 1.0))).at(8, 12))
    assert sorted(torch.cat([queries for queries, _ in found]).tolist()) == list(range(96))
    assert len(found) == 3


@pytest.mark.parametrize("role", [Role.TEMPORAL, Role.CROSS])
def test_key_frames_are_of_self_attention(role: Role) -> None:
    with pytest.raises(ValueError, match=f"not in layers of the role '{role}'"):
        KeyFrames(where=Where(role=role))


def test_no_tap_reads_what_looks_at_key_frames() -> None:
    looking, saying = (Tap(name="t", where=Where(role=role)) for role in (Role.SELF, Role.CROSS))
    with pytest.raises(ValueError, match="their tokens have no places"):
        AttentionPlan(key_frames=KeyFrames(), taps=(saying, looking))
    assert AttentionPlan(key_frames=KeyFrames(), taps=(saying,)).taps == (saying,)
