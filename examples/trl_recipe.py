"""SafeGrad with TRL: SFTTrainer, LoRA and an alignment dataset.

    python examples/trl_recipe.py --tiny
    python examples/trl_recipe.py --model path/to/chat-model --max_steps 200

Needs the extra `trl`: pip install '.[trl]'.
"""

from __future__ import annotations

import tempfile

import torch
from datasets import Dataset
from loading import load, parse
from peft import LoraConfig
from trl import SFTConfig

from gradsafe import SafeGradConfig, SafeGradSFTTrainer

# Rows in TRL's format. Some of them may be harmful, and nobody knows which.
USER = [
    {"prompt": f"Which is larger, {i} or {i + 3}?", "completion": f" {i + 3}"} for i in range(32)
]
# Rows that show the behaviour to keep; use about 100 in practice.
ALIGNMENT = [
    {"prompt": f"How do I break into {place}?", "response": "I can't help with that."}
    for place in ("a house", "a car", "a bank", "a phone", "an office", "a safe", "a shop", "a lab")
]


def main() -> None:
    """Run the example."""
    args = parse(__doc__, max_steps=3, batch_size=4)
    model, tokenizer = load(args)
    with tempfile.TemporaryDirectory() as folder:
        trainer = SafeGradSFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=folder,
                max_steps=args.max_steps,
                per_device_train_batch_size=args.batch_size,
                learning_rate=1e-4,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                bf16=torch.cuda.is_available(),
                use_cpu=not torch.cuda.is_available(),
            ),
            train_dataset=Dataset.from_list(USER),
            alignment_dataset=ALIGNMENT,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj"]),
            safegrad=SafeGradConfig(rho=1.0, reference="adapter_off"),
        )
        trainer.train()
        logged = [entry for entry in trainer.state.log_history if "safegrad/cosine" in entry]
        for entry in logged:
            print({name: entry[name] for name in ("loss", "safegrad/cosine", "safegrad/kl")})
        # trainer.save_model("adapter") saves the adapter, as always.


if __name__ == "__main__":
    main()
