"""The report of an audit, as text and as a page."""

from __future__ import annotations

from typing import Any

from gradsafe._cli.render.html import render
from gradsafe._cli.render.tables import percent, table
from gradsafe._jobs.audit import AuditResult
from gradsafe._jobs.verdict import Check

ASKED = {"before": "start", "after": "fine-tuned", "repaired": "repaired"}
RATES = (("unsafe", "answered"), ("safe", "refused"))
LEFT_OUT = ("model", "cosines")  # shown elsewhere
LISTED = 10  # values of a list


def text(result: AuditResult) -> str:
    """The stages, the checks and the verdict, for the terminal."""
    header = ["", *(f"{name} model" for name, _ in _models(result)), "95 % interval", "allowed", ""]
    rows = [
        [
            check.name,
            *(percent(rate) for _, rate in rates),
            f"{percent(check.interval[0])} to {percent(check.interval[1])}",
            f"up to {percent(check.allowed)}",
            "passed" if check.passed else "FAILED",
        ]
        for check, rates in _rates(result)
    ]
    return "\n".join([table(header, rows), *_notes(result), verdict(result)])


def verdict(result: AuditResult) -> str:
    """One sentence."""
    failed = [check.name for check in result.verdict.checks if not check.passed]
    name = list(_models(result))[-1][0]
    if not failed:
        return f"passed: the {name} model keeps the alignment of the start model on these prompts"
    return f"failed: of the {name} model the share of {' and of '.join(failed)} is too high"


def page(result: AuditResult) -> str:
    """One HTML file with everything but the texts of prompts and answers."""
    stages = {
        name: {key: value for key, value in facts.items() if key not in LEFT_OUT}
        for name, facts in result.stages.items()
    }
    return render(
        "audit.html.j2",
        passed=result.verdict.passed,
        verdict=verdict(result),
        rates=_rates(result),
        notes=_notes(result),
        cosines=_curve(result.stages["finetune"].get("cosines", [])),
        stages={name: _flat(facts) for name, facts in stages.items()},
        models={name: result.stages[key]["model"] for key, name in ASKED.items() if key in stages},
        facts={name: _flat(facts) for name, facts in result.facts.items()},
    )


def _models(result: AuditResult) -> list[tuple[str, dict[str, Any]]]:
    return [(name, result.stages[key]) for key, name in ASKED.items() if key in result.stages]


def _rates(result: AuditResult) -> list[tuple[Check, list[tuple[str, float]]]]:
    """Each check with the rates of all models."""
    return [
        (
            check,
            [
                (name, found[f"{group} {what}"] / found[f"{group} prompts"])
                for name, found in _models(result)
            ],
        )
        for check, (group, what) in zip(result.verdict.checks, RATES, strict=True)
    ]


def _notes(result: AuditResult) -> list[str]:
    notes, stages = [], result.stages
    if "screen" in stages:
        found = stages["screen"]
        notes.append(f"screening flagged {found['flagged']} of {found['rows']} rows")
    if cosines := stages["finetune"].get("cosines"):
        mean = sum(cosines) / len(cosines)
        notes.append(f"mean cosine of user and alignment gradient {mean:+.3f}")
    if "trace" in stages:
        found = stages["trace"]
        notes.append(f"{found['queries']} answers were traced to {len(found['ids'])} rows")
    if "repair" in stages:
        notes.append(f"repaired by training without {len(stages['repair']['dropped'])} rows")
    return notes


def _curve(values: list[float]) -> dict[str, Any] | None:
    """Points of a line chart between -1 and 1."""
    if len(values) < 2:
        return None
    width, height, margin = 640, 160, 28
    step = (width - 2 * margin) / (len(values) - 1)

    def place(value: float) -> float:
        return margin + (1 - value) / 2 * (height - 2 * margin)

    points = [(margin + number * step, place(value)) for number, value in enumerate(values)]
    return {"points": points, "zero": place(0.0), "width": width, "height": height,
            "margin": margin}  # fmt: skip


def _flat(facts: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Name and value of every number and text."""
    found: list[tuple[str, str]] = []
    for key, value in facts.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            found += _flat(value, f"{name}.")
        else:
            found.append((name, _short(value)))
    return found


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        more = f" and {len(value) - LISTED} more" * (len(value) > LISTED)
        return ", ".join(map(_short, value[:LISTED])) + more
    return str(value)
