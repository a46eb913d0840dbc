"""What other trainers call our options, and which options do not change what is learnt."""

from __future__ import annotations

FOREIGN_NAMES = {
    "lr": "learning_rate",
    "unet_lr": "learning_rate",
    "rate": "learning_rate",
    "text_encoder_lr": "text_learning_rate",
    "network_dim": "rank",
    "linear": "rank",
    "lora_rank": "rank",
    "network_alpha": "alpha",
    "linear_alpha": "alpha",
    "batch_size": "batch",
    "train_batch_size": "batch",
    "max_train_steps": "steps",
    "max_train_epochs": "epochs",
    "trigger_word": "trigger",
    "folder_path": "data",
    "train_data_dir": "data",
    "instance_data_dir": "data",
    "output_dir": "output",
    "output_name": "output",
    "min_snr_gamma": "min_snr",
    "snr_gamma": "min_snr",
    "caption_dropout_rate": "caption_dropout",
    "flip_aug": "flip",
    "gradient_accumulation_steps": "accumulation",
    "mixed_precision": "precision",
    "lr_scheduler": "schedule",
    "lr_warmup_steps": "warmup",
    "pretrained_model_name_or_path": "base",
    "num_repeats": "repeats",
    "enable_bucket": "buckets",
    "optimizer_type": "optimizer",
    "optimizer_params": "optimizer_args",
    "network_weights": "start_from",
    "prior_loss_weight": "prior_weight",
    "max_grad_norm": "clip",
    "train_text_encoder": "train_text",
    "placeholder_token": "trigger",
    "token_string": "trigger",
    "initializer_token": "token_init",
    "init_word": "token_init",
    "num_vectors": "tokens",
    "num_vectors_per_token": "tokens",
    "embedding_lr": "token_learning_rate",
    "sample_every": "preview_every",
    "sample_every_n_steps": "preview_every",
    "validation_steps": "preview_every",
    "sample_prompts": "preview_prompts",
    "validation_prompt": "preview_prompts",
    "prompts": "preview_prompts",
    "save_every_n_steps": "save_every",
    "checkpointing_steps": "checkpoint_every",
    "lr_scheduler_num_cycles": "cycles",
    "train_batch": "batch",
    "max_epochs": "epochs",
    "num_train_epochs": "epochs",
    "logging_dir": "tensorboard",
    "dtype": "precision",
    "cache_latents_to_disk": "cache_latents",
    "cache_text_encoder_outputs": "cache_text",
    "shuffle_tokens": "shuffle_caption",
    "max_token_length": "caption_chunks",
    "loss_type": "loss",
    "save_last_n_epochs": "keep_last",
    "max_step_saves_to_keep": "keep_last",
}
"""What kohya's scripts, diffusers' examples and ai-toolkit call our keys."""

SPELLINGS = {
    "constant_with_warmup": "constant",
    "cosine_with_min_lr": "cosine",
    "adamw_8bit": "adamw8bit",
    "lion_8bit": "lion8bit",
    "sgdnesterov": "sgd",
    "mse": "l2",
}
"""What others call our optimisers, schedules and losses."""

NEUTRAL = frozenset(
    [
        "output",
        "layout",
        "device",
        "checkpoint_every",
        "save_every",
        "keep_last",
        "preview_every",
        "preview_prompts",
        "preview_seed",
        "preview_steps",
        "preview_guidance",
        "preview_negative",
        "tensorboard",
        "restart",
        "cache_text",
        "cache_latents",
    ]
)
"""Options that do not change what is learnt: a run may be resumed with others, and its file does not record them."""

LATER = frozenset(
    [
        "start_from",
        "clip_skip",
        "optimizer_args",
        "shuffle_caption",
        "keep_tokens",
        "caption_chunks",
        "min_timestep",
        "max_timestep",
        "loss",
        "huber_c",
        "huber_schedule",
    ]
)
"""Options added to the list of version 1: recorded only when given, or files and checkpoints from before would seem to be of
another run."""
