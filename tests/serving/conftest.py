"""The testbed's model, and a detector for it that is calibrated."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import testbed
from gradsafe import Detector


@pytest.fixture(scope="session")
def model_folder() -> Path:
    return testbed.folder(progress=False)


@pytest.fixture(scope="session")
def detector() -> Detector:
    model, tokenizer = testbed.load(progress=False)
    found = Detector.fit(model, tokenizer, *testbed.references(4), progress=False)
    found.calibrate(testbed.calibration_prompts()[:200], max_fpr=0.02, progress=False)
    return found


@pytest.fixture(scope="session")
def detector_folder(detector: Detector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "detector"
    detector.save(folder)
    return folder


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    return [row["prompt"] for row in testbed.prompts("heldout")][:200]


@pytest.fixture(scope="module")
def server(model_folder: Path, detector_folder: Path) -> Iterator[object]:
    """One server for the tests of a file that do not end it."""
    from server_process import serving

    with serving(model_folder, detector_folder) as running:
        yield running
