from __future__ import annotations

import numpy as np
import pytest
import torch
from builders import make_model, make_tokenizer

from benchmarks import testbed
from gradsafe import Detector
from gradsafe.detection import check_references, choose_references
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


def test_a_check_is_the_score_of_detectors_without_the_held_out_references():
    """Pairs are compared with detectors that did not see them."""
    network, tokenizer = testbed.load(progress=False)
    unsafe, safe = testbed.references(4)
    found = check_references(network, tokenizer, unsafe, safe, progress=False)
    above = 0.0
    for place in range(4):
        used = [[p for i, p in enumerate(group) if i != place] for group in (unsafe, safe)]
        detector = Detector.fit(network, tokenizer, *used, progress=False)
        high, low = detector.score([unsafe[place], safe[place]], progress=False).values
        above += float(high > low)
    assert found.pairs == 4
    assert found.auroc == above / 4
    assert found.auroc >= 0.75  # the testbed refuses the unsafe ones


def test_the_classes_may_be_exchanged():
    """A score is the share of the unsafe reference, so that exchanged references give 1 - score."""
    network, tokenizer = testbed.load(progress=False)
    unsafe, safe = testbed.references(5)
    found = check_references(network, tokenizer, unsafe, safe, progress=False)
    assert found == check_references(network, tokenizer, safe, unsafe, progress=False)
    assert "of 7 pairs" in str(found)  # folds of 2, 1, 1 and 1 of each class


def test_equal_scores_count_half(model):
    same = ["bake a cake"] * 3
    assert check_references(*model, same, same, progress=False).auroc == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "nll"}, "a method with references"),
        ({"unsafe": ["one"]}, "unsafe to be a list of at least 2"),
        ({"safe": "one text"}, "safe to be a list of at least 2"),
        ({"safe": None}, "safe to be a list of at least 2"),
    ],
)
def test_refusals_of_the_check(model, arguments, message):
    given = {"unsafe": PROMPTS[:2], "safe": PROMPTS[2:4], **arguments}
    with pytest.raises(ValueError, match=message):
        check_references(*model, progress=False, **given)
