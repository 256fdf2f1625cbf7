from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
from builders import make_model, make_tokenizer
from datasets import Dataset
from torch.nn import functional
from trace_samples import EXAMPLES, QUERIES, build, files

import gradsafe
from gradsafe import TraceIndex, tracing
from gradsafe._io.artifacts import StorageError
from gradsafe.models import ContextOverflowError, encode
from gradsafe.tracing import IncompleteIndexWarning, signatures


@pytest.fixture(scope="module")
def built(model, tokenizer, tmp_path_factory):
    return build(model, tokenizer, tmp_path_factory.mktemp("index") / "index")


@pytest.fixture
def index(built, model, tokenizer, tmp_path):
    """A copy that a test may damage."""
    shutil.copytree(built.path, tmp_path / "index")
    return TraceIndex.load(tmp_path / "index", model, tokenizer)


def raw(model, tokenizer, rows, layer=2):
    items = [encode(tokenizer, row["prompt"], row["response"]) for row in rows]
    return signatures(model, items, [layer], 0)[layer].double()


def brute_force(train, test, part_norm, weight=None):
    half = train.shape[1] // 2
    if part_norm == "zscore":
        mean, std = train.mean(0), train.std(0, unbiased=False)
        train, test = (train - mean) / std, (test - mean) / std
    if part_norm == "unit":
        train, test = (
            torch.cat([functional.normalize(r[:, :half]), functional.normalize(r[:, half:])], 1)
            for r in (train, test)
        )
    if weight is None:
        weight = {"none": None, "unit": 0.05, "zscore": 0.5}[part_norm]
    if weight is not None:
        factors = torch.tensor([(1 - weight) ** 0.5] * half + [weight**0.5] * half).double()
        train, test = train * factors, test * factors
    return functional.cosine_similarity(test[:, None], train[None], dim=2)


@pytest.mark.parametrize(
    ("part_norm", "weight"),
    [("none", None), ("unit", None), ("unit", 0.05), ("zscore", None), ("zscore", 0.3)],
)
def test_a_query_equals_brute_force_over_all_pairs(model, tokenizer, built, part_norm, weight):
    hits = built.query(QUERIES, k=23, part_norm=part_norm, gradient_weight=weight)
    train, test = raw(model, tokenizer, EXAMPLES), raw(model, tokenizer, QUERIES)
    expected = brute_force(train, test, part_norm, weight)
    assert hits.scores.shape == hits.positions.shape == (3, 23)
    assert hits.scores.dtype == torch.float32
    torch.testing.assert_close(
        hits.scores.double(), expected.gather(1, hits.positions), rtol=0, atol=2e-5
    )
    assert (hits.scores.diff(dim=1) <= 0).all()
    for ids, positions in zip(hits.ids, hits.positions.tolist(), strict=True):
        assert ids == [EXAMPLES[i]["id"] for i in positions]
        assert sorted(positions) == list(range(23))
    few = built.query(QUERIES, k=5, part_norm=part_norm, gradient_weight=weight)
    assert few.ids == [ids[:5] for ids in hits.ids]
    assert torch.equal(few.scores, hits.scores[:, :5])


def test_a_sample_finds_itself_first(built):
    hits = built.query([EXAMPLES[i] for i in (0, 9, 22)], k=2)
    assert [ids[0] for ids in hits.ids] == ["s0", "s9", "s22"]
    assert (hits.scores[:, 0] > 1 - 1e-5).all()
    assert built.query(EXAMPLES[4], k=1).ids == [["s4"]]


def test_the_default_gives_the_gradient_a_twentieth(built):
    assert built.part_norm == "unit"
    scores = built.query(QUERIES, 3).scores
    again = built.query(QUERIES, 3, part_norm="unit", gradient_weight=0.05)
    assert torch.equal(scores, again.scores)


def test_the_layer_is_the_one_asked_for(model, tokenizer, tmp_path):
    index = build(model, tokenizer, tmp_path / "a", layer="last", part_norm="none")
    assert index.layer == 3
    assert index.layer_curve is None
    train, test = raw(model, tokenizer, EXAMPLES, 3), raw(model, tokenizer, QUERIES, 3)
    best = brute_force(train, test, "none").max(1).values
    torch.testing.assert_close(
        index.query(QUERIES, 1).scores[:, 0].double(), best, rtol=0, atol=2e-5
    )


def test_sources_of_examples(model, tokenizer, built, tmp_path):
    lines = "".join(json.dumps(row) + "\n" for row in EXAMPLES)
    (tmp_path / "examples.jsonl").write_text(lines)
    sources = [str(tmp_path / "examples.jsonl"), Dataset.from_list(EXAMPLES)]
    for number, source in enumerate(sources):
        index = build(model, tokenizer, tmp_path / str(number), source)
        assert files(index.path) == files(built.path)


def test_the_formats_of_trl(model, tokenizer, tmp_path):
    shapes = [
        lambda prompt, response: {"prompt": prompt, "completion": response},
        lambda prompt, response: {"prompt": [user(prompt)], "response": response},
        lambda prompt, response: {"prompt": [user(prompt)], "completion": [reply(response)]},
        lambda prompt, response: {"messages": [user(prompt), reply(response)]},
    ]

    def user(text):
        return {"role": "user", "content": text}

    def reply(text):
        return {"role": "assistant", "content": text}

    def rows(samples, number):
        changed = [
            shapes[(i + number) % 4](row["prompt"], row["response"])
            for i, row in enumerate(samples)
        ]
        return [{**row, "id": f"s{i}"} for i, row in enumerate(changed)]

    plain = build(model, tokenizer, tmp_path / "plain")
    for number in range(4):
        index = build(model, tokenizer, tmp_path / str(number), rows(EXAMPLES, number))
        a, b = plain.query(QUERIES, 5), index.query(rows(QUERIES, number), 5)
        assert a.ids == b.ids
        assert torch.equal(a.scores, b.scores)
    turns = [user("hi"), reply("hello"), user("why 7")]
    assert build(model, tokenizer, None, [{"prompt": turns, "response": "so 49"}]).ids == [0]
    for row, error, message in [
        ({"messages": [user("a")]}, ValueError, r"examples\[0\]: .* end with .* the assistant"),
        ({"prompt": [3], "response": "b"}, TypeError, r"examples\[0\]: .* list of messages"),
    ]:
        with pytest.raises(error, match=message):
            build(model, tokenizer, tmp_path / "refused", [row])


def test_every_sample_is_encoded_once(model, tokenizer, tmp_path, monkeypatch):
    encoded: list[str] = []

    def counted(tokenizer, prompt, *rest):
        encoded.append(prompt)
        return encode(tokenizer, prompt, *rest)

    monkeypatch.setattr("gradsafe.tracing.examples.encode", counted)
    prompts = [row["prompt"] for row in EXAMPLES]
    index = build(model, tokenizer, tmp_path / "a", EXAMPLES[:8], layer="auto")
    assert encoded == prompts[:8]
    index.extend(EXAMPLES[8:], progress=False)
    assert encoded == prompts
    (index.path / "shard-000001.safetensors").unlink()
    TraceIndex.repair(index.path)
    with pytest.warns(IncompleteIndexWarning):
        index = TraceIndex.load(index.path, model, tokenizer)
    index.extend(EXAMPLES[8:], progress=False)
    assert encoded == prompts + prompts[8:16]  # those of the shard alone


def test_samples_without_an_id_are_numbered(model, tokenizer, tmp_path):
    rows = [{"prompt": r["prompt"], "response": r["response"]} for r in EXAMPLES[:5]]
    index = build(model, tokenizer, None, rows)
    assert index.ids == [0, 1, 2, 3, 4]
    index.extend([{"prompt": "more", "response": "yes"}], progress=False)
    assert index.ids == [0, 1, 2, 3, 4, 5]
    index.save(tmp_path / "saved")
    assert TraceIndex.load(tmp_path / "saved", model, tokenizer).ids == index.ids


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([], ValueError, "at least one sample"),
        ([{"prompt": "a"}], ValueError, r"examples\[0\]: the field 'response' is missing"),
        ([EXAMPLES[0], {"prompt": "a", "response": ""}], ValueError, r"examples\[1\].*empty"),
        ([{"prompt": "a", "response": None}], ValueError, "'response' is missing"),
        (
            [{"prompt": "a", "response": 3}],
            TypeError,
            "'response' must be text or a list of messages, got int",
        ),
        (
            [EXAMPLES[0], EXAMPLES[1], EXAMPLES[0]],
            ValueError,
            r"examples\[2\]: id 's0' already belongs to examples\[0\]",
        ),
        ([{"id": 1.5, "prompt": "a", "response": "b"}], TypeError, "'id' must be text"),
        (["text"], TypeError, r"examples\[0\]: expected a dict"),
        ({"prompt": "a", "response": "b"}, TypeError, "a list of dicts"),
        ("nowhere.jsonl", FileNotFoundError, "nowhere"),
        ([{"prompt": "a" * 100, "response": "b"}], ContextOverflowError, r"examples\[0\]"),
        ([{"prompt": "a", "response": "b" * 100}], ContextOverflowError, r"examples\[0\]"),
        ([*EXAMPLES, {"prompt": "a" * 100, "response": "b"}], ContextOverflowError, r"\[23\]"),
    ],
)
def test_bad_examples_are_named_and_nothing_is_left(
    model, tokenizer, tmp_path, rows, error, message
):
    with pytest.raises(error, match=message):
        build(model, tokenizer, tmp_path / "index", rows)
    assert not (tmp_path / "index").exists()


def test_a_file_names_the_line(model, tokenizer, tmp_path):
    path = tmp_path / "e.jsonl"
    for second, message in [
        ({"prompt": "x"}, "the field 'response' is missing"),
        ({"prompt": "x", "response": "y", "id": 1.5}, "the field 'id' must be text or an integer"),
    ]:
        path.write_text(json.dumps(EXAMPLES[0]) + "\n\n" + json.dumps(second) + "\n")
        with pytest.raises(ValueError, match=r"e\.jsonl:3: " + message):
            build(model, tokenizer, tmp_path / "index", path)


def test_long_prompts_count_by_their_most_similar_window(model, tokenizer, tmp_path):
    long = {"id": "long", "prompt": "x" * 100 + "why 7", "response": "so 49"}
    rows = [*EXAMPLES[:9], long, *EXAMPLES[9:]]
    index = build(model, tokenizer, tmp_path / "w", rows, overflow="window", max_length=60)
    assert len(index) == 24
    hits = index.query([*QUERIES, long], k=24, part_norm="none")
    assert all(sorted(map(str, ids)) == sorted(row["id"] for row in rows) for ids in hits.ids)
    assert hits.ids[3][0] == "long"
    assert (hits.scores.diff(dim=1) <= 0).all()
    assert hits.text(3, 0)[1] == "so 49"


def test_options_out_of_range_are_refused(model, tokenizer, built, tmp_path):
    with pytest.raises(ValueError, match="expected k at most 23"):
        built.query(QUERIES, k=24)
    with pytest.raises(ValueError, match="expected k to be at least 1"):
        built.query(QUERIES, k=0)
    with pytest.raises(ValueError, match="at least one sample in queries"):
        built.query([])
    with pytest.raises(ValueError, match="expected part_norm"):
        built.query(QUERIES, part_norm="l2")
    with pytest.raises(ValueError, match="gradient_weight needs"):
        built.query(QUERIES, part_norm="none", gradient_weight=0.1)
    with pytest.raises(ValueError, match="between 0 and 1"):
        built.query(QUERIES, gradient_weight=1.5)
    with pytest.raises(TypeError, match="expected gradient_weight to be a number"):
        built.query(QUERIES, gradient_weight="0.1")
    with pytest.raises(ValueError, match="expected part_norm"):
        built.query(QUERIES, part_norm="")
    with pytest.raises(ValueError, match="out of range; the model has 3 blocks"):
        build(model, tokenizer, tmp_path / "x", layer=9)
    with pytest.raises(ValueError, match="overflow"):
        build(model, tokenizer, tmp_path / "x", overflow="truncate")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        build(model, tokenizer, tmp_path / "no" / "x")
    assert list(tmp_path.iterdir()) == []


def test_load_gives_the_same_hits_and_save_the_same_bytes(model, tokenizer, built, tmp_path):
    built.save(tmp_path / "copy")
    assert files(tmp_path / "copy") == files(built.path)
    built.save(tmp_path / "copy")
    loaded = TraceIndex.load(tmp_path / "copy", model, tokenizer)
    a, b = built.query(QUERIES, 4), loaded.query(QUERIES, 4)
    assert a.ids == b.ids
    assert torch.equal(a.scores, b.scores)
    assert (loaded.layer, loaded.ids) == (built.layer, built.ids)
    with pytest.raises(ValueError, match="is the folder of this index"):
        built.save(built.path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "keep.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="refusing to replace"):
        built.save(tmp_path / "other")


def test_extending_equals_one_index_over_all(model, tokenizer, tmp_path):
    index = build(model, tokenizer, tmp_path / "a", EXAMPLES[:11])
    index.extend(EXAMPLES[11:], batch_tokens=200, progress=False)
    whole = build(model, tokenizer, tmp_path / "b")
    found, expected = index.query(QUERIES, 23), whole.query(QUERIES, 23)
    assert found.ids == expected.ids
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-5)
    before = files(index.path)
    index.extend(EXAMPLES[11:], progress=False)
    build(model, tokenizer, tmp_path / "a", EXAMPLES[:11])
    assert files(index.path) == before
    with pytest.raises(ValueError, match="id 's3' already belongs to the index"):
        index.extend(EXAMPLES[3:5], progress=False)
    assert files(index.path) == before


def test_another_model_tokenizer_layer_or_file_is_refused(model, tokenizer, index):
    other = make_model("llama", vocab_size=300, max_position_embeddings=96).eval()
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    template = make_tokenizer(chat_template="{{ messages[0]['content'] }}>")
    changed = [*EXAMPLES[:-1], {**EXAMPLES[-1], "response": "else"}]
    before = files(index.path)
    prints = r"\(fingerprint [0-9a-f]{16}\), got fingerprint [0-9a-f]{16}; use the same "
    for arguments, options, message in [
        (
            (other, tokenizer),
            {},
            r"expected the model that \S+ was built with " + prints + "model and dtype",
        ),
        ((model, template), {}, r"expected the tokenizer .*" + prints + "tokenizer"),
        ((model, tokenizer), {"layer": 1}, r"expected the layer .* \(2\), got 1"),
        ((model, tokenizer), {"layer": "auto"}, r"expected the layer .* \(2\), got auto"),
        ((model, tokenizer), {"append_eos": True}, "expected the encoding"),
        (
            (model, tokenizer),
            {"examples": changed},
            r"\(fingerprint \w{16}, 23 samples\), got fingerprint \w{16}, 23 samples.* extend",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            build(*arguments, index.path, **options)
    for arguments in ((other, tokenizer), (model, template)):
        with pytest.raises(ValueError, match=prints):
            TraceIndex.load(index.path, *arguments)
    with pytest.raises(FileExistsError, match="resume=True"):
        build(model, tokenizer, index.path, resume=False)
    assert files(index.path) == before


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_shard_is_named_and_the_rest_stays_usable(model, tokenizer, built, index, damage):
    shard = index.path / "shard-000001.safetensors"
    data = bytearray(shard.read_bytes())
    if damage == "remove":
        shard.unlink()
    else:
        data[-1] ^= 1
        shard.write_bytes(data if damage == "flip" else data[:-7])
    message = r"shard-000001\.safetensors is .*samples 8 to 15.*repair"
    with pytest.raises(StorageError, match=message):
        TraceIndex.load(index.path, model, tokenizer)
    with pytest.raises(StorageError, match=message):
        build(model, tokenizer, index.path)
    assert TraceIndex.repair(index.path) == ["shard-000001.safetensors"]
    with pytest.warns(IncompleteIndexWarning, match="has 15 of 23 samples"):
        rest = TraceIndex.load(index.path, model, tokenizer)
    assert rest.ids == [row["id"] for i, row in enumerate(EXAMPLES) if not 8 <= i < 16]
    hits = rest.query([EXAMPLES[20], EXAMPLES[3]], 15)
    assert [ids[0] for ids in hits.ids] == ["s20", "s3"]
    assert hits.positions[0, 0] == 20
    assert hits.text(0, 0)[1] == EXAMPLES[20]["response"]
    with pytest.raises(ValueError, match="is incomplete"):
        rest.extend([{"prompt": "new", "response": "one"}], progress=False)
    build(model, tokenizer, index.path)
    assert files(index.path) == files(built.path)


@pytest.mark.parametrize("count", [1, 3])
def test_scores_that_are_all_zero_come_with_a_warning(model, tokenizer, tmp_path, count):
    rows = [{**EXAMPLES[3], "id": i} for i in range(count)]
    index = build(model, tokenizer, tmp_path / "x", rows, part_norm="zscore")
    with pytest.warns(UserWarning, match='all scores are 0: .*; pass part_norm="unit"'):
        assert not index.query(QUERIES, 1).scores.any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert index.query(QUERIES, 1, part_norm="unit").scores.all()


def test_foreign_folders_are_refused(model, tokenizer, tmp_path):
    (tmp_path / "file.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="was not written by gradsafe"):
        build(model, tokenizer, tmp_path)
    with pytest.raises(StorageError, match="not written by gradsafe"):
        TraceIndex.load(tmp_path, model, tokenizer)
    with pytest.raises(StorageError, match="no such folder"):
        TraceIndex.load(tmp_path / "none", model, tokenizer)


def test_it_is_reachable_from_the_package():
    assert gradsafe.TraceIndex is TraceIndex


def test_a_model_that_was_trained_since_is_refused(tokenizer, tmp_path):
    model = make_model("llama", vocab_size=300)
    index = build(model, tokenizer, tmp_path / "index", EXAMPLES[:5])
    index.query(QUERIES, 3)
    with torch.no_grad():
        model.lm_head.weight += 1e-3
    with pytest.raises(ValueError, match=r"TraceIndex\.query: expected the model that"):
        index.query(QUERIES, 3)
    before = files(index.path)
    with pytest.raises(ValueError, match=r"TraceIndex\.extend: expected the model that"):
        index.extend(EXAMPLES[5:], progress=False)
    assert files(index.path) == before


def test_an_id_that_no_file_can_hold_is_refused(index, model, tokenizer):
    bad = [{"id": "cut \ud83d", "prompt": "x", "response": "y"}]
    before = files(index.path)
    with pytest.raises(ValueError, match=r"\[0\].*'id'.* half a surrogate pair"):
        index.extend(bad, progress=False)
    assert files(index.path) == before
    TraceIndex.load(index.path, model, tokenizer)


def test_repair_removes_a_shard_whose_ids_cannot_be_read(index, model, tokenizer, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(tracing.examples, "expect_text", lambda *_: None)
        with pytest.raises(StorageError, match="malformed: ids"):
            index.extend([{"id": "cut \ud83d", "prompt": "x", "response": "y"}], progress=False)
    with pytest.raises(StorageError, match="malformed: ids"):
        TraceIndex.load(index.path, model, tokenizer)
    assert TraceIndex.repair(index.path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IncompleteIndexWarning)
        assert len(TraceIndex.load(index.path, model, tokenizer)) == len(EXAMPLES)


@pytest.mark.parametrize("first_only", [False, True])
def test_signatures_in_inference_mode_are_the_same(model, tokenizer, first_only):
    items = [encode(tokenizer, row["prompt"], row["response"]) for row in EXAMPLES[:5]]
    layer = 3 if first_only else 1
    expected = signatures(model, items, [layer], 0)[layer]
    with torch.inference_mode():
        assert torch.equal(signatures(model, items, [layer], 0)[layer], expected)


def test_a_padding_token_without_an_embedding(tokenizer, tmp_path):
    added = make_tokenizer()
    added.add_special_tokens({"pad_token": "[PAD]"})
    model = make_model("llama", vocab_size=added.pad_token_id)
    found = build(model, added, tmp_path / "a").query(QUERIES, 3)
    one = build(model, added, tmp_path / "b", batch_tokens=1).query(QUERIES, 3, batch_tokens=1)
    assert found.ids == one.ids
