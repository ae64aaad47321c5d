"""Never stale: pages are executed again when anything that their numbers depend on has changed, and only then.

MyST-NB's cache looks at the cells of a page and at nothing else. Here the cache's folder is named by a hash of all
the rest: the package, the requirements, the installed versions, the data set, the scale and the device. The same
hash is a configuration value of Sphinx, so that an incremental build reads every page again when it changes.

Nor is the site ever a mixture: pages print each other's titles, numbers and checks, so when any source has changed
all of them are written, also when the build before was stopped halfway or printed the PDF.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from importlib import metadata
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.config import Config

FILES = ("ewc/**/*.py", "ewc/recorded/*.json", "benchmarks/**/*.py", "requirements.txt")
MACHINERY = ("book/_ext/*.py",)
SOURCES = ("_toc.yml", "book/*.md", "book/*.yml", "book/*.bib")
KEEP = 8  # caches of earlier keys, so that going back to another scale or data set costs nothing


def versions(root: Path) -> dict[str, str]:
    """Installed version of every package that requirements.txt names."""
    found = {"python": sys.version.split()[0]}
    for line in (root / "requirements.txt").read_text().splitlines():
        name = line.partition("#")[0].partition("==")[0].strip()
        if name:
            try:
                found[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                pass  # a tool that the pages do not need
    return found


def settings() -> dict[str, str]:
    """The data set, the scale and the device that the pages run on.

    What `auto` means is decided here, once, and written to the environment: every kernel of this build agrees.
    """
    import torch

    from ewc import tasks

    if os.environ.get("EWC_DATA"):  # kernels start in the chapters' folder: a relative path would lead elsewhere
        os.environ["EWC_DATA"] = str(Path(os.environ["EWC_DATA"]).expanduser().resolve())
    if os.environ.get("EWC_DATASET", "auto") == "auto":
        os.environ["EWC_DATASET"] = "mnist" if tasks.pair("cpu")[0].name == "mnist" else "embedded"
    os.environ["EWC_SCALE"] = tasks.scale()
    device = tasks.device()
    threads = torch.get_num_threads()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {threads} thread{'s' * (threads != 1)}"
    return {"data": os.environ["EWC_DATASET"], "scale": tasks.scale(), "device": name}


def key(root: Path, patterns: tuple[str, ...] = FILES, **facts: dict[str, str]) -> str:
    """A hash of the files that match, by default those that any page's numbers can depend on, and of `facts`."""
    digest = hashlib.sha256(repr(sorted(facts.items())).encode())
    for file in sorted(f for pattern in patterns for f in root.glob(pattern)):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def on_config(app: Sphinx, config: Config) -> None:
    root = Path(app.srcdir)
    build = Path(app.outdir).parent
    # Sphinx and the kernels import `ewc` from the checkout; nothing has to be installed.
    sys.path.insert(0, str(root))
    others = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p != str(root)]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(root), *others])
    os.environ.setdefault("PYTHONHASHSEED", "0")
    # On a GPU autograd's thread has no CUDA context yet when it meets cuBLAS first; PyTorch makes one, and says so.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:Attempting to run cuBLAS")
    ipython = build / "ipython"  # nobody's start-up files, no chatter on stderr
    (ipython / "profile_default").mkdir(parents=True, exist_ok=True)
    (ipython / "profile_default/ipython_kernel_config.py").write_text("get_config().IPKernelApp.log_level = 40\n")
    os.environ["IPYTHONDIR"] = str(ipython)

    app.ewc_settings, app.ewc_versions = settings(), versions(root)
    config.ewc_key = key(root, settings=app.ewc_settings, versions=app.ewc_versions)
    config.ewc_machinery = key(root, MACHINERY)
    config.ewc_site = key(root, SOURCES, keys={"numbers": config.ewc_key, "machinery": config.ewc_machinery})
    caches = build / ".jupyter_cache"
    here = caches / config.ewc_key
    here.mkdir(parents=True, exist_ok=True)
    os.utime(here)
    for old in sorted(caches.iterdir(), key=lambda p: p.stat().st_mtime)[:-KEEP]:
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    config.nb_execution_cache_path = str(here)


def forget_failure(app: Sphinx, exception: Exception | None) -> None:
    """After a failed build read every page again: Sphinx repeats no warning about a page that it does not read."""
    if exception or app._warncount:
        (Path(app.doctreedir) / "environment.pickle").unlink(missing_ok=True)


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_config_value("ewc_key", "", "env")  # when it changes, all pages are read
    app.add_config_value("ewc_machinery", "", "env")
    app.add_config_value("ewc_site", "", "html")  # when it changes, all pages are written; noted after the last one is
    app.connect("config-inited", on_config, priority=100)
    app.connect("build-finished", forget_failure)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
