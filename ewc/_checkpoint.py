"""States on the disk: written whole or not at all, and read back only into the run that they belong to."""

from __future__ import annotations

import copy
import inspect
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from .fisher import _distributed

if TYPE_CHECKING:  # the memories can do without the data sets and what draws them
    from .tasks import Task


def write(state: dict, path: str | os.PathLike) -> None:
    """Writes ``state`` beside ``path``, to the disk, then renames; in a process group on rank 0 only."""
    if _distributed() and dist.get_rank():
        return
    path = Path(path).resolve()  # through a link to the file itself
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {path.parent} to write {path.name} to; create it first.")
    scratch = path.with_name(path.name + ".part")  # always this name: what a kill leaves is overwritten next time
    try:
        with scratch.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def identity_of(tasks: Sequence[Task], seeds, memories, keep_moments: bool, options: dict) -> dict:
    """What makes a run this one and no other, in plain values; without what changes no number, such as ``watch``."""
    identity = {"models": len(memories), "tasks": [str(t.name) for t in tasks], "training examples": [len(t.train) for t in tasks],
                "test examples": [len(t.test) for t in tasks], "seed": [int(s) for s in seeds],
                "memory given": [m is not None for m in memories], "keep_moments": bool(keep_moments)}
    for i, task in enumerate(tasks):
        identity[f"heads of task {i}"] = str(task.heads)
        for what, part in (("training", task.train), ("test", task.test)):
            labels = part.tensors[1].detach().long().cpu().contiguous()  # images differ in their last digits by device
            identity[f"checksum of the {what} labels of task {i}"] = zlib.crc32(labels.numpy())
    telling = ["steps" if options["steps"] is not None else "epochs", "batch_size", "lr", "optimizer", "schedule", "penalty"]
    if options["optimizer"] == "sgd":
        telling.append("momentum")
    identity |= _plain({name: options[name] for name in telling})
    for r, memory in enumerate(memories):
        given = inspect.signature(type(memory)).parameters if memory is not None else ()
        own = _plain({name: getattr(memory, name) for name in given if hasattr(memory, name)})
        identity |= {f"{name} of memory {r}": value for name, value in own.items()}
    return identity


def _plain(values: dict) -> dict:
    """Those that are numbers, strings or None, as Python's own: others are not read back from a file."""
    values = {name: v.item() if getattr(v, "ndim", None) == 0 else v for name, v in values.items()}
    return {name: v for name, v in values.items() if type(v) in (bool, int, float, str, type(None))}


def _gathered(own: Tensor, device: torch.device) -> list[Tensor]:
    """This tensor of all the processes, by rank."""
    if not _distributed():
        return [own]
    every = [torch.empty_like(own, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(every, own.to(device))
    return [t.cpu() for t in every]


def save(path: Path, identity: dict, done: int, models, memories, matrix: Tensor, moments: dict | None,
          device: torch.device) -> None:
    """A kill at any moment leaves a whole file."""
    state = {"run": identity, "done": done, "matrix": matrix, "moments": moments,
             "random": _gathered(torch.get_rng_state(), device),
             "random of cuda": _gathered(torch.cuda.get_rng_state(device), device) if device.type == "cuda" else [],
             "models": [m.state_dict() for m in models],
             "memories": [m.state_dict() if m is not None else None for m in memories]}
    write(state, path)


def restore(path: Path, identity: dict, models, memories, matrix: Tensor, moments: dict | None,
             device: torch.device) -> int:
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as problem:
        raise ValueError(f"{path} is not a readable checkpoint ({problem}); remove it to start afresh.") from problem
    if not (isinstance(state, dict) and isinstance(state.get("run"), dict)):
        raise ValueError(f"{path} is not a checkpoint of `run`, or was written by an earlier version; choose another file.")
    for what in identity | state["run"]:
        there, here = (some.get(what, "absent") for some in (state["run"], identity))
        if there != here:
            raise ValueError(f"{path} belongs to another run: {what} is {there!r} there and {here!r} here; choose "
                             "another file, or go on as it was begun.")
    # All of it is looked at before anything is changed.
    for model, saved, memory, kept in zip(models, state["models"], memories, state["memories"]):
        new, old = ({k: getattr(v, "shape", None) for k, v in s.items()} for s in (model.state_dict(), saved))
        if new != old:
            raise ValueError(f"{path} holds a network with other parameters than this one; choose another file.")
        if memory is not None:
            copy.deepcopy(memory).load_state_dict(kept)
    for model, saved in zip(models, state["models"]):
        model.load_state_dict(saved)
    for memory, saved in zip(memories, state["memories"]):
        if memory is not None:
            memory.load_state_dict(saved)
    if moments is not None:
        moments.update(state["moments"])
    matrix.copy_(state["matrix"])
    rank, world = (dist.get_rank(), dist.get_world_size()) if _distributed() else (0, 1)
    if state["done"] < matrix.shape[1] and len(state["random"]) == world:
        torch.set_rng_state(state["random"][rank])  # dropout and drawn labels go on where they stopped
        if device.type == "cuda" and state["random of cuda"]:
            torch.cuda.set_rng_state(state["random of cuda"][rank], device)
    return state["done"]
