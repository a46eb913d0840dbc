"""The bench of what guiding costs: the parts it counts, and the schedules it supposes."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from studio.base import load_base
from tests.bench.guided_cost import Parts, asked, bare, clora_must, composer_must, kept_for_backward, section

PARTS = Parts(whole=10.0, early=6.0, backward=7.0, once=100.0)


def test_what_methods_must_do_by_hand() -> None:
    # Three passes, four steps of two rows; two updates, each with two looks and one product in every pass.
    assert clora_must(PARTS, 2, 4, "two-pass") == 100 + 3 * (8 * 10 + 2 * (2 * 6 + 7))
    assert clora_must(PARTS, 2, 4, "joint") == 100 + 3 * (8 * 10 + 2 * (6 + 7))
    # One pass; one look for the noise, then at steps 0, 1 and 2 of 4 a look and a product.
    assert composer_must(PARTS, 4) == 100 + 8 * 10 + 6 + 3 * (6 + 7)


def test_a_bare_forward_ends_early_and_its_backward_pass_costs_about_as_much(tiny_base: Path) -> None:
    early, backward = bare(load_base(tiny_base))
    assert 0.2 < early < 1
    assert 0.5 < backward < 1.5


def test_a_forward_that_does_not_end_early_is_no_measurement(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.bench.guided_cost.stopping", lambda unet, module: nullcontext())
    with pytest.raises(RuntimeError, match=r"did not end after .*attn2"):
        bare(load_base(tiny_base))


def test_memory_counts_what_is_kept_at_once_and_no_weights(tiny_base: Path) -> None:
    base = load_base(tiny_base)
    x = torch.zeros(1000, requires_grad=True)
    assert kept_for_backward(base, lambda: (x * 2).exp()) == 4000
    assert kept_for_backward(base, lambda: ((x * 2).exp(), (x * 3).exp())) == 8000
    weight = next(base.unet.parameters())
    assert kept_for_backward(base, lambda: weight.detach() * weight.new_ones(()).requires_grad_()) == 0


def test_requests_have_regions_only_where_they_are_asked_for() -> None:
    assert asked(3, "lora-composer", 4, "embedded")["regions"][2].startswith("unicorn@")
    assert "regions" not in asked(2, "clora", 4, "embedded")


def test_the_section_says_what_is_missed() -> None:
    text = section([("a", 1.1, 2.0), ("b", 1.3, 2.0)], [("x, joint", [1, 2]), ("y, two-pass", [1 << 20, 2 << 20])], 20)
    assert "| a | 1.10 | <= 1.25 | holds | 2.0 |" in text
    assert "| b | 1.30 | <= 1.25 | **missed** | 2.0 |" in text
    assert "| x, joint | 0.00, 0.00 |  |  |" in text
    assert "| y, two-pass | 1.00, 2.00 | flat: <= 1.05 | **missed** |" in text
