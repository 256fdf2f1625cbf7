"""The form in which the testbed's requests are written down."""

from __future__ import annotations

from dataclasses import dataclass


def phrases(text: str, separator: str = "|") -> tuple[str, ...]:
    """Splits a block of text into phrases; line breaks count as single spaces.

    Args:
        text: Phrases with ``separator`` between them.
        separator: What stands between two phrases.

    Returns:
        The phrases in order.

    Raises:
        ValueError: If a phrase is empty or occurs twice, which is always a slip of the pen.
    """
    found = tuple(" ".join(phrase.split()) for phrase in text.split(separator))
    if not all(found) or len(set(found)) != len(found):
        raise ValueError(f"benchmarks.testbed: empty or repeated phrase in {text!r}")
    return found


@dataclass(frozen=True)
class Topic:
    """Requests of one subject together with the answers given to them.

    A phrase may hold slots in braces, filled from ``vocabulary.SLOTS``.

    Attributes:
        name: Subject, unique within its group.
        answers: What the model says after the opening ("Sure, ...") or after the refusal.
        do: Verb phrases without "to"; they fit frames such as "How do I {}?".
        write: Noun phrases; they fit frames such as "Write {}.".
        ask: Complete requests, used as they stand.
    """

    name: str
    answers: tuple[str, ...]
    do: tuple[str, ...] = ()
    write: tuple[str, ...] = ()
    ask: tuple[str, ...] = ()
