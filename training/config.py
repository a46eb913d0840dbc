"""What one concept training is: a typed, frozen, versioned configuration.

Nothing is guessed: an unknown key is an error that offers the near name, also when the key is another trainer's word for the
same thing.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from studio.errors import RequestError, UnknownNameError
from studio.paths import EMBEDDED
from studio.requests import place_of
from training.idle import idle
from training.names import FOREIGN_NAMES, SPELLINGS

SECTIONS = ("attn", "attn+ff", "image", "all")
"""Named sets of layers a LoRA can be attached to; anything else in ``targets`` is a regular expression."""
NEEDED = {
    "data": "the folder of pictures",
    "output": "the .safetensors file to write (--out)",
    "trigger": "the new word that calls the concept, such as 'zqx'",
}
"""The options without a default, for the sentence that asks for them."""
ALPHA: Final = "alpha"
"""The value of ``masks`` that stands for the pictures' own transparency."""
RANK_LIMIT = 512
"""Above this a LoRA is larger than what it adapts; a rank this high is a typing mistake."""
Rate = Annotated[float, Field(gt=0, le=10)]
Factor = Annotated[float, Field(ge=0, le=100)]
Share = Annotated[float, Field(ge=0, le=1)]
Setting = bool | int | float | str | tuple[float, ...] | None


class ConceptConfig(BaseModel):
    """Everything that decides a concept LoRA. Two equal configurations give the same file, bit for bit, on the CPU."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    version: Literal[1] = 1
    """Of this schema."""

    data: Path
    """Folder of pictures, captioned by ``.txt`` files of the same stem, or by ``metadata.jsonl`` or ``metadata.csv``."""
    output: Path
    """The ``.safetensors`` file to write; beside it ``<stem>.train/`` holds checkpoints while training."""
    base: str = EMBEDDED
    """Base model: a name, folder, single file or hub id, as for generating."""
    start_from: Path | None = None
    """A LoRA of this base, with the same layers and rank, that the learning starts from."""
    kind: Literal["concept", "style"] = "concept"
    """Recorded in the file; a style also has another caption template."""

    trigger: str
    """The new word. Captions hold it, or ``{trigger}`` in its place."""
    class_word: str = ""
    """What the thing is ("cat"); captions may hold ``{class_word}``."""
    caption: str = ""
    """For pictures without a caption; empty: "a {trigger} {class_word}", for a style "a picture in {trigger} style"."""
    insert_trigger: bool = True
    """Put the trigger into captions that lack it: before the class word, else in front."""

    rank: Annotated[int, Field(ge=1, le=RANK_LIMIT)] = 32
    alpha: Annotated[float, Field(gt=0)] | None = None
    """Strength is ``alpha / rank``; None: equal to the rank."""
    targets: str | tuple[str, ...] = "attn+ff"
    """``attn``, ``attn+ff``, ``image`` (self-attention, feed-forward and convolutions: nothing that reads the text), ``all``
    (every linear layer and convolution), or regular expressions over UNet module names. Left out: ``image`` for a style."""
    block_rates: dict[str, Factor] = Field(default_factory=dict)
    """Learning-rate factors by regular expression over UNet module names, first match wins; 0 leaves those layers out."""
    train_unet: bool = True
    """Off: only what ``train_text`` names is learnt; with ``embedding`` that is textual inversion, or P+ when layer-wise."""
    train_text: Literal["none", "embedding", "lora", "embedding+lora"] = "none"
    """What is learnt of the text: vectors in place of the trigger, a LoRA on the text encoder, or both (ED-LoRA)."""
    text_learning_rate: Rate | None = None
    """Of the text encoder's LoRA. None: half of ``learning_rate``."""
    tokens: Annotated[int, Field(ge=1, le=32)] = 2
    """Vectors that stand for the trigger when ``train_text`` holds ``embedding``."""
    layerwise: bool = True
    """Vectors of their own for every cross-attention layer (P+, ED-LoRA); off: the same for all (textual inversion)."""
    token_init: str = ""
    """Word or words that the last vector starts from; empty: the class word. The others start at random."""
    token_learning_rate: Rate | None = None
    """None: a thirteenth of the spread of the base's own word vectors, which is 1e-3 on Stable Diffusion 1.5."""
    token_norm: Annotated[float, Field(gt=1)] | None = 1.4
    """Vectors stop learning when their mean length is so many times that of the base's own words (ED-LoRA: .55 on SD 1.5)."""

    steps: Annotated[int, Field(ge=1, le=1_000_000)] = 500
    epochs: Annotated[int, Field(ge=1)] | None = None
    """When given, decides ``steps``: so many times through every picture times its repeats."""
    repeats: Annotated[int, Field(ge=1, le=10_000)] = 1
    batch: Annotated[int, Field(ge=1, le=1024)] = 8
    accumulation: Annotated[int, Field(ge=1, le=1024)] = 1
    learning_rate: Rate = 1e-3
    """Left out: 1e-3 on the embedded base (a style 2e-3), 1e-4 on larger ones, 1 for Prodigy."""
    schedule: Literal["constant", "cosine", "cosine_with_restarts", "linear", "polynomial"] = "cosine"
    warmup: Annotated[int, Field(ge=0)] = 20
    """Steps of linear warm-up."""
    cycles: Annotated[int, Field(ge=1, le=1000)] = 3
    """Falls of ``cosine_with_restarts``."""
    optimizer: Literal["adamw", "adamw8bit", "adafactor", "lion", "lion8bit", "prodigy", "sgd"] = "adamw"
    optimizer_args: dict[str, Setting] = Field(default_factory=dict)
    """Other arguments of the optimiser, by its own names: ``{betas: [0.9, 0.99]}``, for Prodigy ``{d_coef: 2}``."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.01
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest gradient norm; 0 switches clipping off."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    resolution: Annotated[int, Field(ge=16, le=4096)] | None = None
    """Side in pixels of a square picture; None: what the base was trained on."""
    buckets: bool = True
    """Keep each picture's aspect ratio (same area); off: crop to a square."""
    flip: bool = False
    """Mirror half of the pictures and swap "left" and "right" in their captions. Off: many subjects are not symmetric."""
    caption_dropout: Share = 0.05
    """How often a caption is left empty, which teaches guidance."""
    shuffle_caption: bool = False
    """Say the clauses of a caption, cut at its commas, in another order at every step, for captions that are lists of tags.
    Captions are then encoded anew at every step."""
    keep_tokens: Annotated[int, Field(ge=0, le=1000)] = 0
    """Clauses in front that ``shuffle_caption`` leaves in place; the trigger is often the first."""
    caption_chunks: Annotated[int, Field(ge=1, le=8)] = 1
    """Chunks of the text encoder (75 tokens on Stable Diffusion) that a caption may fill; what is longer is cut."""
    clip_skip: Annotated[int, Field(ge=1, le=48)] = 1
    """Layer of the text encoder that captions are read at: 1 is the last. SDXL reads the last but one for 1 and 2 alike."""

    min_snr: Annotated[float, Field(gt=0)] | None = 5.0
    """Gamma of min-SNR weighting; null weighs every noise level alike."""
    noise_offset: Share = 0.0
    min_timestep: Annotated[int, Field(ge=0)] = 0
    """Least noise that is learnt: an early timestep is little noise, which decides details."""
    max_timestep: Annotated[int, Field(ge=1)] | None = None
    """Timesteps below this one are learnt; None: all of the base's, which are 1000 on Stable Diffusion."""
    timestep_sampling: Literal["uniform", "sigmoid"] = "uniform"
    """How often each of them is learnt: alike, or those in the middle more often."""
    sigmoid_scale: Annotated[float, Field(gt=0, le=10)] = 1.0
    """How widely ``sigmoid`` spreads them: less than 1 keeps to the middle, above 1.41 there are two peaks towards the ends."""
    loss: Literal["l2", "huber", "smooth_l1"] = "l2"
    """Of the denoising; pseudo-Huber losses mind single bad pictures less."""
    huber_c: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Errors beyond this count by their size, not by its square."""
    huber_schedule: Literal["constant", "exponential", "snr"] = "snr"
    """How ``huber_c`` depends on the noise: 1 where there is none and ``huber_c`` where there is nothing else, or constant."""
    masks: Literal["alpha"] | Path | None = None
    """Folder of grey pictures, called as those of ``data``: what is white there is learnt, what is black is not; one without a
    mask is learnt whole. ``alpha``: what is transparent is not learnt."""
    unmasked_weight: Share = 0.0
    """How much what a mask leaves out counts all the same."""
    prior: Literal["none", "images", "consistency"] = "none"
    """Against forgetting: pictures of the class, or agreement with the frozen base on class and everyday prompts. Left out:
    ``consistency`` for a concept, ``none`` for a style, which shall reach everything."""
    prior_data: Path | None = None
    """Folder of class pictures for ``prior: images``."""
    prior_prompts: tuple[str, ...] = ()
    """Prompts to protect; empty: everyday things, the class word and the captions without the trigger; on the embedded base, to
    which a made-up word means nothing, everyday things of other classes alone, unless ``train_text`` teaches it the word."""
    prior_weight: Annotated[float, Field(ge=0, le=100)] = 0.3
    prior_batch: Annotated[int, Field(ge=1)] | None = None
    """Rows of a batch spent on the prior; None: for ``images`` half as many as ``batch``, for ``consistency`` a quarter. For
    ``consistency`` they are rows of the batch itself, at most ``batch``."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    gradient_checkpointing: bool = False
    cache_latents: bool = True
    cache_text: bool = True
    save_precision: Literal["fp32", "fp16", "bf16"] = "fp16"
    layout: Literal["auto", "diffusers", "kohya"] = "auto"
    """Names of the tensors in the file: kohya's, which ComfyUI and A1111 read, or diffusers'. ``auto``: kohya's for Stable
    Diffusion 1, 2 and XL, diffusers' for bases those programs do not know."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Under ``accelerate launch`` each process takes its own card."""

    checkpoint_every: Annotated[int, Field(ge=0)] = 100
    """Steps between resumable checkpoints; 0: none."""
    save_every: Annotated[int, Field(ge=0)] = 0
    """Steps between LoRA files kept beside the output as ``<stem>-<step>.safetensors``; 0: none."""
    keep_last: Annotated[int, Field(ge=1)] | None = None
    """Of those files as many as are kept, the latest; None: all."""
    preview_every: Annotated[int, Field(ge=0)] = 0
    """Steps between previews, drawn into ``<stem>.previews/``; 0: none."""
    preview_prompts: tuple[str, ...] = ()
    """What previews show; empty: the caption of a picture without one."""
    preview_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Picture ``i`` of a preview always has the seed ``preview_seed + i``."""
    preview_steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Sampling steps of previews; None: the base's own number."""
    preview_guidance: Annotated[float, Field(ge=1, le=100)] | None = None
    preview_negative: str = ""
    tensorboard: bool = False
    """Write losses, rates and previews to ``<stem>.train/tensorboard`` when the package is installed."""

    restart: bool = False
    """Start over when a run lies at the output: an unfinished one is resumed otherwise, a finished one left as it is."""
    allow_one_image: bool = False
    allow_known_trigger: bool = False

    @field_validator("trigger")
    @classmethod
    def _trigger(cls, value: str) -> str:
        value = " ".join(value.split())
        if not value:
            raise ValueError("trigger is empty: give the new word that calls the concept, such as 'zqx'")
        if "{" in value or "}" in value:
            raise ValueError(f"trigger '{value}' holds a brace: give a plain word")
        return value

    @field_validator("class_word")
    @classmethod
    def _class_word(cls, value: str) -> str:
        return " ".join(value.split())

    @field_validator("output")
    @classmethod
    def _output(cls, value: Path) -> Path:
        if value.suffix != ".safetensors":
            raise ValueError(f"output '{value}' must end in .safetensors")
        return value

    @field_validator("targets")
    @classmethod
    def _targets(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for pattern in (value,) if isinstance(value, str) else value:
            _compiled(pattern, "targets")
        return value

    @field_validator("block_rates")
    @classmethod
    def _block_rates(cls, value: dict[str, float]) -> dict[str, float]:
        for pattern in value:
            _compiled(pattern, "block_rates")
        return value

    @field_validator("optimizer", "schedule", "loss", "huber_schedule", "timestep_sampling", mode="before")
    @classmethod
    def _spelling(cls, value: object) -> object:
        """Names as other trainers write them: ``AdamW8bit``, ``constant_with_warmup``."""
        if not isinstance(value, str):
            return value
        plain = value.lower().replace("-", "_")
        if plain == "sgdnesterov":
            raise ValueError(f"optimizer '{value}' is two options here: optimizer 'sgd', and nesterov: true in optimizer_args")
        return SPELLINGS.get(plain, plain)

    @field_validator("optimizer_args", mode="before")
    @classmethod
    def _numbers(cls, value: object) -> object:
        """YAML takes ``1e-3`` for a word."""
        if not isinstance(value, dict):
            return value
        return {key: _number(item) if isinstance(item, str) else item for key, item in value.items()}

    @field_validator("caption", "prior_prompts", "preview_prompts")
    @classmethod
    def _placeholders(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for text in (value,) if isinstance(value, str) else value:
            for name in re.findall(r"\{([^{}]*)\}", text):
                if name not in ("trigger", "class_word"):
                    raise ValueError(f"'{text}' names '{{{name}}}', but only {{trigger}} and {{class_word}} are filled in")
        return value

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.prior == "images" and self.prior_data is None:
            raise ValueError(
                "prior 'images' needs prior_data, a folder of class pictures; without pictures use prior 'consistency'"
            )
        if self.prior != "images" and self.prior_data is not None:
            raise ValueError(f"prior_data is given but prior is '{self.prior}': set prior to 'images'")
        if self.prior == "images" and not self.class_word and not self.prior_prompts:
            raise ValueError("prior 'images' needs class_word, or prior_prompts that caption those pictures")
        for text in self.prior_prompts:
            if self.calls(self.fill(text)):
                raise ValueError(
                    f"prior_prompts holds '{text}', which calls the trigger, so that it could not be learnt: leave it out"
                )
        if self.text_learning_rate is not None and not self.text_lora:
            raise ValueError(f"text_learning_rate is given but train_text is '{self.train_text}': set train_text to 'lora'")
        if nothing := idle(self):
            raise ValueError(nothing)
        if self.max_timestep is not None and self.max_timestep <= self.min_timestep:
            raise ValueError(
                f"max_timestep {self.max_timestep} is not above min_timestep {self.min_timestep}, so no noise would be learnt: "
                "raise one or lower the other"
            )
        if not self.train_unet and self.train_text == "none":
            raise ValueError("train_unet is off and train_text is 'none', so nothing would be learnt: set one of them")
        self._one_rate()
        return self

    def _one_rate(self) -> None:
        """Prodigy finds one rate for everything."""
        given = [key for key in ("text_learning_rate", "token_learning_rate") if getattr(self, key) is not None]
        if any(factor not in (0, 1) for factor in self.block_rates.values()):
            given.append("block_rates other than 0 and 1")
        if self.optimizer == "prodigy" and given:
            raise ValueError(f"optimizer 'prodigy' has one rate for everything, but {given[0]} is given: leave it out")

    @property
    def words(self) -> bool:
        """Whether vectors are learnt in place of the trigger."""
        return "embedding" in self.train_text

    @property
    def text_lora(self) -> bool:
        """Whether the text encoder gets a LoRA."""
        return "lora" in self.train_text

    @property
    def deltas(self) -> bool:
        """Whether any layer of the base gets a LoRA, so that something could be forgotten."""
        return self.train_unet or self.text_lora

    @property
    def strength(self) -> float:
        """Alpha as used: the rank when none is given."""
        return float(self.rank) if self.alpha is None else self.alpha

    @property
    def text_rate(self) -> float:
        """Learning rate of the text encoder's LoRA as used; Prodigy has one for everything."""
        return self.text_learning_rate or self.learning_rate / (1 if self.optimizer == "prodigy" else 2)

    @property
    def template(self) -> str:
        """The caption of a picture that has none."""
        if self.caption:
            return self.caption
        if self.kind == "style":
            return "a picture in {trigger} style"
        return "a {trigger} {class_word}" if self.class_word else "a {trigger}"

    @property
    def prior_rows(self) -> int:
        """Rows a batch spends on the prior."""
        return self.prior_batch or max(self.batch // (2 if self.prior == "images" else 4), 1)

    @property
    def work(self) -> Path:
        """Where checkpoints and logs lie while training."""
        return self.output.with_suffix(".train")

    def fill(self, text: str) -> str:
        """``text`` with its placeholders filled in and spaces tidied."""
        return " ".join(text.replace("{trigger}", self.trigger).replace("{class_word}", self.class_word).split())

    def calls(self, text: str) -> bool:
        """Whether ``text`` holds the trigger."""
        return re.search(rf"(?<!\w){re.escape(self.trigger)}(?!\w)", text, re.IGNORECASE) is not None


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _compiled(pattern: str, key: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern if pattern not in SECTIONS else re.escape(pattern))
    except re.error as error:
        raise ValueError(f"{key}: '{pattern}' is not one of {', '.join(SECTIONS)} nor a regular expression ({error})") from None


def make_config(**values: Any) -> ConceptConfig:
    """A checked configuration.

    Raises:
        UnknownNameError: a key that does not exist.
        RequestError: a value missing or out of range; one sentence for the first of them.
    """
    for key in values:
        if key not in ConceptConfig.model_fields:
            known = FOREIGN_NAMES.get(key)
            if known:
                raise RequestError(f"unknown training option '{key}': here it is called '{known}'")
            raise UnknownNameError("training option", key, ConceptConfig.model_fields)
    try:
        return ConceptConfig(**values)
    except ValidationError as error:
        raise RequestError(_sentence(error)) from None


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    text = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return text
    key = place_of(first["loc"])
    if first["type"] == "missing":
        return f"training option '{key}' is missing: give {NEEDED[key]}"
    return f"training option '{key}' is {first['input']!r}: {text[0].lower()}{text[1:]}"
