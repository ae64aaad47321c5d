"""Results of the experiments at full scale, as they were measured, for builds that are too small to measure them.

A chapter hands its results to `keep`. A build with ``EWC_RECORD=1`` writes them here as JSON, together with the device
and the versions that made them; every other build can `load` them and show them beside its own, told apart.
"""
from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from ewc import tasks

FOLDER = Path(__file__).parent


def keep(name: str, results: dict[str, Any]) -> None:
    """Write ``results`` to ``<name>.json`` if the environment asks for it (``EWC_RECORD=1``) and the scale is full.

    Args:
        name: the experiment's name.
        results: numbers, strings, lists and dictionaries of these.
    """
    if os.environ.get("EWC_RECORD") != "1" or tasks.scale() != "full":
        return
    device = tasks.device()
    made = {
        "data": " → ".join(task.title for task in tasks.pair()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    (FOLDER / f"{name}.json").write_text(json.dumps({"made": made, "results": results}, indent=1) + "\n")


def load(name: str) -> dict[str, Any]:
    """What `keep` wrote: ``{"made": {...}, "results": {...}}``.

    Raises:
        FileNotFoundError: nothing of this name has been recorded; the message lists what has.
    """
    file = FOLDER / f"{name}.json"
    if not file.exists():
        known = ", ".join(sorted(f.stem for f in FOLDER.glob("*.json"))) or "nothing yet"
        raise FileNotFoundError(f"No recorded results are called {name!r}; recorded so far: {known}.")
    return json.loads(file.read_text())
