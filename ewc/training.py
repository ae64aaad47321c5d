r"""Training: one run (`fit`), many runs at once (`sweep`), tasks in sequence (`run`).

All three share one loop. Batches are index selections from tensors that already lie on the
compute device, so an epoch costs little more than its matrix products.
"""
from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from . import curvature
from .elastic import EWC, _write
from .fisher import _distributed, _progress, unwrap
from .kfac import KFAC, _shrunk
from .metrics import accuracy
from .relatives import SynapticIntelligence
from .tasks import Task

CHECK_EVERY = 50  # steps between two looks at the loss: a look waits for the device


class NonFiniteLoss(ArithmeticError):
    """The loss became infinite or NaN; the model holds the last weights whose loss was finite."""


@dataclass
class History:
    """What one run saw: mean training loss of each epoch, and accuracies at each evaluation.

    Attributes:
        loss: mean training loss per epoch, in nats per example, without the penalty.
        steps: the optimiser step of each evaluation; 0 is before the first step.
        accuracy: task name -> test accuracy at each of `steps`, between 0 and 1.
    """

    loss: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    accuracy: dict[str, list[float]] = field(default_factory=dict)


def fit(
    model: nn.Module,
    task: Task,
    *,
    epochs: int = 5,
    steps: int | None = None,
    batch_size: int = 128,
    lr: float = 0.01,
    optimizer: str = "sgd",
    momentum: float = 0.9,
    schedule: str | None = "cosine",
    memory=None,
    penalty: str = "pull",
    watch: Sequence[Task] = (),
    every: int | None = None,
    seed: int = 0,
    moments: dict | None = None,
) -> History:
    r"""Train ``model`` on ``task.train`` in place, protected by ``memory`` if there is one.

    Minimises the mean cross-entropy of the task plus the memory's penalty
    :math:`\tfrac{\lambda}{2}\sum_i F_i(\theta_i-\theta^*_i)^2`. For a task with heads the softmax runs
    over the classes of each example's head. Under ``torchrun`` each process
    takes its share of every batch and PyTorch's DistributedDataParallel averages the gradients.
    On a GPU the step of a network of plain layers (linear, convolution, dropout, ...) without hooks is captured once as
    a CUDA graph and replayed, if there are more than fifty; other networks train step by step, to the same numbers but
    for rounding. After a replay no gradient is left in ``.grad``.

    Args:
        model: a network with logits of shape ``(n, classes)``; moved to the task's device.
        task: the data; its tensors are used as they lie.
        epochs: passes over the training set.
        steps: stop after so many steps of the optimiser, whatever ``epochs``.
        batch_size: examples per step, over all processes together.
        lr: learning rate.
        optimizer: ``"sgd"`` or ``"adam"``.
        momentum: of SGD; Adam has its own.
        schedule: ``"cosine"`` (the rate falls to 0 over the run) or None (constant).
        memory: an object with ``add_gradient(model)`` and ``pull(model, step)``, such as
            `ewc.EWC`; None trains plainly.
        penalty: ``"pull"`` takes a proximal step on the penalty after each step of the optimiser,
            stable for every strength; ``"gradient"`` adds the penalty's gradient to the loss's.
        watch: tasks whose test accuracy is recorded.
        every: steps between two such evaluations, the last step being one in any case; None evaluates once an epoch.
        seed: fixes the order of the examples.
        moments: the optimiser's running means, carried from task to task: give every call the same dict, empty
            at first. None starts the optimiser afresh.

    Returns:
        The run's `History`.

    Raises:
        NonFiniteLoss: the loss became infinite or NaN; names the step. The model is left with
            the last weights that are known to have a finite loss, and the buffers of that moment.
        ValueError: an unknown optimiser, schedule or penalty, no training example, or labels that are no classes.
    """
    _check(task, batch_size)
    x, y = task.train.tensors
    model.to(x.device)
    rank, world = (dist.get_rank(), dist.get_world_size()) if _distributed() else (0, 1)
    net = nn.parallel.DistributedDataParallel(model) if world > 1 else model

    def loss_of(batch: Tensor, parameters: dict[str, Tensor] | None) -> Tensor:
        mine = batch[rank::world]
        inputs, targets = _rows(x, mine), _rows(y, mine)
        if parameters is None:
            outputs = net(inputs)
        else:
            places = curvature.places(model).items()  # once for each way in which a parameter is reached
            values = {place: parameters[name] for place, (name, _) in places if name in parameters}
            outputs = functional_call(model, values, (inputs,), tie_weights=False)
        # Summed and divided by the whole batch, so that uneven shares weigh as they should.
        total = cross_entropy(task.masked(outputs, targets), targets, reduction="sum")
        return total * (world / len(batch))

    def evaluate() -> list[dict[str, float]]:
        return [{t.name: accuracy(model, t) for t in watch}]

    history = History()
    _loop(
        parameters={k: p for k, p in unwrap(model).named_parameters() if p.requires_grad},
        buffers=list(model.buffers()),
        loss_of=loss_of,
        evaluate=evaluate,
        orders=_orders([seed], len(x), x.device, stacked=False),
        size=len(x),
        histories=[history],
        modules=[model],
        memory=_Single(model, memory) if memory is not None else None,
        epochs=epochs, steps=steps, batch_size=batch_size, lr=lr, optimizer=optimizer, momentum=momentum,
        schedule=schedule, penalty=penalty, every=every, watched=bool(watch), moments=moments,
        graph=world == 1 and _has_graphs(x.device) and _replayable(model, task, memory, penalty, optimizer),
    )
    return history


def sweep(
    models: Sequence[nn.Module],
    task: Task,
    *,
    seeds: Sequence[int],
    memories: Sequence | None = None,
    epochs: int = 5,
    steps: int | None = None,
    batch_size: int = 128,
    lr: float = 0.01,
    optimizer: str = "sgd",
    momentum: float = 0.9,
    schedule: str | None = "cosine",
    penalty: str = "pull",
    watch: Sequence[Task] = (),
    every: int | None = None,
    moments: dict | None = None,
) -> list[History]:
    r"""Train R models of one architecture at once, each as `fit` would with its own seed and memory.

    The parameters are stacked along a new first axis and every layer becomes one batched product,
    so R runs cost little more than one on a GPU. The loss is the sum over runs, whose gradient
    keeps the runs apart; the optimisers act element by element and need no change.

    Args:
        models: R networks that differ in their weights only; trained in place.
        task: the data, the same for all runs.
        seeds: R integers, the order of the examples of each run; equal seeds share their batches.
        memories: R quadratic memories (with ``fisher``, ``theta_star``, ``strength``) or None; or R of `ewc.kfac.KFAC`,
            each with one pair of factors (of one task, or pooled), for SGD and the pull.
        epochs, steps, batch_size, lr, optimizer, momentum, schedule, penalty, watch, every, moments: as for `fit`.

    Returns:
        One `History` per run.

    Raises:
        NonFiniteLoss: as for `fit`; names the run as well. All models are left with the last
            weights at which every loss was finite.
        ValueError: lists of different lengths, a memory of other networks, options unknown to `fit`, or K-FAC memories
            with several pairs of factors, beside others, for another optimiser or penalty, or with frozen parameters.
    """
    models = [unwrap(model) for model in models]
    runs = len(models)
    memories = list(memories) if memories is not None else [None] * runs
    if not runs or len(seeds) != runs or len(memories) != runs:
        raise ValueError(f"sweep needs one seed and one memory (or None) per model, but got {runs} models, "
                         f"{len(seeds)} seeds and {len(memories)} memories.")
    kronecker = any(isinstance(m, KFAC) for m in memories)
    if not kronecker and any(hasattr(m, "record") or (m is not None and not hasattr(m, "fisher")) for m in memories):
        raise ValueError("sweep stacks quadratic memories such as EWC and L2; train this one with fit.")
    if kronecker:
        pairs = {len(m.tasks) if isinstance(m, KFAC) else None for m in memories}
        if pairs not in ({0}, {1}) or (optimizer, penalty) != ("sgd", "pull"):
            raise ValueError("sweep stacks K-FAC memories that all have one pair of factors (of one task, or pooled), for "
                             "SGD and penalty='pull'; train these with fit.")
        if any(not p.requires_grad for p in models[0].parameters()):
            raise ValueError("sweep pulls with K-FAC where no parameter is frozen; train these with fit.")
        memories = memories if pairs == {1} else [None] * runs  # before the first task nothing pulls
    _check(task, batch_size)
    x, y = task.train.tensors
    for model in models:
        model.to(x.device).train()  # all of them in one mode, as stacking asks
    base = models[0]
    places = {place: name for place, (name, _) in curvature.places(base).items()}
    stacked, buffers = stack_module_state(list(models))
    own = dict(base.named_parameters())
    for memory in memories:
        for name, star in memory.theta_star.items() if memory is not None else ():
            if name not in own or own[name].shape != star.shape:
                raise ValueError(f"A memory holds a parameter {name!r} of shape {tuple(star.shape)} that the models do "
                                 "not have; use the models that were consolidated.")
    linear = {id(m.weight) for m in base.modules() if type(m) is nn.Linear}
    for name, p in own.items():
        if id(p) in linear:  # as a batched product lays out its gradient: autograd would copy any other into this shape
            stacked[name] = stacked[name].detach().mT.contiguous().mT.requires_grad_(p.requires_grad)
    trained = {name: p for name, p in stacked.items() if own[name].requires_grad}
    shared = len(set(seeds)) == 1

    def logits(inputs: Tensor, in_dim: int | None, parameters: dict[str, Tensor] | None = None) -> Tensor:
        def one(parameters, extra, batch):
            values = {place: parameters[name] for place, name in places.items()} | extra
            return functional_call(base, values, (batch,), tie_weights=False)
        used = stacked | (parameters or {})
        return vmap(one, in_dims=(0, 0, in_dim), randomness="different")(used, buffers, inputs)

    def loss_of(batch: Tensor, parameters: dict[str, Tensor] | None) -> Tensor:
        targets = _rows(y, batch).expand(runs, -1)
        outputs = task.masked(logits(_rows(x, batch), None if shared else 0, parameters), targets)
        each = cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none")
        return each.view(runs, -1).mean(1)

    def evaluate() -> list[dict[str, float]]:
        rows = [{} for _ in models]
        with curvature.evaluating(base), torch.no_grad():
            for t in watch:
                xt, yt = t.test.tensors
                hits = sum((t.masked(logits(a, None), b).argmax(-1) == b).sum(1)
                           for a, b in zip(xt.split(1000), yt.split(1000)))
                for row, hit in zip(rows, hits.tolist()):
                    row[t.name] = hit / len(xt)
        return rows

    histories = [History() for _ in models]
    try:
        _loop(
            parameters=trained,
            buffers=list(buffers.values()),
            loss_of=loss_of,
            evaluate=evaluate,
            orders=_orders([seeds[0]] if shared else seeds, len(x), x.device, stacked=not shared),
            size=len(x),
            histories=histories,
            modules=[base],
            memory=None if all(m is None for m in memories) else (_Kronecker if kronecker else _Stacked)(trained, memories),
            epochs=epochs, steps=steps, batch_size=batch_size, lr=lr, optimizer=optimizer, momentum=momentum,
            schedule=schedule, penalty=penalty, every=every, watched=bool(watch), moments=moments,
            graph=_has_graphs(x.device) and _replayable(base, task, None, penalty, optimizer),  # stacked memories are plain
        )
    finally:
        with torch.no_grad():
            for r, model in enumerate(models):
                for name, p in model.named_parameters():
                    p.copy_(stacked[name][r])
                for name, b in model.named_buffers():
                    b.copy_(buffers[name][r])
    return histories


def run(
    model: nn.Module | Sequence[nn.Module],
    tasks: Sequence[Task],
    memory=None,
    *,
    checkpoint: str | Path | None = None,
    seed: int | Sequence[int] = 0,
    keep_moments: bool = False,
    **options,
) -> Tensor:
    """Learn ``tasks`` one after the other, consolidating after each; many models train as a `sweep`.

    Args:
        model: one network, or a list of R networks.
        tasks: the sequence; every task is evaluated after each.
        memory: the memory of the run, or a list of R of them; None for plain fine-tuning.
        checkpoint: a file that keeps the state after each finished task. If it exists, the run goes
            on after the last task in it and ends with the same numbers as if it had never stopped.
        seed: fixes the order of the examples; one for each model.
        keep_moments: carry the optimiser's running means from task to task; False starts each task afresh.
        **options: passed to `fit` or `sweep`.

    Returns:
        The accuracy matrix, float64. Entry ``[i, j]`` is the accuracy on task j after learning task i,
        shape ``(T, T)``, or ``(R, T, T)`` for R models.

    Raises:
        ValueError: the checkpoint belongs to another run; one seed or memory for several models; K-FAC memories that
            keep each task's factors, for several models and more than two tasks.
    """
    many = isinstance(model, (list, tuple))
    models = list(model) if many else [model]
    for what, given in {"seed": seed, "memory": memory}.items():
        if many and not isinstance(given, Sequence) and (what == "seed" or given is not None):
            raise ValueError(f"{len(models)} models need a list of one {what} each; got {given!r}.")
    memories = list(memory) if many and memory is not None else [memory] * len(models)
    seeds = list(seed) if many else [seed]
    if many and len(tasks) > 2 and any(isinstance(m, KFAC) and m.keep == "each" for m in memories):
        raise ValueError("Many models train as a sweep, which needs K-FAC memories with one pair of factors: keep='pooled'.")
    names = [t.name for t in tasks]
    matrix = torch.full((len(models), len(tasks), len(tasks)), math.nan, dtype=torch.float64)
    moments = {} if keep_moments else None
    done = 0
    if checkpoint is not None and Path(checkpoint).exists():
        done = _restore(Path(checkpoint), names, models, memories, matrix, moments)
        for keep in memories:
            if keep is not None:
                keep.to(tasks[0].device)  # the file was read to the CPU; the models move when they train
    for i in range(done, len(tasks)):
        task = tasks[i]
        if many:
            sweep(models, task, seeds=[s + i for s in seeds], memories=memories, moments=moments, **options)
        else:
            fit(model, task, memory=memory, seed=seed + i, moments=moments, **options)
        for r, (net, keep) in enumerate(zip(models, memories)):
            if keep is not None:
                keep.consolidate(net, _share(task.train), classes=task.head)
            for j, other in enumerate(tasks):
                matrix[r, i, j] = accuracy(net, other)
        if checkpoint is not None:
            _save(Path(checkpoint), names, i + 1, models, memories, matrix, moments)
    return matrix if many else matrix[0]


# The loop that `fit` and `sweep` share.


def _loop(*, parameters: dict[str, Tensor], buffers: list[Tensor], loss_of: Callable, evaluate: Callable,
          orders: Callable, size: int, histories: list[History], modules: list[nn.Module], memory, epochs: int,
          steps: int | None, batch_size: int, lr: float, optimizer: str, momentum: float, schedule: str | None,
          penalty: str, every: int | None, watched: bool, moments: dict | None, graph: bool) -> None:
    tensors = list(parameters.values())
    kept = tensors + buffers  # what a bad loss must not spoil: the statistics of batch normalisation as well
    _choose("penalty", penalty, ("pull", "gradient"))
    _choose("schedule", schedule, ("cosine", None))
    _choose("optimizer", optimizer, ("sgd", "adam"))
    per_epoch = math.ceil(size / batch_size)
    total = epochs * per_epoch if steps is None else steps
    # Fused steps go through all their tensors in one order, which gaps between the numbers would break.
    dense = all(torch.empty_like(p).stride() == p.stride() for p in tensors)
    graph = graph and dense and total > CHECK_EVERY  # a capture takes as long as some tens of steps
    # A graph's kernels are told their rate by a tensor, which may change from step to step.
    rate = torch.tensor(lr, dtype=torch.float32, device=tensors[0].device) if graph else lr
    if optimizer == "sgd":
        opt = torch.optim.SGD(tensors, lr=rate, momentum=momentum, foreach=not graph, fused=graph)
    else:
        # Fused: one pass over its four tensors, not five. Without a graph a GPU would be waited for at every step,
        # because the fused step count lies there.
        fused = graph or (dense and tensors[0].device.type == "cpu")
        opt = torch.optim.Adam(tensors, lr=rate, fused=fused, foreach=not fused, capturable=graph)
    if moments:
        if any(i >= len(tensors) or (m.dim() and m.shape != tensors[i].shape) for i, own in moments.items() for m in own.values()):
            raise ValueError("These moments belong to other parameters; give every run an empty dict of its own.")
        # A copy: the optimiser writes into its state. It lies in memory as the parameters do, since the fused step
        # goes through all of them in one order. The rate is this run's, not the last one's.
        state = {i: {key: torch.empty_like(tensors[i]).copy_(m) if m.dim() else m.clone() for key, m in own.items()}
                 for i, own in moments.items()}
        opt.load_state_dict({"state": state, "param_groups": opt.state_dict()["param_groups"]})
        opt.param_groups[0]["lr"] = rate  # not a copy of it
    every = every or per_epoch
    latest = [t.detach().clone() for t in kept]
    earlier = [p.clone() for p in latest]
    window: list[Tensor] = []
    for module in modules:
        module.train()

    def look(step: int) -> None:
        """Evaluate, and write the row of step `step`."""
        for history, row in zip(histories, evaluate()):
            history.steps.append(step)
            for name, value in row.items():
                history.accuracy.setdefault(name, []).append(value)

    def check(step: int) -> Tensor:
        """Stop at a bad loss with the last good weights; return the sum of the losses since the last check."""
        losses = torch.stack(window).view(len(window), -1)
        bad = ~losses.isfinite()
        sound = step < total or all(bool(p.isfinite().all()) for p in tensors)
        if bad.any() or not sound:
            first = int(bad.any(1).float().argmax()) if bad.any() else len(window)
            # The loss of the weights at the last check is the window's first: if it is bad, go back one more.
            with torch.no_grad():
                torch._foreach_copy_(kept, latest if first > 0 else earlier)
            where = f" of run {int(bad[first].float().argmax())}" if len(histories) > 1 and bad.any() else ""
            raise NonFiniteLoss(
                f"The loss{where} is not finite at step {step - len(window) + first} (learning rate {lr:g}, penalty by "
                f"{penalty}): training stopped with the last weights known to have a finite loss. Lower lr, or, if the "
                f"penalty enters through its gradient, lower lr * strength or use penalty='pull'.")
        torch._foreach_copy_(earlier, latest)
        torch._foreach_copy_(latest, kept)
        window.clear()
        return losses.sum(0).double()

    def differentiate(batch: Tensor) -> Tensor:
        """The losses of a batch; leaves the gradient of their sum with the parameters."""
        for p in tensors:  # as `opt.zero_grad`, which also notes itself for a profiler
            p.grad = None
        if not graph:
            losses = loss_of(batch, None)
            (losses.sum() if losses.dim() else losses).backward()  # a small network feels one node more
            return losses.detach()
        # Autograd remembers of a parameter on which stream it first saw it, and a capture has its own: so each step
        # has fresh ones that share the memory. The fused step wants gradients that lie in memory as they do.
        fresh = {name: p.detach().requires_grad_() for name, p in parameters.items()}
        losses = loss_of(batch, fresh)
        found = torch.autograd.grad(losses.sum(), list(fresh.values()), allow_unused=True)
        for p, g in zip(tensors, found):
            p.grad = g if g is None or g.stride() == p.stride() else torch.empty_like(p).copy_(g)
        return losses.detach()

    def advance(batch: Tensor) -> Tensor:
        """One step of the optimiser; the losses of its weights before it, times the examples."""
        losses = differentiate(batch)
        if memory is not None:
            memory.record()
            if penalty == "gradient":
                memory.add_gradient()
        opt.step()
        if memory is not None and penalty == "pull":
            memory.pull(_step_sizes(opt, parameters))
        return losses * batch.shape[-1]

    if graph:
        advance = _Replayed(advance, batch_size)
    if watched:
        look(0)
    step = 0
    with _progress("Training", total, "steps") as bar:
        for epoch in range(math.ceil(total / per_epoch)):
            summed, seen = 0.0, 0
            for batch in orders(epoch).split(batch_size, dim=-1)[: total - step]:
                if schedule == "cosine":  # as CosineAnnealingLR, whose step takes a tenth of a small network's
                    now = lr * (1 + math.cos(math.pi * step / total)) / 2
                    if graph:
                        rate.fill_(now)
                    else:
                        opt.param_groups[0]["lr"] = now
                window.append(advance(batch))
                step += 1
                bar.update()
                seen += batch.shape[-1]
                if len(window) == CHECK_EVERY or step % per_epoch == 0 or step == total:
                    summed = summed + check(step)
                if watched and (step % every == 0 or step == total):
                    look(step)
                    for module in modules:
                        module.train()
            for history, value in zip(histories, (summed / seen).view(-1).tolist()):
                history.loss.append(value)
    if graph:
        opt.zero_grad(set_to_none=True)  # they belong to the graph
    if moments is not None:
        moments.update(opt.state_dict()["state"])


class _Replayed:
    """A step of training as one launch: on a GPU, starting its small kernels one by one takes longer than they do.

    The first steps run as they are, because they make what all others use again, such as the optimiser's state. Then
    one is captured as a CUDA graph, and every full batch replays it. A batch of another size runs as it is.
    """

    def __init__(self, step: Callable[[Tensor], Tensor], size: int) -> None:
        self.step, self.size, self.before = step, size, 3
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, batch: Tensor) -> Tensor:
        if batch.shape[-1] != self.size or self.before:
            self.before = max(0, self.before - 1)
            return self.step(batch)
        if self.graph is None:
            self.batch, self.graph = batch.clone(), torch.cuda.CUDAGraph()
            with torch.cuda.device(batch.device), torch.cuda.graph(self.graph, stream=torch.cuda.Stream(batch.device)):
                self.losses = self.step(self.batch)  # noted, not run
        self.batch.copy_(batch)
        self.graph.replay()
        return self.losses.clone()


# What a graph may hold: layers whose Python does the same at every step.
_PLAIN = (nn.Sequential, nn.Flatten, nn.Linear, nn.Conv2d, nn.ReLU, nn.PReLU, nn.Tanh, nn.Dropout, nn.AvgPool2d)


def _has_graphs(device: torch.device) -> bool:
    return device.type == "cuda" and not torch.is_anomaly_enabled()  # which looks at values in the middle of a step


def _replayable(model: nn.Module, task: Task, memory, penalty: str, optimizer: str) -> bool:
    """Can a step be captured once and replayed, and would the next one do the same?"""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    for module in model.modules():
        if type(module) not in _PLAIN or "forward" in vars(module) or any(getattr(module, h) for h in hooks):
            return False
    parameters = list(model.parameters())
    if type(task) is not Task or any(p._backward_hooks or p._post_accumulate_grad_hooks for p in parameters):
        return False
    if memory is not None and {"pull", "add_gradient", "record"} & vars(memory).keys():
        return False
    if isinstance(memory, KFAC):
        # Several pairs of factors, or a step for each weight, are solved by looking at residuals.
        simple = type(memory) is KFAC and len(memory.tasks) <= 1 and optimizer == "sgd" and penalty == "pull"
        return simple and all(p.requires_grad for p in parameters)
    if memory is None:
        return True
    kind = type(memory)
    record = getattr(kind, "record", SynapticIntelligence.record)
    return (isinstance(memory, EWC) and kind.strength is EWC.strength and kind.pull is EWC.pull
            and kind.add_gradient is EWC.add_gradient and record is SynapticIntelligence.record)


def _step_sizes(opt: torch.optim.Optimizer, parameters: dict[str, Tensor]) -> float | Tensor | dict[str, Tensor]:
    r"""The step s that turns the optimiser's move into ``-s * gradient`` when the gradient is constant.

    With momentum m the moves add up to s = lr / (1 - m); Adam divides by the root of its second
    moment, element by element. With this s the proximal step and the penalty's gradient have the
    same fixed point, so that one strength means the same in both.
    """
    group = opt.param_groups[0]
    lr = group["lr"]
    if isinstance(opt, torch.optim.SGD):
        return lr / (1 - group["momentum"])
    sizes = {}
    for name, p in parameters.items():
        state = opt.state.get(p)
        if not state:  # it never had a gradient, so it has not moved
            sizes[name] = torch.zeros_like(p)
            continue
        taken = state["step"]
        correction = 1 - group["betas"][1] ** (taken.double() if group["capturable"] else float(taken))
        sizes[name] = lr / ((state["exp_avg_sq"] / correction).sqrt() + group["eps"])
    return sizes


class _Single:
    """A memory and its model, as the loop sees them."""

    def __init__(self, model: nn.Module, memory) -> None:
        self.model, self.memory = model, memory

    def record(self) -> None:
        """Synaptic intelligence watches the task's own gradient along the way; other memories do not."""
        if hasattr(self.memory, "record"):
            self.memory.record(self.model)

    def add_gradient(self) -> None:
        self.memory.add_gradient(self.model)

    def pull(self, step) -> None:
        self.memory.pull(self.model, step)


class _Stacked:
    """R quadratic memories on stacked parameters: the penalties of all runs in a few element-wise operations."""

    def __init__(self, parameters: dict[str, Tensor], memories: Sequence) -> None:
        self.names, self.tensors = list(parameters), [p.detach() for p in parameters.values()]
        self.parameters = list(parameters.values())
        self.weights = [torch.zeros_like(p) for p in self.tensors]  # lambda * F, stacked as the parameters are
        self.anchors = [p.clone() for p in self.tensors]
        self.inverse: list[Tensor] = []  # 1 / (lambda * F), made when it is first asked for
        self.shares: list[Tensor] = []  # memory that `pull` need not ask for at each step
        for name, weight, anchor in zip(self.names, self.weights, self.anchors):
            for r, memory in enumerate(memories):
                if memory is not None and name in memory.fisher:  # one that it never saw is free, as in `fit`
                    weight[r] = memory.strength * memory.fisher[name]
                    anchor[r] = memory.theta_star[name]

    def record(self) -> None:
        """Quadratic memories only: nothing watches the way."""

    def add_gradient(self) -> None:
        for p in self.parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        moved = torch._foreach_sub(self.tensors, self.anchors)
        torch._foreach_addcmul_([p.grad for p in self.parameters], self.weights, moved)

    def pull(self, step: float | Tensor | dict[str, Tensor]) -> None:
        if not self.inverse:
            self.inverse = [w.reciprocal() for w in self.weights]
            self.shares = [torch.empty_like(w) for w in self.weights]
        for name, inverse, share in zip(self.names, self.inverse, self.shares):  # w / (1 + w) = 1 / (1 + 1 / w)
            torch.div(inverse, step[name] if isinstance(step, dict) else step, out=share)
        torch._foreach_add_(self.shares, 1.0)
        torch._foreach_reciprocal_(self.shares)
        torch._foreach_lerp_(self.tensors, self.anchors, self.shares)


class _Kronecker:
    """R memories with one pair of Kronecker factors for each layer, on stacked parameters: `KFAC.pull` for all runs.

    The anchors, bases and stiffnesses are stacked and fixed: a graph may hold them.
    """

    def __init__(self, parameters: dict[str, Tensor], memories: Sequence[KFAC]) -> None:
        self.layers = []
        for layer in memories[0].tasks[0]:
            prefix = f"{layer}." if layer else ""
            weight, bias = (parameters.get(prefix + key) for key in ("weight", "bias"))
            U, V, curvatures = (torch.stack(parts) for parts in zip(*(memory._basis(layer) for memory in memories)))
            strengths = curvatures.new_tensor([memory.strength for memory in memories])
            anchor = torch.stack([memory._anchor(layer) for memory in memories])
            fixed = anchor, U, V, strengths[:, None, None] * curvatures
            kind = torch.promote_types(weight.dtype, torch.float32)  # sums of products overflow in half precision
            own = weight.detach(), None if bias is None else bias.detach()
            self.layers.append((*own, *(part.to(weight.device, kind) for part in fixed)))

    def record(self) -> None:
        """Nothing watches the way."""

    @torch.no_grad()
    def pull(self, step: float | Tensor) -> None:
        for weight, bias, anchor, U, V, stiffness in self.layers:
            rows = weight.flatten(2)
            delta = (rows if bias is None else torch.cat([rows, bias[:, :, None]], 2)) - anchor
            place = anchor + _shrunk(delta, U, V, step * stiffness)
            weight.copy_(place[:, :, : rows.shape[2]].view_as(weight))
            if bias is not None:
                bias.copy_(place[:, :, -1])


def _orders(seeds: Sequence[int], n: int, device: torch.device, *, stacked: bool) -> Callable[[int], Tensor]:
    """Epoch -> order of the examples: shape ``(n,)``, or ``(R, n)`` when runs have their own."""
    generators = [torch.Generator().manual_seed(int(s)) for s in seeds]

    def order(epoch: int) -> Tensor:
        rows = [torch.randperm(n, generator=g) for g in generators]
        return (torch.stack(rows) if stacked else rows[0]).to(device)

    return order


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """``x[index]``; on a CPU faster than that."""
    rows = x.index_select(0, index.flatten())
    return rows if index.dim() == 1 else rows.unflatten(0, index.shape)


def _check(task: Task, batch_size: int) -> None:
    """Says in words what would otherwise fail in the middle of the training, on a GPU for the whole process."""
    x, y = task.train.tensors
    if not len(x):
        raise ValueError(f"{task.name!r} has no training example; give at least one.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size!r}.")
    low, high = torch.stack(y.aminmax()).tolist()
    if low < 0 or high >= task.classes:
        raise ValueError(f"{task.name!r} has labels from {low} to {high}, but {task.classes} classes: they must lie "
                         f"between 0 and {task.classes - 1}.")


def _choose(what: str, value, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"{what} must be one of {', '.join(repr(a) for a in allowed)}, not {value!r}.")


def _share(data: TensorDataset) -> TensorDataset:
    """This process's part of the data; the memories add up over processes."""
    if not _distributed():
        return data
    return TensorDataset(*(t[dist.get_rank()::dist.get_world_size()] for t in data.tensors))


def _save(path: Path, names, done: int, models, memories, matrix: Tensor, moments: dict | None) -> None:
    """A kill at any moment leaves a whole file."""
    state = {"tasks": names, "done": done, "matrix": matrix, "moments": moments,
             "random": torch.get_rng_state(),
             "random of cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
             "models": [m.state_dict() for m in models],
             "memories": [m.state_dict() if m is not None else None for m in memories]}
    _write(state, path)


def _restore(path: Path, names, models, memories, matrix: Tensor, moments: dict | None) -> int:
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as problem:
        raise ValueError(f"{path} is not a readable checkpoint ({problem}); remove it to start afresh.") from problem
    if not isinstance(state, dict):
        raise ValueError(f"{path} is not a checkpoint of `run` but holds a {type(state).__name__}; choose another file.")
    if state.get("tasks") != names or len(state.get("models", ())) != len(models):
        raise ValueError(f"{path} belongs to another run (tasks {state.get('tasks')}, {len(state.get('models', ()))} "
                         f"models), not to this one (tasks {names}, {len(models)} models); choose another file.")
    # All of it is looked at before anything is changed.
    for model, saved, memory, kept in zip(models, state["models"], memories, state["memories"]):
        if {k: v.shape for k, v in model.state_dict().items()} != {k: v.shape for k, v in saved.items()}:
            raise ValueError(f"{path} holds a network with other parameters than this one; choose another file.")
        if (memory is None) != (kept is None):
            raise ValueError(f"{path} was written {'without' if kept is None else 'with'} a memory; run it that way.")
        if memory is not None:
            copy.deepcopy(memory).load_state_dict(kept)
    for model, saved in zip(models, state["models"]):
        model.load_state_dict(saved)
    for memory, saved in zip(memories, state["memories"]):
        if memory is not None:
            memory.load_state_dict(saved)
    if moments is not None:
        moments.update(state["moments"] or {})
    matrix.copy_(state["matrix"])
    torch.set_rng_state(state["random"])  # dropout and drawn labels go on where they stopped
    if len(state["random of cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["random of cuda"])
    return state["done"]
