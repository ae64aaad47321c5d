r"""EWC's relatives: the same quadratic penalty, with another answer to how much each weight matters.

All of them are :math:`\tfrac\lambda2 \sum_i \omega_i (\theta_i - \theta^*_i)^2`, stored, differentiated and
pulled by the code of :class:`ewc.elastic.EWC`, with the importances ω in the place of the Fisher (attribute
``fisher``) and the newest optimum as the anchor. They differ in `consolidate`, where the importances
come from.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import DataLoader, Dataset

from ewc import curvature
from ewc._layers import entrance, recurrent, run_alone
from ewc.elastic import EWC
from ewc.fisher import _add_over_processes, _untouched, class_index, unwrap

__all__ = ["L2", "MemoryAwareSynapses", "SynapticIntelligence"]


class _Relative(EWC):
    """The memory interface with importances in the place of the Fisher."""

    def __init__(self, strength: float):
        super().__init__(strength)

    def state_dict(self) -> dict:
        """Everything the memory knows; ``torch.load(weights_only=True)`` reads it back."""
        return super().state_dict() | {"kind": type(self).__name__}

    def load_state_dict(self, state: Mapping) -> None:
        """Takes over a :meth:`state_dict`, options included.

        Raises:
            ValueError: the state of another kind of memory, or of none; the memory is then as it was.
        """
        kind = state.get("kind") if isinstance(state, Mapping) else None
        if kind != type(self).__name__:
            raise ValueError(
                f"This is not the state of a {type(self).__name__} memory (found kind {kind!r})."
            )
        super().load_state_dict(state)


class L2(_Relative):
    r"""Every weight matters equally: the penalty's Fisher is the identity.

    :math:`\Omega(\theta) = \tfrac\lambda2 \sum_i (\theta_i - \theta^*_i)^2`

    The anchor is the newest optimum and λ stays what it is, however many tasks: the penalty is that of the
    online memories with decay 0. λ has another unit than EWC's, where it multiplies the Fisher.

    Implements: eq-l2
    """

    def consolidate(self, model: nn.Module, data=None, *, classes=None) -> None:
        """Moves the anchor to the model's present weights: the trainable ones and those that have a spring already.

        Data and classes are not looked at.

        Raises:
            ValueError: weights that are not finite, nothing to train, or a model that is not the stored one.
        """
        parameters = unwrap(model).named_parameters()
        ones = {name: torch.ones_like(p) for name, p in parameters if p.requires_grad or name in self.fisher}
        self.decay = 0.0  # one spring for each weight, at the newest place
        super().consolidate(model, fisher=ones)


class SynapticIntelligence(_Relative):
    r"""A weight matters by how much of the loss's fall it brought about on its way.

    Along the path of training weight i contributes
    :math:`w_i = -\sum_k g_{ki} (\theta_{k+1,i} - \theta_{k,i})` to the fall of the task's loss, with g its
    gradient at step k. At the end of a task

    :math:`\omega_i \leftarrow \omega_i + \max(0,\ 2 w_i / ((\theta_i - \theta_{0,i})^2 + \xi))`

    Zenke et al. write the penalty as :math:`c \sum_i \omega_i (\theta_i - \theta^*_i)^2` without the factors
    2 and ½; with both of them strength is their c. A quadratic loss of curvature κ, walked down to its
    minimum by gradient flow, gives ω → κ for ξ → 0, so λ means what it means for EWC.

    **Contract with the training loop**: call :meth:`record` once for every step, after ``backward()`` of the
    task's loss alone (with a ``GradScaler`` after ``scaler.unscale_(optimizer)``) and before anything else (the
    penalty's gradient, the optimiser's step, the pull)::

        loss.backward()
        memory.record(model)
        optimizer.step()
        memory.pull(model, lr)

    The whole move from one record to the next counts, the pull's included: for small steps the sum of all w is
    then the fall of the loss along the path really walked. `consolidate` closes the last step and forgets the
    path.

    Attributes:
        damping: ξ, which bounds ω for weights that hardly moved.

    References:
        Zenke, Poole and Ganguli, *Continual learning through synaptic intelligence* (ICML 2017).

    Implements: eq-si
    """

    def __init__(self, strength: float, *, damping: float = 0.1):
        """
        Args:
            strength: λ.
            damping: ξ, finite and positive.

        Raises:
            ValueError: a strength that is negative or not finite, a damping that is not positive.
        """
        super().__init__(strength)
        if not 0 < damping < math.inf:
            raise ValueError(f"damping is the ξ that keeps ω finite: a positive number; got {damping!r}.")
        self.damping = float(damping)
        self._path: dict[str, dict[str, Tensor]] = {"begin": {}, "last": {}, "gradient": {}, "work": {}}

    @torch.no_grad()
    def record(self, model: nn.Module) -> None:
        """Notes one step of training: the weights before it, and in ``.grad`` the gradient of the task's loss."""
        for name, p in unwrap(model).named_parameters():
            if not p.requires_grad:
                continue
            if name not in self._path["begin"]:
                for key in ("begin", "last"):
                    self._path[key][name] = p.detach().clone()
                self._path["gradient"][name] = torch.zeros_like(p)
                # A sum of thousands of small terms, which half precision would leave where it is.
                self._path["work"][name] = torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
            self._close(name, p, self._path["work"][name])
            self._path["last"][name].copy_(p)  # all is written in place, so that a CUDA graph can do it again
            gradient = self._path["gradient"][name]
            if p.grad is None:
                gradient.zero_()
            else:
                gradient.copy_(p.grad.to_dense() if p.grad.is_sparse else p.grad)
                gradient.nan_to_num_(0.0, 0.0, 0.0)  # of a step that is not taken, as a GradScaler decides

    def _close(self, name: str, p: Tensor, work: Tensor) -> None:
        """Credits the move since the last record with the fall promised there."""
        last, gradient = self._path["last"][name], self._path["gradient"][name]
        work.addcmul_(gradient, p - last, value=-1)  # work -= gradient * (p - last), with the product as fine as work

    @torch.no_grad()
    def consolidate(self, model: nn.Module, data=None, *, classes=None) -> None:
        """Turns the recorded path into importances, added to the old ones, and moves the anchor.

        Data and classes are not looked at: the recorded gradients have seen them.

        Raises:
            ValueError: no step was recorded since the last consolidation, a model that is not the recorded one, or
                weights that are not finite. The memory is then as it was.
        """
        if not self._path["begin"]:
            raise ValueError(
                "No path was recorded: call record(model) after each backward() of the task's loss."
            )
        parameters = dict(unwrap(model).named_parameters())
        gained = {}
        for name, begin in self._path["begin"].items():
            if name not in parameters or parameters[name].shape != begin.shape:
                raise ValueError(
                    f"The path holds {name!r} of shape {tuple(begin.shape)}, which the model lacks."
                )
            work = self._path["work"][name].clone()
            self._close(name, parameters[name], work)
            moved = parameters[name].to(work.dtype) - begin
            gained[name] = (2 * work / (moved.square() + self.damping)).clamp(min=0)
            if not gained[name].isfinite().all():
                raise ValueError(
                    f"The importance of {name!r} is not finite, as the weights, now or on their path, are not; go "
                    "back to sound weights, and if that is not enough, to a memory saved before."
                )
        super().consolidate(model, fisher=gained)
        self._path = {key: {} for key in self._path}

    def __getstate__(self) -> dict:
        # A copy walks a path of its own, which is written in place.
        path = {key: {name: t.clone() for name, t in named.items()} for key, named in self._path.items()}
        return super().__getstate__() | {"_path": path}

    def state_dict(self) -> dict:
        """Importances and anchor, and the path of a task under way."""
        path = {key: dict(tensors) for key, tensors in self._path.items()}
        return super().state_dict() | {"damping": self.damping, "path": path}

    def load_state_dict(self, state: Mapping) -> None:
        """Takes over a :meth:`state_dict`, options included.

        Raises:
            ValueError: the state of another kind of memory, or of none; the memory is then as it was.
        """
        new = copy.copy(self)  # with what a subclass adds
        super(SynapticIntelligence, new).load_state_dict(state)
        damping, path = state["damping"], state["path"]
        if not (isinstance(damping, (int, float)) and 0 < damping < math.inf):
            raise ValueError(f"The checkpoint's damping must be a positive number, not {damping!r}; it is damaged.")
        try:
            path = {key: {n: t.detach().clone() for n, t in named.items()} for key, named in path.items()}
            shapes = [{n: t.shape for n, t in named.items()} for named in path.values()]
        except (AttributeError, TypeError):
            path = {}
        if path.keys() != self._path.keys() or any(other != shapes[0] for other in shapes):
            raise ValueError(f"The checkpoint's path must map {', '.join(self._path)} to tensors alike; it is damaged.")
        new._path = path
        new.damping = float(damping)
        self.__dict__.update(new.__dict__)

    def to(self, *args, **kwargs) -> SynapticIntelligence:
        """Moves the stored tensors, as ``Tensor.to`` does; returns the memory itself."""
        super().to(*args, **kwargs)
        self._path = {
            key: {n: t.to(*args, **kwargs) for n, t in named.items()} for key, named in self._path.items()
        }
        return self


class MemoryAwareSynapses(_Relative):
    r"""A weight matters by how strongly the network's output depends on it; no labels are needed.

    :math:`\omega_i = \frac1N \sum_n \left| \frac{\partial \|f(x_n)\|^2}{\partial \theta_i} \right|`

    with f the logits. The absolute value is taken example by example, before the mean. Importances of several
    tasks add up, anchored at the newest optimum. As :math:`\|f\|^2` is not a log probability, ω has neither
    the Fisher's unit nor its square: λ must be chosen anew.

    References:
        Aljundi et al., *Memory aware synapses: learning what (not) to forget* (ECCV 2018).

    Implements: eq-mas
    """

    def consolidate(
        self,
        model: nn.Module,
        data: Dataset | DataLoader | tuple[Tensor, Tensor],
        *,
        classes: Sequence[int] | None = None,
    ) -> None:
        """Adds the importances on the task just learnt and moves the anchor.

        Args:
            model: a network that maps (N, ...) to outputs (N, ...), one example independent of the others.
            data: a dataset, a loader or a pair of tensors, the second of which (the labels) is not looked at; in
                an initialised process group each rank passes its own shard, and all get the mean over all of them.
            classes: the outputs that count, for a head chosen by task; all of them if not given.

        Raises:
            ValueError: empty data, nothing to train, classes that do not exist, outputs that are not finite, a model
                that mixes the examples of a batch, is random in eval mode, or is not the stored one.
            TypeError: data of another kind.
        """
        super().consolidate(model, fisher=_sensitivity(unwrap(model), data, classes))


@torch.inference_mode(False)
def _sensitivity(model: nn.Module, data, classes: Sequence[int] | None) -> dict[str, Tensor]:
    """E|∂‖f‖²/∂θ| of every trainable parameter."""
    trainable = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError("The model has no trainable parameter: there is nothing to measure.")
    first = next(iter(trainable.values()))
    places = curvature.places(model)

    def size(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        tensors = {place: parameters.get(name, held) for place, (name, held) in places.items()}
        return _chosen(functional_call(model, tensors, (x.unsqueeze(0).clone(),), tie_weights=False), classes).square().sum()

    total = {
        name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for name, p in trainable.items()
    }
    count = torch.zeros((), dtype=torch.int64, device=first.device)
    chunk = max(1, 2**24 // sum(p.numel() for p in trainable.values()))  # at most 2²⁴ gradients at once
    batched = recurrent(model)
    several = None
    with _untouched(model):
        enter = entrance(model)
        for x, _ in curvature.batches(data, max(16, chunk)):
            x = enter(x)
            if several is None:  # once: do the first few examples come out as they do alone?
                with torch.no_grad():
                    several = model(x[:16].clone())  # some models write into their input
                if not isinstance(several, Tensor):
                    raise ValueError(f"The model returned a {type(several).__name__}: it must return one tensor.")
                run_alone(model, x[:1].clone(), several[:1])
                alone = grad(size)(trainable, x[0])
                own = [p for name, p in model.named_parameters() if name in trainable]
                value = _chosen(model(x[:1].clone()), classes).square().sum()
                curvature.check_reached(torch.cat([g.flatten() for g in alone.values()]), value, own)
            for part in x.split(chunk):
                weights = {n: p.expand(len(part), *p.shape) for n, p in trainable.items()} if batched else trainable
                for name, g in vmap(grad(size), in_dims=(0 if batched else None, 0))(weights, part).items():
                    total[name] += g.abs().sum(0)
            count += len(x)
    _add_over_processes(count, *total.values())
    if not count:
        raise ValueError("The data holds no example: the importances are means over at least one.")
    return {name: value / count for name, value in total.items()}


def _chosen(outputs: Tensor, classes: Sequence[int] | None) -> Tensor:
    index = class_index(classes, outputs, least=1)
    return outputs if index is None else outputs[:, index]
