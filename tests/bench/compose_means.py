"""What a run of the composition bench is made with, and what its pictures cost."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import sha256
from pathlib import Path

from PIL import Image

from studio.art.scenes import Scene, render
from studio.requests import GenerateRequest
from tests.bench.combinations import Case
from tests.bench.compose_judge import Seen, make_judge, seen
from tests.bench.compose_loras import check
from tests.bench.compose_rows import Count, Row, counted, equivalents
from tests.bench.judge import Judge, vae_roundtrip


@dataclass(frozen=True)
class Drawn:
    """A picture, the seconds it took (0: drawn, not generated), and what the product had to say."""

    image: Image.Image
    seconds: float = 0.0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Means:
    """What a run is made with; tests put their own in.

    Args:
        base: name or folder. base_sha256: of its weights. steps: of its family.
        loras: hashes of the LoRA files, by name.
        draw: makes a request. truth: the art's own picture. look: judges one. count: floating-point operations of a request.
    """

    base: str
    base_sha256: str
    steps: int
    loras: Mapping[str, str]
    draw: Callable[[GenerateRequest], Drawn]
    truth: Callable[[Scene], Drawn]
    look: Callable[[Image.Image, Case, Sequence[str]], list[Seen]]
    count: Count


class Costs:
    """Forwards per picture by LoRAs, row and K, counted on the first such combination, and kept in a file."""

    def __init__(self, file: Path, means: Means) -> None:
        self.file, self.means = file, means
        self.known: dict[str, float] = json.loads(file.read_text("utf-8")) if file.is_file() else {}

    @cached_property
    def loras(self) -> str:
        """Which LoRAs these are: larger ones cost more."""
        return sha256(json.dumps(self.means.loras, sort_keys=True).encode()).hexdigest()[:12]

    def of(self, row: Row, case: Case, request: GenerateRequest) -> float:
        if row.source == "truth":
            return 0.0
        count = len(request.loras)
        what = f"{row.method} {sorted(row.options.items())} K={count} boxes={row.boxes and len(case.boxes)} {request.steps}"
        key = f"{self.loras} {what}" if count else what
        if key not in self.known:
            self.known[key] = equivalents(self.means.count, request)
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(json.dumps(self.known, indent=1), "utf-8")
        return self.known[key]


def real_means(base_name: str, folder: Path, only: Sequence[str], cache: Path, judging: bool = True) -> Means:
    """The product, the judge and the LoRAs of ``folder``.

    Raises:
        RequestError: LoRAs are missing there, or are of another base.
    """
    import torch

    from pipelines import generate
    from studio.base import load_base
    from studio.lora.files import file_sha256

    base = load_base(base_name, device="cpu")
    check(folder, base.sha256, only)
    roundtrip = vae_roundtrip(base.vae)

    @lru_cache(maxsize=1)
    def judge() -> Judge:
        return make_judge(roundtrip, cache)

    def draw(request: GenerateRequest) -> Drawn:
        result = generate(request, progress=False, lora_dirs=[folder], device="cpu")
        return Drawn(result.images[0], result.seconds, tuple(result.notes))

    def truth(scene: Scene) -> Drawn:
        pixels = torch.from_numpy(render(scene).image.copy()).float().permute(2, 0, 1)[None] / 255
        back = (roundtrip(pixels)[0].permute(1, 2, 0) * 255).round().byte().numpy()
        return Drawn(Image.fromarray(back))

    def count(request: GenerateRequest) -> int:
        with counted() as total:
            draw(request)
            return total()

    if judging:
        judge()
    return Means(
        base=base_name,
        base_sha256=base.sha256,
        steps=base.family.steps,
        loras={name: file_sha256(folder / f"{name}.safetensors") for name in only},
        draw=draw,
        truth=truth,
        look=lambda image, case, things: seen(judge(), image, case, things),
        count=count,
    )


def profile(base_name: str, folder: Path, only: Sequence[str]) -> None:
    """Measure the LoRAs' Fourier profiles, so that no picture's time holds one."""
    from compose.bank import Adapter, LoraBank
    from compose.profile import profiled
    from studio.base import load_base
    from studio.lora.files import load_lora

    base = load_base(base_name, device="cpu")
    for name in only:
        with LoraBank.on(base, [Adapter(name, load_lora(folder / f"{name}.safetensors"))]) as bank:
            profiled(base, bank, 0)
