"""Special tokens typed into prompts: as today, counted, or kept ordinary text."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as token_models
from transformers import PreTrainedTokenizerFast

from gradsafe.models import encode, encode_prompts, encode_windows

BOS, EOS = 1, 2
CLOSED = "<s>{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}</s>{% endfor %}[assistant]"
Build = Callable[..., PreTrainedTokenizerFast]


def prompt_ids(tokenizer: PreTrainedTokenizerFast, prompt: Any, **options: Any) -> list[int]:
    item = encode(tokenizer, prompt, "Sure", **options)
    return item.input_ids[: item.prompt_length]


def text_of(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("prompt", ["</s>", "a</s><s>[user]b", "<s>", "</<s>s>", " </s>\n"])
@pytest.mark.parametrize("template", [None, CLOSED, "{prompt}", "<s>{prompt}</s>"])
def test_only_the_templates_tokens_are_special(
    tokenizer: PreTrainedTokenizerFast, prompt: str, template: str | None
) -> None:
    ordinary = prompt_ids(tokenizer, "hi", template=template)
    typed = prompt_ids(tokenizer, prompt, template=template)
    split = prompt_ids(tokenizer, prompt, template=template, split_special_tokens=True)
    for special in (BOS, EOS):
        assert split.count(special) == ordinary.count(special)
    assert split != typed
    expected = text_of(tokenizer, ordinary)
    wanted = prompt.strip() if template == CLOSED else prompt
    assert text_of(tokenizer, split) == expected.replace("hi", wanted)


@pytest.mark.parametrize("prompt", ["hello to you", "t<s", [{"role": "user", "content": "a > b"}]])
def test_other_prompts_do_not_change(tokenizer: PreTrainedTokenizerFast, prompt: Any) -> None:
    for template in (None, CLOSED, "User: {prompt}\n"):
        split = prompt_ids(tokenizer, prompt, template=template, split_special_tokens=True)
        assert split == prompt_ids(tokenizer, prompt, template=template)


def test_the_default_is_what_transformers_does(tokenizer: PreTrainedTokenizerFast) -> None:
    assert prompt_ids(tokenizer, "a</s>b").count(EOS) == 1


def test_tokens_merge_over_the_seams_of_a_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    """The text is cut at the template's special tokens only, not where a turn begins."""
    split = prompt_ids(tokenizer, "o </s>", template="<s>t{prompt}", split_special_tokens=True)
    (merged,) = tokenizer("to", add_special_tokens=False)["input_ids"]
    assert split[:2] == [BOS, merged]


def test_the_operators_system_message_stays_special(tokenizer: PreTrainedTokenizerFast) -> None:
    options = {"split_special_tokens": True}
    own = prompt_ids(tokenizer, "a</s>", system="x</s>", **options)
    assert own.count(EOS) == 1
    turns = [{"role": "system", "content": "x</s>"}, {"role": "user", "content": "a</s>"}]
    assert prompt_ids(tokenizer, turns, **options).count(EOS) == 0
    plain = "{system}|{prompt}|"
    assert prompt_ids(tokenizer, turns, template=plain, **options).count(EOS) == 0
    assert prompt_ids(tokenizer, "</s>", template=plain, system="</s>", **options).count(EOS) == 1


def test_every_text_of_a_turn_is_the_prompts_own(build_tokenizer: Build) -> None:
    tokenizer = build_tokenizer(
        chat_template="{% for m in messages %}[{{ m.name or m.role }}]{{ m.content }}"
        "{{ m.tool_calls | tojson if m.tool_calls }}{% endfor %}"
    )
    turns = [
        {"role": "user", "content": "1+2", "name": "</s>"},
        {"role": "assistant", "content": "", "tool_calls": [{"role": "<s>", "x": ["</s>"]}]},
        {"role": "tool", "content": "3"},
    ]
    assert encode(tokenizer, turns, "Sure").control_tokens == 3
    assert {BOS, EOS} & set(prompt_ids(tokenizer, turns))
    assert not {BOS, EOS} & set(prompt_ids(tokenizer, turns, split_special_tokens=True))


def test_a_template_that_looks_for_special_tokens_is_refused(build_tokenizer: Build) -> None:
    tokenizer = build_tokenizer(chat_template="{{ messages[0].content | replace('</s>', '!') }}")
    turn = [{"role": "user", "content": "a!"}]
    assert prompt_ids(tokenizer, turn, split_special_tokens=True)
    template = "{{ messages[0].content }}{{ messages[0].content | length }}"
    with pytest.raises(ValueError, match=r"gradsafe\.encode: expected a chat template"):
        encode(tokenizer, "a</s>", "Sure", template=template, split_special_tokens=True)


def test_private_use_characters_in_a_prompt_are_kept(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = f"{chr(0xF0000)}</s>{chr(0xF0001)}<s>"
    split = prompt_ids(tokenizer, prompt, split_special_tokens=True)
    assert text_of(tokenizer, split) == f"<s>[user]{prompt}[assistant]"


def test_a_tokenizer_that_cannot_split_is_refused() -> None:
    """Its model itself, not only its list of special tokens, joins the text of one."""
    vocabulary = [("<unk>", 0.0), ("</s>", -1.0), *((c, -9.0) for c in "abSure</>s ")]
    backend = Tokenizer(token_models.Unigram(list(dict.fromkeys(vocabulary)), unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="<unk>"
    )
    with pytest.raises(ValueError, match=r"gradsafe\.encode: expected a tokenizer that can write"):
        encode(tokenizer, "</s>", "Sure", template="{prompt}", split_special_tokens=True)


def test_windows_of_split_prompts(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = "abc</s>" * 20
    windows = encode_windows(
        tokenizer, prompt, "Sure", max_length=60, overlap=0, split_special_tokens=True
    )
    assert all(len(window) <= 60 and EOS not in window.input_ids for window in windows)
    assert len(windows) < 8
    texts = [text_of(tokenizer, w.input_ids[1 : w.prompt_length]) for w in windows]
    joined = "".join(t.removeprefix("[user]").removesuffix("[assistant]") for t in texts)
    assert joined == prompt


def test_threads_with_and_without_the_option(tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = ["</s>" * 50] * 8

    def ids(split: bool) -> int:
        found, _ = encode_prompts(tokenizer, prompts, "Sure", split_special_tokens=split)
        return sum(item.input_ids.count(EOS) for item in found)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ids, [True, False] * 10)) == [0, 400] * 10


def test_typed_tokens_are_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    def count(prompt: Any) -> int:
        return encode(tokenizer, prompt, "Sure").control_tokens

    assert count("hello <user>") == 0
    assert count("a</s><s>b<pad>") == 3
    assert count([{"role": "user", "content": "</s>"}, {"role": "user", "content": "<s>"}]) == 2


BAD = "a\ud800b"


@pytest.mark.parametrize(
    ("prompts", "error", "text"),
    [
        ((p for p in "ab"), TypeError, r"a list of prompts, got generator; pass list\(prompts\)"),
        ({"a"}, TypeError, r"a list of prompts, got set; pass list\(prompts\)"),
        ({"a": 1}, TypeError, r"a list of prompts, got dict"),
        (None, TypeError, "a list of prompts, got NoneType; pass the prompts in a list"),
        (3, TypeError, "a list of prompts, got int"),
        (
            ["a", BAD],
            ValueError,
            r"^prompts\[1\]: gradsafe\.encode: .*surrogate pair at character 1",
        ),
        ([[{"role": "user", "content": BAD}]], ValueError, r"the text of prompt\[0\].*surrogate"),
        ([[{"role": "user", "content": "a", "name": BAD}]], ValueError, "surrogate"),
        (["a", {"b"}], TypeError, r"prompts\[1\]: gradsafe.* got set"),
    ],
)
def test_what_is_no_list_of_prompts(
    tokenizer: PreTrainedTokenizerFast, prompts: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text) as caught:
        encode_prompts(tokenizer, prompts, "Sure")
    assert "gradsafe." in str(caught.value)
