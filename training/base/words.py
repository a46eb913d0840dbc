"""What words mean, distilled: 64 numbers a phrase from a sentence encoder, kept in ``assets/atlas/words.npz``.

``python -m training.base.words MODEL_DIR`` (all-MiniLM-L6-v2, Apache-2.0) makes the file once; the text side is then
trained from the atlas alone, and words of concepts whose pictures the base never saw still mean something to it.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import numpy as np

from studio.art.atlas import atlas_dir

WIDTH = 64


def phrases() -> list[str]:
    """Every name, label, synonym, keyword and class word of the atlas, lower case, sorted."""
    rows = json.loads((atlas_dir() / "concepts.json").read_text("utf-8"))["concepts"]
    found = {
        text.lower().replace("\u2019", "'").replace(" (2)", "")
        for row in rows
        for text in (row["name"], row["label"], row["class"], *row["tags"], *row["synonyms"])
    }
    return sorted(found)


def build(model: Path, out: Path) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    texts = phrases()
    tokenizer, encoder = (kind.from_pretrained(model, local_files_only=True) for kind in (AutoTokenizer, AutoModel))
    rows = []
    with torch.no_grad():
        for start in range(0, len(texts), 64):
            batch = tokenizer(texts[start : start + 64], padding=True, return_tensors="pt")
            mask = batch["attention_mask"][..., None]
            states = encoder(**batch).last_hidden_state
            rows.append(((states * mask).sum(1) / mask.sum(1)).numpy())
    vectors = np.concatenate(rows)
    vectors -= vectors.mean(0)
    _, _, directions = np.linalg.svd(vectors, full_matrices=False)
    short = vectors @ directions[:WIDTH].T
    short /= np.linalg.norm(short, axis=1, keepdims=True)
    np.savez_compressed(out, texts=np.array(texts), vectors=np.round(short * 127).astype(np.int8))


@lru_cache(maxsize=1)
def load() -> tuple[list[str], np.ndarray]:
    """``(phrases, vectors [n, 64] float32 of length 1)``."""
    with np.load(atlas_dir() / "words.npz") as data:
        vectors = data["vectors"].astype(np.float32)
        return [str(t) for t in data["texts"]], vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


if __name__ == "__main__":
    import typer

    def main(model: Path, out: Path = Path("assets/atlas/words.npz")) -> None:
        """Distil the sentence encoder in MODEL into OUT."""
        build(model, out)

    typer.run(main)
