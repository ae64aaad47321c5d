"""Image classification tasks as tensors on one device: what the book's networks learn, and forget.

A ``Task`` holds standardised images and labels, already on the compute device, so that a batch is an index
selection. ``load`` reads four data sets: MNIST and Fashion-MNIST, which must be on disk or are downloaded by
torchvision, and the embedded pair ``digits`` and ``letters``, which need no network. ``permuted``,
``rotated`` and ``split`` make new tasks of old ones.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from ewc import _images

LABELS = {
    "mnist": tuple("0123456789"),
    "fashion": (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
}

SCENARIOS = ("task", "domain", "class")


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
        return logits.masked_fill(self._elsewhere[labels.long()], -math.inf)

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
        return " ".join([_images.TITLES.get(first, first), *rest])

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
    if name in _images.REAL:
        arrays, labels = _images.real(name), LABELS[name]
    elif name == "digits":
        arrays, labels = _images.digits(), tuple("0123456789")
    elif name == "letters":
        arrays, labels = _images.letters(), tuple(_images.LETTERS)
    else:
        raise ValueError(f"There is no data set {name!r}; choose one of {_listed(_images.TITLES)}.")
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
    offline = choice == "auto" and any(map(_images.missing, _images.REAL)) and _images.download_failed_recently()
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
    from torchvision.transforms.functional import InterpolationMode, rotate  # importing it takes long

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
            scenario; groups of different sizes in the scenario ``"domain"``, or of one class in ``"task"``.

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
        if alone := [group for group in groups if len(group) == 1]:
            raise ValueError(f"Told the group {alone[0]}, there is nothing to choose: give each two classes or more.")
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


# Settings


def _setting(variable: str, allowed: tuple[str, ...], default: str) -> str:
    value = os.environ.get(variable) or default
    if value not in allowed:
        raise ValueError(f"{variable}={value!r} is not understood; set it to one of {_listed(allowed)}.")
    return value


def _listed(names) -> str:
    return ", ".join(map(repr, names))


_default_device = device  # `load` has an argument of that name
