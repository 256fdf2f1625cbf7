from __future__ import annotations

import numpy as np
import pytest
import torch
from builders import make_model, make_tokenizer

from gradsafe.detection import choose_references
from gradsafe.models import collate, encode, find_layers
from gradsafe.models.hidden import hidden_states

PROMPTS = [f"please {verb} it {'now ' * i}" for i in range(5) for verb in ("hurt", "bake")]
LABELS = [1, 0] * 5


@pytest.fixture(scope="module")
def model():
    return make_model("llama", vocab_size=300, max_position_embeddings=128), make_tokenizer()


def states(model, tokenizer, prompts, block):
    """Hidden states at the last prompt token, one prompt at a time."""
    blocks = find_layers(model).blocks
    found = []
    for prompt in prompts:
        batch = collate([encode(tokenizer, prompt, "Sure")], 0)
        with torch.no_grad(), hidden_states(blocks, (block,), batch) as kept:
            model(batch.input_ids)
        found.append(kept[block][0].double().numpy())
    return np.stack(found)


@pytest.mark.parametrize("layer", [0, -1])
@pytest.mark.parametrize("batch_tokens", [1, 4096])
def test_chosen_ones_are_nearest_to_the_mean_of_their_class(model, layer, batch_tokens):
    unsafe, safe = choose_references(
        *model, PROMPTS, LABELS, 2, layer=layer, batch_tokens=batch_tokens, progress=False
    )
    found = states(*model, PROMPTS, layer % 3)
    for chosen, label in ((unsafe, 1), (safe, 0)):
        rows = [i for i, given in enumerate(LABELS) if given == label]
        distances = np.linalg.norm(found[rows] - found[rows].mean(0), axis=1)
        assert chosen == [rows[i] for i in distances.argsort()[:2]]


def test_the_middle_block_is_the_default(model):
    blocks = len(find_layers(model[0]).blocks)
    default = choose_references(*model, PROMPTS, LABELS, 3, progress=False)
    middle = choose_references(*model, PROMPTS, LABELS, 3, layer=blocks // 2, progress=False)
    assert default == middle


def test_a_long_prompt_counts_once(model):
    long = ["please bake " * 40, *PROMPTS]
    network, tokenizer = model[0], make_tokenizer()
    tokenizer.model_max_length = 96
    unsafe, safe = choose_references(
        *(network, tokenizer, long, [0, *LABELS], 5), overflow="window", progress=False
    )
    assert len({*unsafe}) == 5
    assert len({*safe}) == 5
    assert {*unsafe} == {i + 1 for i, label in enumerate(LABELS) if label == 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "expected count >= 1"),
        ({"count": 6}, "expected at least 6 prompts labelled unsafe, got 5"),
        ({"layer": 9}, "-3 <= layer < 3, got layer=9"),
        ({"labels": [1, 0]}, "one label for each of the 10 prompts"),
        ({"labels": [2] * 10}, r"labels\[0\] to be 1"),
    ],
)
def test_refusals_of_choosing(model, arguments, message):
    given = {"labels": LABELS, "count": 2, **arguments}
    with pytest.raises(ValueError, match="choose_references") as error:
        choose_references(*model, PROMPTS, progress=False, **given)
    assert error.match(message)
