"""What a concept LoRA minimises: the denoising loss on its pictures, and a term against forgetting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compose.text import added_conditions
from training.adapters import Adapters
from training.batches import Batch, Captions
from training.losses import add_noise, huber_widths, min_snr_weights, target, weighted_huber, weighted_mse
from training.text import Reader, moved

if TYPE_CHECKING:
    from compose.text import Encoded
    from studio.base import Base
    from training.config import ConceptConfig


class Objective(nn.Module):
    """The module that accelerate wraps, so that gradients of several processes meet; ``forward`` gives a micro-batch's losses.

    The denoising loss is ``w(t) |eps_lora(x_t, t, c) - target|^2`` with min-SNR weights ``w``, within masks if there are any.
    The prior adds ``prior_weight`` times the same loss on pictures of the class (DreamBooth, Ruiz et al., 2023, eq. 2), or
    without pictures ``w(t) |eps_lora(x_t, t, c') - eps_base(x_t, t, c')|^2`` on class and everyday prompts c' (BA-LoRA's
    consistency term, in noise space). With another ``loss`` both squares are that (:func:`~training.losses.weighted_huber`).
    """

    def __init__(self, base: Base, adapters: Adapters, captions: Captions, config: ConceptConfig, device: torch.device) -> None:
        super().__init__()
        self.unet = base.unet
        self.encoders = nn.ModuleList(m for key, m in base.models().items() if key != "unet" and config.train_text != "none")
        self.vectors = nn.ParameterList(adapters.word.vectors.values() if adapters.word else ())
        learnt = [adapters.word.embedding] if adapters.word else ()
        self._reader = Reader(base, learnt, captions.clip_skip, captions.chunks)
        self._base, self._adapters, self._captions, self._config = base, adapters, captions, config
        self._device = device
        self._abar: Tensor = base.scheduler.alphas_cumprod.to(device)
        self._kind = str(base.scheduler.config["prediction_type"])

    def forward(self, batch: Batch, prior: Batch | None = None, prompts: Sequence[int] = ()) -> Mapping[str, Tensor]:
        """``loss`` to minimise, and its parts ``denoising`` and ``prior`` for the log.

        Args:
            batch: rows of the concept.
            prior: rows of class pictures.
            prompts: caption numbers for consistency, one for each of the first rows of ``batch``. No tensor: among several
                processes that would be brought to the card, where those of ``batch``, inside a dataclass, are not.
        """
        losses = {"denoising": self._denoising(batch)} if not prompts else self._held(batch, torch.tensor(prompts))
        if prior is not None:
            losses["prior"] = self._denoising(prior)
        total = losses["denoising"] + self._config.prior_weight * losses["prior"] if "prior" in losses else losses["denoising"]
        for rows in self.vectors:  # a batch in which nothing calls the word has a gradient too: zero
            total = total + 0 * rows.sum()
        return {"loss": total} | losses

    def _denoising(self, batch: Batch) -> Tensor:
        noised, t = self._noised(batch)
        return self._from_target(batch, self._predict(noised, t, self._text(batch.captions)), t)

    def _held(self, batch: Batch, prompts: Tensor) -> dict[str, Tensor]:
        """The denoising loss, and the distance from the base on ``prompts``, of one forward: cheaper than one for each."""
        noised, t = self._noised(batch)
        some, few = noised[: len(prompts)], t[: len(prompts)]
        with torch.no_grad(), self._adapters.absent():
            teacher = self._predict(some, few, self._captions.states(prompts))
        text = self._text(torch.cat([batch.captions, prompts]))
        said, held = self._predict(torch.cat([noised, some]), torch.cat([t, few]), text).split([len(t), len(few)])
        return {"denoising": self._from_target(batch, said, t), "prior": self._distance(held, teacher, few)}

    def _noised(self, batch: Batch) -> tuple[Tensor, Tensor]:
        latents, noise, t = (value.to(self._device) for value in (batch.latents, batch.noise, batch.t))
        return add_noise(latents, noise, t, self._abar), t

    def _from_target(self, batch: Batch, said: Tensor, t: Tensor) -> Tensor:
        latents, noise = batch.latents.to(self._device), batch.noise.to(self._device)
        masks = None if batch.masks is None else batch.masks.to(self._device)
        return self._distance(said, target(self._kind, latents, noise, t, self._abar), t, masks)

    def _distance(self, said: Tensor, wanted: Tensor, t: Tensor, masks: Tensor | None = None) -> Tensor:
        config = self._config
        weights = min_snr_weights(t, self._abar, config.min_snr, self._kind)
        if config.loss == "l2":
            return weighted_mse(said, wanted, weights, masks)
        widths = huber_widths(t, self._abar, config.huber_c, config.huber_schedule)
        return weighted_huber(said, wanted, weights, widths, masks, smooth=config.loss == "smooth_l1")

    def _text(self, numbers: Tensor) -> Encoded:
        if self._config.train_text == "none":
            return self._captions.states(numbers)
        return self._reader.read(self._captions.called(numbers))

    def _predict(self, noised: Tensor, t: Tensor, text: Encoded) -> Tensor:
        kind = self.unet.dtype
        words = moved(text, self._device, kind)
        height, width = (side * self._base.latent_factor for side in noised.shape[-2:])
        added = added_conditions(self._base, words, (width, height))
        unet: Any = self.unet
        predicted: Tensor = unet(noised.to(kind), t, words.states, added_cond_kwargs=added).sample
        return predicted
