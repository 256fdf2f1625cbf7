from __future__ import annotations

import pytest
from builders import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers import models as token_models
from transformers import PreTrainedTokenizerFast

from gradsafe.models import encode, probe_prompts, prompt_span, token_texts

TOKENIZER = make_tokenizer()


def sentencepiece_like():
    """Marks word starts with ▁ and falls back to bytes, as Llama 2's tokenizer does."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "▁a": 4, "▁b": 5, "a": 6, "b": 7}
    vocabulary |= {f"<0x{byte:02X}>": 8 + byte for byte in range(256)}
    merges = [("▁", "a"), ("▁", "b")]
    backend = Tokenizer(
        token_models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>")
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@given(st.text(max_size=40))
@settings(deadline=None)
def test_the_pieces_join_to_the_text(text):
    ids = TOKENIZER(text).input_ids
    pieces = token_texts(TOKENIZER, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == f"<s>{text}"


@pytest.mark.parametrize("text", ["a b", "a  b a", "ab ba", "日本", "a é b", "x🙂", "a\nb"])
def test_pieces_with_word_starts_and_byte_fallback(text):
    tokenizer = sentencepiece_like()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    pieces = token_texts(tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text


def test_words_keep_their_space():
    tokenizer = sentencepiece_like()
    ids = tokenizer("a b a", add_special_tokens=False).input_ids
    assert token_texts(tokenizer, ids) == ["a", " b", " a"]


def test_a_character_stands_at_its_last_token():
    ids = TOKENIZER("é!", add_special_tokens=False).input_ids
    assert token_texts(TOKENIZER, ids) == ["", "é", "!"]
    assert token_texts(TOKENIZER, ids[:1]) == ["\ufffd"]
    assert token_texts(TOKENIZER, []) == []


@given(st.text(alphabet="to0?é ", min_size=1, max_size=12))
@settings(deadline=None)
def test_the_span_is_the_user_s_text(prompt):
    others = [encode(TOKENIZER, text, "Sure", system="Be kind.") for text in ("0", "?")]
    item = encode(TOKENIZER, prompt, "Sure", system="Be kind.")
    pieces = token_texts(TOKENIZER, item.input_ids)
    assert "".join(pieces[prompt_span(item, others)]) == prompt


def test_tokens_shared_with_the_template_belong_to_the_user():
    others = [encode(TOKENIZER, text, "Sure", template="t{prompt}o") for text in ("0", "?")]
    item = encode(TOKENIZER, "o-t", "Sure", template="t{prompt}o")  # one merged "to" at each end
    pieces = token_texts(TOKENIZER, item.input_ids)
    assert pieces[prompt_span(item, others)] == ["to", "-", "to"]


def test_the_span_of_a_conversation_is_its_last_user_turn():
    talk = [
        {"role": "user", "content": "0"},
        {"role": "assistant", "content": "?"},
        {"role": "user", "content": "to go"},
        {"role": "tool", "content": "0"},
    ]
    others = [encode(TOKENIZER, probe, "Sure") for probe in probe_prompts(talk)]
    item = encode(TOKENIZER, talk, "Sure")
    assert "".join(token_texts(TOKENIZER, item.input_ids)[prompt_span(item, others)]) == "to go"
    assert probe_prompts("hi") == ["0", "?"]
