from __future__ import annotations

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from builders import FAMILIES, make_model, make_tokenizer
from sklearn.metrics import roc_auc_score

from benchmarks import testbed
from benchmarks.testbed.corpus import fresh_rows
from gradsafe import Detector
from gradsafe._io.artifacts import StorageError
from gradsafe.detection import Learning, UncalibratedWarning
from gradsafe.detection.detector import pack, unpack
from gradsafe.detection.learned import candidate_blocks
from gradsafe.detection.learning import check_labels, learn_weights
from gradsafe.models import collate, encode, find_layers, response_nll
from gradsafe.models.compat import enable_checkpointing
from gradsafe.models.hidden import hidden_states

UNSAFE, SAFE = ["how to hurt", "steal it now please"], ["bake a cake", "sing"]
PROMPTS = [f"please {verb} it {'now ' * i}" for i in range(6) for verb in ("hurt", "bake")]
LABELS = [1, 0] * 6
FEATURES = ["components", "hidden", "both"]

pytestmark = pytest.mark.filterwarnings("ignore::gradsafe.detection.ReferenceGapWarning")


def fit(model, tokenizer, **options):
    return Detector.fit(model, tokenizer, UNSAFE, SAFE, progress=False, **options)


def learned(model, tokenizer, features="both", layer=None, prompts=PROMPTS, **options):
    detector = fit(model, tokenizer, **options)
    detector.learn(prompts, LABELS, features=features, layer=layer, progress=False)
    return detector


def score(detector, prompts=PROMPTS, **options):
    return detector.score(prompts, progress=False, **options)


@pytest.fixture(scope="module")
def trained():
    """A detector of the testbed, 25 labelled prompts a class, and held-out prompts."""
    model, tokenizer = testbed.load(progress=False)
    rows = {
        label: [
            row["prompt"] for row in fresh_rows("heldout", 125, 75, 50) if row["label"] == label
        ]
        for label in ("unsafe", "safe")
    }
    labelled = rows["unsafe"][:25] + rows["safe"][:25]
    heldout = rows["unsafe"][25:] + rows["safe"][25:]
    labels = [1] * (len(rows["unsafe"]) - 25) + [0] * (len(rows["safe"]) - 25)
    unsafe, safe = testbed.references(4)
    detector = Detector.fit(model, tokenizer, unsafe, safe, progress=False)
    return detector, labelled, [True] * 25 + [False] * 25, heldout, labels


class TestQuality:
    def test_labels_help_on_held_out_prompts(self, trained):
        """The mean of four draws of 25 labels a class: one draw moves the AUROC by 0.02."""
        detector, prompts, labels, heldout, truth = trained
        prompts, labels = np.array(prompts + heldout, dtype=object), np.array([*labels, *truth])
        detector = Detector(detector.model, detector.tokenizer, detector.state)
        plain = score(detector, prompts.tolist()).values.numpy()
        found = {name: [] for name in ("plain", *FEATURES)}
        for draw in range(4):
            rng = np.random.default_rng(draw)
            chosen = np.concatenate(
                [rng.permutation(np.flatnonzero(labels == k))[:25] for k in (0, 1)]
            )
            rest = np.setdiff1d(np.arange(len(labels)), chosen)
            found["plain"].append(roc_auc_score(labels[rest], plain[rest]))
            for features in FEATURES:
                learning = detector.learn(
                    prompts[chosen].tolist(), labels[chosen], features=features, progress=False
                )
                assert (learning.unsafe, learning.safe) == (25, 25)
                values = score(detector, prompts[rest].tolist(), components=False).values
                found[features].append(roc_auc_score(labels[rest], values))
        mean = {name: np.mean(values) for name, values in found.items()}
        assert mean["components"] > mean["plain"] + 0.01
        assert mean["hidden"] > mean["plain"] + 0.01
        assert mean["both"] > max(mean["components"], mean["hidden"]) - 0.01

    def test_flags_after_learning_and_calibration(self, trained):
        detector, prompts, labels, heldout, truth = trained
        detector.learn(prompts, labels, progress=False)
        assert detector.threshold is None
        with pytest.warns(UncalibratedWarning, match=r"default threshold 0\.0"):
            flags = detector.flag(heldout, progress=False)
        assert torch.equal(flags, score(detector, heldout).values > 0)
        assert (flags.numpy() == np.array(truth)).mean() > 0.8
        benign = [p for p, label in zip(heldout, truth, strict=True) if not label]
        detector.calibrate(benign[::2], max_fpr=0.1, progress=False)
        flags = detector.flag(benign[1::2], progress=False)
        assert flags.float().mean() < 0.25
        detector.learn(prompts, labels, progress=False)
        assert detector.calibration is None

    def test_labels_without_a_pattern_are_not_learned(self, trained):
        detector, prompts, _, heldout, _ = trained
        shuffled = torch.randperm(50).remainder(2).tolist()
        learning = detector.learn(prompts, shuffled, progress=False)
        assert learning.auroc < 0.75
        assert score(detector, heldout).values.abs().max() < 3


class TestRegression:
    @pytest.mark.parametrize("width", [1, 7, 300])
    def test_weights_belong_to_the_unscaled_features(self, width):
        rng = np.random.default_rng(0)
        labels = np.arange(40) % 2
        blocks = 5 + 100 * rng.normal(size=(40, width)) * np.arange(1, width + 1)
        blocks[:, 0] += 300 * labels
        layer, auroc, got = learn_weights(None, {3: blocks}, labels)
        _, _, scaled = learn_weights(None, {3: blocks / 7 + 2}, labels)
        assert layer == 3
        assert auroc > 0.6
        log_odds = blocks @ got["hidden"] + got["bias"].sum()
        again = (blocks / 7 + 2) @ scaled["hidden"] + scaled["bias"].sum()
        assert np.allclose(log_odds, again, atol=1e-6)
        assert (blocks @ got["hidden"] + got["bias"][1]).mean() == pytest.approx(0, abs=1e-9)

    def test_both_blocks_count_alike_whatever_their_width(self):
        rng = np.random.default_rng(0)
        labels = np.arange(60) % 2
        signal = labels[:, None] + rng.normal(size=(60, 1))
        narrow, wide = np.repeat(signal, 2, 1), np.repeat(signal, 500, 1) * 1e3
        _, _, got = learn_weights(narrow, {0: wide}, labels)
        parts = narrow @ got["components"], wide @ got["hidden"]
        assert parts[0].std() == pytest.approx(parts[1].std(), rel=1e-3)

    def test_the_informative_layer_is_chosen_and_the_last_with_few_labels(self):
        rng = np.random.default_rng(0)
        labels = np.arange(40) % 2
        states = {i: rng.normal(size=(40, 5)) for i in (1, 2, 3)}
        states[2][:, 0] += 3 * labels
        assert learn_weights(None, states, labels)[0] == 2
        few = {i: s[:8] for i, s in states.items()}
        assert learn_weights(None, few, labels[:8])[0] == 3

    def test_a_rare_class_does_not_move_the_neutral_score(self):
        rng = np.random.default_rng(0)
        labels = (np.arange(400) % 10 == 0).astype(int)
        states = rng.normal(size=(400, 3)) + 1.5 * labels[:, None]
        _, _, got = learn_weights(None, {0: states}, labels)
        log_odds = states @ got["hidden"] + got["bias"].sum()
        wrong = [np.mean((log_odds > 0)[labels == k] != k) for k in (0, 1)]
        assert max(wrong) < 0.25

    def test_constant_columns_get_no_weight(self):
        labels = np.arange(10) % 2
        columns = np.stack([np.full(10, 0.5), labels + 0.1 * np.arange(10)], 1)
        _, _, got = learn_weights(columns, {}, labels)
        assert got["components"][0] == 0
        assert np.isfinite(got["bias"]).all()
        assert set(got) == {"components", "bias"}


class TestScores:
    @pytest.mark.parametrize("features", FEATURES)
    def test_a_score_is_linear_in_components_and_hidden_state(self, model, tokenizer, features):
        detector = learned(model, tokenizer, features)
        got, weights = score(detector), detector.state.learned
        expected = weights["bias"].sum()
        if features != "hidden":
            expected = expected + got.components.double() @ weights["components"]
        if features != "components":
            states = torch.cat([state_of(detector, prompt) for prompt in PROMPTS])
            expected = expected + states.double() @ weights["hidden"]
        assert torch.allclose(got.values.double(), expected, atol=1e-4)
        assert torch.allclose(got.components, score(fit(model, tokenizer)).components, rtol=1e-5)
        assert got.backward.all()

    @pytest.mark.parametrize("features", FEATURES)
    def test_order_batches_and_kept_components_do_not_matter(self, model, tokenizer, features):
        detector = learned(model, tokenizer, features)
        expected = score(detector).values
        for other in (
            score(detector, batch_tokens=1).values,
            score(detector, PROMPTS[::-1]).values.flip(0),
            score(detector, components=False).values,
        ):
            assert torch.allclose(other, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(score(detector).values, expected)

    def test_the_hidden_state_alone_needs_no_backward_pass(self, model, tokenizer):
        got = score(learned(model, tokenizer, "hidden"), components=False)
        assert not got.backward.any()
        assert torch.isfinite(got.nll).all()
        assert score(learned(model, tokenizer, "both"), components=False).backward.all()

    def test_learning_is_deterministic_and_starts_anew(self, model, tokenizer):
        detector, other = (learned(model, tokenizer) for _ in range(2))
        assert detector.learning == other.learning
        other.learn(PROMPTS, LABELS[::-1], features="hidden", layer=0, progress=False)
        other.learn(
            other.encode(PROMPTS), np.array(LABELS, dtype=bool), features="both", progress=False
        )
        assert detector.learning == other.learning
        assert torch.equal(score(detector).values, score(other).values)

    def test_exchanged_labels_turn_the_score_round(self, model, tokenizer):
        there, back = fit(model, tokenizer), fit(model, tokenizer)
        there.learn(PROMPTS, LABELS, layer=0, progress=False)
        back.learn(PROMPTS, [1 - label for label in LABELS], layer=0, progress=False)
        assert torch.allclose(score(there).values, -score(back).values, rtol=1e-2, atol=1e-3)

    @pytest.mark.parametrize("options", [{"turns": "worst"}, {"overflow": "window"}], ids=str)
    def test_of_several_windows_the_worst_is_learned_and_scored(self, model, tokenizer, options):
        plain = fit(model, tokenizer, **options)
        if "turns" in options:
            prompts = [
                [
                    {"role": "user", "content": "hello"},
                    {"role": "assistant", "content": "hi"},
                    {"role": "user", "content": text},
                ]
                for text in PROMPTS
            ]
        else:
            prompts = [text + "z" * 100 + text for text in PROMPTS]
        encoded = plain.encode(prompts)
        assert all(len(windows) > 1 for windows in encoded.windows)
        parts = [
            [dataclasses.replace(encoded, names=["w"], windows=[[w]]) for w in windows]
            for windows in encoded.windows
        ]
        worst = [max(ws, key=lambda w: float(score(plain, w).values)) for ws in parts]
        kept = dataclasses.replace(encoded, windows=[list(w.windows[0]) for w in worst])
        detector, other = plain, fit(model, tokenizer, **options)
        detector.learn(encoded, LABELS, progress=False)
        other.learn(kept, LABELS, progress=False)
        assert torch.allclose(score(detector, kept).values, score(other, kept).values, atol=1e-3)
        highest = [max(float(score(detector, w).values) for w in ws) for ws in parts]
        assert torch.allclose(score(detector, encoded).values, torch.tensor(highest), atol=1e-4)

    def test_threads_see_their_own_hidden_states(self, model, tokenizer):
        detector = learned(model, tokenizer)
        parts = [PROMPTS[i : i + 3] for i in range(0, len(PROMPTS), 3)] * 2
        expected = [score(detector, part).values for part in parts]

        def work(index):
            if index % 2:  # a plain forward pass at the same time
                model(torch.arange(40)[None])
            return score(detector, parts[index]).values

        with ThreadPoolExecutor(4) as pool:
            got = list(pool.map(work, range(len(parts))))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def state_of(detector, prompt):
    """The hidden state by definition: the batch of one, `output_hidden_states` of transformers."""
    item = encode(detector.tokenizer, prompt, "Sure")
    with torch.no_grad():
        output = detector.model(torch.tensor([item.input_ids]), output_hidden_states=True)
    # The last entry has gone through the final norm; the tests learn from earlier blocks.
    assert detector.learning.layer + 2 < len(output.hidden_states)
    return output.hidden_states[detector.learning.layer + 1][:, item.prompt_length - 1]


class TestHiddenStates:
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_the_last_prompt_token_under_padding(self, model, tokenizer, side):
        blocks = find_layers(model).blocks
        hooks = [dict(block._forward_hooks) for block in blocks]  # transformers has its own
        items = [encode(tokenizer, prompt, "Sure") for prompt in PROMPTS]
        batch = collate(items, 0, side)
        with torch.no_grad(), hidden_states(blocks, (0, 1), batch) as together:
            response_nll(model, batch)
        for index, item in enumerate(items):
            with torch.no_grad(), hidden_states(blocks, (0, 1), collate([item], 0)) as alone:
                response_nll(model, collate([item], 0))
            for block in (0, 1):
                assert torch.allclose(together[block][index], alone[block][0], atol=1e-5)
                assert together[block].dtype == torch.float32
        assert [dict(block._forward_hooks) for block in blocks] == hooks

    @pytest.mark.parametrize("family", sorted(FAMILIES))
    def test_every_family(self, family):
        tokenizer = make_tokenizer()
        detector = learned(make_model(family, vocab_size=300), tokenizer, template="{prompt}: ")
        assert torch.isfinite(score(detector).values).all()

    def test_checkpointing_and_lora_change_nothing(self, model, tokenizer):
        peft = pytest.importorskip("peft")
        expected = learned(model, tokenizer)
        checkpointed = make_model("llama", vocab_size=300, max_position_embeddings=128).train()
        enable_checkpointing(checkpointed)
        base = make_model("llama", vocab_size=300, max_position_embeddings=128)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
        for other in (checkpointed, peft.get_peft_model(base, config)):
            got = learned(other, tokenizer, layer=expected.learning.layer)
            assert torch.allclose(score(got).values, score(expected).values, atol=1e-3)

    def test_scoring_the_last_blocks_reads_earlier_ones(self, model, tokenizer):
        detector = learned(model, tokenizer, layer=0, layers=1)
        assert detector.learning.layer == 0
        states = torch.cat([state_of(detector, prompt) for prompt in PROMPTS])
        part = states.double() @ detector.state.learned["hidden"]
        assert part.std() > 0.01

    def test_candidates(self):
        assert candidate_blocks(30) == (9, 14, 19)
        assert candidate_blocks(2) == (0,)
        assert candidate_blocks(1) == (0,)

    def test_blocks_without_hidden_states_are_refused(self, model, tokenizer, monkeypatch):
        monkeypatch.setattr(
            "gradsafe.models.hidden.own", lambda hook: lambda m, a, o: hook(m, a, 1)
        )
        with pytest.raises(ValueError, match=r"block 0 to return .*features=.components."):
            learned(model, tokenizer)


class TestExplanations:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"granularity": "row+column", "reduce": "weighted"},
            {"relative": "difference"},
            {"unsigned": False},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("features", ["components", "both"])
    def test_constant_evidence_and_hidden_evidence_add_up(
        self, model, tokenizer, features, options
    ):
        detector = learned(model, tokenizer, features, reference_dtype="float32", **options)
        constants = []
        for prompt in PROMPTS[:3]:
            got, scores = detector.explain(prompt), score(detector, [prompt])
            assert got.score == float(scores.values)
            assert got.score == pytest.approx(
                got.constant + got.total + got.hidden_evidence, abs=1e-5
            )
            size = float(got.component_evidence.abs().sum())
            assert float(got.token_evidence.double().sum()) == pytest.approx(
                got.total, abs=1e-4 * size
            )
            assert float(got.component_evidence.double().sum()) == pytest.approx(
                got.total, abs=1e-5 * size
            )
            share = detector.config.relative == "share" and detector.config.unsigned
            parts = scores.components[0].double() - 0.5 * share
            parts *= detector.state.learned["components"]
            assert torch.allclose(got.component_evidence.double(), parts, atol=1e-5 * size)
            assert (got.hidden_evidence != 0) == (features == "both")
            constants.append(got.constant)
        assert constants == pytest.approx(constants[:1] * 3, abs=1e-6)
        assert json.loads(json.dumps(got.to_json()))["constant"] == got.constant

    def test_the_worst_window_is_explained(self, model, tokenizer):
        detector = learned(model, tokenizer, overflow="window")
        got = detector.explain("a" * 150 + "hurt" + "b" * 150)
        assert got.windows > 1
        assert got.score == pytest.approx(got.constant + got.total + got.hidden_evidence, abs=1e-5)

    def test_without_learning_nothing_is_added(self, model, tokenizer):
        got = fit(model, tokenizer).explain(PROMPTS[0])
        assert got.constant is None
        assert got.hidden_evidence == 0

    def test_the_hidden_state_alone_is_refused(self, model, tokenizer):
        with pytest.raises(ValueError, match=r"features=.hidden., whose evidence has no parts"):
            learned(model, tokenizer, "hidden").explain(PROMPTS[0])


class TestStorage:
    @pytest.mark.parametrize("features", FEATURES)
    def test_a_loaded_detector_scores_bit_by_bit_the_same(
        self, model, tokenizer, features, tmp_path
    ):
        detector = learned(model, tokenizer, features)
        detector.calibrate([f"benign {i}" for i in range(20)], max_fpr=0.2, progress=False)
        detector.save(tmp_path / "saved")
        loaded = Detector.load(tmp_path / "saved", model, tokenizer)
        before, after = score(detector), score(loaded)
        assert torch.equal(before.values, after.values)
        assert torch.equal(before.components, after.components)
        assert (loaded.learning, loaded.threshold) == (detector.learning, detector.threshold)

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            (lambda t, m: t.pop("learned/hidden"), "no tensor learned/hidden"),
            (lambda t, m: t.update({"learned/bias": torch.zeros(3).double()}), r"is \[3\]"),
            (lambda t, m: t["learned/components"].fill_(torch.nan), "components holds NaN"),
            (
                lambda t, m: t.update({"learned/hidden": torch.zeros(9).double()}),
                r"hidden is \[9\]",
            ),
            (lambda t, m: t.update({"learned/bias": torch.zeros(2)}), "torch.float32, expected"),
            (lambda t, m: m["learning"].update(layer=3), "has no block 3"),
            (lambda t, m: m["learning"].update(layer=-1), "malformed: expected a layer"),
            (lambda t, m: m["learning"].update(layer=None), "malformed: expected a layer"),
            (lambda t, m: m["learning"].update(features="all"), "Invalid enum value"),
            (lambda t, m: m["learning"].update(safe=1), "two labels of each class"),
            (lambda t, m: m.pop("learning"), "missing required field `learning`"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, model, tokenizer, change, text):
        tensors, metadata = pack(learned(model, tokenizer))
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        metadata = json.loads(json.dumps(metadata))
        change(tensors, metadata)
        with pytest.raises(StorageError, match=text):
            unpack("here", tensors, metadata, model, tokenizer)

    def test_no_other_method_has_learned(self, model, tokenizer):
        learning = pack(learned(model, tokenizer))[1]["learning"]
        tensors, metadata = pack(Detector.fit(model, tokenizer, method="nll"))
        with pytest.raises(StorageError, match="method nll learns no labels"):
            unpack("here", tensors, {**metadata, "learning": learning}, model, tokenizer)


class TestErrors:
    @pytest.mark.parametrize(
        ("labels", "error", "text"),
        [
            (
                [1] * 12,
                ValueError,
                "at least 2 labelled prompts of each class, got 12 unsafe and 0",
            ),
            ([1] + [0] * 11, ValueError, "of each class, got 1 unsafe and 11 safe"),
            ([], ValueError, "one label for each of the 12 prompts, got 0 labels"),
            (LABELS[:-1], ValueError, "each of the 12 prompts, got 11 labels"),
            ([*LABELS[:-1], float("nan")], ValueError, r"labels\[11\] to be 1 .*, got nan"),
            ([2, *LABELS[1:]], ValueError, r"labels\[0\] to be 1 \(unsafe\) or 0 \(safe\), got 2"),
            ([0.5, *LABELS[1:]], ValueError, r"labels\[0\]"),
            (["unsafe", *LABELS[1:]], ValueError, r"labels\[0\] to be 1 .*, got 'unsafe'"),
            ([None, *LABELS[1:]], ValueError, r"labels\[0\]"),
            (torch.tensor(LABELS)[:, None], ValueError, r"labels\[0\] to be 1 .*, got \[1\]"),
            ("101010101010", TypeError, "labels to be a list, got str"),
            (None, TypeError, "labels to be a list, got NoneType"),
        ],
    )
    def test_labels(self, model, tokenizer, labels, error, text):
        detector = fit(model, tokenizer)
        before = detector.state
        with pytest.raises(error, match=text):
            detector.learn(PROMPTS, labels, progress=False)
        assert detector.state is before

    def test_label_types(self):
        expected = np.array(LABELS)
        for labels in (torch.tensor(LABELS), expected.astype(bool), [bool(x) for x in LABELS]):
            assert np.array_equal(check_labels(labels, 12), expected)
        assert np.array_equal(check_labels(expected.astype(float), 12), expected)

    @pytest.mark.parametrize(
        ("options", "error", "text"),
        [
            ({"features": "all"}, ValueError, "features to be one of components, hidden, both"),
            ({"layer": 3}, ValueError, "-3 <= layer < 3"),
            ({"layer": -4}, ValueError, "-3 <= layer < 3"),
            ({"layer": 0, "features": "components"}, ValueError, 'features="both" or "hidden"'),
            ({"layer": 0.5}, TypeError, "layer to be a whole number or None"),
        ],
    )
    def test_options(self, model, tokenizer, options, error, text):
        with pytest.raises(error, match=text):
            fit(model, tokenizer).learn(PROMPTS, LABELS, progress=False, **options)

    @pytest.mark.parametrize("method", ["nll", "gradnorm", "gradsafe", "cascade"])
    def test_other_methods(self, model, tokenizer, method):
        options = {"gap": 0.1} if method == "gradsafe" else {}
        with pytest.raises(ValueError, match=f'method="gradcoo", got {method!r}'):
            fit(model, tokenizer, method=method, **options).learn(PROMPTS, LABELS)

    def test_values_that_are_not_finite(self, model, tokenizer):
        # A ratio to a reference of zeros is infinite.
        detector = fit(model, tokenizer, relative="ratio")
        safe = detector.state.references["safe"]
        for weight in safe.weights.values():
            weight.zero_()
        with pytest.raises(
            ValueError, match=r"finite component values, got NaN or Inf for prompts"
        ):
            detector.learn(PROMPTS, LABELS, progress=False)

    def test_negative_layers_count_from_the_end(self, model, tokenizer):
        assert learned(model, tokenizer, layer=-2).learning.layer == 1

    def test_a_summary_names_what_was_learned(self):
        learning = Learning("both", 3, 10, 12, 0.9, 0.8)
        assert str(learning) == (
            "learned from 10 unsafe and 12 safe prompts with components and the hidden state of "
            "block 3: cross-validated AUROC 0.900, before 0.800"
        )
