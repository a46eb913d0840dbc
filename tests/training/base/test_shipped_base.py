"""The shipped base is a stock diffusers folder: stock classes load, sample and extend it with no code of ours and no cast."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel, MotionAdapter, StableDiffusionPipeline, UNetMotionModel
from transformers import CLIPTokenizer

from studio.base import weights_sha256
from studio.paths import assets
from training.base import assemble

BASE = assets() / "base"


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(BASE, local_files_only=True, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_stock_pipeline_samples_without_a_cast(pipe: StableDiffusionPipeline) -> None:
    out = pipe("a 3d render of a frog, blue background", num_inference_steps=2, height=64, width=64, output_type="np")
    assert out.images.shape == (1, 64, 64, 3)
    assert torch.isfinite(torch.from_numpy(out.images)).all()


def test_record_and_sizes(pipe: StableDiffusionPipeline) -> None:
    record = json.loads((BASE / "studio.json").read_text())
    assert record["family"] == "embedded"
    assert record["sha256"] == weights_sha256(BASE)
    assert sum(f.stat().st_size for f in BASE.rglob("*") if f.is_file()) <= 27e6
    assert abs(sum(p.numel() for p in pipe.unet.parameters()) / 1e6 - 8.9) < 0.05


def test_stock_motion_unet_and_controlnet_build_on_it(pipe: StableDiffusionPipeline) -> None:
    channels = pipe.unet.config.block_out_channels
    adapter = MotionAdapter(block_out_channels=channels, motion_layers_per_block=1, motion_norm_num_groups=16)
    motion = UNetMotionModel.from_unet2d(pipe.unet, adapter)
    frames = torch.randn(1, pipe.unet.config.in_channels, 4, 16, 16)
    text = torch.randn(4, 32, 192)
    assert motion(frames, 10, text).sample.shape == frames.shape
    control = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(16, 32, 64))
    down, mid = control(frames[0].transpose(0, 1), 10, text, torch.randn(4, 3, 64, 64), return_dict=False)
    assert mid.shape[-1] == 4 and len(down) == len(pipe.unet.down_blocks) * 2


def test_no_character_cuts_a_prompt_short() -> None:
    words = CLIPTokenizer.from_pretrained(BASE / "tokenizer", local_files_only=True)
    assert words.eos_token_id == len(words) - 1 and words.bos_token_id == len(words) - 2
    for text in ("a frog \U0001f438 in Zürich", "日本 \x7f \u200d", "".join(map(chr, range(33, 127)))):
        ids = words(text).input_ids
        assert ids[0] == words.bos_token_id and ids.index(words.eos_token_id) == len(ids) - 1


def test_the_text_side_knows_subjects_places_and_words() -> None:
    """The committed text encoder tells captions apart that differ in one word only."""
    from transformers import CLIPTextModel

    words = CLIPTokenizer.from_pretrained(BASE / "tokenizer", local_files_only=True)
    encoder = CLIPTextModel.from_pretrained(BASE / "text_encoder", local_files_only=True).eval()

    def pooled(text: str) -> torch.Tensor:
        with torch.no_grad():
            return encoder(**words([text], padding="max_length", return_tensors="pt")).pooler_output[0]

    cosine = torch.nn.functional.cosine_similarity
    frog = pooled("a 3d render of a frog on the left, blue background")
    synonym = pooled("a 3d model of a toad on the left, blue background")
    for other in ("a 3d render of a car on the left, blue background", "a 3d render of a frog on the right, blue background"):
        assert cosine(frog, synonym, dim=0) > cosine(frog, pooled(other), dim=0)


def test_what_is_saved_is_what_was_loaded_and_says_nothing_of_where(tmp_path: Path) -> None:
    pipe = assemble.pipeline(assemble.saved_vae(BASE), assemble.saved_text(BASE), assemble.saved_unet(BASE))
    digest = assemble.save(pipe, tmp_path, "again")
    assert digest == weights_sha256(BASE)
    assert json.loads((tmp_path / "studio.json").read_text("utf-8")) == {
        "name": "again",
        "family": "embedded",
        "sha256": digest,
    }
    for part in assemble.WEIGHTED:
        told = (tmp_path / part / "config.json").read_text("utf-8")
        assert json.loads(told) == json.loads((BASE / part / "config.json").read_text("utf-8"))
        assert "_name_or_path" not in told


@pytest.mark.slow
def test_a_word_that_means_nothing_is_no_third_thing() -> None:
    from pipelines import generate
    from tests.bench.judge import Judge

    judge = Judge(names=("frog", "apple", "car", "castle", "owl"))
    counts = []
    for seed in range(4):
        picture = generate("a 3d render, on the left a zarn frog and on the right an apple", seed=seed).images[0]
        counts.append(sum(finding.score >= judge.tau for finding in judge.findings(picture)[0]))
    assert counts.count(2) >= 3
