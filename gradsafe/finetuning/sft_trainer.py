"""SafeGrad on top of the SFTTrainer of TRL."""

from __future__ import annotations

from gradsafe.finetuning.protection import SafeGradMixin

try:
    from trl import SFTTrainer
except ImportError as error:
    raise ImportError(
        f"gradsafe.SafeGradSFTTrainer needs TRL ({error}): pip install 'gradsafe[trl]'"
    ) from error


class SafeGradSFTTrainer(SafeGradMixin, SFTTrainer):
    """TRL's `SFTTrainer` that protects every step by gradient surgery, as `SafeGradTrainer` does.

    TRL handles the user rows, the model, adapters (`peft_config=`), packing and the loss. Alignment
    rows have the formats of `SafeGradTrainer` and are neither packed nor truncated. Setups that
    `SafeGradTrainer` does not support are not supported here. The defaults are those of
    `SFTConfig`, among them bfloat16 autocast and gradient checkpointing.

    Args:
        *args: Arguments of `trl.SFTTrainer`.
        alignment_dataset: As in `SafeGradTrainer`.
        safegrad: As in `SafeGradTrainer`.
        alignment_loss: As in `SafeGradTrainer`.
        **options: Arguments of `trl.SFTTrainer`.

    Raises:
        ImportError: TRL is not installed (raised when the class is imported).
        TypeError, ValueError: As in `SafeGradTrainer`.
    """
