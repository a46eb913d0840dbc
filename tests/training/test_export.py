"""What a finished file says of its training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from studio.base import Base
from studio.lora.files import read_header
from tests.training.conftest import Configure, draw
from training import train_concept
from training.export import metadata
from training.plan import prepare
from training.progress import Progress


def quiet(progress: Progress) -> None:
    pass


def test_metadata_says_where_it_comes_from(configure: Configure, base: Base) -> None:
    config = configure(steps=1, min_snr=None)
    metadata = read_header(train_concept(config, quiet).path).metadata
    assert metadata["studio.trigger"] == "zqx"
    assert metadata["studio.class_word"] == "apple"
    assert metadata["studio.base_sha256"] == base.sha256
    assert metadata["studio.family"] == "embedded"
    assert metadata["studio.kind"] == "concept"
    assert metadata["modelspec.trigger_phrase"] == "zqx apple"
    assert (metadata["ss_network_dim"], metadata["ss_steps"], metadata["ss_num_train_images"]) == ("2", "1", "5")
    assert json.loads(metadata["studio.config"])["learning_rate"] == config.learning_rate
    assert json.loads(metadata["ss_tag_frequency"])["pictures"] == {"a zqx apple on the left": 2, "a zqx apple on the right": 3}
    assert str(config.output.parent) not in json.dumps(metadata)


def test_metadata_says_the_rate_and_the_size_that_were_used(
    configure: Configure, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.optim.find_spec", lambda name: object())
    draw(pictures / "wide.png", size=(120, 70))
    for changes, rate in (({}, 5e-4), ({"text_learning_rate": 1e-5}, 1e-5), ({"optimizer": "prodigy"}, 1.0)):
        plan = prepare(configure(train_text="lora", **changes))
        assert float(metadata(plan, 1)["ss_text_encoder_lr"]) == rate
    assert set(plan.buckets) == {(80, 48), (64, 64)}
    assert metadata(plan, 1)["modelspec.resolution"] == "64x64" and metadata(plan, 1)["ss_resolution"] == "[64, 64]"
