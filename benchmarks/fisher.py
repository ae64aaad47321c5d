"""Times the diagonal Fisher of `ewc` against its peers, in one process, and prints ratios.

    python -m benchmarks.fisher                              # everything that is installed
    EWC_RECORD=1 EWC_SCALE=full python -m benchmarks.fisher  # the same, kept for the chapter "fast code"
    pip install -r benchmarks/requirements.txt               # the peers

Every method computes the mean per example over the same images. One round times each method once, in turn; the ratio
is to a plain forward and backward pass over the same images in the same round, and the median over rounds is printed.
The error is the relative L2 distance to plain autograd in float64, one example and one class at a time.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from ewc import fisher, recorded, tasks

Diagonal = dict[str, Tensor]
FEW = 24  # images on which the errors are measured
FEW_TO_TRAIN = {"convolutional": 10_000}  # on a CPU its ten epochs over everything take a quarter of an hour
SLOW = 20  # the loops at batch size one run on this fraction of the images
# Images in one pass, as suits the device; `ewc` chooses for itself.
PLAIN = {"cpu": 512, "cuda": 10_000}
PEERS = {"cpu": 128, "cuda": 2048}


def perceptron(shape: Sequence[int], width: int) -> nn.Sequential:
    features = shape[0] * shape[1] * shape[2]
    return nn.Sequential(
        nn.Flatten(), nn.Linear(features, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )


def convolutional(shape: Sequence[int]) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * (shape[1] // 4) * (shape[2] // 4), 10),
    )


NETWORKS: dict[str, Callable[[Sequence[int]], nn.Sequential]] = {
    "256-256": lambda shape: perceptron(shape, 256),
    "1000-1000": lambda shape: perceptron(shape, 1000),
    "convolutional": convolutional,
}


# ---- the methods: (model, x, y) -> mean diagonal -----------------------------------------------------------------


def batches(x: Tensor, y: Tensor, sizes: dict[str, int]) -> Iterator[tuple[Tensor, Tensor]]:
    size = sizes[x.device.type]
    return zip(x.split(size), y.split(size))


def plain_pass(model: nn.Module, x: Tensor, y: Tensor) -> None:
    for a, b in batches(x, y, PLAIN):
        F.cross_entropy(model(a), b).backward()
    model.zero_grad()


def one_at_a_time(every_class: bool) -> Callable:
    """The loop of most repositories; ``every_class`` weighs the squared gradients of all labels."""

    def run(model: nn.Module, x: Tensor, y: Tensor) -> Diagonal:
        names, params = zip(*model.named_parameters())
        total = [torch.zeros_like(p) for p in params]
        for a, b in zip(x.split(1), y):
            log_p = model(a)[0].log_softmax(0)
            for c in range(len(log_p)) if every_class else [b]:
                weight = log_p[c].detach().exp() if every_class else 1.0
                for t, g in zip(total, torch.autograd.grad(log_p[c], params, retain_graph=True)):
                    t += weight * g.square()
        return {n: t / len(x) for n, t in zip(names, total)}

    return run


def torch_func(model: nn.Module, x: Tensor, y: Tensor) -> Diagonal:
    params = {n: p.detach() for n, p in model.named_parameters()}
    total = {n: torch.zeros_like(p) for n, p in params.items()}
    each = vmap(grad(lambda p, a, b: F.cross_entropy(functional_call(model, p, (a[None],)), b[None])), (None, 0, 0))
    for a, b in batches(x, y, PEERS):
        for n, g in each(params, a, b).items():
            total[n] += g.square().sum(0)
    return {n: t / len(x) for n, t in total.items()}


def backpack(quantity: str) -> Callable:
    import backpack as peer
    from backpack import extensions

    extension = getattr(extensions, quantity)
    field = extension().savefield
    extended: dict[int, nn.Module] = {}

    def run(model: nn.Module, x: Tensor, y: Tensor) -> Diagonal:
        if id(model) not in extended:
            extended[id(model)] = peer.extend(copy.deepcopy(model))
        twin = extended[id(model)]
        loss = peer.extend(nn.CrossEntropyLoss(reduction="sum"))
        total = {n: torch.zeros_like(p) for n, p in twin.named_parameters()}
        for a, b in batches(x, y, PEERS):
            with peer.backpack(extension()):
                loss(twin(a), b).backward()
            for n, p in twin.named_parameters():
                total[n] += getattr(p, field).detach()
        twin.zero_grad()
        return {n: t / len(x) for n, t in total.items()}

    return run


def nngeometry() -> Callable:
    from nngeometry.metrics import FIM
    from nngeometry.object import PMatDiag
    from torch.utils.data import DataLoader, TensorDataset

    def run(model: nn.Module, x: Tensor, y: Tensor) -> Diagonal:
        loader = DataLoader(TensorDataset(x, y), batch_size=PEERS[x.device.type])
        flat = FIM(model=model, loader=loader, representation=PMatDiag, variant="classif_logits", device=x.device)
        parts = flat.get_diag().detach().split([p.numel() for p in model.parameters()])
        return {n: part.view_as(p) for part, (n, p) in zip(parts, model.named_parameters())}

    return run


def laplace() -> Callable:
    from laplace.curvature import BackPackGGN

    backends: dict[int, tuple] = {}

    def run(model: nn.Module, x: Tensor, y: Tensor) -> Diagonal:
        if id(model) not in backends:
            twin = copy.deepcopy(model)
            backends[id(model)] = BackPackGGN(twin, "classification"), twin
        backend, twin = backends[id(model)]
        flat = sum(backend.diag(a, b)[1] for a, b in batches(x, y, PEERS)) / len(x)
        parts = flat.detach().split([p.numel() for p in twin.parameters()])
        return {n: part.view_as(p) for part, (n, p) in zip(parts, twin.named_parameters())}

    return run


def own(estimator: str, **options) -> Callable:
    return lambda model, x, y: fisher.diagonal(model, (x, y), estimator, **options)


# (method, quantity, how to make it, run it on one image in so many)
METHODS: list[tuple[str, str, Callable[[], Callable], int]] = [
    ("ewc", "empirical", lambda: own("empirical"), 1),
    ("ewc", "sampled", lambda: own("sampled"), 1),
    ("ewc", "probe", lambda: own("probe"), 1),
    ("ewc", "exact", lambda: own("exact"), 1),
    ("ewc, tolerance 1e-2", "exact", lambda: own("exact", tolerance=1e-2), 1),
    ("loop, batch size 1", "empirical", lambda: one_at_a_time(False), SLOW),
    ("loop, every class", "exact", lambda: one_at_a_time(True), 5 * SLOW),
    ("torch.func vmap(grad)", "empirical", lambda: torch_func, SLOW),
    ("BackPACK SumGradSquared", "empirical", lambda: backpack("SumGradSquared"), 5),
    ("BackPACK DiagGGNMC", "sampled", lambda: backpack("DiagGGNMC"), 5),
    ("BackPACK DiagGGNExact", "exact", lambda: backpack("DiagGGNExact"), 5),
    ("NNGeometry PMatDiag", "exact", nngeometry, 5),
    ("laplace-torch BackPackGGN", "exact", laplace, 5),
]


# ---- measuring ----------------------------------------------------------------------------------------------------


def brute_force(model: nn.Module, x: Tensor, y: Tensor, quantity: str) -> Diagonal:
    twin = copy.deepcopy(model).double().cpu()
    return one_at_a_time(quantity == "exact")(twin, x.double().cpu(), y.cpu())


def relative_error(actual: Diagonal, expected: Diagonal) -> float:
    difference = sum(float((actual[n].double().cpu() - e).square().sum()) for n, e in expected.items())
    return (difference / sum(float(e.square().sum()) for e in expected.values())) ** 0.5


def seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int) -> None:
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), device=x.device).split(128):
            optimiser.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimiser.step()


def record_name(benchmark: str) -> str:
    """Where `recorded` keeps a benchmark: graphics cards apart from processors."""
    return f"benchmark-{benchmark}" + ("-cuda" if tasks.device().type == "cuda" else "")


def measure(
    networks: Sequence[str] = tuple(NETWORKS),
    methods: str = "",
    images: int = 10_000,
    rounds: int = 5,
    epochs: int = 10,
    data: str | None = None,
) -> list[dict]:
    """Times methods on networks trained for ``epochs``, on the book's device.

    Args:
        networks: keys of `NETWORKS`.
        methods: only the methods whose name contains this, such as ``"ewc"``.
        images: how many images one pass covers.
        rounds: how often each method is timed.
        epochs: passes of training before the measurement, over all the training images (fewer for the convolutional
            network on a CPU).
        data: a data set of `tasks.load`; the first of the book's two if not given.

    Returns:
        One dictionary for each network and method: ``network``, ``method``, ``quantity``, ``installed``,
        ``trained on`` (images); where it is installed, ``ratio`` to a plain pass and ``seconds`` (medians) and
        ``error`` (None for random estimators).
    """
    device = tasks.device()
    task = tasks.load(data, device=device) if data else tasks.pair()[0]
    all_x, all_y = task.train.tensors
    chosen = [m for m in METHODS if methods in m[0]]
    ready: list[Callable | None] = []
    for _, _, make, _ in chosen:
        try:
            ready.append(make())
        except ImportError:
            ready.append(None)
    rows = []
    for network in networks:
        torch.manual_seed(0)
        model = NETWORKS[network](task.shape).to(device)
        few = FEW_TO_TRAIN.get(network, len(all_x)) if device.type == "cpu" else len(all_x)
        train(model, all_x[:few], all_y[:few], epochs)
        x, y = all_x[:images], all_y[:images]
        ratios: list[list[float]] = [[] for _ in chosen]
        times: list[list[float]] = [[] for _ in chosen]
        for i in range(rounds + 1):
            reference = seconds(lambda: plain_pass(model, x, y), device)
            for (*_, part), run, own_times, own_ratios in zip(chosen, ready, times, ratios):
                if run is None:
                    continue
                n = -(-len(x) // part)
                elapsed = seconds(lambda run=run, n=n: run(model, x[:n], y[:n]), device) * len(x) / n
                if i:  # the first round warms up
                    own_times.append(elapsed)
                    own_ratios.append(elapsed / reference)
        truth = {}  # by quantity: slow, so made once
        for (method, quantity, *_), run, own_times, own_ratios in zip(chosen, ready, times, ratios):
            row = {"network": network, "method": method, "quantity": quantity, "installed": run is not None}
            row["trained on"] = min(few, len(all_x))
            if run is not None:
                row |= {"seconds": statistics.median(own_times), "ratio": statistics.median(own_ratios), "error": None}
                if "tolerance" in method:  # a share of the trace over all the images: so is its error
                    whole = {n: f.double().cpu() for n, f in fisher.diagonal(model, (x, y)).items()}
                    row["error"] = relative_error(run(model, x, y), whole)
                elif quantity in ("exact", "empirical"):
                    start = x[:FEW], y[:FEW]
                    if quantity not in truth:
                        truth[quantity] = brute_force(model, *start, quantity)
                    row["error"] = relative_error(run(model, *start), truth[quantity])
            rows.append(row)
    return rows


def table(rows: Sequence[dict]) -> str:
    """The measurements as text, one line each."""
    lines = [f"{'network':14} {'quantity':10} {'method':26} {'x plain pass':>12} {'seconds':>9} {'error':>9}"]
    for r in rows:
        if r["installed"]:
            error = f"{r['error']:9.0e}" if r["error"] is not None else "   random"
            numbers = f"{r['ratio']:12.2f} {r['seconds']:9.3f} {error}"
        else:
            numbers = "not installed"
        lines.append(f"{r['network']:14} {r['quantity']:10} {r['method']:26} {numbers}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--methods", default="", help="only those whose name contains this")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data", help="a data set of ewc.tasks.load")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.backends.cudnn.allow_tf32 = False  # as in `fisher.diagonal`: the same precision for all
    print(f"{recorded.machine(tasks.device())}, torch {torch.__version__}")
    for network in arguments.networks:
        rows = measure(
            [network], arguments.methods, images=arguments.images, rounds=arguments.rounds, epochs=arguments.epochs,
            data=arguments.data,
        )
        print(f"{network}: trained for {arguments.epochs} epochs on {rows[0]['trained on']:,} images")
        print(table(rows), flush=True)
        results = {"images": arguments.images, "epochs": arguments.epochs, "rows": rows}
        recorded.keep(record_name(f"fisher-{network}"), results)


if __name__ == "__main__":
    main()
