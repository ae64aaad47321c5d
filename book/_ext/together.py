"""Chapters are independent programs, so a cold build executes several at a time, before Sphinx reads the pages one by one.

Results go into the cache of MyST-NB, which then finds them there. A chapter that fails is left out: MyST-NB executes it
again when it is read, and reports the cell and the traceback as always. A page whose front matter says `alone: true`
measures time: it is executed after the others, with the whole machine to itself.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import torch
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn
from myst_nb.core.read import create_nb_reader
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.environment import BuildEnvironment
from sphinx.util import logging


def granted(cores: int, memory: int, group: Path = Path("/sys/fs/cgroup")) -> tuple[int, int]:
    """What a container may use of a machine's cores and memory; all of it if no limit is set."""
    try:
        quota, period = (group / "cpu.max").read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or "max"
        pass
    try:
        memory = min(memory, int((group / "memory.max").read_text()))
    except (OSError, ValueError):
        pass
    return cores, memory


CORES, MEMORY = granted(
    len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
    os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**33,
)
AT_ONCE = max(1, min(CORES, MEMORY // (3 * 2**30)))  # each kernel holds PyTorch and a data set: up to three gigabytes
if torch.cuda.is_available():  # the largest pages take five to eight gigabytes there, most of them less than three
    AT_ONCE = max(1, min(AT_ONCE, torch.cuda.get_device_properties(0).total_memory // (5 * 2**30)))

logger = logging.getLogger(__name__)


def share_cores(app: Sphinx, config: Config) -> None:
    """Every kernel gets its share of the cores; more threads than cores would slow all of them down."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, CORES // AT_ONCE)))


def execute(app: Sphinx, env: BuildEnvironment, pages: list[str]) -> None:
    """Execute the pages that are not in the cache yet."""
    cache = get_cache(env.mystnb_config.execution_cache_path)
    due: dict[Path, tuple[NotebookNode, dict]] = {}
    for page in pages:
        path = Path(env.doc2path(page))
        text = path.read_text(encoding="utf-8")
        reader = create_nb_reader(str(path), env.myst_config, env.mystnb_config, text)
        if reader is None:
            continue  # a page without cells
        notebook = reader.read(text)
        try:
            cache.match_cache_notebook(notebook)
        except KeyError:
            due[path] = notebook, reader.read_fmt

    async def one(path: Path, places: asyncio.Semaphore) -> None:
        (notebook, read_fmt), page = due[path], env.path2doc(str(path))
        async with places:
            logger.info("executing %s", page)
            start = time.monotonic()
            try:
                await NotebookClient(notebook, timeout=env.mystnb_config.execution_timeout, record_timing=False,
                                     resources={"metadata": {"path": str(path.parent)}}).async_execute()
            except (CellExecutionError, CellTimeoutError, DeadKernelError):
                return
            seconds = time.monotonic() - start
        record = cache.add_nb_to_project(str(path), **({"read_data": read_fmt} if read_fmt else {}))
        bundle = CacheBundleIn(notebook, record.uri, data={"execution_seconds": seconds})
        cache.cache_notebook_bundle(bundle, check_validity=False, overwrite=True)
        logger.info("executed %s in %.0f seconds", page, seconds)

    async def everything() -> None:
        alone = [path for path, (notebook, _) in due.items() if notebook.metadata.get("alone")]
        places = asyncio.Semaphore(AT_ONCE)
        # The longest pages first: they take longest, and no other should be left waiting for them at the end.
        rest = sorted(set(due) - set(alone), key=lambda path: -path.stat().st_size)
        await asyncio.gather(*(one(path, places) for path in rest))
        for path in alone:
            await one(path, places)

    asyncio.run(everything())


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("config-inited", share_cores, priority=50)
    app.connect("env-before-read-docs", execute)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
