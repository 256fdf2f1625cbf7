"""Writes docs/models.md: what works for every causal language model of transformers.

Runs the checks of tests/zoo on tiny random models; takes a minute or two on one core.

    python tools/model_table.py [--output docs/models.md] [family ...]
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "zoo")]

import transformers  # noqa: E402
from builders import make_tokenizer  # noqa: E402
from checks import CHECKS, Result, quietly  # noqa: E402
from families import LISTED, families, make_model  # noqa: E402

HEADER = """# Models

What works for each family of causal language models in transformers (version {version}),
measured with a tiny random model of the family on the CPU. `tools/model_table.py` writes this page,
`tests/zoo` tests the same.

- **detect**: `fit` and `score` run; the scores equal those of plain autograd per prompt (float32,
  1e-5) and do not depend on how prompts are batched.
- **trace**: signatures are finite and do not depend on the batch.
- **SafeGrad**: one step of gradient surgery.
- **coverage**: of the weights with two or more dimensions in the decoder blocks, the fraction that
  is scored. Weights that a text prompt does not use, such as cross-attention without an encoder and
  image towers, do not count; `detector.coverage` lists them.
- **experts**: the number of scored stacks of expert weights (fused experts, or blocks of
  block-diagonal weights).

{summary}

| family | detect | trace | SafeGrad | coverage | experts | remarks |
| --- | --- | --- | --- | --- | --- | --- |
"""


@dataclass
class Row:
    """One line of the table."""

    family: str
    works: dict[str, bool]
    result: Result | None
    remarks: list[str]

    def __str__(self) -> str:
        marks = [{True: "yes", False: "no"}.get(self.works.get(name), "-") for name in CHECKS]  # type: ignore[arg-type]
        covered = f"{self.result.coverage:.2f}" if self.result else "-"
        experts = str(self.result.experts or "") if self.result else ""
        cells = [self.family, *marks, covered, experts, "; ".join(self.remarks)]
        return f"| {' | '.join(cells)} |"


def row(family: str, tokenizer: object) -> Row:
    """Run all checks on one family; a failed one is a remark."""
    if family in LISTED:
        return Row(family, {}, None, [LISTED[family]])
    works: dict[str, bool] = {}
    remarks: list[str] = []
    result = None
    try:
        model = make_model(family)
    except Exception as error:  # whatever a family throws is what the table is for
        return Row(family, {}, None, [f"not built: {str(error).splitlines()[0][:160]}"])
    for name, check in CHECKS.items():
        try:
            with quietly():
                found = check(model, tokenizer)
            works[name] = True
        except Exception as error:  # whatever a family throws is what the table is for
            works[name] = False
            remarks.append(f"{name}: {str(error).splitlines()[0][:160]}".replace("|", "/"))
            continue
        result = found if isinstance(found, Result) else result
    if result is not None:
        largest = sorted(result.left_out.items(), key=lambda item: -item[1])
        names = [name for name, share in largest if share >= 0.005]
        remarks += [f"not scored: {', '.join(names)}"] if names else []
        remarks += ["prompts run one at a time"] if result.one_at_a_time else []
    return Row(family, works, result, remarks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="default: all")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "models.md")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    tokenizer = make_tokenizer()
    rows = []
    for family in arguments.families or families():
        rows.append(row(family, tokenizer))
        print(rows[-1], flush=True)
    built = [r for r in rows if r.works]
    good = [r for r in built if all(r.works.values())]
    covered = [r for r in built if r.result and r.result.coverage >= 0.9]
    mixtures = [r for r in built if r.result and r.result.experts]
    lowest = min((r.result.coverage for r in mixtures if r.result), default=0)
    summary = (
        f"Of {len(rows)} families, {len(built)} are text models that can be built without further "
        f"packages. All three methods work for {len(good)} of these, and coverage is at least 0.9 "
        f"for {len(covered)}.\n{len(mixtures)} families have stacks of experts; their lowest "
        f"coverage is {lowest:.2f}."
    )
    header = HEADER.format(version=transformers.__version__, summary=summary)
    arguments.output.write_text(header + "\n".join(map(str, rows)) + "\n")


if __name__ == "__main__":
    main()
