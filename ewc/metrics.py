r"""What sequential learning has kept, in four numbers.

The accuracy matrix :math:`R`, shape ``(T, T)``, holds in row i, column j the test accuracy on task j after
learning task i; `ewc.training.run` returns it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ewc.fisher import IGNORED, _evaluating, class_index
from ewc.tasks import Task


@torch.no_grad()
def accuracy(
    model: nn.Module,
    data: Task | TensorDataset,
    classes: Sequence[int] | None = None,
    batch_size: int = 1000,
) -> float:
    """Share of labels whose class has the largest logit, between 0 and 1; labels of -100 do not count.

    For a task with heads the choice is made within the image's head. Where the largest logit is NaN or infinite, as
    after a run that diverged, the answer counts as wrong. The model is evaluated in eval mode and handed back in the
    mode it was in.

    Args:
        model: a network with logits of shape ``(n, classes)``, or ``(n, classes, *positions)``.
        data: a task, of which the test set is used, or a set of images and labels: whole numbers of shape ``(n,)`` or
            ``(n, *positions)``.
        classes: the classes among which the network may choose, whatever the task's heads; default all of
            them, or those of the image's head.
        batch_size: images in one pass; the result does not depend on it.

    Raises:
        ValueError: there are no images, no classes to choose from, or some that the network does not have; labels of
            another shape than the logits', or in floating point; a batch_size below 1.
        TypeError: the data is neither a task nor a `TensorDataset`.
    """
    if not isinstance(data, (Task, TensorDataset)):
        raise TypeError(f"accuracy() needs a Task or a TensorDataset of images and labels; got {type(data).__name__}.")
    x, y = (data.test if isinstance(data, Task) else data).tensors
    if y.is_floating_point():
        raise ValueError(f"The labels are {y.dtype}; labels must be whole numbers: use y.long().")
    y = y.long()
    counted = int((y != IGNORED).sum())
    if not counted:
        raise ValueError(f"The accuracy on no images is undefined; give at least one with a label (not {IGNORED}).")
    if classes is not None and len(classes) == 0:
        raise ValueError("accuracy() needs at least one class to choose from; classes=None allows all.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size!r}.")
    hits, elsewhere = 0, None
    with _evaluating(model):
        for images, labels in zip(x.split(batch_size), y.split(batch_size)):
            logits = model(images)
            if logits.dim() < 2 or logits.shape[:1] + logits.shape[2:] != labels.shape:
                raise ValueError(
                    f"Labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(logits.shape)}: axis 1 of "
                    "the logits runs over the classes and the other axes are those of the labels."
                )
            if classes is not None and elsewhere is None:  # the network's first answer says how many classes there are
                elsewhere = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
                elsewhere[class_index(classes, logits, least=1)] = False
            logits = logits.movedim(1, -1)
            if elsewhere is not None:
                logits = logits.masked_fill(elsewhere, -math.inf)
            elif isinstance(data, Task):
                logits = data.masked(logits, labels)
            hits += _right(logits, labels).sum()
    return int(hits) / counted


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the largest logit, on the last axis, is the label's; not if it is NaN or infinite."""
    largest, choice = logits.max(-1)  # max would choose a NaN
    return (choice == labels) & (largest < math.inf)


def average_accuracy(matrix: Tensor) -> float:
    r"""Mean accuracy over all tasks after the last one.

    .. math:: \frac1T \sum_{j=1}^{T} R_{T,j}

    Args:
        matrix: R, shape ``(T, T)``.

    Raises:
        ValueError: the matrix is not square.

    Implements: eq-average-accuracy

    References:
        Lopez-Paz and Ranzato, *Gradient episodic memory for continual learning*, 2017.
    """
    return _square(matrix)[-1].mean().item()


def backward_transfer(matrix: Tensor) -> float:
    r"""How much later learning changed the earlier tasks; negative where it harmed them.

    .. math:: \frac{1}{T-1} \sum_{j=1}^{T-1} (R_{T,j} - R_{j,j})

    Args:
        matrix: R, shape ``(T, T)`` with at least two tasks.

    Raises:
        ValueError: the matrix is not square, or has a single task.

    Implements: eq-backward-transfer

    References:
        Lopez-Paz and Ranzato, *Gradient episodic memory for continual learning*, 2017.
    """
    matrix = _square(matrix, tasks=2)
    return (matrix[-1] - matrix.diagonal())[:-1].mean().item()


def forgetting(matrix: Tensor) -> float:
    r"""Mean drop from the best accuracy that each earlier task ever had.

    .. math:: \frac{1}{T-1} \sum_{j=1}^{T-1} \max_{i<T} (R_{i,j} - R_{T,j})

    Args:
        matrix: R, shape ``(T, T)`` with at least two tasks.

    Raises:
        ValueError: the matrix is not square, or has a single task.

    Implements: eq-forgetting

    References:
        Chaudhry et al., *Riemannian walk for incremental learning*, 2018.
    """
    matrix = _square(matrix, tasks=2)
    return (matrix[:-1, :-1].max(0).values - matrix[-1, :-1]).mean().item()


def _square(matrix: Tensor, tasks: int = 1) -> Tensor:
    matrix = torch.as_tensor(matrix, dtype=torch.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) < tasks:
        raise ValueError(
            f"This needs the accuracy matrix of at least {tasks} task(s), shape (T, T), "
            f"not a tensor of shape {tuple(matrix.shape)}."
        )
    return matrix
