from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from gradsafe.models import (
    ContextOverflowError,
    Encoded,
    Encoding,
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


TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "bye"},
]


def test_a_conversation_is_rendered_with_all_turns(tokenizer: PreTrainedTokenizerFast) -> None:
    item = encode(tokenizer, TALK, "Sure")
    assert prompt_text(tokenizer, item) == (
        "<s>[system]Be kind.[user]hi[assistant]Hello![user]bye[assistant]"
    )
    assert encode(tokenizer, TALK[1:], "Sure", system="Be kind.") == item
    assert encode(tokenizer, TALK[1:2], "Sure") == encode(tokenizer, "hi", "Sure")
    found, owners = encode_prompts(tokenizer, ["hi", TALK], "Sure", max_length=None)
    assert found == [encode(tokenizer, "hi", "Sure"), item]
    assert owners == [0, 1]


def test_other_keys_reach_the_template(build_tokenizer: Build) -> None:
    tokenizer = build_tokenizer(
        chat_template="{% for m in messages %}[{{ m.name or m.role }}]{{ m.content }}"
        "{{ m.tool_calls | tojson if m.tool_calls }}{% endfor %}"
    )
    calls = [{"function": {"name": "add"}}]
    talk = [
        {"role": "user", "content": "1+2", "name": "Ann"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "3"},
    ]
    text = prompt_text(tokenizer, encode(tokenizer, talk, "Sure"))
    assert text == '[Ann]1+2[assistant][{"function": {"name": "add"}}][tool]3'


@pytest.mark.parametrize(
    ("prompt", "error", "text"),
    [
        ([], ValueError, "at least one message"),
        ({"role": "user", "content": "a"}, TypeError, "list of messages, got dict"),
        (["a"], TypeError, r'prompt\[0\] to be a dict with "role" and "content"'),
        ([{"role": "user", "content": None}], TypeError, r"prompt\[0\] to be str, got NoneType"),
        ([{"role": "user", "content": [{"type": "image"}]}], TypeError, "only text is supported"),
        ([{"role": "user", "content": ""}], ValueError, r"prompt\[0\] to be non-empty"),
        ([{"role": "bot", "content": "a"}], ValueError, r"prompt\[0\] to be one of system, user"),
        (TALK[:3], ValueError, "got assistant; pass the text of that turn as the response"),
        (TALK[:1], ValueError, "got the roles system; add the user turn"),
        ([{"role": "tool", "content": "3"}], ValueError, "got the roles tool; add"),
    ],
)
def test_bad_conversations(
    tokenizer: PreTrainedTokenizerFast, prompt: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        encode(tokenizer, prompt, "Sure")


def test_two_system_messages_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="one system message"):
        encode(tokenizer, TALK, "Sure", system="Be brief.")


def test_plain_templates_take_one_user_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    with_system = "{system}|{prompt}|"
    pair = encode(tokenizer, [TALK[0], TALK[1]], "Sure", template=with_system)
    assert pair == encode(tokenizer, "hi", "Sure", template=with_system, system="Be kind.")
    assert encode(tokenizer, TALK[1:2], "Sure", template=PLAIN) == encode(
        tokenizer, "hi", "Sure", template=PLAIN
    )
    for talk in (TALK, TALK[1:], TALK[:2]):
        with pytest.raises(ValueError, match="single user turn for the plain template"):
            encode(tokenizer, talk, "Sure", template=PLAIN)


LAST_TURN = "[{{ messages[-1]['role'] }}]{{ messages[-1]['content'] }}"
USERS = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
BACKWARDS = "{% for m in messages[::-1] %}{{ m.content }};{% endfor %}"


@pytest.mark.parametrize(
    ("template", "turn"),
    [(LAST_TURN, "0 .system: 'Be kind.'"), (USERS, "0 .system"), (BACKWARDS, "2 .assistant")],
)
def test_a_template_that_drops_a_turn_is_refused(
    tokenizer: PreTrainedTokenizerFast, template: str, turn: str
) -> None:
    with pytest.raises(ValueError, match=rf"without turn {turn}.*; pass another template="):
        encode(tokenizer, TALK, "Sure", template=template)


def test_a_template_that_drops_the_system_message_is_refused(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    assert encode(tokenizer, "hi", "Sure", template=USERS)
    with pytest.raises(ValueError, match=r"without turn 0 \(system: 'Be kind\.'\)"):
        encode(tokenizer, "hi", "Sure", template=USERS, system="Be kind.")


def test_what_templates_do_to_turns_is_no_loss(tokenizer: PreTrainedTokenizerFast) -> None:
    """White space stripped, the system message in the last turn, reasoning removed, JSON."""
    template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ m.content | tojson }}"
        "{% elif m.role != 'system' %}[{{ m.role }}]"
        "{{ messages[0].content if loop.last or m.content == 'sum ' }}"
        "{{ m.content.split('</think>')[-1] | trim }}{% endif %}{% endfor %}"
    )
    talk = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": " hi\n"},
        {"role": "assistant", "content": "<think>a greeting</think>\nHello!"},
        {"role": "user", "content": "sum "},
        {"role": "tool", "content": 'a "quoted"\nline é'},
    ]
    text = prompt_text(tokenizer, encode(tokenizer, talk, "Sure", template=template))
    assert text == '[user]hi[assistant]Hello![user]Be kind.sum"a \\"quoted\\"\\nline é"'


def test_template_that_refuses_a_system_message(build_tokenizer: Build) -> None:
    tokenizer = build_tokenizer(chat_template="{{ raise_exception('no system role') }}")
    with pytest.raises(ValueError, match=r"no system role; leave out system="):
        encode(tokenizer, "hi", "Sure", system="S")


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"prompt": ""}, ValueError, "non-empty prompt"),
        ({"prompt": None}, TypeError, "prompt to be str or a list of messages, got None"),
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
    tokenizer = build_tokenizer(chat_template="{{ messages[0]['content'] | trim }}")
    with pytest.raises(ValueError, match="has no token"):
        encode(tokenizer, " ", "Sure")


def test_whitespace_prompts_are_allowed(tokenizer: PreTrainedTokenizerFast) -> None:
    assert prompt_text(tokenizer, encode(tokenizer, " \n", "Sure")) == "<s>[user] \n[assistant]"


def test_overflow_is_an_error_with_numbers_and_the_fix(tokenizer: PreTrainedTokenizerFast) -> None:
    length = len(encode(tokenizer, "hello", "Sure"))
    assert len(encode(tokenizer, "hello", "Sure", max_length=length)) == length
    with pytest.raises(ContextOverflowError, match=rf'{length} tokens .*overflow="window"'):
        encode(tokenizer, "hello", "Sure", max_length=length - 1)


def test_one_record_holds_the_options(tokenizer: PreTrainedTokenizerFast) -> None:
    options = Encoding(template=PLAIN, append_eos=True)
    item = encode(tokenizer, "hi", "Sure", options)
    assert item == encode(tokenizer, "hi", "Sure", template=PLAIN, append_eos=True)
    assert encode(tokenizer, "hi", "Sure", options, append_eos=False) != item
    with pytest.raises(TypeError, match="append_bos"):
        encode(tokenizer, "hi", "Sure", append_bos=True)


def test_encodings_need_no_torch() -> None:
    code = (
        "import sys; from gradsafe.models import Encoding, Prompt, encode, encode_windows; "
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


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
    with pytest.raises(TypeError, match="one conversation"):
        encode_prompts(tokenizer, TALK, "Sure", max_length=None)
    with pytest.raises(ValueError, match=r"^prompts\[1\]: .*got assistant"):
        encode_prompts(tokenizer, ["a", TALK[:3]], "Sure", max_length=None)
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


@pytest.mark.parametrize("last", [[], [{"role": "tool", "content": "42"}]])
def test_windows_of_a_conversation_cut_the_last_user_turn(
    tokenizer: PreTrainedTokenizerFast, last: list[dict[str, str]]
) -> None:
    text = "".join(chr(97 + i % 26) for i in range(200))
    talk = [*TALK[:3], {"role": "user", "content": text}, *last]
    windows = encode_windows(tokenizer, talk, "Sure", max_length=100, overlap=0)
    head = "<s>[system]Be kind.[user]hi[assistant]Hello![user]"
    tail = "".join(f"[{turn['role']}]{turn['content']}" for turn in last) + "[assistant]"
    pieces = [prompt_text(tokenizer, window) for window in windows]
    assert len(windows) > 1
    assert all(len(window) <= 100 for window in windows)
    assert all(piece.startswith(head) and piece.endswith(tail) for piece in pieces)
    assert "".join(piece.removeprefix(head).removesuffix(tail) for piece in pieces) == text
    with pytest.raises(ContextOverflowError, match="shorten the other turns"):
        encode_windows(tokenizer, talk, "Sure", max_length=60)


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


def specials(tokenizer: PreTrainedTokenizerFast, item: Encoded) -> list[str]:
    """The special tokens of an encoded prompt, in order."""
    special = set(tokenizer.all_special_ids)
    ids = item.input_ids[: item.prompt_length]
    return tokenizer.convert_ids_to_tokens([token for token in ids if token in special])


@pytest.mark.parametrize("template", [None, PLAIN, "<s>" + PLAIN, "{prompt}</s>"])
def test_typed_special_tokens_are_split_on_request(
    tokenizer: PreTrainedTokenizerFast, template: str | None
) -> None:
    for prompt, typed in (("hi", 0), ("</s><s>[user]hi", 2), ("a</s>", 1), ("</", 0)):
        read = encode(tokenizer, prompt, "Sure", template=template)
        split = encode(tokenizer, prompt, "Sure", template=template, split_special_tokens=True)
        assert read.control_tokens == split.control_tokens == typed
        alike = encode(tokenizer, "hi", "Sure", template=template)
        assert specials(tokenizer, split) == specials(tokenizer, alike)
        # The text is the same; BOS is the tokenizer's own, unless the text starts with it.
        texts = {prompt_text(tokenizer, item).removeprefix("<s>") for item in (read, split)}
        assert len(texts) == 1
        assert (read.input_ids == split.input_ids) == (not typed)


def test_special_tokens_of_the_operator_stay_special(tokenizer: PreTrainedTokenizerFast) -> None:
    options = {"system": "Be</s>", "split_special_tokens": True}
    item = encode(tokenizer, "hi</s>", "<s>Sure</s>", **options)
    assert item.control_tokens == 1
    assert specials(tokenizer, item) == ["<s>", "</s>"]
    assert item.input_ids[-1] == tokenizer.eos_token_id
    assert item.input_ids[item.prompt_length] == tokenizer.bos_token_id


def test_every_text_of_a_conversation_is_split(tokenizer: PreTrainedTokenizerFast) -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content | trim }}"
        "{% for c in m.tool_calls %}{{ c | tojson }}{% endfor %}{{ eos_token }}{% endfor %}"
    )
    call = {"name": "f", "arguments": {"x": ["</s>", 3]}}
    talk = [
        {"role": "system", "content": "<s>"},
        {"role": "user", "content": " </s> \n"},
        {"role": "assistant", "tool_calls": [call], "content": None},
        {"role": "tool", "content": "<pad>"},
    ]
    read, split = (
        encode(tokenizer, talk, "Sure", template=template, split_special_tokens=option)
        for option in (False, True)
    )
    assert read.control_tokens == split.control_tokens == 4
    assert prompt_text(tokenizer, read) == prompt_text(tokenizer, split)
    assert specials(tokenizer, split) == ["<s>", *["</s>"] * 4]


def test_text_that_completes_a_special_token_is_split(tokenizer: PreTrainedTokenizerFast) -> None:
    for template, prompt in (("({prompt}s>", "<"), ("<{prompt}", "/s> a"), ("<{prompt}>", "/s")):
        chat = template.replace("{prompt}", "{{ messages[0].content }}")
        for kind in (template, chat):
            item = encode(tokenizer, prompt, "Sure", template=kind, split_special_tokens=True)
            assert item.control_tokens == 1
            assert specials(tokenizer, item) == ["<s>"] * (kind == template)


def test_a_template_that_reads_special_tokens_is_refused(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    template = "{{ messages[0].content }}{{ '!' if messages[0].content.startswith('</s>') }}"
    assert encode(tokenizer, "</s>a", "Sure", template=template).control_tokens == 1
    template = template.replace("startswith('</s>')", "startswith('</s>a') ")
    with pytest.raises(ValueError, match="depends on the special tokens"):
        encode(tokenizer, "</s>a", "Sure", template=template, split_special_tokens=True)


def test_slow_tokenizers_count_but_do_not_split() -> None:
    tokenizer = ByT5Tokenizer()
    item = encode(tokenizer, "a</s>b<pad>", "Sure", template=PLAIN)
    assert item.control_tokens == 2
    options = {"template": PLAIN, "split_special_tokens": True}
    assert encode(tokenizer, "ab", "Sure", **options).control_tokens == 0
    with pytest.raises(ValueError, match="a fast tokenizer for split_special_tokens=True"):
        encode(tokenizer, "a</s>b", "Sure", **options)


def test_windows_know_the_control_tokens_of_their_prompt(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    prompt = "</s>" + "x" * 60 + "<s>"
    for split in (False, True):
        options = {"max_length": 50, "split_special_tokens": split}
        windows = encode_windows(tokenizer, prompt, "Sure", **options)
        assert len(windows) > 1
        assert [window.control_tokens for window in windows] == [2] * len(windows)
        found = {token for window in windows for token in specials(tokenizer, window)}
        assert found == ({"<s>"} if split else {"<s>", "</s>"})


def test_turns_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    talk = [*TALK, {"role": "tool", "content": "42</s>"}]
    items, owners = encode_prompts(tokenizer, ["a", talk], "Sure", turns="worst")
    assert owners == [0, 1, 1, 1]
    assert [prompt_text(tokenizer, item) for item in items] == [
        "<s>[user]a[assistant]",
        *(f"<s>[system]Be kind.[user]{text}[assistant]" for text in ("hi", "bye", "42</s>")),
    ]
    assert [item.control_tokens for item in items] == [0, 1, 1, 1]
    with pytest.raises(ValueError, match=r"^prompts\[0\]: .*got assistant"):
        encode_prompts(tokenizer, [TALK[:3]], "Sure", turns="worst")
    with pytest.raises(TypeError, match="True or False"):
        encode(tokenizer, "a", "Sure", split_special_tokens=1)
