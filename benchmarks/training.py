"""Times `ewc.training` against the usual loop over a DataLoader, and a sweep against runs in turn; prints ratios.

    EWC_DATA=... python -m benchmarks.training            # MNIST
    EWC_DATASET=embedded python -m benchmarks.training    # digits and letters
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import MNIST
from torchvision.transforms import ToTensor

from benchmarks.fisher import record_name, seconds
from ewc import EWC, models, recorded, tasks, training


class Pictures(MNIST):
    """A task's training images as torchvision's data set serves them: made a picture and converted, one at a time.

    They are not read from files, because embedded data have none.
    """

    def __init__(self, task: tasks.Task) -> None:
        x, y = (t.cpu() for t in task.train.tensors)
        self.data, self.targets = ((x * task.std + task.mean).clamp(0, 1) * 255).round().byte()[:, 0], y
        self.transform, self.target_transform = ToTensor(), None


def loader_epoch(model: nn.Module, data: Dataset, batch_size: int, device: torch.device) -> None:
    """One epoch as tutorials write it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    for x, y in DataLoader(data, batch_size=batch_size, shuffle=True):
        x, y = x.to(device), y.to(device)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.item()  # the usual running sum
        loss.backward()
        optimizer.step()


@torch.no_grad()
def epoch_by_hand(model: nn.Sequential, task: tasks.Task, lr: float = 0.01, batch_size: int = 128) -> None:
    """One epoch of SGD with momentum as `fit` takes it at a constant rate, but for this one architecture (a
    `models.mlp` with two hidden layers): the chain rule written out, no autograd, no buffer allocated twice."""
    x, y = task.train.tensors
    x = x.flatten(1)
    weights = list(model.parameters())
    w1, b1, w2, b2, w3, b3 = weights
    gradients = [torch.empty_like(w) for w in weights]
    velocities = [torch.zeros_like(w) for w in weights]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(x.device)
    buffer = x.new_empty(batch_size, x.shape[1])
    for batch in order.split(batch_size):
        inputs = torch.index_select(x, 0, batch, out=buffer[: len(batch)])
        first = torch.addmm(b1, inputs, w1.T).relu_()
        second = torch.addmm(b2, first, w2.T).relu_()
        delta = torch.addmm(b3, second, w3.T).softmax(1)
        delta[torch.arange(len(batch), device=x.device), y[batch]] -= 1
        delta /= len(batch)
        for i, (below, weight) in enumerate(((second, w3), (first, w2), (inputs, None))):
            torch.mm(delta.T, below, out=gradients[4 - 2 * i])
            torch.sum(delta, 0, out=gradients[5 - 2 * i])
            if weight is not None:
                delta = torch.mm(delta, weight).mul_(below > 0)
        torch._foreach_mul_(velocities, 0.9)
        torch._foreach_add_(velocities, gradients)
        torch._foreach_add_(weights, velocities, alpha=-lr)


def products_of_an_epoch(task: tasks.Task, batch_size: int = 128) -> None:
    """The matrix products of such an epoch and nothing else: what no program can do without."""
    weights = [torch.randn(256, task.features), torch.randn(256, 256), torch.randn(task.classes, 256)]
    weights = [w.to(task.device) for w in weights]
    layers = [(w, torch.randn(batch_size, w.shape[1]).to(w), torch.randn(batch_size, w.shape[0]).to(w)) for w in weights]
    for _ in range(math.ceil(len(task.train) / batch_size)):
        for i, (weight, below, delta) in enumerate(layers):
            below @ weight.T, delta.T @ below
            if i:
                delta @ weight


def epochs(task: tasks.Task, rounds: int) -> dict[str, list[float]]:
    """Seconds of one epoch, for each round: the loop over a DataLoader, `fit`, and how far it is from the arithmetic."""
    pictures = Pictures(task)
    device = task.device
    model = models.mlp(task.features, [256, 256], task.classes, seed=0).to(device)
    deep = models.mlp(task.features, [256, 256, 256], task.classes, seed=0).to(device)  # the tutorial's network
    ways = {
        "DataLoader, batch 32, the tutorial's network": lambda: loader_epoch(deep, pictures, 32, device),
        "DataLoader, batch 128": lambda: loader_epoch(model, pictures, 128, device),
        "fit, batch 128": lambda: training.fit(model, task, epochs=1),
        "by hand for this one network, batch 128": lambda: epoch_by_hand(model, task),
        "its matrix products alone": lambda: products_of_an_epoch(task),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(seconds(way, device))
    return times


def runs(first: tasks.Task, second: tasks.Task, count: int, rounds: int) -> list[tuple[float, float]]:
    """Seconds of learning the second task under EWC, `count` runs in turn and at once, for each round."""
    device = first.device
    nets = [models.mlp(first.features, [256, 256], first.classes, seed=s).to(device) for s in range(count)]
    memories = [EWC(strength=float(10 * (s + 1))) for s in range(count)]
    for net, memory in zip(nets, memories):
        memory.consolidate(net, first.take(1000, 1).train)

    def in_turn() -> None:
        for s, net in enumerate(copy.deepcopy(nets)):
            training.fit(net, second, memory=memories[s], seed=s, epochs=1)

    def at_once() -> None:
        training.sweep(copy.deepcopy(nets), second, memories=memories, seeds=range(count), epochs=1)

    return [(seconds(in_turn, device), seconds(at_once, device)) for _ in range(rounds)]


def whole_sweep(first: tasks.Task, second: tasks.Task, count: int = 50) -> float:
    """Seconds of `count` runs of the book's experiment, five epochs of each task, at once."""
    nets = [models.mlp(first.features, [256, 256], first.classes, seed=s).to(first.device) for s in range(count)]
    start = time.perf_counter()
    training.sweep(nets, first, seeds=range(count), lr=0.05)
    memories = [EWC(strength=300.0) for _ in nets]
    for net, memory in zip(nets, memories):
        memory.consolidate(net, first.train)
    training.sweep(nets, second, seeds=range(count), memories=memories)
    if first.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=12)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    first, second = tasks.pair()
    print(f"{recorded.machine(first.device)}, torch {torch.__version__}")
    rounds = epochs(first, arguments.rounds)
    for name, times in rounds.items():
        ratios = sorted(t / ours for t, ours in zip(times, rounds["fit, batch 128"]))
        print(f"{name:46} {statistics.median(times):7.2f} s an epoch  "
              f"{statistics.median(ratios):5.2f} x ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    measured = {name: statistics.median(times) for name, times in rounds.items()}
    pairs = runs(first, second, arguments.runs, arguments.rounds)
    alone, together = (statistics.median(column) for column in zip(*pairs))
    ratios = sorted(at_once / in_turn for in_turn, at_once in pairs)
    print(f"{arguments.runs} runs: in turn {alone:.2f} s, at once {together:.2f} s, "
          f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    results = {"epoch": measured, "epoch, rounds": rounds,
               "runs": arguments.runs, "in turn": alone, "at once": together, "ratios": ratios}
    if first.device.type == "cuda":
        results["whole sweep of 50"] = whole_sweep(first, second)
        print(f"50 runs of the whole experiment: {results['whole sweep of 50']:.1f} s")
    recorded.keep(record_name("training"), results)


if __name__ == "__main__":
    main()
