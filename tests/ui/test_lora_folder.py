"""A folder as people have it: thirty-odd files of many trainers, families and states of health, judged in one table."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from studio.base import load_base
from studio.lora.files import load_lora, module_shapes
from studio.lora.write import save_lora
from studio.paths import assets
from tests.studio.lora_dumps import kohya, motion
from ui import cli, console

pytestmark = pytest.mark.usefixtures("no_network")
SHIPPED = assets() / "loras" / "pastel.safetensors"
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
FLAT = f"lora_unet_{ATTENTION.replace('.', '_')}_to_q"
Files = dict[str, tuple[dict[str, Tensor], dict[str, str] | None]]


def pair(out: int, into: int, names: tuple[str, str], rank: int = 2) -> dict[str, Tensor]:
    return {names[0]: torch.randn(rank, into), names[1]: torch.randn(out, rank)}


def renamed(pattern: tuple[str, str]) -> dict[str, Tensor]:
    """The shipped LoRA with the start of its names exchanged."""
    return {key.replace(*pattern, 1): tensor for key, tensor in load_file(SHIPPED).items()}


def that_fit() -> Files:
    """Adapters of every format for the embedded base, whose first attention is 64 wide."""
    shipped = {key.removeprefix("unet."): tensor for key, tensor in load_file(SHIPPED).items()}
    down, up = (f"unet.{ATTENTION}.processor.to_q_lora.{side}.weight" for side in ("down", "up"))
    plain = pair(64, 64, (f"{FLAT}.lora_down.weight", f"{FLAT}.lora_up.weight"))
    text = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    hadamard = {f"{FLAT}.hada_w{n}_{side}": torch.randn(64, 2).T if side == "b" else torch.randn(64, 2)
                for n in (1, 2) for side in "ab"}  # fmt: skip
    return {
        "peft.safetensors": ({f"base_model.model.{key}": tensor for key, tensor in shipped.items()}, None),
        "bare paths.safetensors": (shipped, None),
        "comfy.safetensors": (renamed(("unet.", "diffusion_model.")), None),
        "old diffusers.safetensors": (pair(64, 64, (down, up)), None),
        "sub/kohya, no alpha.safetensors": (plain, {"ss_network_module": "networks.lora"}),
        "sub/half 犬.safetensors": ({key: tensor.half() for key, tensor in plain.items()}, None),
        "one trainer.safetensors": ({**plain, f"{FLAT}.alpha": torch.tensor(1.0)}, {"ot_revision": "abc"}),
        "text.safetensors": (pair(192, 192, (f"{text}.lora_down.weight", f"{text}.lora_up.weight")), None),
        "dora.safetensors": ({**plain, f"{FLAT}.dora_scale": torch.rand(64, 1)}, None),
        "dora peft.safetensors": (
            {**pair(64, 64, (f"unet.{ATTENTION}.to_q.lora_A.weight", f"unet.{ATTENTION}.to_q.lora_B.weight")),
             f"unet.{ATTENTION}.to_q.lora_magnitude_vector": torch.rand(64)},
            None,
        ),
        "loha.safetensors": ({key: tensor.contiguous() for key, tensor in hadamard.items()}, None),
        "lokr.safetensors": ({f"{FLAT}.lokr_w1": torch.randn(4, 4), f"{FLAT}.lokr_w2": torch.randn(16, 16)}, None),
        "lycoris.safetensors": ({key.replace("lora_unet_", "lycoris_"): tensor for key, tensor in plain.items()}, None),
    }  # fmt: skip


def that_do_not() -> tuple[Files, dict[str, str]]:
    """Sound safetensors files that are no LoRA for this base, and what should be said."""
    down, up = f"{FLAT}.lora_down.weight", f"{FLAT}.lora_up.weight"
    plain = pair(64, 64, (down, up))
    wide = f"lora_unet_{ATTENTION.replace('.', '_')}".replace("attn1", "attn2") + "_to_k"
    xl = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    flux = "transformer.single_transformer_blocks.0.attn.to_q"
    thin = torch.zeros(2, 8)
    told: dict[str, tuple[Mapping[str, Tensor], dict[str, str] | None, str]] = {
        "sd15.safetensors": (pair(320, 768, (f"{wide}.lora_down.weight", f"{wide}.lora_up.weight")), None, "is for sd15"),
        "sdxl.safetensors": (pair(640, 2048, (f"{xl}.lora_down.weight", f"{xl}.lora_up.weight")), None, "is for sdxl"),
        "sd2.safetensors": (pair(320, 1024, (f"{wide}.lora_down.weight", f"{wide}.lora_up.weight")), None, "is for sd2"),
        "motion.safetensors": (motion().tensors, None, "is for animatediff-motion, not for embedded"),
        "flux.safetensors": (
            pair(8, 8, (f"{flux}.lora_A.weight", f"{flux}.lora_B.weight")), None, "is for a transformer such as FLUX",
        ),
        "flux kohya.safetensors": ({"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": thin}, None, "FLUX or SD3"),
        "wan.safetensors": ({"diffusion_model.blocks.0.self_attn.q.lora_A.weight": thin}, None, "Wan, Qwen-Image"),
        "other shape.safetensors": (pair(64, 72, (down, up)), None, "does not fit: 0 of 1 layers matched"),
        "other layers.safetensors": (kohya().tensors, None, "does not fit"),
        "nan.safetensors": ({**plain, up: plain[up] * float("nan")}, None, "holds NaN or infinity"),
        "inf.safetensors": ({**plain, down: plain[down] / 0}, None, "holds NaN or infinity"),
        "wrong up.safetensors": ({**plain, up: torch.randn(64, 3)}, None, "an 'up' that does not fit its 'down'"),
        "half a layer.safetensors": ({down: plain[down]}, None, "lacks up"),
        "rank.safetensors": (pair(64, 64, (down, up), rank=1025), None, "rank 1025, more than the 1024"),
        "path.safetensors": (plain, {"ss_output_name": "../../.bashrc"}, "is a path"),
        "ia3.safetensors": ({f"{FLAT}.on_input": thin}, None, "is an IA3 adapter"),
        "full.safetensors": ({f"{FLAT}.diff": thin}, None, "whole weight differences"),
        "word.safetensors": ({"emb_params": thin}, None, "use it with --embedding"),
        "checkpoint.safetensors": ({"model.diffusion_model.out.2.bias": thin}, None, "use it as --base"),
    }  # fmt: skip
    return {name: (dict(tensors), meta) for name, (tensors, meta, _) in told.items()}, {n: why for n, (*_, why) in told.items()}


def damage(folder: Path) -> dict[str, str]:
    """Files that no safetensors library would open, and what should be said."""
    sound = SHIPPED.read_bytes()
    overlapping = {f"{FLAT}.{side}.weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for side in ("a", "b")}
    header = json.dumps(overlapping).encode()
    raw = {
        "cut.safetensors": (sound[:-100], "is cut short"),
        "empty.safetensors": (b"", "is not a safetensors file"),
        "page.safetensors": (b"<!DOCTYPE html><html>404</html>", "is not a safetensors file"),
        "huge header.safetensors": ((2**40).to_bytes(8, "little") + b'{"a":1}', "claims a header"),
        "bomb.safetensors": ((2 * 10**6).to_bytes(8, "little") + b'{"a":' + b"[" * (2 * 10**6 - 5), "is damaged"),
        "overlap.safetensors": (len(header).to_bytes(8, "little") + header + bytes(8), "overlap"),
    }
    for name, (content, _) in raw.items():
        (folder / name).write_bytes(content)
    torch.save({"a": torch.ones(1)}, folder / "old.pt")
    torch.save({"a": torch.ones(1)}, folder / "in disguise.safetensors")
    with zipfile.ZipFile(folder / "zip.ckpt", "w") as archive:
        archive.writestr("data.pkl", "x" * 600)
    (folder / "circle.safetensors").symlink_to(folder / "circle.safetensors")
    pickles = dict.fromkeys(("old.pt", "in disguise.safetensors", "zip.ckpt"), "is a pickle")
    return {**{name: why for name, (_, why) in raw.items()}, **pickles, "circle.safetensors": "Too many levels"}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str], dict[str, str]]:
    """The folder, the names of what fits, and of all else a part of the verdict."""
    folder = tmp_path_factory.mktemp("mixed")
    torch.manual_seed(0)
    good = that_fit()
    bad, reasons = that_do_not()
    for name, (tensors, metadata) in {**good, **bad}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        save_file(tensors, folder / name, metadata)
    shutil.copy(SHIPPED, folder / "shipped.safetensors")
    save_lora(folder / "kohya.safetensors", load_lora(SHIPPED), "kohya")
    return folder, {*good, "shipped.safetensors", "kohya.safetensors"}, {**reasons, **damage(folder)}


def test_every_file_gets_the_right_verdict(
    mixed: tuple[Path, set[str], dict[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, good, reasons = mixed
    assert console.run(cli.app, ("lora", "check", str(folder), "--json")) == 0
    answer = json.loads(capsys.readouterr().out)
    rows: dict[str, dict[str, Any]] = {row["name"]: row for row in answer["rows"]}
    assert set(rows) == good | set(reasons)
    assert len(rows) > 40
    assert {name for name, row in rows.items() if row["fits"]} == good
    assert {rows[name]["verdict"] for name in good} == {"fits"}
    for name, reason in reasons.items():
        assert reason in rows[name]["verdict"], name
        assert rows[name]["verdict"].count("\n") == 0
    kinds = {
        "dora.safetensors": "dora",
        "dora peft.safetensors": "dora",
        "loha.safetensors": "loha",
        "lokr.safetensors": "lokr",
    }
    assert {name: rows[name]["kinds"] for name in kinds} == {name: [kind] for name, kind in kinds.items()}
    assert rows["text.safetensors"]["text_encoder"]
    assert rows["one trainer.safetensors"]["trainer"] == "OneTrainer"
    assert (rows["shipped.safetensors"]["triggers"], rows["shipped.safetensors"]["matched"]) == (["sopi"], 86)


def test_verdicts_are_what_loading_does(mixed: tuple[Path, set[str], dict[str, str]]) -> None:
    from compose.bank import Adapter, LoraBank
    from studio.errors import FileError

    folder, good, reasons = mixed
    base = load_base()
    for name in [*good, *reasons]:
        try:
            lora = load_lora(folder / name)
            with LoraBank(base.models(), [Adapter(name, lora)], family="embedded") as bank:
                assert bank.matched[name] == len(lora.layers)
            fits = True
        except FileError:
            fits = False
        assert fits == (name in good), name
    assert module_shapes(**base.models())["unet.conv_in"] == tuple(base.unet.conv_in.weight.shape)


@pytest.mark.parametrize("width", [80, 160])
def test_the_table_is_readable(
    mixed: tuple[Path, set[str], dict[str, str]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    width: int,
) -> None:
    folder, good, reasons = mixed
    monkeypatch.setenv("COLUMNS", str(width))
    assert console.run(cli.app, ("lora", "check", str(folder))) == 0
    printed = capsys.readouterr()
    assert all(len(line) <= width and (line + " ").isprintable() for line in printed.out.splitlines())
    if width > 100:
        assert "sdxl.safetensors" in printed.out and "is for sdxl, not for embedded" in printed.out
    assert f"{len(good)} of {len(good) + len(reasons)} LoRA files" in printed.err


def test_one_file_that_holds_nan_is_refused_too(
    mixed: tuple[Path, set[str], dict[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert console.run(cli.app, ("lora", "check", str(mixed[0] / "nan.safetensors"))) == 6
    assert "holds NaN or infinity" in capsys.readouterr().err


def test_a_file_name_cannot_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "\x1b[31mred\u202e.safetensors"
    file.write_bytes(b"x")
    assert console.run(cli.app, ("lora", "show", str(file))) == 6
    printed = capsys.readouterr()
    assert (printed.out + printed.err).replace("\n", "").isprintable()
