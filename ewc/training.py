r"""Training: one run (`fit`), many runs at once (`sweep`), tasks in sequence (`run`).

All three share one loop. Batches are index selections from tensors that already lie on the
compute device, so an epoch costs little more than its matrix products.
"""
from __future__ import annotations

import inspect
import math
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.functional import cross_entropy
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.utils.data import TensorDataset

from . import _checkpoint, curvature
from ._layers import recurrent
from ._memories import Kronecker, Single, Stacked
from .elastic import EWC
from .fisher import IGNORED, _add_over_processes, _distributed, _evaluating, _progress, unwrap
from .kfac import KFAC
from .metrics import _right, accuracy
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


@torch.inference_mode(False)  # and with gradients, whatever surrounds the call
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
    All modules train in training mode, also a batch normalisation that was put in eval mode; afterwards each is in the
    mode it was in.

    Args:
        model: a network with logits of shape ``(n, classes)``, or wider for a task without heads; moved to the task's
            device.
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
        watch: tasks whose test accuracy is recorded, of different names.
        every: steps between two such evaluations, the last step being one in any case; None evaluates once an epoch.
        seed: fixes the order of the examples.
        moments: the optimiser's running means by the parameters' names, carried from task to task: give every call
            the same dict, empty at first. A parameter without any starts afresh, as all do for None.

    Returns:
        The run's `History`.

    Raises:
        NonFiniteLoss: the loss became infinite or NaN; names the step. The model is left with
            the last weights that are known to have a finite loss, and the buffers of that moment; a memory that
            watches the way (`SynapticIntelligence`) with the path that leads there and to no other weights.
        ValueError: an unknown optimiser, schedule or penalty, a number outside its range, no training example, labels
            that are no classes or in no head, too few outputs, nothing to train, or two watched tasks of one name.
    """
    _check(model, task, watch)
    x, y = task.train.tensors[0], task.train.tensors[1].long()
    rank, world = (dist.get_rank(), dist.get_world_size()) if _distributed() else (0, 1)
    net = model
    if world > 1 and not isinstance(model, nn.parallel.DistributedDataParallel):
        net = nn.parallel.DistributedDataParallel(model, find_unused_parameters=_idle(model, x))

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
    with _modes_kept([model]):
        _loop(
            parameters={k: p for k, p in unwrap(model).named_parameters() if p.requires_grad},
            buffers=list(model.buffers()),
            loss_of=loss_of,
            evaluate=evaluate,
            orders=_orders([seed], len(x), x.device, stacked=False),
            size=len(x),
            histories=[history],
            modules=[model],
            memory=Single(model, memory) if memory is not None else None,
            epochs=epochs, steps=steps, batch_size=batch_size, lr=lr, optimizer=optimizer, momentum=momentum,
            schedule=schedule, penalty=penalty, every=every, watched=bool(watch), moments=moments, world=world,
            graph=world == 1 and _has_graphs(x.device) and _replayable(model, task, memory, penalty, optimizer),
        )
    return history


@torch.inference_mode(False)
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
        models: R networks that differ in their weights only; trained in place. What else a forward pass reads from
            Python, such as a chosen head, is the first network's for all of them.
        task: the data, the same for all runs.
        seeds: R integers, the order of the examples of each run; equal seeds share their batches.
        memories: R quadratic memories (with ``fisher``, ``theta_star``, ``strength``; none with a pull that is not
            EWC's) or None; or R of `ewc.kfac.KFAC`, each with one pair of factors (of one task, or pooled), for SGD and
            the pull.
        epochs, steps, batch_size, lr, optimizer, momentum, schedule, penalty, watch, every, moments: as for `fit`.

    Returns:
        One `History` per run.

    Raises:
        NonFiniteLoss: as for `fit`; names the run as well. All models are left with the last
            weights at which every loss was finite.
        ValueError: lists of different lengths, networks of different layers or that share weights, a memory of other
            networks or with a pull of its own, recurrent layers, what `fit` refuses, or K-FAC memories with several
            pairs of factors, beside others, for another optimiser or penalty, or with frozen parameters.
    """
    models = [unwrap(model) for model in models]
    runs = len(models)
    memories = list(memories) if memories is not None else [None] * runs
    if not runs or len(seeds) != runs or len(memories) != runs:
        raise ValueError(f"sweep needs one seed and one memory (or None) per model, but got {runs} models, "
                         f"{len(seeds)} seeds and {len(memories)} memories.")
    plans = list(map(_plan, models))
    for r, plan in enumerate(plans):
        if plan != plans[0]:
            raise ValueError(f"sweep trains models that differ in weights only, but models[{r}] has other layers, "
                             "settings or frozen parameters than models[0]; train them with fit.")
    weights = [p for model in models for p in model.parameters() if p.requires_grad]
    if len(set(map(id, weights))) < len(weights):
        raise ValueError("sweep needs models with weights of their own, but two of these share; use copy.deepcopy.")
    if recurrent(models[0]):
        raise ValueError("sweep cannot stack recurrent layers, for which torch.func has no rule; train these with fit.")
    kronecker = any(isinstance(m, KFAC) for m in memories)
    if any(m is not None and _changed(m, KFAC if isinstance(m, KFAC) else EWC) for m in memories):
        raise ValueError("sweep pulls as EWC and KFAC do, but a memory has a pull, an add_gradient or a strength of "
                         "its own; train this one with fit.")
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
    base = models[0]
    own = dict(base.named_parameters())
    for memory in memories:
        for name, star in memory.theta_star.items() if memory is not None else ():
            if name not in own or own[name].shape != star.shape:
                raise ValueError(f"A memory holds a parameter {name!r} of shape {tuple(star.shape)} that the models do "
                                 "not have; use the models that were consolidated.")
    _check(base, task, watch, positions=False)
    x, y = task.train.tensors[0], task.train.tensors[1].long()
    for model in models:
        model.to(x.device)
    places = {place: name for place, (name, _) in curvature.places(base).items()}
    with _modes_kept(models):
        for model in models:
            model.train()  # all of them in one mode, as stacking asks
        stacked, buffers = stack_module_state(models)
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
        with _evaluating(base), torch.no_grad():
            for t in watch:
                xt, yt = t.test.tensors
                hits = sum(_right(t.masked(logits(a, None), b), b).sum(1)
                           for a, b in zip(xt.split(1000), yt.split(1000)))
                counted = (yt != IGNORED).sum()
                for row, hit in zip(rows, (hits.double() / counted).tolist()):
                    row[t.name] = hit
        return rows

    histories = [History() for _ in models]
    stack = Kronecker if kronecker else Stacked
    try:
        with _modes_kept([base]):
            _loop(
                parameters=trained,
                buffers=list(buffers.values()),
                loss_of=loss_of,
                evaluate=evaluate,
                orders=_orders([seeds[0]] if shared else seeds, len(x), x.device, stacked=not shared),
                size=len(x),
                histories=histories,
                modules=[base],
                memory=None if all(m is None for m in memories) else stack(trained, memories),
                epochs=epochs, steps=steps, batch_size=batch_size, lr=lr, optimizer=optimizer, momentum=momentum,
                schedule=schedule, penalty=penalty, every=every, watched=bool(watch), moments=moments, world=1,
                # Stacked memories are plain.
                graph=_has_graphs(x.device) and _replayable(base, task, None, penalty, optimizer),
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
            on after the last task in it and ends with the same numbers as if it had never stopped (with dropout or
            drawn labels under ``torchrun``: in as many processes; a generator that a memory was given is not kept). It
            belongs to the tasks' names, sizes, heads and labels, the seed, the options and the memory's options; of the
            networks only the shapes are compared.
        seed: fixes the order of the examples; one for each model.
        keep_moments: carry the optimiser's running means from task to task; False starts each task afresh.
        **options: passed to `fit` or `sweep`.

    Returns:
        The accuracy matrix, float64. Entry ``[i, j]`` is the accuracy on task j after learning task i,
        shape ``(T, T)``, or ``(R, T, T)`` for R models.

    Raises:
        ValueError: the checkpoint belongs to another run, or cannot be written where it is to be; one seed or memory
            for several models, or one memory twice; K-FAC memories that keep each task's factors, for several models and
            more than two tasks; a task that cannot be learnt or tested, also a later one.
    """
    many = isinstance(model, (list, tuple))
    models = list(model) if many else [model]
    for what, given in {"seed": seed, "memory": memory}.items():
        if many and not isinstance(given, Sequence) and (what == "seed" or given is not None):
            raise ValueError(f"{len(models)} models need a list of one {what} each; got {given!r}.")
    memories = list(memory) if many and memory is not None else [memory] * len(models)
    own = [id(m) for m in memories if m is not None]
    if len(set(own)) < len(own):
        raise ValueError("Every model needs a memory of its own, which is consolidated with it, but two of these are one; "
                         "use copy.deepcopy.")
    seeds = list(seed) if many else [seed]
    if many and len(tasks) > 2 and any(isinstance(m, KFAC) and m.keep == "each" for m in memories):
        raise ValueError("Many models train as a sweep, which needs K-FAC memories with one pair of factors: keep='pooled'.")
    for task in tasks:
        if models:
            _check(models[0], task)  # many must be alike, says `sweep`
        _check_data(task, "test", task.test)
    heads = [task.head if any(m is not None for m in memories) else None for task in tasks]  # one each, or refused
    chosen = {name: p.default for name, p in inspect.signature(fit).parameters.items()} | options
    matrix = torch.full((len(models), len(tasks), len(tasks)), math.nan, dtype=torch.float64)
    moments = {} if keep_moments else None
    done = 0
    path = None if checkpoint is None else Path(checkpoint)
    identity = _checkpoint.identity_of(tasks, seeds, memories, keep_moments, chosen) if path else {}
    if path and path.is_file():
        done = _checkpoint.restore(path, identity, models, memories, matrix, moments, tasks[0].device)
        for keep in memories:
            if keep is not None:
                keep.to(tasks[0].device)  # the file was read to the CPU; the models move when they train
    unwritable = torch.zeros((), device=tasks[0].device if tasks else None)
    if path and done < len(tasks) and not (_distributed() and dist.get_rank()):  # the others do not write
        unwritable += path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK)
    _add_over_processes(unwritable)
    if unwritable:
        raise ValueError(f"The checkpoint {str(path)!r} cannot be written; choose a file in a folder that exists and "
                         "that you may write to.")
    for i in range(done, len(tasks)):
        task = tasks[i]
        if many:
            sweep(models, task, seeds=[s + i for s in seeds], memories=memories, moments=moments, **options)
        else:
            fit(model, task, memory=memory, seed=seed + i, moments=moments, **options)
        for r, (net, keep) in enumerate(zip(models, memories)):
            if keep is not None:
                keep.consolidate(net, _share(task.train), classes=heads[i])
            for j, other in enumerate(tasks):
                matrix[r, i, j] = accuracy(net, other)
        if path:
            _checkpoint.save(path, identity, i + 1, models, memories, matrix, moments, task.device)
    return matrix if many else matrix[0]


@contextmanager
def _modes_kept(models: Sequence[nn.Module]) -> Iterator[None]:
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


# The loop that `fit` and `sweep` share.


def _loop(*, parameters: dict[str, Tensor], buffers: list[Tensor], loss_of: Callable, evaluate: Callable,
          orders: Callable, size: int, histories: list[History], modules: list[nn.Module], memory, epochs: int,
          steps: int | None, batch_size: int, lr: float, optimizer: str, momentum: float, schedule: str | None,
          penalty: str, every: int | None, watched: bool, moments: dict | None, world: int, graph: bool) -> None:
    names, tensors = list(parameters), list(parameters.values())
    if not tensors:
        raise ValueError("There is nothing to train: every parameter is frozen (requires_grad is False).")
    _choose("penalty", penalty, ("pull", "gradient"))
    _choose("schedule", schedule, ("cosine", None))
    _choose("optimizer", optimizer, ("sgd", "adam"))
    batch_size, epochs = _whole("batch_size", batch_size, 1), _whole("epochs", epochs, 0)
    steps, every = (None if v is None else _whole(n, v, least) for n, v, least in (("steps", steps, 0), ("every", every, 1)))
    if not (math.isfinite(lr) and lr >= 0):
        raise ValueError(f"lr must be a finite number, at least 0; got {lr!r}.")
    if optimizer == "sgd" and not 0 <= momentum < 1:
        raise ValueError(f"momentum must be at least 0 and less than 1; got {momentum!r}.")
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
        flat = [(n, m) for n, own in moments.items() for m in own.values()]
        if any(n not in parameters or (m.dim() and m.shape != parameters[n].shape) for n, m in flat):
            raise ValueError("These moments belong to other parameters, or to some that are frozen by now; give every run an "
                             "empty dict of its own, and remove the entries of what you freeze.")
        mean = "momentum_buffer" if optimizer == "sgd" else "exp_avg"
        if any(mean not in own for own in moments.values() if own):
            raise ValueError(f"These moments are another optimiser's than {optimizer!r}; give every run an empty dict of its "
                             "own.")
        # A copy: the optimiser writes into its state. It lies in memory as the parameters do, since the fused step
        # goes through all of them in one order. The rate is this run's, not the last one's.
        state = {i: {key: torch.empty_like(p).copy_(m) if m.dim() else m.clone() for key, m in moments[n].items()}
                 for i, (n, p) in enumerate(parameters.items()) if n in moments}
        opt.load_state_dict({"state": state, "param_groups": opt.state_dict()["param_groups"]})
        opt.param_groups[0]["lr"] = rate  # not a copy of it
    every = every or per_epoch
    # What a bad loss must not spoil: statistics of batch normalisation and the path of synaptic intelligence as well.
    kept = tensors + buffers + (memory.path() if isinstance(memory, Single) else [])
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
        if world > 1:  # each process has seen its share of the batches; all must decide alike
            dist.all_reduce(losses)
            losses /= world
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
        moments.update((names[i], own) for i, own in opt.state_dict()["state"].items())


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
    if isinstance(memory, KFAC):
        # Several pairs of factors, or a step for each weight, are solved by looking at residuals.
        simple = type(memory) is KFAC and len(memory.tasks) <= 1 and optimizer == "sgd" and penalty == "pull"
        return simple and not _changed(memory, KFAC) and all(p.requires_grad for p in parameters)
    if memory is None:
        return True
    record = getattr(type(memory), "record", SynapticIntelligence.record)
    return isinstance(memory, EWC) and not _changed(memory, EWC) and record is SynapticIntelligence.record


def _changed(memory, kind: type) -> bool:
    """Does this memory do in a way of its own what training does for ``kind`` without asking it?"""
    ways = ("pull", "add_gradient", "strength") if isinstance(memory, kind) else ("pull", "add_gradient")
    return (any(getattr(type(memory), way, getattr(kind, way)) is not getattr(kind, way) for way in ways)
            or not {"pull", "add_gradient", "record"}.isdisjoint(getattr(memory, "__dict__", ())))


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


def _orders(seeds: Sequence[int], n: int, device: torch.device, *, stacked: bool) -> Callable[[int], Tensor]:
    """Epoch -> order of the examples: shape ``(n,)``, or ``(R, n)`` when runs have their own."""
    generators = [torch.Generator().manual_seed(int(s)) for s in seeds]

    def order(epoch: int) -> Tensor:
        rows = [torch.randperm(n, generator=g, device="cpu") for g in generators]
        return (torch.stack(rows) if stacked else rows[0]).to(device)

    return order


def _idle(model: nn.Module, x: Tensor) -> bool:
    """Has a weight that is trained no part in the output, such as one of a head that is not in use?"""
    weights = [p for p in model.parameters() if p.requires_grad]
    try:
        with _evaluating(model), torch.enable_grad():
            return any(g is None for g in torch.autograd.grad(model(x[:2]).sum(), weights, allow_unused=True))
    except Exception:  # one that asks for more examples, or for training mode: to say yes only costs a walk
        return True


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """``x[index]``; on a CPU faster than that."""
    rows = x.index_select(0, index.flatten())
    return rows if index.dim() == 1 else rows.unflatten(0, index.shape)


def _plan(model: nn.Module) -> list:
    """What models must have in common to be trained at once; of torch's own layers also the settings."""
    layers = [(name, type_before_parametrizations(m), m.extra_repr() if m.__module__.startswith("torch.nn.modules") else "")
              for name, m in model.named_modules() if not isinstance(m, (nn.ParameterList, nn.ParameterDict))]
    return [*layers, *((n, p.shape, p.requires_grad) for n, p in model.named_parameters()),
            *((n, b.shape) for n, b in model.named_buffers())]


def _check(model: nn.Module, task: Task, watch: Sequence[Task] = (), positions: bool = True) -> None:
    """Says in words what would otherwise fail in the middle of the training, on a GPU for the whole process."""
    _check_data(task, "training", task.train)
    names = [t.name for t in watch]
    if len(set(names)) < len(names):
        raise ValueError(f"watch needs tasks of different names, under which it records their accuracies; got {names}.")
    x = task.train.tensors[0][:2]
    model = unwrap(model.to(x.device))
    with _evaluating(model), torch.no_grad():
        try:
            logits = model(x)
        except Exception:  # a model that asks for more examples, or for training mode; the training will tell
            return
    if not isinstance(logits, Tensor):
        raise ValueError(f"The model returned a {type(logits).__name__}; it must return the logits, one tensor.")
    shape = tuple(logits.shape)
    positions = positions and not task.heads
    if len(shape) < 2 or (len(shape) > 2 and not positions):
        raise ValueError(f"The model returns shape {shape} for two examples; it must return logits of shape (examples, "
                         f"classes){' or (examples, classes, *positions)' if positions else ''}.")
    width = shape[1]
    if width < task.classes or (task.heads and width > task.classes):
        raise ValueError(f"The model has {width} outputs, but {task.name!r} has {task.classes} classes; give it one "
                         f"output for each{'' if task.heads else ', or more'}.")


def _check_data(task: Task, what: str, data: TensorDataset) -> None:
    x, y = data.tensors
    if not len(x):
        raise ValueError(f"{task.name!r} has no {what} example; give at least one.")
    if y.is_floating_point() or y.is_complex():
        raise ValueError(f"{task.name!r} has {what} labels of {y.dtype}; labels must be whole numbers: use y.long().")
    y = y.long() if task.heads else y.long()[y != IGNORED]  # which cross-entropy and `accuracy` skip
    low, high = torch.stack(y.aminmax()).tolist() if len(y) else (0, 0)
    if low < 0 or high >= task.classes:
        raise ValueError(f"{task.name!r} has labels from {low} to {high}, but {task.classes} classes: they must lie "
                         f"between 0 and {task.classes - 1}.")
    if task.heads and (homeless := set(y.unique().tolist()).difference(*task.heads)):
        raise ValueError(f"{task.name!r} has {what} labels {sorted(homeless)}, but no head for them in {task.heads}.")


def _whole(what: str, value, least: int) -> int:
    try:
        whole = operator.index(value)
    except TypeError:
        whole = None
    if whole is None or whole < least:
        raise ValueError(f"{what} must be a whole number, at least {least}; got {value!r}.")
    return whole


def _choose(what: str, value, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"{what} must be one of {', '.join(repr(a) for a in allowed)}, not {value!r}.")


def _share(data: TensorDataset) -> TensorDataset:
    """This process's part of the data; the memories add up over processes."""
    if not _distributed():
        return data
    return TensorDataset(*(t[dist.get_rank()::dist.get_world_size()] for t in data.tensors))
