"""Image classification tasks as tensors on one device: what the book's networks learn, and forget.

A ``Task`` holds standardised images and labels, already on the compute device, so that a batch is an index
selection. ``load`` reads four data sets: MNIST and Fashion-MNIST, which must be on disk or are downloaded by
torchvision, and the embedded pair ``digits`` and ``letters``, which need no network. ``permuted``,
``rotated`` and ``split`` make new tasks of old ones.
"""

import contextlib
import gzip
import hashlib
import http.client
import io
import math
import os
import queue
import socket
import tempfile
import threading
import time
import urllib.request
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor
from torch.nn import functional
from torch.utils.data import TensorDataset

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

LABELS = {
    "mnist": tuple("0123456789"),
    "fashion": (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
}

TIMEOUT = 5.0  # seconds of silence after which a server counts as unreachable
RETRY = 600.0  # seconds for which `pair` remembers that a download failed

FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol"),
    *("STIXGeneralItalic", "cmr10", "cmb10", "cmss10", "cmti10", "cmtt10"),
)
SCENARIOS = ("task", "domain", "class")
LETTERS = "ABCDEFGHIJ"
LETTERS_VERSION = 2  # names the cached file: raise it when `_render_letters` changes


@dataclass(frozen=True, eq=False, repr=False)
class Task:
    """A classification task whose tensors live on one device.

    Attributes:
        name: what the task is called, such as ``"mnist"`` or ``"mnist permuted 3"``.
        train: training images, float32 ``(N, 1, H, W)``, standardised, and labels, int64 ``(N,)``.
        test: the same for the test images.
        classes: number of classes K, the width of the network's output; labels are 0 … K−1.
        shape: ``(1, H, W)``.
        mean: mean of the training set's pixels before standardisation, on a scale from 0 to 1.
        std: their standard deviation, on the same scale.
        labels: one name per class.
        heads: disjoint groups of classes if the network is told which group an image belongs to and chooses
            within it (task-incremental learning); None if it chooses among all classes.
    """

    name: str
    train: TensorDataset
    test: TensorDataset
    classes: int
    shape: tuple[int, int, int]
    mean: float
    std: float
    labels: tuple[str, ...]
    heads: tuple[tuple[int, ...], ...] | None = None

    @property
    def features(self) -> int:
        """Number of pixels of an image."""
        return math.prod(self.shape)

    @property
    def head(self) -> tuple[int, ...] | None:
        """The group of classes among which the answer to this task's images is chosen; None if among all.

        Raises:
            ValueError: the images belong to several heads, or to none.
        """
        if self.heads is None:
            return None
        y = self.train.tensors[1]
        used = [head for head in self.heads if torch.isin(y, torch.tensor(head, device=y.device)).any()]
        if len(used) > 1:
            raise ValueError(f"{self.name} uses the heads {used}; take one task at a time.")
        if not used:
            raise ValueError(f"{self.name} has no training image in any of its heads {self.heads}; take more images.")
        return used[0]

    def masked(self, logits: Tensor, labels: Tensor) -> Tensor:
        r"""The logits, with -∞ for the classes outside the head of each example.

        A softmax over the result gives those classes the probability 0, and a loss
        gives their outputs the gradient 0: one output layer, masked, is as many
        separate output layers as there are heads.

        Args:
            logits: shape ``(..., n, classes)``.
            labels: the images' classes, shape ``(n,)`` or ``(..., n)``; only the head
                they belong to is used.

        Implements: eq-restricted-softmax
        """
        if self.heads is None:
            return logits
        return logits.masked_fill(self._elsewhere[labels], -math.inf)

    @cached_property
    def _elsewhere(self) -> Tensor:
        """Entry [y, k]: is class k in another head than class y?"""
        head = torch.full((self.classes,), -1)
        for number, group in enumerate(self.heads):
            head[list(group)] = number
        return (head[:, None] != head).to(self.device)

    @property
    def title(self) -> str:
        """The name as it is written in a figure or a sentence, ``Fashion-MNIST`` for ``fashion``."""
        first, *rest = self.name.split(" ", 1)
        return " ".join([TITLES.get(first, first), *rest])

    @property
    def device(self) -> torch.device:
        """The device that holds the tensors."""
        return self.train.tensors[0].device

    def take(self, n_train: int, n_test: int) -> "Task":
        """At most the first ``n_train`` training and ``n_test`` test images; their order is random.

        Raises:
            ValueError: a number below 1.
        """
        if n_train < 1 or n_test < 1:
            raise ValueError(f"take() needs at least one image of each kind, not {n_train} and {n_test}.")
        return replace(
            self, train=_select(self.train, slice(n_train)), test=_select(self.test, slice(n_test))
        )

    def validation(self, fraction: float = 0.1, seed: int = 0) -> "Task":
        """The training images alone, split in two.

        Hyperparameters chosen on this task leave the test set untouched.

        Args:
            fraction: the part of the training images that becomes the new task's test set, between 0 and 1.
            seed: of the random split.

        Raises:
            ValueError: one of the two parts would be empty.
        """
        count = len(self.train)
        held_out = round(fraction * count)
        if not 0 < held_out < count:
            raise ValueError(
                f"fraction={fraction} of {count} images leaves one part empty; choose one between 0 and 1."
            )
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).to(self.device)
        return replace(
            self,
            name=f"{self.name} validation",
            train=_select(self.train, order[held_out:]),
            test=_select(self.train, order[:held_out]),
        )

    def __repr__(self) -> str:
        return (
            f"Task({self.title}: {len(self.train):,} training and {len(self.test):,} test images of "
            f"{self.shape[1]}×{self.shape[2]} pixels, {self.classes} classes, on {self.device})"
        )


def device() -> torch.device:
    """The device that computes by default: the GPU if PyTorch sees one, the CPU otherwise."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def scale() -> str:
    """``"quick"`` or ``"full"``, from the environment variable ``EWC_SCALE``.

    The default is full on a GPU and quick on a CPU.

    Raises:
        ValueError: ``EWC_SCALE`` is something else.
    """
    return _setting("EWC_SCALE", ("quick", "full"), "full" if device().type == "cuda" else "quick")


def load(name: str, device: torch.device | str | None = None) -> Task:
    """One of the four data sets as a task, standardised with the mean and deviation of its training pixels.

    ``"mnist"`` and ``"fashion"`` (28×28, 60,000 + 10,000 images) are read from the folder that the
    environment variable ``EWC_DATA`` names (default: the user's cache folder), in torchvision's layout; if
    they are not there, torchvision downloads them to it. ``"digits"`` (8×8, scikit-learn's 1,797 scanned
    digits) and ``"letters"`` (8×8, the glyphs A to J in 16 fonts, light on a dark plate, rotated, sheared,
    scaled, shifted and blurred at random) need no network.

    Args:
        name: ``"mnist"``, ``"fashion"``, ``"digits"`` or ``"letters"``.
        device: where the tensors are put; default ``tasks.device()``.

    Raises:
        ValueError: there is no data set of this name.
        FileNotFoundError: the files are not on disk and cannot be downloaded.
        RuntimeError: a file on disk is truncated or corrupt.
    """
    if name in REAL:
        arrays, labels = _read_real(name), LABELS[name]
    elif name == "digits":
        # Imported here: few of the book's processes need it, and importing takes seconds.
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        scans = load_digits()
        images, targets = scans.images.astype(np.uint8), scans.target
        x, x_test, y, y_test = train_test_split(
            images, targets, test_size=0.2, stratify=targets, random_state=0
        )
        arrays, labels = (x, y, x_test, y_test), tuple("0123456789")
    elif name == "letters":
        arrays, labels = _cached_letters(), tuple(LETTERS)
    else:
        raise ValueError(f"There is no data set {name!r}; choose one of {_listed(TITLES)}.")
    return _standardised(name, arrays, labels, _default_device() if device is None else torch.device(device))


def pair(device: torch.device | str | None = None) -> tuple[Task, Task]:
    """The two tasks that the book runs on; their names say which pair it is.

    The environment variable ``EWC_DATASET`` chooses: ``mnist`` is MNIST and Fashion-MNIST, ``embedded`` is
    digits and letters, and ``auto``, the default, is the first pair where it is on disk or can be downloaded
    and the second one otherwise. After a failed download ``auto`` does not try again for ten minutes.

    At the scale ``quick`` MNIST and Fashion-MNIST are cut to their first 6,000 training and 2,000 test
    images, which a CPU trains on in seconds; the embedded pair is small enough as it is.

    Raises:
        ValueError: ``EWC_DATASET`` is something else.
        FileNotFoundError: ``EWC_DATASET=mnist`` and the files cannot be had.
        RuntimeError: a file on disk is truncated or corrupt, which is never passed over in silence.
    """
    choice = _setting("EWC_DATASET", ("auto", "mnist", "embedded"), "auto")
    offline = choice == "auto" and any(map(_missing, REAL)) and _download_failed_recently()
    if choice != "embedded" and not offline:
        try:
            whole = load("mnist", device), load("fashion", device)
            return whole if scale() == "full" else tuple(task.take(6000, 2000) for task in whole)
        except FileNotFoundError:
            if choice == "mnist":
                raise
    return load("digits", device), load("letters", device)


def permuted(task: Task, seed: int) -> Task:
    """The task with the pixels of every image shuffled by one fixed random permutation.

    References:
        Goodfellow et al. (2013), Kirkpatrick et al. (2017).

    Args:
        task: the original.
        seed: of the permutation, the same for training and test images.
    """
    order = torch.randperm(task.features, generator=torch.Generator().manual_seed(seed)).to(task.device)
    return _mapped(task, f"permuted {seed}", lambda x: x.flatten(1)[:, order].view_as(x))


def rotated(task: Task, degrees: float) -> Task:
    """The task with every image turned counter-clockwise about its centre, on an empty background.

    Args:
        task: the original.
        degrees: the angle.
    """
    from torchvision.transforms.functional import InterpolationMode, rotate  # see _source

    background = -task.mean / task.std  # a black pixel after standardisation

    def turn(x: Tensor) -> Tensor:
        return rotate(x, degrees, InterpolationMode.BILINEAR, fill=[background])

    return _mapped(task, f"rotated {degrees:g}", turn)


def split(
    task: Task, groups: Sequence[Sequence[int]] | None = None, *, scenario: str = "class"
) -> list[Task]:
    """One task per group of classes, in the order of the groups (Split MNIST, Zenke et al. 2017).

    Args:
        task: the original.
        groups: disjoint groups of classes; default two by two: (0, 1), (2, 3), …
        scenario: what the network must answer. ``"class"``: which of all classes it is, one output per class.
            ``"task"``: the same, but it is told the group and chooses within it (`Task.heads`). ``"domain"``:
            which member of its group it is, without being told the group; each group's classes are numbered
            from 0 in its order, and all groups share these outputs.

    Raises:
        ValueError: no groups, an empty group, a class that does not exist, or one in two groups; an unknown
            scenario; groups of different sizes in the scenario ``"domain"``.

    References:
        Van de Ven and Tolias, *Three scenarios for continual learning*, 2019.
    """
    if scenario not in SCENARIOS:
        raise ValueError(f"There is no scenario {scenario!r}; choose one of {_listed(SCENARIOS)}.")
    if groups is None:
        groups = [range(k, min(k + 2, task.classes)) for k in range(0, task.classes, 2)]
    groups = [tuple(group) for group in groups]
    members = [k for group in groups for k in group]
    if not groups or not all(groups):
        raise ValueError("split() needs at least one group, and at least one class in each group.")
    if wrong := [k for k in members if k not in range(task.classes)]:
        raise ValueError(
            f"{task.name} has the classes 0 to {task.classes - 1}; there is no class {wrong[0]!r}."
        )
    if len(set(members)) < len(members):
        raise ValueError(f"split() needs disjoint groups, but a class appears twice in {groups}.")
    parts = [_restricted(task, group) for group in groups]
    if scenario == "task":
        return [replace(part, heads=tuple(groups)) for part in parts]
    if scenario == "domain":
        if len({len(group) for group in groups}) > 1:
            raise ValueError(f"Tasks that share their outputs need groups of one size, but got {groups}.")
        return [_renumbered(part, group) for part, group in zip(parts, groups)]
    return parts


def joint(*parts: Task) -> Task:
    """All images of several tasks as one task: what training on everything at once would reach.

    Args:
        *parts: tasks of the same shape, number of classes and heads; an image keeps its task's label.

    Raises:
        ValueError: no tasks, or tasks that differ in shape, number of classes or heads.
    """
    if len({(task.shape, task.classes, task.heads) for task in parts}) != 1:
        raise ValueError(
            f"joint() needs tasks of one shape, number of classes and heads, but got {list(parts)}."
        )
    sets = ([getattr(task, name).tensors for task in parts] for name in ("train", "test"))
    train, test = (TensorDataset(*map(torch.cat, zip(*tensors))) for tensors in sets)
    return replace(parts[0], name=" and ".join(task.name for task in parts), train=train, test=test)


def _restricted(task: Task, group: tuple[int, ...]) -> Task:
    """The task with the images of ``group`` alone."""
    member = torch.tensor(group, device=task.device)

    def keep(data: TensorDataset) -> TensorDataset:
        return _select(data, torch.isin(data.tensors[1], member))

    name = f"{task.name} {'-'.join(task.labels[k] for k in group)}"
    return replace(task, name=name, train=keep(task.train), test=keep(task.test))


def _renumbered(task: Task, group: tuple[int, ...]) -> Task:
    """The task with its classes, ``group``, numbered from 0 in the order of the group."""
    member = torch.tensor(group, device=task.device)
    train, test = (
        TensorDataset(data.tensors[0], (data.tensors[1][:, None] == member).int().argmax(1))
        for data in (task.train, task.test)
    )
    names = tuple(task.labels[k] for k in group)
    return replace(task, train=train, test=test, classes=len(group), labels=names)


def _select(data: TensorDataset, index: Tensor | slice) -> TensorDataset:
    return TensorDataset(*(tensor[index] for tensor in data.tensors))


def _mapped(task: Task, suffix: str, function) -> Task:
    """The task with ``function`` applied to its images."""
    (x, y), (x_test, y_test) = task.train.tensors, task.test.tensors
    return replace(
        task,
        name=f"{task.name} {suffix}",
        train=TensorDataset(function(x), y),
        test=TensorDataset(function(x_test), y_test),
    )


def _standardised(
    name: str, arrays: tuple[np.ndarray, ...], labels: tuple[str, ...], device: torch.device
) -> Task:
    """A task of ``(x, y, x_test, y_test)``: whole-numbered pixels ``(N, H, W)`` and labels."""
    top = 16 if name in ("digits", "letters") else 255  # the value of a fully inked pixel
    x, y, x_test, y_test = (torch.from_numpy(array).to(device) for array in arrays)
    x, x_test = (images[:, None].float() / top for images in (x, x_test))
    mean, std = x.mean().item(), x.std().item()
    return Task(
        name=name,
        train=TensorDataset(x.sub_(mean).div_(std), y.long()),
        test=TensorDataset(x_test.sub_(mean).div_(std), y_test.long()),
        classes=len(labels),
        shape=tuple(x.shape[1:]),
        mean=mean,
        std=std,
        labels=labels,
    )


# Settings and folders


def _setting(variable: str, allowed: tuple[str, ...], default: str) -> str:
    value = os.environ.get(variable) or default
    if value not in allowed:
        raise ValueError(f"{variable}={value!r} is not understood; set it to one of {_listed(allowed)}.")
    return value


def _listed(names) -> str:
    return ", ".join(map(repr, names))


_default_device = device  # `load` has an argument of that name


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


def _missing(name: str) -> bool:
    return not all(path.exists() for path in _paths(name).values())


def _read_real(name: str) -> tuple[np.ndarray, ...]:
    """``(x, y, x_test, y_test)`` of MNIST or Fashion-MNIST, downloaded if need be."""
    if _missing(name):
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


def _download_failed_recently() -> bool:
    try:
        return 0 <= time.time() - (_cache_folder() / "download-failed").stat().st_mtime < RETRY
    except OSError:
        return False


# Letters


def _cached_letters() -> tuple[np.ndarray, ...]:
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
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npz", delete=False) as file:
            np.savez(file, **dict(zip(names, arrays)))
        os.replace(file.name, path)
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
