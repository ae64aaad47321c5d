"""Where the images come from: arrays of whole-numbered pixels and labels, read from disk, downloaded or drawn."""

import contextlib
import gzip
import hashlib
import http.client
import io
import os
import queue
import socket
import tempfile
import threading
import time
import urllib.request
import zipfile
import zlib
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch.nn import functional

TITLES = {"mnist": "MNIST", "fashion": "Fashion-MNIST", "digits": "digits", "letters": "letters"}

# name -> the name of torchvision's class, which knows the mirrors, and the MD5 sums of the four uncompressed files.
REAL = {
    "mnist": (
        "MNIST",
        {
            "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
            "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
            "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
            "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
        },
    ),
    "fashion": (
        "FashionMNIST",
        {
            "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
            "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
            "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
            "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
        },
    ),
}

TIMEOUT = 5.0  # seconds of silence after which a server counts as unreachable
RETRY = 600.0  # seconds for which `pair` remembers that a download failed

FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol"),
    *("STIXGeneralItalic", "cmr10", "cmb10", "cmss10", "cmti10", "cmtt10"),
)
LETTERS = "ABCDEFGHIJ"
LETTERS_VERSION = 2  # names the cached file: raise it when `_render_letters` changes


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ewc"


def _data_folder() -> Path:
    return Path(os.environ.get("EWC_DATA") or _cache_folder()).expanduser()


# MNIST and Fashion-MNIST


def _source(name: str):
    """torchvision's class of a data set; imported here because that takes longer than reading the files."""
    from torchvision import datasets

    return getattr(datasets, REAL[name][0])


def _paths(name: str) -> dict[str, Path]:
    """The files of a data set: uncompressed, or as ``.gz`` where only that is on disk."""
    folder_name, checksums = REAL[name]
    folder = _data_folder() / folder_name / "raw"
    paths = {file: folder / file for file in checksums}
    return {file: path if path.exists() else path.with_name(f"{file}.gz") for file, path in paths.items()}


def missing(name: str) -> bool:
    return not all(path.exists() for path in _paths(name).values())


def real(name: str) -> tuple[np.ndarray, ...]:
    """``(x, y, x_test, y_test)`` of MNIST or Fashion-MNIST, downloaded if need be."""
    if missing(name):
        _download(name)
    arrays = []
    for file, path in _paths(name).items():
        content = _checked(path, REAL[name][1][file])
        if "images" in file:  # IDX: a header of 16 bytes before images, of 8 before labels
            arrays.append(np.frombuffer(content, np.uint8, offset=16).reshape(-1, 28, 28).copy())
        else:
            arrays.append(np.frombuffer(content, np.uint8, offset=8).copy())
    return tuple(arrays)


def _checked(path: Path, checksum: str) -> bytes:
    """The uncompressed content of a file, which must have this MD5 sum."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error):
            content = b""
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != checksum:
        raise RuntimeError(
            f"{path} is truncated or corrupt (wrong checksum): delete it and load the data again."
        )
    return content


def _download(name: str) -> None:
    """Lets torchvision download a data set, by way of a temporary folder: nothing half-written is found."""
    source = _source(name)
    folder = _data_folder() / source.__name__ / "raw"
    timeout = socket.getdefaulttimeout()
    try:
        if not any(_answers(mirror + source.resources[0][0]) for mirror in source.mirrors):
            raise OSError("no server answers")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            socket.setdefaulttimeout(TIMEOUT)
            with contextlib.redirect_stderr(io.StringIO()):  # no progress bar in a page of the book
                source(temporary, download=True)
            for file in Path(temporary, source.__name__, "raw").glob("*-ubyte"):
                os.replace(file, folder / file.name)
    except (OSError, RuntimeError, EOFError, zlib.error) as error:
        _remember_failed_download()
        raise FileNotFoundError(
            f"{TITLES[name]} is not in {folder} and could not be downloaded ({error}): set EWC_DATA to the "
            f"folder that holds {source.__name__}/raw, or set EWC_DATASET=embedded to use the digits and "
            "letters that need no download."
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)


def _answers(url: str) -> bool:
    """Whether a server answers in time; asked in a thread, as looking up a host's name knows no timeout."""
    answer = queue.SimpleQueue()

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=TIMEOUT):
                answer.put(True)
        except (OSError, ValueError, http.client.HTTPException):
            answer.put(False)

    threading.Thread(target=ask, daemon=True).start()
    try:
        return answer.get(timeout=TIMEOUT)
    except queue.Empty:
        return False


def _remember_failed_download() -> None:
    with contextlib.suppress(OSError):  # without a cache folder the next chapter waits again
        _cache_folder().mkdir(parents=True, exist_ok=True)
        (_cache_folder() / "download-failed").touch()


def download_failed_recently() -> bool:
    try:
        return 0 <= time.time() - (_cache_folder() / "download-failed").stat().st_mtime < RETRY
    except OSError:
        return False


# Digits


def digits() -> tuple[np.ndarray, ...]:
    """``(x, y, x_test, y_test)`` of scikit-learn's scanned digits, pixels from 0 to 16."""
    # Imported here: few of the book's processes need it, and importing takes seconds.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    scans = load_digits()
    images, targets = scans.images.astype(np.uint8), scans.target
    x, x_test, y, y_test = train_test_split(images, targets, test_size=0.2, stratify=targets, random_state=0)
    return x, y, x_test, y_test


# Letters


def letters() -> tuple[np.ndarray, ...]:
    """``(x, y, x_test, y_test)``, from the cache if an undamaged copy is there."""
    path = _cache_folder() / f"letters-{LETTERS_VERSION}.npz"
    names = ("x", "y", "x_test", "y_test")
    damaged = (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error)
    with contextlib.suppress(*damaged), path.open("rb") as file, np.load(file) as stored:
        return tuple(stored[name] for name in names)
    x, y = _render_letters(6000, seed=0)
    arrays = x[:5000], y[:5000], x[5000:], y[5000:]
    with contextlib.suppress(OSError):  # a read-only cache folder costs a second per load, no more
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:  # gone again, whatever happens
            np.savez(Path(scratch, path.name), **dict(zip(names, arrays)))
            os.replace(Path(scratch, path.name), path)
    return arrays


def _masters() -> np.ndarray:
    """Each letter in each font, thin and bold, sharp and blurred: ``(10, 16, 2, 2, 64, 64)``, 0 to 1."""
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    masters = np.zeros((len(LETTERS), len(FONTS), 2, 2, 64, 64), np.float32)
    for f, font in enumerate(FONTS):
        face = ImageFont.truetype(folder / f"{font}.ttf", 60)
        for k, letter in enumerate(LETTERS):
            for bold in (0, 1):
                drawing = Image.new("L", (128, 128))
                ImageDraw.Draw(drawing).text((20, 20), letter, fill=255, font=face, stroke_width=1 + 2 * bold)
                left, top, right, bottom = drawing.getbbox()  # the ink: fonts differ in their margins
                x, y = (left + right) // 2 - 32, (top + bottom) // 2 - 32
                glyph = drawing.crop((x, y, x + 64, y + 64))
                for blur in (0, 1):
                    image = glyph.filter(ImageFilter.GaussianBlur(1 + 2 * blur))
                    masters[k, f, bold, blur] = 1 - np.asarray(image) / 255  # a light letter on a dark plate
    return masters


def _render_letters(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 ``(count, 8, 8)`` from 0 to 16, like the scans, and labels, equally many of each."""
    # Light letters on a dark plate share the scans' pixels but not their look, like clothes after digits.
    draw = np.random.default_rng(seed)
    labels = draw.permutation(np.arange(count) % len(LETTERS))
    style = (draw.integers(n, size=count) for n in (len(FONTS), 2, 2))
    glyphs = torch.from_numpy(_masters()[labels, *style])[:, None]
    angle, shear = draw.uniform(-0.25, 0.25, count), draw.uniform(-0.3, 0.3, count)
    wide, high = draw.uniform(0.75, 1.12, (2, count))
    right, down = draw.uniform(-0.15, 0.15, (2, count))
    rows = [
        [np.cos(angle) * wide, (shear - np.sin(angle)) * wide, right],
        [np.sin(angle) * high, np.cos(angle) * high, down],
    ]
    maps = torch.from_numpy(np.array(rows, np.float32)).permute(2, 0, 1)
    grid = functional.affine_grid(maps, list(glyphs.shape), align_corners=False)
    warped = functional.grid_sample(glyphs, grid, align_corners=False)
    ink = functional.avg_pool2d(warped, 8)[:, 0]
    return (ink * 16).round().clamp(0, 16).to(torch.uint8).numpy(), labels
