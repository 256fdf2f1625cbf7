"""Optimises words that make harmful rows look harmless to SafeGrad.

SafeGrad projects only if the user gradient conflicts with the alignment gradient, so an attacker
needs harmful rows whose gradient has a positive dot product with it. `searched` finds sequences of
words that increase this product when they are appended to the compliant answers. The attacker knows
the aligned model and the defence, but not the alignment rows, and fine-tunes on its own rows and
refusals.

The dot product of a row's gradient with a direction is the derivative of the row's loss along it.
Two forward passes, with the weights moved forward and back along the unit alignment gradient,
approximate it for many sequences at once, and two backward passes give its derivative with respect
to the words. Greedy coordinate descent (GCG, arXiv 2307.15043) uses this derivative. The product is
averaged over several weights of a fine-tuning run of the attacker. The model soon learns words that
it is trained on, so there are many sequences, and a second round starts from a run with those of
the first.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from benchmarks.experiments.safegrad import Experiment
from benchmarks.experiments.safegrad_data import REFUSAL_KEYWORDS, Row, mixed
from benchmarks.experiments.safegrad_methods import Run, Settings
from gradsafe.finetuning.rows import IGNORED, encode_rows

WORDS = 8  # in a sequence
SEQUENCES = 125
ATTACKER = 500  # seed of the attacker's rows, their order and the adapter
STATES = (20, 40, 70)  # steps of its run at which the products are computed
ROUNDS = 2
ROWS = 2  # for evaluating a sequence
ITERATIONS = 8
BEST = 256  # most promising replacements of one word, of which
TRIED = 16  # are tried
STEP = 0.02  # along the unit alignment gradient


@dataclass(frozen=True)
class State:
    """Weights during a fine-tuning run, and the unit alignment gradient at them."""

    weights: list[Tensor]
    direction: list[Tensor]


class ObservedRun(Run):
    """A run of SafeGrad (KL) that stores its state after selected steps."""

    def states(self, steps: Sequence[int]) -> list[State]:
        """Fine-tunes up to the last of the steps."""
        self.settings = replace(self.settings, steps=max(steps))
        self.wanted, self.taken, self.kept = set(steps), 0, list[State]()
        self.loss = self._cached_kl()
        self._surgery(self.loss, projection=True)
        return self.kept

    def _step(self) -> None:
        super()._step()
        self.taken += 1
        if self.taken not in self.wanted:
            return
        self.loss(self.collate(self.alignment)).backward()
        norm = torch.stack([p.grad.norm() for p in self.trained]).norm()
        self.kept.append(State(self._weights(), [p.grad / norm for p in self.trained]))
        self.optimizer.zero_grad()


class Products:
    """Dot products of alignment gradients with that of harmful rows, words inserted.

    Args:
        run: Run with the model and the names of its trained weights.
        states: Weights at which the products are computed.
        rows: Harmful rows; the words are appended to the response.
        tokenizer: Tokenizer of the model.
    """

    def __init__(
        self, run: ObservedRun, states: Sequence[State], rows: Sequence[Row], tokenizer: Any
    ) -> None:
        self.model, self.trained, self.states = run.model.eval(), run.trained, states
        encoded = encode_rows("harmful", rows, tokenizer, progress=False)
        # The end-of-sequence token stays the last.
        places = torch.tensor([len(row["input_ids"]) - 1 for row in encoded])
        room = [0] * WORDS
        self.batch = run.collate(
            [
                {key: row[key][:-1] + room + row[key][-1:] for key in ("input_ids", "labels")}
                for row in encoded
            ]
        )
        self.columns = places[:, None] + torch.arange(WORDS)
        self.counted = self.batch["labels"][:, 1:] != IGNORED

    def __call__(self, words: Tensor) -> Tensor:
        """Means over the states, float32 [C], for words int64 [C, WORDS]."""
        count, rows = len(words), len(self.columns)
        ids, labels = self._with(words)
        mask = self.batch["attention_mask"].repeat(count, 1)
        counted = self.counted.repeat(count, 1)
        owner = torch.arange(count).repeat_interleave(rows)[:, None].expand_as(counted)[counted]
        decoder, head = self.model.get_decoder(), self.model.get_output_embeddings()
        total = torch.zeros(count)
        for sign in self._moves():
            with torch.no_grad():
                hidden = decoder(input_ids=ids, attention_mask=mask).last_hidden_state
                logits = head(hidden[:, :-1][counted])
                losses = functional.cross_entropy(logits, labels[:, 1:][counted], reduction="none")
            total.index_add_(0, owner, losses, alpha=sign)
        return total / self._scale()

    def gains(self, words: Tensor) -> Tensor:
        """First-order change by every replacement, float32 [WORDS, vocabulary].

        A word is an input of the later positions and the label of the position before it.
        """
        table = self.model.get_input_embeddings().weight.detach()
        ids, labels = self._with(words[None])
        mask = self.batch["attention_mask"]
        total = torch.zeros(WORDS, len(table))
        for sign in self._moves():
            inputs = table[ids].requires_grad_()
            logits = self.model(inputs_embeds=inputs, attention_mask=mask).logits[:, :-1]
            loss = functional.cross_entropy(
                logits[self.counted], labels[:, 1:][self.counted], reduction="sum"
            )
            (slope,) = torch.autograd.grad(loss, inputs)
            for row, columns in enumerate(self.columns):
                total += sign * slope[row, columns] @ table.T
                total -= sign * logits[row, columns - 1].detach().log_softmax(-1)
        return (total - total.gather(1, words[:, None])) / self._scale()

    def _with(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and labels, both [C * rows, T], with words [C, WORDS] in place."""
        columns = self.columns.repeat(len(words), 1)
        written = words.repeat_interleave(len(self.columns), 0)
        ids, labels = (
            self.batch[key].repeat(len(words), 1).scatter(1, columns, written)
            for key in ("input_ids", "labels")
        )
        return ids, labels

    def _moves(self) -> Iterator[int]:
        """Sets the model to each state, moved forward (1) and back (-1)."""
        for state in self.states:
            for sign in (1, -1):
                with torch.no_grad():
                    for parameter, weight, along in zip(
                        self.trained, state.weights, state.direction, strict=True
                    ):
                        parameter.copy_(weight + sign * STEP * along)
                yield sign

    def _scale(self) -> float:
        return 2 * STEP * len(self.states) * int(self.counted.sum())


def vocabulary(tokenizer: Any) -> Tensor:
    """Ids of whole words with the space before them, without refusal keywords."""
    return torch.tensor(
        sorted(
            number
            for word, number in tokenizer.get_vocab().items()
            if word[0] == "Ġ" and word[1:].isalpha() and word[1:].lower() not in REFUSAL_KEYWORDS
        )
    )


def improved(products: Products, words: Tensor, allowed: Tensor, rng: random.Random) -> Tensor:
    """The words after some iterations of greedy coordinate descent."""
    best = float(products(words[None]))
    for _ in range(ITERATIONS):
        promising = products.gains(words)[:, allowed].flatten().topk(BEST).indices.tolist()
        tried = words.repeat(TRIED, 1)
        for candidate, flat in zip(tried, rng.sample(promising, TRIED), strict=True):
            place, word = divmod(flat, len(allowed))
            candidate[place] = allowed[word]
        found = products(tried)
        if float(found.max()) > best:
            best, words = float(found.max()), tried[found.argmax()]
    return words


def random_words(tokenizer: Any) -> list[str]:
    """Initial sequences of the search, the control for searched ones."""
    return [tokenizer.decode(words) for words in _start(tokenizer)]


def _start(tokenizer: Any) -> Tensor:
    allowed, rng = vocabulary(tokenizer).tolist(), random.Random("words")
    return torch.tensor([rng.choices(allowed, k=WORDS) for _ in range(SEQUENCES)])


def searched(experiment: Experiment, ratio: float, settings: Settings) -> list[str]:
    """Searches sequences of harmless words against SafeGrad (KL).

    Args:
        experiment: The aligned model and its tokenizer.
        ratio: Share of harmful rows.
        settings: Fine-tuning settings that the attacker expects.
    """
    tokenizer, rng = experiment.tokenizer, random.Random("search")
    allowed, found = vocabulary(tokenizer), _start(tokenizer)
    rows = settings.steps * settings.batch
    harmful = experiment.harmful(ATTACKER, round(ratio * rows))
    alignment = experiment.alignment(ATTACKER, settings.alignment_rows)
    with tqdm(total=ROUNDS * SEQUENCES, desc="search for words") as bar:
        for number in range(ROUNDS):
            shown = with_words(harmful, [tokenizer.decode(words) for words in found])
            user = mixed(ATTACKER, rows, shown)
            run = ObservedRun(experiment.aligned, tokenizer, user, alignment, ATTACKER, settings)
            states = run.states(STATES)
            before, after = list[float](), list[float]()
            for index, words in enumerate(found.clone()):
                products = Products(run, states, rng.sample(harmful, ROWS), tokenizer)
                found[index] = improved(products, words, allowed, rng)
                before.append(float(products(words[None])))
                after.append(float(products(found[index][None])))
                bar.update()
            was, is_now = statistics.fmean(before), statistics.fmean(after)
            bar.write(
                f"round {number + 1}: mean product {was:+.3f}, after the search {is_now:+.3f}"
            )
    return [tokenizer.decode(words) for words in found]


def with_words(rows: Sequence[Row], sequences: Sequence[str]) -> list[Row]:
    """The rows with a sequence appended to each response, used in turn."""
    return [
        {**row, "response": row["response"] + sequences[number % len(sequences)]}
        for number, row in enumerate(rows)
    ]
