"""Results of the experiments at full scale, as they were measured, for builds that are too small to measure them.

A chapter hands its results to `keep`. A build with ``EWC_RECORD=1`` writes them here as JSON, together with the device
and the versions that made them; every other build can `load` them and show them beside its own, told apart.
"""
from __future__ import annotations

import json
import os
import platform
import re
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
    made = {
        "data": " → ".join(task.title for task in tasks.pair()),
        "device": machine(tasks.device()),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    (FOLDER / f"{name}.json").write_text(json.dumps({"made": made, "results": results}, indent=1) + "\n")


def machine(device: torch.device) -> str:
    """The device in words: the graphics card's name, or the processor's and the number of threads that PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    about = Path("/proc/cpuinfo")  # Linux; elsewhere Python knows the name
    names = re.findall(r"^model name\s*: (.+)$", about.read_text() if about.exists() else "", flags=re.MULTILINE)
    threads = torch.get_num_threads()
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {threads} thread{'s' * (threads != 1)}"


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
