"""What a checkpoint remembers of a run, beside its rows: all that changes the result."""

from __future__ import annotations

from typing import Any

from gradsafe.finetuning.config import SafeGradConfig

# Options of SafeGrad that may change: they only affect warnings, and the encoding, which the
# fingerprint of the rows covers.
_FREE = (
    *("warn_cosine", "warn_steps"),
    *("template", "system", "append_eos", "max_length", "split_special_tokens"),
)
# Training arguments that may not change. Versions of transformers and TRL have some of them only.
_FIXED = (
    *("learning_rate", "weight_decay", "max_grad_norm", "optim", "optim_args", "adam_beta1"),
    *("adam_beta2", "adam_epsilon", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("warmup_ratio", "seed", "data_seed", "bf16", "fp16", "label_smoothing_factor"),
    *("neftune_noise_alpha", "average_tokens_across_devices", "dataloader_drop_last"),
    *("train_sampling_strategy", "group_by_length", "loss_type", "completion_only_loss"),
    *("assistant_only_loss", "padding_free"),
)
# Fields of a PEFT configuration that the names and shapes of the trained parameters do not show.
_ADAPTER = (
    *("peft_type", "lora_alpha", "alpha_pattern", "lora_dropout", "use_rslora", "use_dora"),
)


def option_facts(options: SafeGradConfig) -> dict[str, Any]:
    """The options of SafeGrad."""
    return {name: value for name, value in options.to_json().items() if name not in _FREE}


def argument_facts(args: Any) -> dict[str, Any]:
    """The training arguments, and the length of the run, which may grow."""
    return {
        **{name: getattr(args, name, None) for name in _FIXED},
        "max_steps": args.max_steps if args.max_steps > 0 else None,
        "num_train_epochs": None if args.max_steps > 0 else float(args.num_train_epochs),
    }


def given_facts(trainer: Any) -> dict[str, Any]:
    """The optimizer and scheduler that a trainer was given; to be called before it trains."""

    def described(given: Any, attribute: str) -> str | None:
        return None if given is None else f"{type(given).__name__} {getattr(given, attribute, '')}"

    return {
        "optimizer": described(trainer.optimizer, "defaults"),
        "scheduler": described(trainer.lr_scheduler, "base_lrs"),
        "optimizer_cls_and_kwargs": repr(getattr(trainer, "optimizer_cls_and_kwargs", None)),
    }


def parameter_facts(model: Any) -> dict[str, Any]:
    """The trained parameters and the adapters; to be called before the model is wrapped."""
    named = model.named_parameters()
    adapters = getattr(model, "peft_config", {})
    return {
        "trainable": {name: list(p.shape) for name, p in named if p.requires_grad},
        "adapters": {
            f"{name}.{field}": getattr(config, field, None)
            for name, config in adapters.items()
            for field in _ADAPTER
        },
    }
