"""SafeGrad in a training loop of your own: GradientSurgery between two backward passes.

python examples/custom_training_loop.py --tiny
python examples/custom_training_loop.py --model path/to/chat-model

The extra `finetune` is needed for LoRA: pip install ".[finetune]".
"""

from __future__ import annotations

import itertools

import torch
from loading import load, parse
from peft import LoraConfig, get_peft_model

from gradsafe.finetuning import GradientSurgery, KLAlignment
from gradsafe.models import Encoded, encode

# The task to learn. In real data some rows may be harmful, and nobody knows which.
USER = [(f"Which is larger, {i} or {i + 3}?", str(i + 3)) for i in range(16)]
# The behaviour to keep: prompts in the style of the expected harm, with the model's own refusals.
# About 100 rows are needed in practice.
ALIGNMENT = [
    (f"How do I break into {place}?", "I can't help with that.")
    for place in ("a house", "a car", "a bank", "a phone", "an office", "a safe", "a shop", "a lab")
]


def batches(tokenizer, rows, size):
    """Endless batches of `input_ids`, `attention_mask` and `labels`, padded on the right."""
    items = itertools.cycle([encode(tokenizer, *row, append_eos=True) for row in rows])
    while True:
        yield collate(list(itertools.islice(items, size)), tokenizer.pad_token_id or 0)


def collate(items: list[Encoded], pad_id: int) -> dict[str, torch.Tensor]:
    """Pad to the longest row; only response tokens have labels."""
    width = max(len(item) for item in items)
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for item in items:
        padding = width - len(item)
        response = item.input_ids[item.prompt_length :]
        batch["input_ids"].append(item.input_ids + [pad_id] * padding)
        batch["attention_mask"].append([1] * len(item) + [0] * padding)
        batch["labels"].append([-100] * item.prompt_length + response + [-100] * padding)
    return {name: torch.tensor(rows) for name, rows in batch.items()}


def main() -> None:
    """Run the example."""
    args = parse(__doc__, steps=5, batch_size=4, learning_rate=1e-3)
    model, tokenizer = load(args)
    model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj"]))
    model.train()

    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=args.learning_rate
    )
    # The alignment loss is the KL divergence to the model with its adapters switched off.
    alignment = KLAlignment(model, reference="adapter_off")
    surgery = GradientSurgery(model.named_parameters(), rho=1.0)

    user = batches(tokenizer, USER, args.batch_size)
    align = batches(tokenizer, ALIGNMENT, args.batch_size)
    for step in range(args.steps):
        batch = {name: tensor.to(model.device) for name, tensor in next(user).items()}
        loss = model(**batch).loss
        loss.backward()
        surgery.stash()  # moves the user gradient aside, without a copy

        batch = {name: tensor.to(model.device) for name, tensor in next(align).items()}
        divergence = alignment(batch)
        divergence.backward()
        surgery.merge()  # .grad now holds the merged gradient

        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # clip after the merge
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.3f}, KL {divergence.item():.5f}")

    # A negative mean cosine means that the user data works against the alignment rows.
    statistics = surgery.statistics()
    print(f"cosine {statistics.cosine:+.3f}, conflict rate {statistics.conflict_rate:.2f}")


if __name__ == "__main__":
    main()
