"""What detection, tracing and SafeGrad cost for a model: bytes and FLOPs from its configuration.

    python examples/cost.py                                  # a table of well-known models
    python examples/cost.py --model Llama-3.1-8B --layers 16 --row_fraction 0.25
    python examples/cost.py --config path/to/model/config.json --reference_dtype float8

Nothing is loaded and nothing is installed: the script needs Python alone. docs/cost.md explains the
formulas; tests/test_cost.py compares them with real models.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8": 1}
KL_CHUNK = 256  # tokens whose logits exist at a time in SafeGrad's KL
LORA_TARGETS = ("q", "k", "v")


@dataclass(frozen=True)
class Decoder:
    """The part of a model's configuration that decides what it costs.

    Attributes:
        blocks: Decoder blocks.
        hidden: Width of the hidden states.
        mlp: Width of the MLP, or of one expert.
        heads: Attention heads.
        kv_heads: Heads of keys and values.
        head_dim: Width of a head.
        vocabulary: Tokens in the vocabulary.
        experts: Experts per block, 0 for a dense model.
        active: Experts that each token uses.
        tied: Whether the output head shares the weights of the embedding.
        qk_norm: Whether queries and keys are normalised (Qwen3).
    """

    blocks: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    experts: int = 0
    active: int = 0
    tied: bool = False
    qk_norm: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Decoder:
        """Read a `config.json` of a Llama-like model (Llama, Mistral, Qwen, Mixtral, ...).

        Raises:
            ValueError: The model has parts that the formulas do not describe.
        """
        config = config.get("text_config", config)
        for key in ("n_shared_experts", "shared_expert_intermediate_size", "first_k_dense_replace"):
            if config.get(key):
                raise ValueError(f"cost: the formulas do not describe models with {key}")
        try:
            heads, hidden = config["num_attention_heads"], config["hidden_size"]
            experts = config.get("num_local_experts") or config.get("num_experts") or 0
            return cls(
                blocks=config["num_hidden_layers"],
                hidden=hidden,
                mlp=(experts and config.get("moe_intermediate_size"))
                or config["intermediate_size"],
                heads=heads,
                kv_heads=config.get("num_key_value_heads") or heads,
                head_dim=config.get("head_dim") or hidden // heads,
                vocabulary=config["vocab_size"],
                experts=experts,
                active=config["num_experts_per_tok"] if experts else 0,
                tied=bool(config.get("tie_word_embeddings", False)),
                qk_norm=str(config.get("model_type", "")).startswith("qwen3"),
            )
        except KeyError as error:
            raise ValueError(f"cost: the configuration has no {error}") from None

    @property
    def attention(self) -> dict[str, tuple[int, int]]:
        """Weights of the attention module of one block: name to (O, I)."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q": (queries, self.hidden),
            "k": (keys, self.hidden),
            "v": (keys, self.hidden),
            "o": (self.hidden, queries),
        }

    @property
    def matrices(self) -> list[tuple[int, int, int]]:
        """Scored weights of one block: (how many, O, I)."""
        found = [(1, rows, columns) for rows, columns in self.attention.values()]
        if not self.experts:
            return [*found, (2, self.mlp, self.hidden), (1, self.hidden, self.mlp)]
        router = (1, self.experts, self.hidden)
        gate_up = (self.experts, 2 * self.mlp, self.hidden)
        return [*found, router, gate_up, (self.experts, self.hidden, self.mlp)]

    def block_entries(self, row_fraction: float = 1.0) -> int:
        """Scored entries of one block."""
        return sum(n * math.ceil(row_fraction * o) * i for n, o, i in self.matrices)

    @property
    def active_entries(self) -> int:
        """Entries of one block that a token is multiplied with."""
        attention = sum(rows * columns for rows, columns in self.attention.values())
        one_mlp = 3 * self.hidden * self.mlp
        if not self.experts:
            return attention + one_mlp
        return attention + self.experts * self.hidden + self.active * one_mlp

    @property
    def parameters(self) -> int:
        """All parameters: blocks, norms, embedding and output head."""
        norms = 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.blocks * (self.block_entries() + norms) + self.hidden + embeddings


# From the published configuration files.
MODELS = {
    "SmolLM2-135M": Decoder(30, 576, 1536, 9, 3, 64, 49_152, tied=True),
    "Llama-3.2-1B": Decoder(16, 2048, 8192, 32, 8, 64, 128_256, tied=True),
    "Llama-3.2-3B": Decoder(28, 3072, 8192, 24, 8, 128, 128_256, tied=True),
    "Llama-3.1-8B": Decoder(32, 4096, 14_336, 32, 8, 128, 128_256),
    "Llama-3.1-70B": Decoder(80, 8192, 28_672, 64, 8, 128, 128_256),
    "Qwen3-30B-A3B": Decoder(
        48, 2048, 768, 32, 4, 128, 151_936, experts=128, active=8, qk_norm=True
    ),
    "Mixtral-8x7B": Decoder(32, 4096, 14_336, 32, 8, 128, 32_000, experts=8, active=2),
}
TINY = Decoder(3, 32, 48, 4, 2, 8, 300)


# --- Detection -------------------------------------------------------------------------------


def reference_bytes(
    model: Decoder,
    dtype: str = "bfloat16",
    row_fraction: float = 1.0,
    layers: int | None = None,
    references: int = 2,
) -> int:
    """Memory of the stored reference gradients; 2 for GradCoo, 1 for GradSafe, 0 for "nll"."""
    blocks = model.blocks if layers is None else layers
    return references * blocks * model.block_entries(row_fraction) * DTYPE_BYTES[dtype]


def fit_bytes(model: Decoder, row_fraction: float = 1.0, layers: int | None = None) -> int:
    """Float32 sums that `fit` holds if one group of references needs more than one batch."""
    return reference_bytes(model, "float32", row_fraction, layers, references=1)


def activation_bytes(
    model: Decoder,
    dtype: str = "bfloat16",
    layers: int | None = None,
    padded_to: int = 0,
) -> int:
    """Memory per token that the backward pass of detection needs: what autograd keeps.

    Args:
        model: The model.
        dtype: That of its weights.
        layers: Only the last n blocks are scored; the others keep nothing.
        padded_to: Tokens of the longest prompt of a batch with padding: the attention then keeps a
            mask, and keys and values of every head. 0 for a batch without padding.
    """
    size = DTYPE_BYTES[dtype]
    d, queries = model.hidden, model.heads * model.head_dim
    keys = (model.heads if padded_to else model.kv_heads) * model.head_dim
    kept = size * (2 * d + 2 * queries + 2 * keys + padded_to)  # norms, q, k, v, context, mask
    kept += 4 * (2 * d + 2 + model.heads)  # inputs of both norms, and sums, in float32
    if model.qk_norm:
        kept += 4 * (queries + model.kv_heads * model.head_dim + model.heads + model.kv_heads)
    if model.experts:
        kept += model.active * size * (3 * d + 4 * model.mlp + 1)
        kept += 4 * model.experts + 24 * model.active  # router probabilities and indices
    else:
        kept += size * 4 * model.mlp
    return kept * (model.blocks if layers is None else layers)


def detection_flops(
    model: Decoder,
    tokens: int,
    row_fraction: float = 1.0,
    layers: int | None = None,
    references: int = 2,
) -> dict[str, float]:
    """Operations per prompt of `tokens` tokens, the response of one token included."""
    scored = model.blocks if layers is None else layers
    block = 2 * tokens * model.active_entries + 4 * tokens**2 * model.heads * model.head_dim
    head = 2 * model.hidden * model.vocabulary
    # A token reaches its own experts; a prompt reaches most of them only if it is long.
    entries = model.block_entries(row_fraction)
    if model.experts:
        experts = model.experts * 3 * model.hidden * model.mlp * row_fraction
        unreached = (1 - model.active / model.experts) ** tokens
        entries -= experts * unreached
    return {
        "forward": model.blocks * block + head,
        "backward": scored * (block + 4 * tokens**2 * model.heads * model.head_dim) + head,
        "products": scored * row_fraction * 2 * tokens * model.active_entries,
        "scoring": scored * entries * (4 + 2 * references),
    }


# --- Tracing ---------------------------------------------------------------------------------


def index_bytes(model: Decoder, tokens: int = 0) -> int:
    """Disk space per training sample: the signature, two float32 vectors, and the token ids."""
    return 2 * model.hidden * 4 + 4 * tokens


def signature_flops(model: Decoder, prompt_tokens: int) -> float:
    """Operations per sample for signatures at the last layer: one forward pass of the prompt."""
    block = 2 * prompt_tokens * model.active_entries
    block += 4 * prompt_tokens**2 * model.heads * model.head_dim
    return model.blocks * block + 4 * model.hidden * model.vocabulary


# --- SafeGrad --------------------------------------------------------------------------------


def lora_parameters(model: Decoder, rank: int = 8, targets: tuple[str, ...] = LORA_TARGETS) -> int:
    """Trained parameters of LoRA adapters on attention weights."""
    return model.blocks * sum(rank * sum(model.attention[name]) for name in targets)


def safegrad_bytes(
    model: Decoder, trained: int, dtype: str = "bfloat16", gradient_dtype: str = "float32"
) -> dict[str, int]:
    """Memory that SafeGrad needs beside ordinary fine-tuning."""
    return {
        "stashed gradients": trained * DTYPE_BYTES[gradient_dtype],
        "logits of a KL chunk": 2 * KL_CHUNK * model.vocabulary * DTYPE_BYTES[dtype],
    }


def cached_bytes(model: Decoder, rows: int, tokens: int, dtype: str = "bfloat16") -> int:
    """Host memory of reference="cached": final hidden states of the alignment rows."""
    return rows * tokens * model.hidden * DTYPE_BYTES[dtype]


# --- The table -------------------------------------------------------------------------------


def gigabytes(count: float) -> str:
    """Decimal GB with two digits, smaller amounts in MB or kB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def rows(name: str, model: Decoder, args: argparse.Namespace) -> list[tuple[str, str]]:
    """The costs of one model, as pairs of label and value."""
    part = {"row_fraction": args.row_fraction, "layers": args.layers}
    if args.layers is not None and not 1 <= args.layers <= model.blocks:
        raise ValueError(f"cost: {name} has {model.blocks} blocks, got --layers {args.layers}")
    scored = part["layers"] or model.blocks
    per_token = activation_bytes(model, args.dtype, args.layers)
    flops = detection_flops(model, args.tokens, **part)
    total = sum(flops.values())
    trained = lora_parameters(model)
    stash, logits = safegrad_bytes(model, trained, args.dtype).values()
    result = [
        ("model", name),
        ("parameters", f"{model.parameters / 1e9:.2f} B"),
        ("weights", gigabytes(model.parameters * DTYPE_BYTES[args.dtype])),
        ("scored entries", f"{scored * model.block_entries(args.row_fraction) / 1e9:.3g} B"),
        ("both references", gigabytes(reference_bytes(model, args.reference_dtype, **part))),
        ("fit in several batches", gigabytes(fit_bytes(model, **part))),
        ("activations per token", gigabytes(per_token)),
        ("activations per batch", gigabytes(per_token * args.batch_tokens)),
        ("detection per prompt", f"{total / 1e12:.3g} TFLOP"),
        ("of a forward pass", f"{total / flops['forward']:.2f} x"),
        ("index per sample", gigabytes(index_bytes(model))),
        ("signature per sample", f"{signature_flops(model, args.tokens) / 1e12:.3g} TFLOP"),
        ("SafeGrad, LoRA r 8: stash", gigabytes(stash)),
        ("SafeGrad: KL logits", gigabytes(logits)),
    ]
    if args.tflops:
        rate = args.tflops * 1e12 / total
        result.append((f"prompts/s at {args.tflops:g} TFLOP/s (estimate)", f"{rate:.3g}"))
    return result


def main() -> None:
    """Print the costs of the chosen models as a Markdown table."""
    parser = argparse.ArgumentParser(description="Bytes and FLOPs from a model's configuration.")
    parser.add_argument("--model", choices=MODELS, help="default: all")
    parser.add_argument("--config", type=Path, help="config.json of a model")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, for the tests")
    parser.add_argument("--dtype", choices=DTYPE_BYTES, default="bfloat16", help="of the weights")
    parser.add_argument("--reference_dtype", choices=DTYPE_BYTES, default="bfloat16")
    parser.add_argument("--row_fraction", type=float, default=1.0)
    parser.add_argument("--layers", type=int, help="score the last n blocks only")
    parser.add_argument("--tokens", type=int, default=100, help="tokens per prompt")
    parser.add_argument("--batch_tokens", type=int, default=4096)
    parser.add_argument("--tflops", type=float, help="speed of your device, for an estimate")
    args = parser.parse_args()
    if args.config:
        chosen = {args.config.parent.name: Decoder.from_config(json.loads(args.config.read_text()))}
    elif args.tiny:
        chosen = {"tiny": TINY}
    else:
        chosen = {name: MODELS[name] for name in ([args.model] if args.model else MODELS)}
    columns = [rows(name, model, args) for name, model in chosen.items()]
    for number, line in enumerate(zip(*columns, strict=True)):
        print(f"| {line[0][0]} | {' | '.join(value for _, value in line)} |")
        if number == 0:
            print("|" + " --- |" * (len(columns) + 1))


if __name__ == "__main__":
    main()
