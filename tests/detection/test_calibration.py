from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradsafe.detection.calibration import calibrate, exact_interval


@given(
    scores=st.lists(st.floats(-5, 5), min_size=1, max_size=300),
    max_fpr=st.sampled_from([0.01, 0.05, 0.1, 0.5]),
)
@pytest.mark.filterwarnings("ignore:gradsafe.calibrate")
def test_the_measured_rate_never_exceeds_the_bound(scores, max_fpr):
    values = torch.tensor(scores)
    report = calibrate(values, max_fpr)
    assert (values > report.threshold).double().mean().item() == pytest.approx(report.fpr)
    assert report.fpr <= max_fpr
    low, high = report.fpr_interval
    assert low <= report.fpr <= high


def test_the_rate_holds_on_new_prompts():
    torch.manual_seed(0)
    rates = []
    for _ in range(400):
        threshold = calibrate(torch.randn(99), 0.05).threshold
        rates.append(0.5 * torch.special.erfc(torch.tensor(threshold / 2**0.5)).item())
    assert sum(rates) / len(rates) == pytest.approx(0.05, abs=0.005)


def test_too_few_prompts_are_announced():
    with pytest.warns(UserWarning, match="too few"):
        report = calibrate(torch.arange(10.0), 0.01)
    assert report.threshold == 9.0
    assert report.fpr_interval == pytest.approx((0.0, 0.3085), abs=1e-4)
    assert "0.00 % of 10 benign prompts" in str(report)


def test_known_intervals():
    assert exact_interval(5, 100) == pytest.approx((0.01643, 0.11284), abs=1e-4)
    assert exact_interval(0, 20)[0] == 0.0
    assert exact_interval(20, 20)[1] == 1.0


@pytest.mark.parametrize(
    ("scores", "max_fpr", "text"),
    [([], 0.1, "got none"), ([1.0], 0.0, "max_fpr"), ([1.0], 1.0, "max_fpr"),
     ([float("nan")], 0.1, "NaN")],
)  # fmt: skip
def test_bad_arguments(scores, max_fpr, text):
    with pytest.raises(ValueError, match=text):
        calibrate(torch.tensor(scores), max_fpr)


def test_a_rate_close_to_one_takes_the_smallest_score():
    assert calibrate(torch.tensor([3.0, 1.0, 2.0]), 1 - 1e-10).threshold == 1
