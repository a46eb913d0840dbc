"""Regional passes: every region is denoised alone, with its own LoRAs and prompt, and the predictions are blended by place.

    e(z)[p] = sum_{n = 0..K} W_n[p] e_n(z)[p] / sum_n W_n[p],      W_0 = max(0, 1 - sum_{n > 0} W_n)

``e_n`` is the whole UNet with region n's LoRAs and prompt, ``e_0`` the picture's own prompt with the LoRAs that no region
names. Each ``W_n`` is 1 in region n, 0 outside, with a soft edge. This is the simple way (latent couple, area conditioning):
exact for any kind of LoRA, K + 1 passes a step, and nothing keeps a subject from being cut off at its edge.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from compose.figures import Boxes, Figure
from compose.figures import Maps as Pictures
from compose.options import Count
from compose.region_words import Said
from compose.regions import laid_out
from compose.run import Method, Options, Run, Step
from compose.separate import at_once, chunks, side_by_side


class RegionalOptions(Options):
    """Options of :class:`Regional`.

    Args:
        feather: width of the soft edges, as a share of the picture's shorter side; half of it lies inside the region.
        prompt: what a region without a prompt says. "local": its subject and what the prompt says about the whole picture;
            "placed": that in the prompt's own order, with an article and where it is; "arranged": that with the subjects of all
            regions, others by their class words; "whole": the prompt. By default "placed", on the embedded base "arranged".
        chunk: passes that share a forward; 1 needs least memory. By default as many as fit the base's batch.
    """

    feather: Annotated[float, Field(ge=0, le=0.5)] = 0.125
    prompt: Said | None = None
    chunk: Count | None = None


def blend_weights(covered: Tensor, feather: float) -> Tensor:
    """``W_0 .. W_K`` ``[K + 1, h, w]``, each 0..1 and together 1 everywhere.

    Args:
        covered: ``[K, h, w]``, true in each region.
        feather: width of the edges in cells; the edge of the picture is none.
    """
    regions = covered.float()
    reach = round(feather / 2)
    if reach > 0:
        padded = F.pad(regions[None], (reach, reach, reach, reach), mode="replicate")
        regions = F.avg_pool2d(padded, 2 * reach + 1, stride=1)[0]
    rest = (1 - regions.sum(0, keepdim=True)).clamp(min=0)
    weights = torch.cat([rest, regions])
    return weights / weights.sum(0)


class Regional(Method):
    """One pass per region and one for the background, blended."""

    takes: ClassVar[type[Options]] = RegionalOptions
    regions: ClassVar[Literal["none", "optional", "required"]] = "required"
    options: RegionalOptions

    def prepare(self, run: Run) -> None:
        self.layout = laid_out(run, self.options.prompt, least=1)
        height, width = run.latents.shape[-2:]
        covered = self.layout.regions.at(height, width).view(-1, height, width)
        self.weights = blend_weights(covered, self.options.feather * min(height, width)).to(run.latents)
        spots = self.layout.spots
        self.acting = [self.layout.everywhere, *(spot.weights for spot in spots)]
        self.told = [(run.negative, run.positive), *((spot.negative, spot.positive) for spot in spots)]

    def predict(self, run: Run, step: Step, x: Tensor) -> tuple[Tensor | None, Tensor]:
        uncond, cond = torch.zeros_like(x), torch.zeros_like(x)
        # A pass that shows nowhere need not be made.
        shown = [index for index, weight in enumerate(self.weights) if bool((weight > 0).any())]
        for some in self._alike(shown, at_once(run, self.options.chunk)):
            run.check_cancelled()
            u, v = side_by_side(run, x, step.timestep, [(self.acting[index], self.told[index]) for index in some])
            weight = self.weights[list(some)][:, None, None]
            cond += (v * weight).sum(0)
            if u is not None:
                uncond += (u * weight).sum(0)
        return (uncond if run.guided else None), cond

    def _alike(self, passes: Sequence[int], size: int) -> list[Sequence[int]]:
        """Runs of at most ``size`` passes whose prompts are equally long: only those fit in one forward."""
        found: list[Sequence[int]] = []
        for length in dict.fromkeys(self.told[index][1].states.shape[1] for index in passes):
            found += chunks([index for index in passes if self.told[index][1].states.shape[1] == length], size)
        return found

    def explain(self, run: Run) -> Sequence[Figure]:
        names = ["background", *self.layout.names]
        text = "How much of each pass is taken where."
        return [
            Boxes(title="Regions", boxes=dict(zip(self.layout.names, self.layout.boxes, strict=True))),
            Pictures(title="Shares", text=text, top=1.0, rows={n: [w.cpu()] for n, w in zip(names, self.weights, strict=True)}),
        ]
