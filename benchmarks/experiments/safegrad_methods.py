"""The methods that the SafeGrad experiment compares.

All train a LoRA adapter on the linear layers of the decoder with AdamW. `GradientSurgery` runs in a
plain training loop; `SafeGradTrainer` would give the same result with more overhead per step.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from benchmarks.experiments.safegrad_data import Row
from benchmarks.testbed.training import isolated
from gradsafe import GradientSurgery
from gradsafe.finetuning import AlignmentSubspace, KLAlignment, SFTAlignment
from gradsafe.finetuning.rows import IGNORED, AlignmentOrder, RowCollator, encode_rows

Batch = dict[str, Tensor]
Loss = Callable[[Batch], Tensor]

METHODS = ("SFT", "SFT + KL", "Lisa", "SafeGrad (SFT)", "SafeGrad (KL)")
OTHERS = ("Interleaving", "SBR", "SPF")
# Lisa-style: 2 steps on the alignment rows after every 8 user steps, with a proximal term towards
# the weights at the start of each phase. The alignment steps are additional, so that all methods
# see the same user rows.
LISA_USER_STEPS = 8
LISA_ALIGNMENT_STEPS = 2
# SBR-style: the squared distance of the hidden states to those of the aligned model, relative to
# their norm, with weight 1.
SUBSPACE_STEPS, SUBSPACE_BATCHES, SUBSPACE_RANK = 20, 8, 4


@dataclass(frozen=True)
class Settings:
    """Hyperparameters; the defaults were chosen by `safegrad --search`.

    Attributes:
        learning_rate: Constant learning rate of AdamW.
        steps: Optimizer steps, each on `batch` user rows.
        alignment_rows: Size of the alignment set.
        batch: User rows per step.
        alignment_batch: Alignment rows per step.
        rho: Weight of the alignment gradient.
        rank: Rank of the adapter; alpha is twice the rank.
        lisa_pull: Weight of Lisa's proximal term.
    """

    learning_rate: float = 1e-3
    steps: int = 100
    alignment_rows: int = 100
    batch: int = 10
    alignment_batch: int = 10
    rho: float = 1.0
    rank: int = 8
    lisa_pull: float = 0.1


class Run:
    """One fine-tuning run on a copy of the aligned model."""

    def __init__(
        self,
        aligned: Any,
        tokenizer: Any,
        user: Sequence[Row],
        alignment: Sequence[Row],
        seed: int,
        settings: Settings,
    ) -> None:
        adapter = LoraConfig(
            r=settings.rank,
            lora_alpha=2 * settings.rank,
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        with isolated(torch.get_num_threads()):
            torch.default_generator.manual_seed(seed)
            self.model: Any = get_peft_model(copy.deepcopy(aligned), adapter).train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=settings.learning_rate, weight_decay=0.0, fused=True
        )
        self.settings = settings
        self.user = encode_rows("user", user, tokenizer, progress=False)
        self.alignment = encode_rows("alignment", alignment, tokenizer, progress=False)
        self.order = AlignmentOrder(len(self.alignment), seed)
        self.collate = RowCollator(int(tokenizer.pad_token_id))
        self.cross_entropy = SFTAlignment(self.model)  # on the response tokens of any rows

    def fit(self, method: str) -> dict[str, Any]:
        """Fine-tunes with one of `METHODS` or `OTHERS`; returns the statistics of the surgery."""
        if method == "SFT":
            return self._sft()
        if method == "Lisa":
            return self._lisa()
        if method == "SPF":
            return self._subspace()
        if method == "SBR":
            return self._surgery(self._distance(), projection=False)
        refusals = method in ("SafeGrad (SFT)", "Interleaving")
        loss = self.cross_entropy if refusals else self._cached_kl()
        return self._surgery(loss, projection=method.startswith("SafeGrad"))

    def merged(self) -> Any:
        """The fine-tuned model without adapter layers."""
        return self.model.merge_and_unload().eval()

    def _sft(self) -> dict[str, float]:
        for index in range(self.settings.steps):
            self._user_backward(index)
            self._step()
        return {}

    def _lisa(self) -> dict[str, float]:
        """Alternates two phases, each with a proximal term towards its initial weights."""
        anchor = self._weights()
        for index in range(self.settings.steps):
            self._user_backward(index)
            self._pull(anchor)
            self._step()
            if (index + 1) % LISA_USER_STEPS:
                continue
            anchor = self._weights()
            for _ in range(LISA_ALIGNMENT_STEPS):
                self._alignment_backward(self.cross_entropy)
                self._pull(anchor)
                self._step()
            anchor = self._weights()
        return {}

    def _surgery(self, loss: Loss, projection: bool) -> dict[str, Any]:
        """SafeGrad, or the sum of both gradients without projection."""
        surgery = GradientSurgery(self.trained, self.settings.rho, projection=projection)
        cosines: list[float] = []
        for index in range(self.settings.steps):
            self._user_backward(index)
            surgery.stash()
            self._alignment_backward(loss)
            dot, user, align, _ = surgery.merge()[0].tolist()
            cosines.append(dot / (user * align) ** 0.5 if user * align else 0.0)
            self._step()
        seen = surgery.statistics()
        return {
            "cosine": seen.cosine,
            "conflict_rate": 100 * seen.conflict_rate,
            # The part of the user gradient's norm that a projection removes.
            "in_conflict": 100 * statistics.fmean(max(0.0, -cosine) for cosine in cosines),
            "cosines": cosines,
        }

    def _subspace(self) -> dict[str, float]:
        """Projection off the first singular vectors of several alignment gradients (SPF).

        They are taken anew every `SUBSPACE_STEPS` steps, from batches of alignment rows with the
        cross-entropy; `rho` adds their mean.
        """
        conflicts = []
        for index in range(self.settings.steps):
            if index % SUBSPACE_STEPS == 0:
                gradients = []
                for _ in range(SUBSPACE_BATCHES):
                    self._alignment_backward(self.cross_entropy)
                    gradients.append([p.grad.clone() for p in self.trained])
                    self.optimizer.zero_grad()
                subspace = AlignmentSubspace.from_gradients(gradients, SUBSPACE_RANK)
            self._user_backward(index)
            out = subspace.project_([p.grad for p in self.trained], self.settings.rho)
            conflicts.append(float(out[0] < 0))
            self._step()
        return {"conflict_rate": 100 * statistics.fmean(conflicts)}

    def _cached_kl(self) -> KLAlignment:
        """KL divergence to the present model; the new adapter has no effect yet."""
        loss = KLAlignment(self.model, "cached")
        loss.cache([self.collate(self.alignment)])
        return loss

    def _user_backward(self, index: int) -> None:
        size = self.settings.batch
        places = range(index * size, (index + 1) * size)
        rows = [self.user[place % len(self.user)] for place in places]
        self.cross_entropy(self.collate(rows)).backward()

    def _distance(self) -> Loss:
        """Distance of the last hidden states of alignment prompts to the aligned model's (SBR)."""

        def last(batch: Batch) -> Tensor:
            # The state before the first token of the response, after the final norm.
            columns = batch["labels"].ne(IGNORED).int().argmax(1) - 1
            inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
            output = self.model(**inputs, output_hidden_states=True, logits_to_keep=1)
            return output.hidden_states[-1][range(len(columns)), columns]

        def loss(batch: Batch) -> Tensor:
            with torch.no_grad(), self.model.disable_adapter():
                start = last(batch)
            distances = (last(batch) - start).square().sum(1) / start.square().sum(1)
            return distances.mean()

        return loss

    def _alignment_backward(self, loss: Loss) -> None:
        numbers = self.order.draw(self.settings.alignment_batch)
        loss(self.collate([self.alignment[number] for number in numbers])).backward()

    def _step(self) -> None:
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def _weights(self) -> list[Tensor]:
        return [parameter.clone() for parameter in self.trained]

    @torch.no_grad()
    def _pull(self, anchor: list[Tensor]) -> None:
        """Adds the gradient of the proximal term, pull / 2 times the squared distance."""
        for parameter, start in zip(self.trained, anchor, strict=True):
            parameter.grad.add_(parameter - start, alpha=self.settings.lisa_pull)
