"""What the processes of a command must have in common: model, inputs, settings, the detector."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gradsafe._cli.options import TESTBED
from gradsafe._io.processes import Processes

if TYPE_CHECKING:
    import torch

    from gradsafe.detection import Detector


def load_in_each(args: argparse.Namespace, processes: Processes) -> tuple[Any, Any]:
    """Loads model and tokenizer, on a GPU of its own if there is one; one process shows the bar."""
    from gradsafe._cli.model import load_model

    options = (args.model, args.dtype, args.device, processes.first and not args.no_progress)
    if processes.count == 1:
        return load_model(*options)
    if args.model != TESTBED:
        return load_model(*options, processes.local_rank)
    with processes.first_of_machine_first("testbed"):  # which trains it
        return load_model(*options, processes.local_rank)


def check_agreement(
    processes: Processes, keys: Sequence[Mapping[str, Any]], device: torch.device
) -> None:
    """Raises ValueError if this process would write other records than the first, or elsewhere."""
    digest = hashlib.sha256(json.dumps(keys).encode()).hexdigest()
    first = processes.share("job", [digest, device.type])
    if first[0] != digest:
        raise ValueError(
            f"process {processes.rank} has other inputs, settings or another model than process "
            "0: all machines need the same files"
        )
    if first[1] != device.type:
        raise ValueError(
            f"process {processes.rank} computes on {device.type} and process 0 on {first[1]}: "
            "give --device cpu or --device cuda"
        )


def hand_over(
    processes: Processes, detector: Detector | None, model: Any, tokenizer: Any
) -> Detector:
    """Gives the first process's detector to the others; references and threshold are bit-equal.

    Args:
        processes: The processes, all of which call this.
        detector: The detector, in the first process.
        model: This process's model.
        tokenizer: Its tokenizer.
    """
    if processes.count == 1:
        assert detector is not None
        return detector
    from gradsafe.detection import Detector
    from gradsafe.detection.detector import pack, unpack

    mine, facts = pack(detector) if detector is not None else ({}, {})
    metadata = processes.share("detector", facts)
    tensors = processes.share_tensors("references", mine, model.device)
    if detector is not None:
        return detector
    return unpack("the detector of process 0", tensors, metadata, model, tokenizer)
