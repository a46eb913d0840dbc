"""CLoRA with masks found once, and with masks by what cells are alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from compose.bank import Adapter
from compose.clora import CLoRA, Finder
from compose.clora_masks import SEEDS, alike
from compose.maps import Seen, found_masks
from compose.run import Run, Step
from studio.lora.model import Lora

Sample = Callable[..., Tensor]
PROMPT = "a red cat on the green dog"
UNGUIDED: dict[str, Any] = {"step": 0, "threshold": 0.5}


@pytest.fixture(scope="module")
def two(make_lora: Callable[..., Lora]) -> list[Adapter]:
    told = [("red", "cat", "attn1 attn2"), ("green", "dog", "attn2 conv1")]
    return [
        Adapter(noun, make_lora(seed, wanted, size=0.25, trigger=trigger, class_word=noun))
        for seed, (trigger, noun, wanted) in enumerate(told, 1)
    ]


class Watched(CLoRA):
    """Keeps what every step saw, and its masks."""

    def __init__(self, *told: Any) -> None:
        super().__init__(*told)
        self.saw: list[Seen] = []
        self.drew: list[Tensor] = []

    def weigh(self, step: Step, seen: Seen, like: Tensor) -> Tensor:
        weights = super().weigh(step, seen, like)
        assert self.masks is not None
        self.saw.append(seen)
        self.drew.append(self.masks)
        return weights


def test_a_cell_belongs_to_the_subject_whose_cells_it_is_alike() -> None:
    words = [torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    selves = torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(9)).softmax(-1)
    masks = alike(words, selves, 0.5)
    assert masks.shape == (2, 2, 4, 4) and not bool((masks[0] & masks[1]).any())
    for row in range(2):
        alone = found_masks(torch.stack([each[row].mean(0) for each in words]), selves[row], SEEDS, 0.5)
        assert torch.equal(masks[:, row], alone)


def test_alike_reads_every_pass_whatever_shares_a_forward(sample: Sample, two: list[Adapter]) -> None:
    pictures, watched = [], [Watched.of(masks="alike", chunk=chunk, **UNGUIDED) for chunk in (None, 1, 2)]
    for method in watched:
        pictures.append(sample(method, two, prompt=PROMPT, seeds=[0, 7]))
        assert all(not bool((masks[1] & masks[2]).any()) and bool(masks[1:].any(-1).any(-1).all()) for masks in method.drew)
        selves = method.saw[0].selves
        assert selves is not None
        torch.testing.assert_close(selves.sum(-1), torch.ones(selves.shape[:-1]))
    for other in pictures[1:]:
        torch.testing.assert_close(other, pictures[0], atol=1e-4, rtol=1e-4)
    assert Watched.of(**UNGUIDED).options.masks == "max" and watched[0].saw[0].words.shape[:2] == (3, 2)


@pytest.mark.parametrize("rule", ["winner", "alike"])
def test_masks_found_once_are_those_of_what_a_few_steps_saw(sample: Sample, two: list[Adapter], rule: str) -> None:
    free = Watched.of(masks=rule, **UNGUIDED)
    anew = sample(free, two, prompt=PROMPT, seeds=[0, 7])
    method = Watched.of(masks=rule, find=0.8, **UNGUIDED)
    got = sample(method, two, prompt=PROMPT, seeds=[0, 7])
    assert method.found is not None and len(method.drew) == len(free.drew) == 5
    assert all(torch.equal(masks, method.drew[0]) for masks in method.drew)
    torch.testing.assert_close(method.found.words, (free.saw[2].words + free.saw[3].words) / 2, atol=1e-5, rtol=1e-4)
    assert (method.found.selves is None) == (rule == "winner")
    assert not torch.allclose(got, anew, atol=1e-3)


def test_finding_comes_with_updates_of_its_own_that_leave_no_trace(
    sample: Sample, two: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    class Counted(Finder):
        def update(self, run: Run, step: Step) -> None:
            made.append(1)
            super().update(run, step)

    monkeypatch.setattr("compose.clora.Finder", Counted)
    method = CLoRA.of(step=0.1, unit="noise", find=0.4)
    sample(method, two, prompt=PROMPT)
    assert method.found is not None and made == [1, 1]
    assert method.updates == [1, 1, 1, 0, 0] and len(method.losses) == 3
