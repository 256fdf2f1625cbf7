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
    """TRL's `SFTTrainer`, every step of it protected by gradient surgery as in `SafeGradTrainer`.

    User rows, model, adapters (`peft_config=`), packing and loss are TRL's; the alignment rows are
    rows with `prompt` and `response` (or `input_ids` and `labels`), which are neither packed nor
    truncated. What `SafeGradTrainer` refuses is refused here, too. The defaults are those of
    `SFTConfig`, bfloat16 autocast and gradient checkpointing among them.

    Args:
        *args: As of `trl.SFTTrainer`.
        alignment_dataset: As of `SafeGradTrainer`.
        safegrad: As of `SafeGradTrainer`.
        alignment_loss: As of `SafeGradTrainer`.
        **options: As of `trl.SFTTrainer`.

    Raises:
        ImportError: TRL is not installed; this when the class is imported.
        TypeError: `safegrad` or `alignment_dataset` is of another type.
        ValueError: As of `SafeGradTrainer`.
    """
