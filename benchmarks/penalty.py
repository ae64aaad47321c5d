"""Times one training step with the penalty of `ewc` against the same step without it, and prints ratios.

Medians over many short rounds, and the range of the middle half of them: a machine that others use as well has slow
and fast moments.

    python -m benchmarks.penalty
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.fisher import NETWORKS, record_name, seconds
from ewc import EWC, recorded, tasks


def measure(network: str = "256-256", batch_size: int = 128, steps: int = 20, rounds: int = 300) -> dict[str, list[float]]:
    """Ratio of a penalised step to a plain one (SGD with momentum) for each way to apply the penalty: its quartiles."""
    device = tasks.device()
    torch.manual_seed(0)
    model = NETWORKS[network]((1, 28, 28)).to(device)
    x, y = torch.randn(batch_size, 1, 28, 28, device=device), torch.randint(10, (batch_size,), device=device)
    memories = {1: EWC(1.0), 5: EWC(1.0, anchors="each")}
    for count, memory in memories.items():
        for _ in range(count):
            memory.consolidate(model, fisher={n: torch.rand_like(p) for n, p in model.named_parameters()})
    hasty = copy.deepcopy(memories[1])  # its own: a changing rate throws away the shares of a constant one
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def step(before: Callable = lambda: 0.0, between: Callable = lambda: None, after: Callable = lambda: None):
        for _ in range(steps):
            optimiser.zero_grad()
            (F.cross_entropy(model(x), y) + before()).backward()
            between()
            optimiser.step()
            after()

    def loop_over_parameters():
        memory = memories[1]
        return sum(
            0.5 * (memory.fisher[n] * (p - memory.theta_star[n]).square()).sum() for n, p in model.named_parameters()
        )

    def each_step_its_rate(rates=iter(range(10**9))):
        hasty.pull(model, 1e-4 / (1 + next(rates)))

    ways = {
        "plain": {},
        "loop over parameters": {"before": loop_over_parameters},
        "penalty": {"before": lambda: memories[1].penalty(model)},
        "add_gradient": {"between": lambda: memories[1].add_gradient(model)},
        "add_gradient, five tasks": {"between": lambda: memories[5].add_gradient(model)},
        "pull, constant rate": {"after": lambda: memories[1].pull(model, 1e-4)},
        "pull, constant rate, five tasks": {"after": lambda: memories[5].pull(model, 1e-4)},
        "pull, a new rate every step": {"after": each_step_its_rate},
    }
    ratios: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(rounds + 1):
        times = {name: seconds(lambda way=way: step(**way), x.device) for name, way in ways.items()}
        if i:
            for name, t in times.items():
                ratios[name].append(t / times["plain"])
    return {name: statistics.quantiles(r, n=4) for name, r in ratios.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="256-256", choices=["256-256", "1000-1000"])
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{recorded.machine(tasks.device())}, torch {torch.__version__}")
    quartiles = measure(arguments.network)
    for name, (low, median, high) in quartiles.items():
        print(f"{name:34} {median:6.3f}   {low:6.3f} to {high:6.3f}")
    ratios = {name: median for name, (_, median, _) in quartiles.items()}
    recorded.keep(record_name("penalty"), {"network": arguments.network, "ratios": ratios, "quartiles": quartiles})


if __name__ == "__main__":
    main()
