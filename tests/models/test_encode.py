from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gradsafe.models import (
    ContextOverflowError,
    Encoded,
    context_length,
    encode,
    encode_prompts,
    encode_windows,
)

PLAIN = "User: {prompt}\nAssistant: "
Build = Callable[..., PreTrainedTokenizerFast]


def text_of(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


def prompt_text(tokenizer: PreTrainedTokenizerFast, item: Encoded) -> str:
    return text_of(tokenizer, item.input_ids[: item.prompt_length])


def test_chat_template_renders_prompt_then_response(tokenizer: PreTrainedTokenizerFast) -> None:
    item = encode(tokenizer, "hello", "Sure")
    assert prompt_text(tokenizer, item) == "<s>[user]hello[assistant]"
    assert text_of(tokenizer, item.input_ids[item.prompt_length :]) == "Sure"
    assert len(item) == len(item.input_ids)
    assert item.response_length == 4


def test_there_is_exactly_one_bos(tokenizer: PreTrainedTokenizerFast) -> None:
    options = [{}, {"template": PLAIN}, {"template": "<s>" + PLAIN}, {"system": "be kind"}]
    for option in options:
        item = encode(tokenizer, "hello", "Sure", **option)
        assert item.input_ids.count(tokenizer.bos_token_id) == 1, option
        assert item.input_ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("eos", [True, False])
def test_no_eos_between_prompt_and_response(build_tokenizer: Build, eos: bool) -> None:
    tokenizer = build_tokenizer(eos=eos)
    assert tokenizer.eos_token_id not in encode(tokenizer, "a", "b", template=PLAIN).input_ids
    assert tokenizer.eos_token_id not in encode(tokenizer, "a", "b").input_ids
    # An EOS that the template itself writes stays.
    kept = encode(tokenizer, "a", "b", template="{prompt}</s>")
    assert kept.input_ids.count(tokenizer.eos_token_id) == 1


def test_append_eos(tokenizer: PreTrainedTokenizerFast, build_tokenizer: Build) -> None:
    item = encode(tokenizer, "a", "Sure", append_eos=True)
    assert item.input_ids[-1] == tokenizer.eos_token_id
    assert item.response_length == 5
    without = build_tokenizer()
    without.eos_token = None
    with pytest.raises(ValueError, match="append_eos=True"):
        encode(without, "a", "Sure", append_eos=True)


@pytest.mark.parametrize("prompt", ["{prompt}", "{system} {0} {}", "{{ x }} {% if %}", "%s \\1"])
def test_braces_in_prompts_stay_literal(tokenizer: PreTrainedTokenizerFast, prompt: str) -> None:
    plain = encode(tokenizer, prompt, "Sure", template="{system}|{prompt}|", system="{prompt}")
    assert prompt_text(tokenizer, plain) == f"<s>{{prompt}}|{prompt}|"
    chat = encode(tokenizer, prompt, "Sure")
    assert prompt_text(tokenizer, chat) == f"<s>[user]{prompt}[assistant]"


def test_jinja_template_argument(tokenizer: PreTrainedTokenizerFast) -> None:
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    item = encode(tokenizer, "hi", "Sure", template=template, system="S")
    assert prompt_text(tokenizer, item) == "<system>S<user>hi"


def test_missing_chat_template_names_the_argument(build_tokenizer: Build) -> None:
    tokenizer = build_tokenizer(chat_template=None)
    wanted = r"pass template= .*shell.*, for example template=.*\{prompt\}"
    with pytest.raises(ValueError, match=wanted):
        encode(tokenizer, "hi", "Sure")
    # The fault is the tokenizer's, so no prompt is blamed.
    with pytest.raises(ValueError, match=r"^gradsafe"):
        encode_prompts(tokenizer, ["hi"], "Sure", max_length=None)


def test_template_that_refuses_a_system_message(build_tokenizer: Build) -> None:
    tokenizer = build_tokenizer(chat_template="{{ raise_exception('no system role') }}")
    with pytest.raises(ValueError, match=r"no system role; leave out system="):
        encode(tokenizer, "hi", "Sure", system="S")


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"prompt": ""}, ValueError, "non-empty prompt"),
        ({"prompt": None}, TypeError, "prompt to be str, got NoneType"),
        ({"response": ""}, ValueError, "response=''"),
        ({"response": 3}, TypeError, "response to be str"),
        ({"template": "no field"}, ValueError, r"\{prompt\}"),
        ({"template": "{prompt}", "system": "S"}, ValueError, r"no \{system\}"),
        ({"max_length": 1}, ValueError, "max_length >= 2"),
    ],
)
def test_bad_arguments(
    tokenizer: PreTrainedTokenizerFast,
    arguments: dict[str, object],
    error: type[Exception],
    text: str,
) -> None:
    call = {"prompt": "hi", "response": "Sure", **arguments}
    with pytest.raises(error, match=text):
        encode(tokenizer, call.pop("prompt"), call.pop("response"), **call)  # type: ignore[arg-type]


def test_prompt_without_any_token_is_refused(build_tokenizer: Build) -> None:
    tokenizer = build_tokenizer(chat_template="{{ '' }}")
    with pytest.raises(ValueError, match="has no token"):
        encode(tokenizer, "hi", "Sure")


def test_whitespace_prompts_are_allowed(tokenizer: PreTrainedTokenizerFast) -> None:
    assert prompt_text(tokenizer, encode(tokenizer, " \n", "Sure")) == "<s>[user] \n[assistant]"


def test_overflow_is_an_error_with_numbers_and_the_fix(tokenizer: PreTrainedTokenizerFast) -> None:
    length = len(encode(tokenizer, "hello", "Sure"))
    assert len(encode(tokenizer, "hello", "Sure", max_length=length)) == length
    with pytest.raises(ContextOverflowError, match=rf'{length} tokens .*overflow="window"'):
        encode(tokenizer, "hello", "Sure", max_length=length - 1)


def test_encoded_needs_prompt_and_response() -> None:
    for length in (0, 3):
        with pytest.raises(ValueError, match="at least one prompt token"):
            Encoded([1, 2, 3], length)


def test_encode_prompts_names_the_index(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=r"^prompts\[1\]: .*non-empty"):
        encode_prompts(tokenizer, ["a", ""], "Sure", max_length=None)
    with pytest.raises(TypeError, match=r"^prompts\[2\]: .*NoneType"):
        encode_prompts(tokenizer, ["a", "b", None], "Sure", max_length=None)  # type: ignore[list-item]
    with pytest.raises(ContextOverflowError, match=r"^prompts\[1\]: "):
        encode_prompts(tokenizer, ["a", "b" * 99], "Sure", max_length=40)
    with pytest.raises(TypeError, match="one str"):
        encode_prompts(tokenizer, "abc", "Sure", max_length=None)
    with pytest.raises(ValueError, match="empty list"):
        encode_prompts(tokenizer, [], "Sure", max_length=None)
    with pytest.raises(ValueError, match="overflow="):
        encode_prompts(tokenizer, ["a"], "Sure", overflow="cut", max_length=9)  # type: ignore[arg-type]


def test_encode_prompts_returns_owners(tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = ["a", "b" * 60, "c"]
    found, owners = encode_prompts(tokenizer, prompts, "Sure", overflow="window", max_length=50)
    assert owners[0] == 0
    assert owners[-1] == 2
    assert owners == sorted(owners)
    assert owners.count(1) > 1
    assert found[0] == encode(tokenizer, "a", "Sure")
    assert all(len(item) <= 50 for item in found)
    unlimited, _ = encode_prompts(tokenizer, prompts, "Sure", overflow="window", max_length=None)
    assert len(unlimited) == 3


def test_a_prompt_that_fits_is_one_window(tokenizer: PreTrainedTokenizerFast) -> None:
    assert encode_windows(tokenizer, "hi", "Sure", max_length=99) == [
        encode(tokenizer, "hi", "Sure")
    ]


def test_window_errors(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ContextOverflowError, match="template, response and a single character"):
        encode_windows(tokenizer, "hello", "Sure", max_length=8)
    with pytest.raises(ValueError, match="overlap < 1"):
        encode_windows(tokenizer, "hello", "Sure", max_length=99, overlap=1.0)


def test_windows_overlap(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = "".join(chr(97 + i % 26) for i in range(200))
    pieces = window_texts(tokenizer, prompt, 60, 0.25)
    for before, after in pairwise(pieces):
        size = len(before) // 4
        assert before[-size:] == after[:size]
    assert len(pieces) <= 200 / (0.7 * len(pieces[0])) + 1


def window_texts(
    tokenizer: PreTrainedTokenizerFast, prompt: str, max_length: int, overlap: float
) -> list[str]:
    """The prompt text inside each window, read back from its ids."""
    windows = encode_windows(tokenizer, prompt, "Sure", max_length=max_length, overlap=overlap)
    assert all(len(window) <= max_length for window in windows)
    texts = [prompt_text(tokenizer, window) for window in windows]
    return [text.removeprefix("<s>[user]").removesuffix("[assistant]") for text in texts]


@settings(max_examples=100, deadline=None)
@example(prompt="0\U00010000" * 2 + "\x80\U00010000\U00010000", room=8, overlap=0.75)
@given(
    prompt=st.text(
        st.one_of(st.sampled_from("to {}\n "), st.characters(exclude_categories=["Cs"])),
        min_size=1,
        max_size=80,
    ),
    room=st.integers(8, 40),
    overlap=st.floats(0, 0.9),
)
def test_windows_cover_every_character(
    tokenizer: PreTrainedTokenizerFast, prompt: str, room: int, overlap: float
) -> None:
    # 28 tokens of template and response at most; up to 4 bytes (tokens) for one character.
    position = 0
    for piece in window_texts(tokenizer, prompt, 28 + room, overlap):
        # Each window starts inside or right after what is covered and reaches further.
        begins = [b for b in range(position + 1) if prompt.startswith(piece, b)]
        assert begins, "a gap, or text that is not the prompt's"
        reach = max(begins) + len(piece)
        assert reach > position
        position = max(position, reach)
    assert position == len(prompt)


def test_context_length(
    build_model: Callable[..., nn.Module],
    tokenizer: PreTrainedTokenizerFast,
    build_tokenizer: Build,
) -> None:
    assert context_length(build_model("llama"), tokenizer) == 64
    assert context_length(build_model("gpt2"), tokenizer) == 64
    short = build_tokenizer()
    short.model_max_length = 32
    assert context_length(build_model("llama"), short) == 32
    unknown = nn.Module()
    unknown.config = SimpleNamespace(max_position_embeddings=None)  # type: ignore[assignment]
    assert context_length(unknown, tokenizer) is None
    with pytest.raises(ValueError, match="config"):
        context_length(nn.Linear(2, 2), tokenizer)


def test_trained_tokenizer(stories: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stories)
    item = encode(tokenizer, "a cat {sat}", "Sure", template=PLAIN, max_length=512)
    assert item.input_ids.count(tokenizer.bos_token_id) <= 1
    prompt = "Once upon a time there was a cät. " * 80
    windows = encode_windows(tokenizer, prompt, "Sure", template=PLAIN, max_length=128)
    assert len(windows) > 3
    assert all(len(window) <= 128 for window in windows)
