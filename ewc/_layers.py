r"""Sums of squared gradients per example, :math:`\sum_n \sum_k (J_n^\top v_{nk})^2`: the engine behind `ewc.fisher`.

The gradient of a layer's weight for one example is a product of the layer's input a and the gradient δ at its output.
Forward hooks keep a; one backward pass to the layers' outputs, which skips the weights, gives δ for every example at
once; the squares follow in closed form, and no gradient per example of the whole network is ever stored.

A closed form is used for a parameter only if

- the autograd graph shows that the recorded calls are the parameter's only uses,
- on a few examples its result equals that of plain autograd, one example at a time (`Engine._rehearse`), and
- the rows of the calls belong to the examples in their order, whatever the data: by the kinds of the operations in
  the graph, or if these do not tell, by a test (`Engine._in_order`).

Every other parameter takes gradients per example through ``torch.func``, rehearsed as well, or else through a loop.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from ewc._closed import RULES, Call, Pointwise, accumulator, closed_forms

REHEARSED = 2  # examples on which every fast path is compared with plain autograd
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3}  # of that comparison; 0.2 in half precision
BUDGET = 2**21  # numbers in one temporary tensor on the CPU; 32 times as many on a GPU
SMALL = 2**20  # numbers in a temporary tensor that is worth making at one go
# Operations whose output rows come from the same input rows, whatever the data: along the graph of these alone the rows
# of a batch stay in place, or are rearranged by shape, which the rehearsal tells.
STEADY = set(
    "Abs AdaptiveAvgPool2D AdaptiveMaxPool2D Add Amax AvgPool2D Cat Celu Clamp ClampMax ClampMin "
    "Clone ConstantPadNd Convolution Cos CudnnBatchNorm CudnnConvolution CudnnRnn Div Elu Erf Exp "
    "Expand FusedRmsNorm Gelu Hardswish Hardtanh LeakyRelu LinalgVectorNorm Log LogSigmoid LogSoftmax Logsumexp "
    "MaskedFill Max MaxPool2DWithIndices Mean Min Mish MkldnnRnnLayer Mul NativeBatchNorm NativeDropout "
    "NativeGroupNorm NativeLayerNorm Neg Permute PixelShuffle Pow PreluKernel Prod Reciprocal ReflectionPad1D "
    "ReflectionPad2D Relu Repeat ReplicationPad1D ReplicationPad2D ReshapeAlias Rsqrt Rsub "
    "ScaledDotProductEfficientAttention ScaledDotProductFlashAttention ScaledDotProductFlashAttentionForCpu "
    "Sigmoid Sign Silu Sin Softmax Softplus Sqrt Squeeze Stack Sub Sum T Tanh ThnnFusedGruCell ThnnFusedLstmCell "
    "ToCopy Transpose Tril Unbind Unfold UnsafeView Unsqueeze UpsampleNearest2D Var View Where".split()
)


def numbers(tensors: Sequence[Tensor]) -> list:
    """The values of tensors of one number each; a GPU is waited for once, not once for each."""
    return torch.stack([t.to(tensors[0].device) for t in tensors]).tolist() if tensors else []


def numbers_of_one(x: Tensor, calls: list[Call]) -> int:
    """How many numbers one of these examples fills in the layers, windows of convolutions unfolded."""
    kernel = [math.prod(getattr(c.layer, "kernel_size", (1,))) for c in calls]
    return (x.numel() + sum(c.input.numel() * k + c.shape.numel() for c, k in zip(calls, kernel))) // len(x)


def entrance(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Brings inputs to the model's device and, if they are floating-point numbers, to a precision that it takes: that of
    the data if it can, else one of its parameters', which do not say what the first layer is."""
    device = next(model.parameters()).device
    kinds = list(dict.fromkeys(p.dtype for p in model.parameters() if p.is_floating_point() or p.is_complex()))
    found: dict[torch.dtype, torch.dtype] = {kind: kind for kind in kinds} if len(kinds) == 1 else {}

    def taken(x: Tensor) -> torch.dtype:
        with torch.no_grad():
            for kind in (x.dtype, *kinds):
                try:
                    model(x[:REHEARSED].to(kind, copy=True))
                except Exception:  # the first pass will tell, if no precision is right
                    continue
                return kind
        return kinds[0]

    def enter(x: Tensor) -> Tensor:
        x = x.to(device)
        x = x.clone() if x.is_inference() else x  # autograd keeps no tensor that was made in that mode
        if not x.is_floating_point():
            return x
        if x.dtype not in found:
            found[x.dtype] = taken(x)
        return x.to(found[x.dtype])

    return enter


def places(model: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """Every place where a module holds a parameter -> the name that ``named_parameters`` gives it, its value.

    With this list functional_call need not tie weights itself: given a module that sits at two places, its
    own tying leaves the swapped tensors behind in the model.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        f"{path}.{own}".lstrip("."): (names[id(p)], p.detach())
        for path, module in model.named_modules()
        for own, p in module._parameters.items()
        if p is not None
    }


def recurrent(model: nn.Module) -> bool:
    """Whether there is a layer that writes in place into states, which vmap takes for shared unless weights are batched."""
    return any(isinstance(layer, nn.RNNBase) for layer in model.modules())


def check_differentiable(logits: Tensor) -> Tensor:
    if not logits.requires_grad:
        raise ValueError("The logits do not depend on any parameter that requires a gradient (is there a no_grad?).")
    return logits


def run_alone(model: Callable[[Tensor], Tensor], x: Tensor, among: Tensor | None = None) -> Tensor:
    """The logits of one example; refuses a model that fails on one, or found others for it ``among`` more examples."""
    try:
        logits = model(x)
    except Exception as error:
        raise ValueError(f"The model fails on one example alone, so it has no gradient per example: {error}") from error
    if among is None:
        return logits
    # Inputs of half precision: so are the first layers, and their rounding depends on the size of the batch.
    tolerance = max(TOLERANCE.get(t.dtype, 0.2) for t in (x, among) if t.is_floating_point())
    alike = logits.shape == among.shape
    if alike:
        masked = among.detach().isfinite().logical_not()  # classes with -inf
        difference = (logits.detach() - among.detach()).masked_fill(masked, 0)
        alike = difference.norm() <= tolerance * among.detach().masked_fill(masked, 0).norm()
    if not alike:
        raise ValueError(
            "The logits of an example change when it is run alone: the model mixes the examples of a batch (batch "
            "normalisation without running statistics? examples not on the first axis?) or is random in eval mode, so "
            "it has no gradient per example."
        )
    return logits


# ---- recording ------------------------------------------------------------------------------------------------------


def record(model: nn.Module, x: Tensor, wanted: dict[int, str]) -> tuple[Tensor, list[Call]]:
    """Runs the model; returns its output and the calls of layers with closed forms. Leaves no hook behind."""
    calls: list[Call] = []

    def keep(layer, args, kwargs, output):
        a = args[0] if args else kwargs.get("input")
        if isinstance(output, Tensor) and output.requires_grad:
            source = get_gradient_edge(a).node if a.requires_grad else None
            calls.append(Call(layer, a.detach(), output.shape, get_gradient_edge(output), source))

    with ExitStack() as hooks:
        if not nn.modules.module._global_forward_hooks:  # these come first and may change an output
            for layer in model.modules():
                direct = layer._parameters.values()
                if type(layer) in RULES and "forward" not in vars(layer) and any(id(p) in wanted for p in direct):
                    hooks.callback(layer.register_forward_hook(keep, prepend=True, with_kwargs=True).remove)
        return model(x), calls


def steady(node, examples: int) -> bool:
    """Whether an operation keeps the rows of a batch in their places."""
    stem = re.sub(r"Backward\d*$", "", node.name())
    if stem in ("Mm", "Addmm"):  # with a weight on the right; a matrix made from data on the left may pick rows
        weight = node.next_functions[-1][0]
        weight = weight.next_functions[0][0] if weight is not None and weight.name() == "TBackward0" else weight
        return weight is None or hasattr(weight, "variable")
    if stem == "Bmm":  # one product for each example, or several; einsum also makes it of a single one
        factor = node._saved_mat2 if node._saved_self is None else node._saved_self
        return factor is None or len(factor) % examples == 0
    if stem in ("Select", "Slice", "Split", "UnsafeSplit"):  # of rows, perhaps by the data
        sizes = node._saved_self_sym_sizes  # a negative dim is saved as 2⁶⁴ less
        return (node._saved_dim + len(sizes)) % 2**64 % len(sizes) != 0 or sizes[0] < examples
    if stem == "Embedding":  # a table of weights; one made from data may be rows to be picked
        return hasattr(node.next_functions[0][0], "variable")
    return stem in STEADY or hasattr(node, "variable")


def closed_calls(z: Tensor, calls: list[Call], wanted: dict[int, str]) -> tuple[dict[str, list[Call]], set[str], bool]:
    """For every parameter of which all uses in the graph of ``z`` are recorded calls, these calls; the names of all used
    ones; and whether all operations are steady."""
    uses: dict[str, set] = {}
    reached = _walk(z.grad_fn, None, wanted, uses)
    explained: dict[str, list[set]] = {}
    owners: dict[str, list[Call]] = {}
    for call in calls:
        if call.edge.node in reached:
            mine: dict[str, set] = {}
            _walk(call.edge.node, call.source, wanted, mine)
            for name, edges in mine.items():
                explained.setdefault(name, []).append(edges)
                owners.setdefault(name, []).append(call)
    closed = {
        name: owners[name]
        for name, edges in explained.items()
        if all(len(e) == 1 for e in edges) and len(set().union(*edges)) == len(edges) == len(uses[name])
    }
    return closed, set(uses), all(steady(node, len(z)) for node in reached)


def _walk(start, stop, wanted: dict[int, str], uses: dict[str, set]) -> set:
    """All nodes below ``start`` but not below ``stop``; notes the graph's edges into wanted parameters in ``uses``."""
    seen, todo = {start}, [start]
    while todo:
        node = todo.pop()
        if node is stop:
            continue
        for i, (child, _) in enumerate(node.next_functions):
            if child is None:
                continue
            variable = getattr(child, "variable", None)
            if variable is not None and id(variable) in wanted:
                uses.setdefault(wanted[id(variable)], set()).add((node, i))
            if child not in seen:
                seen.add(child)
                todo.append(child)
    return seen


# ---- the engine -----------------------------------------------------------------------------------------------------


class Engine:
    """Adds up (J^T v)^2 over examples and output vectors, for every parameter that requires a gradient."""

    def __init__(self, model: nn.Module, batch_size: int | None = None):
        self.model = model
        self.wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.wanted:
            raise ValueError("No parameter of the model requires a gradient, so there is nothing to measure.")
        for name, p in self.wanted.items():
            if p.is_complex():
                raise ValueError(
                    f"Parameter {name!r} is complex; the Fisher information is of real weights. Store its real and "
                    "imaginary parts (torch.view_as_real) as the parameter."
                )
            if p.is_inference():
                raise ValueError(
                    f"Parameter {name!r} was made in inference mode, so that autograd has no gradient for it; make or "
                    "load the model outside that mode."
                )
        for name, layer in model.named_modules():
            if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) and layer.max_norm is not None:
                raise ValueError(f"Layer {name!r} has max_norm, which changes its weights in every forward pass.")
        self.names = {id(p): name for name, p in self.wanted.items()}
        first = next(iter(self.wanted.values()))
        self.device, self.dtype = first.device, first.dtype
        self.totals = {
            name: torch.zeros(p.shape, dtype=accumulator(p.dtype), device=p.device) for name, p in self.wanted.items()
        }
        self.count = 0
        cuda = self.device.type == "cuda"
        self.budget = 32 * BUDGET if cuda else BUDGET
        self.batch_size = batch_size
        self.largest_batch = 32768 if cuda else 2048
        self.rehearsed = 0  # on how many examples
        self.trusted: dict[str, set] = {}  # closed forms that passed the rehearsal, with the shapes they passed for
        self.refused: set[str] = set()  # closed forms that did not
        self.proven: set[tuple] = set()  # parameters and shapes of an example for which torch.func passed
        self.looped: set[str] = set()  # parameters that torch.func cannot do
        self.overwrites: bool | None = None  # whether the model writes into its input; the first pass tells

    def chunks(self, x: Tensor) -> Iterable[slice]:
        """Slices of the examples that fit the memory budget."""
        return [slice(i, i + self.examples_at_once(x)) for i in range(0, len(x), self.examples_at_once(x))]

    def examples_at_once(self, x: Tensor) -> int:
        if self.batch_size is None:
            with torch.enable_grad():  # without a graph there are no calls to measure
                _, calls = record(self.model, x[:REHEARSED].clone(), self.names)
            size = numbers_of_one(x[:REHEARSED], calls)
            self.batch_size = max(REHEARSED, min(self.largest_batch, 4 * self.budget // size)) if calls else 256
        return self.batch_size

    def forward(self, x: Tensor) -> Tensor:
        """The logits of some examples, without a graph; `backward` refers to these examples."""
        self.x, copied = x, x if self.overwrites is False else x.clone()
        version = copied._version
        self.z, self.calls = record(self.model, copied, self.names)
        self.overwrites = self.overwrites or copied._version != version
        if not isinstance(self.z, Tensor):
            raise ValueError(f"The model returned a {type(self.z).__name__}; it must return the logits, one tensor.")
        return self.z.detach()

    def backward(self, vectors: Sequence[Tensor]) -> None:
        """Adds (J^T v)^2 of the examples of the last `forward`, for every vector (each of the shape of the logits)."""
        x, z, calls = self.x, self.z, self.calls
        self.x = self.z = self.calls = None
        if not len(vectors):  # nothing but padding
            return
        check_differentiable(z)
        owners, used, in_place = closed_calls(z, calls, self.names)
        size = numbers_of_one(x, calls)
        owners = {name: own for name, own in owners.items() if name not in self.refused}
        recorded = [call for call in {c: None for own in owners.values() for c in own} if call.is_intact(len(x))]
        if not in_place or any(len(call.input) > len(x) for call in recorded):  # packed, or folded into the batch
            kept = self._in_order(z, recorded)
            owners = {name: own for name, own in owners.items() if kept.issuperset(own)}
        marks = {name: tuple(c.signature(len(x)) for c in own) for name, own in owners.items()}

        def trusted(name: str) -> bool:
            return marks[name] in self.trusted.get(name, ())

        if self.rehearsed < min(len(x), REHEARSED) or not all(map(trusted, owners)):
            self._rehearse(x)
        sums = self._closed({name: own for name, own in owners.items() if name not in self.refused}, z, vectors)
        # What the rehearsal could not tell, since it saw zeros only, counts where it is zero again.
        sums = {name: total for name, total in sums.items() if trusted(name) or not total.any()}
        del z, calls, owners  # the graph
        rest = [name for name in self.wanted if name in used and name not in sums]
        func = self._per_example([name for name in rest if name not in self.looped], x, vectors, size)
        unproven = [name for name in func if (name, x.shape[1:]) not in self.proven]
        if unproven:  # all of them: of a recurrent layer torch.func cannot do some of the weights alone
            self._rehearse_func(list(func), x)
        unproven = [n for n in unproven if (n, x.shape[1:]) not in self.proven and func[n].any()]
        sums |= {name: total for name, total in func.items() if name not in self.looped.union(unproven)}
        sums |= self._one_by_one([name for name in rest if name not in sums], x, vectors)
        if sums:
            parts = [value.reshape(self.totals[name].shape) for name, value in sums.items()]
            torch._foreach_add_([self.totals[name] for name in sums], parts)

    def _in_order(self, z: Tensor, calls: list[Call]) -> set[Call]:
        """The calls whose rows belong to the examples in the order of these, as the closed forms take for granted.

        If each example's vector is multiplied by a number of its own, each row of δ is multiplied by the number of the
        example that it belongs to. The numbers are powers of two: multiplied by these nothing is rounded.
        """
        n = len(z)
        if n == 1 or not calls or z.dtype == torch.float16:  # whose numbers are too few
            return set(calls) if n == 1 else set()
        random = {"generator": torch.Generator().manual_seed(0), "device": "cpu"}
        v = torch.randn(z.shape, **random).to(z)
        exponents = torch.randperm(max(n, 81), **random)[:n] % 81 - 40  # different ones, as far as they go
        scales = torch.exp2(exponents.double()).to(z)
        edges = [call.edge for call in calls]
        one, other = (
            torch.autograd.grad(z, edges, u, retain_graph=True, allow_unused=True)
            for u in (v, v * scales.view(-1, *[1] * (z.dim() - 1)))
        )
        off = []
        for a, b in zip(one, other):
            a, b = (z.new_zeros(n, 1, 1) if g is None else g.reshape(n, len(g) // n, -1) for g in (a, b))
            far = (b / scales.to(b).view(-1, 1, 1) - a).norm(dim=2)
            off.append((~(far <= 0.01 * a.norm(dim=2) + 1e-5 * a.norm(dim=2).mean())).sum())
        return {call for call, count in zip(calls, numbers(off)) if not count}

    def _closed(self, owners: dict[str, list[Call]], z: Tensor, vectors: Sequence[Tensor]) -> dict[str, Tensor]:
        forms = closed_forms(owners, self.wanted, len(z), self.budget)
        if not forms:
            return {}
        calls = list({call: None for name in forms for call in owners[name]})
        points = {owners[name][0]: None for name, form in forms.items() if isinstance(form, Pointwise)}
        for k in range(len(vectors)):
            grads = torch.autograd.grad(
                z, [c.edge for c in calls], vectors[k], retain_graph=k < len(vectors) - 1, allow_unused=True
            )
            deltas = {c: z.new_zeros(c.shape) if g is None else g for c, g in zip(calls, grads)}
            for call, squared in points.items():
                d = deltas[call].to(accumulator(z.dtype))
                points[call] = d.square() if squared is None else squared.addcmul_(d, d)
            for name, form in forms.items():
                if not isinstance(form, Pointwise):
                    form.add([deltas[c] for c in owners[name]])
        return {
            name: form.finish(points[owners[name][0]]) if isinstance(form, Pointwise) else form.finish()
            for name, form in forms.items()
        }

    def _per_example(self, names: list[str], x: Tensor, vectors: Sequence[Tensor], size: int) -> dict[str, Tensor]:
        """Gradients of some parameters example by example through ``torch.func``, within the memory budget, if one
        example fills ``size`` numbers in the layers."""
        if not names:
            return {}
        x = x.clone() if self.overwrites else x
        params = {n: self.wanted[n].detach() for n in names}
        where = places(self.model)

        def squares(params, one, columns):
            def f(p):
                tensors = {place: p.get(name, held) for place, (name, held) in where.items()}
                return functional_call(self.model, tensors, (one.unsqueeze(0),), tie_weights=False).squeeze(0)

            grads = vmap(vjp(f, params)[1])(columns)[0]
            return {n: g.to(accumulator(g.dtype)).square().sum(0) for n, g in grads.items()}

        batched = recurrent(self.model)
        size = max(size, sum(p.numel() for p in params.values()))
        across = max(1, min(len(vectors), 4 * self.budget // max(size, vectors[0].numel())))
        along = max(1, 4 * self.budget // (size * across))
        sums = {n: torch.zeros_like(self.totals[n]) for n in names}
        try:
            with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):  # vmap has no rule for fused attention
                warnings.simplefilter("ignore")  # "performance drop": still faster than one by one
                for k in range(0, len(vectors), across):
                    columns = torch.stack([vectors[j] for j in range(k, min(k + across, len(vectors)))], 1)
                    for i in range(0, len(x), along):
                        rows = x[i : i + along]
                        weights = {n: p.expand(len(rows), *p.shape) for n, p in params.items()} if batched else params
                        part = vmap(squares, in_dims=(0 if batched else None, 0, 0))(
                            weights, rows, columns[i : i + along]
                        )
                        for n in names:
                            sums[n] += part[n].detach().sum(0)  # of what a closure holds
        except torch.OutOfMemoryError:
            raise
        except Exception:  # torch.func refuses with errors of every kind; autograd decides in `_one_by_one`
            self.looped.update(names)
            return {}
        return sums

    def _one_by_one(self, names: list[str], x: Tensor, vectors: Sequence[Tensor], z: Tensor | None = None):
        """The definition itself: one example at a time, one gradient for every vector."""
        sums = {n: torch.zeros_like(self.totals[n]) for n in names}
        params = [self.wanted[n] for n in names]
        x = x.clone() if self.overwrites else x
        for i in range(len(x) if names else 0):
            one = run_alone(self.model, x[i : i + 1], None if z is None else z[i : i + 1])
            for k in range(len(vectors)):
                v, last = vectors[k][i : i + 1], k == len(vectors) - 1
                try:
                    grads = torch.autograd.grad(one, params, v, retain_graph=not last, allow_unused=True)
                except RuntimeError as error:
                    raise RuntimeError(
                        f"No gradients per example for {', '.join(map(repr, names))}: autograd failed with: {error}"
                    ) from error
                known = {n: g.to_dense() if g.is_sparse else g for n, g in zip(names, grads) if g is not None}
                if known:
                    wide = [g.to(sums[n].dtype) for n, g in known.items()]
                    torch._foreach_addcmul_([sums[n] for n in known], wide, wide)
        return sums

    def _rehearse(self, x: Tensor) -> set[str]:
        """Compares every closed form with plain autograd on a few examples and a random vector; returns the refused."""
        x = self._different(x)
        z, calls = record(self.model, x.clone() if self.overwrites else x, self.names)
        v = self._noise(z, 1)
        owners, *_ = closed_calls(z, calls, self.names)
        fast = self._closed({n: own for n, own in owners.items() if n not in self.refused}, z, v)
        truth = self._one_by_one(list(self.wanted), x, v, z.detach())
        wrong, size = self._compared(fast, truth, lambda twin: twin._rehearse(entrance(twin.model)(x)))
        self.refused |= wrong
        for name in fast.keys() - self.refused:
            if size[name]:  # zeros prove nothing: look again at the next chunk
                mark = tuple(c.signature(len(x)) for c in owners[name])
                self.trusted.setdefault(name, set()).add(mark)
        self.rehearsed = max(self.rehearsed, len(x))
        return self.refused

    def _rehearse_func(self, names: list[str], x: Tensor) -> set[str]:
        """The same for torch.func. Several vectors, since it can be right with one and wrong with many."""
        x, shape = self._different(x), x.shape[1:]
        v = self._noise(record(self.model, x.clone(), {})[0].detach(), 3)
        truth = self._one_by_one(list(self.wanted), x, v)  # all: a gradient of rounding is judged against the others
        found = self._per_example(names, x, v, 1)
        wrong, size = self._compared(found, truth, lambda twin: twin._rehearse_func(names, entrance(twin.model)(x)))
        self.looped |= wrong
        self.proven |= {(name, shape) for name in found.keys() - self.looped if size[name]}
        return self.looped

    def _different(self, x: Tensor) -> Tensor:
        """A few examples that are not alike, so that to mix them would show."""
        if len(x) > REHEARSED and torch.equal(x[0], x[1]):
            others = (x != x[0]).reshape(len(x), -1).any(1).nonzero().flatten()
            return x[[0, int(others[0]) if len(others) else 1]]
        return x[:REHEARSED]

    def _noise(self, z: Tensor, count: int) -> list[Tensor]:
        random = torch.Generator().manual_seed(0)
        return list(torch.randn((count, *z.shape), generator=random, device="cpu").to(z.device, z.dtype))

    def _compared(
        self, values: dict[str, Tensor], truth: dict[str, Tensor], again: Callable[[Engine], set[str]]
    ) -> tuple[set[str], dict[str, float]]:
        """The names that differ from the truth, and the sizes.

        What agrees only in being small beside the others, or differs in half precision, is compared ``again`` by a twin in
        double precision.
        """
        size = dict(zip(truth, numbers(torch._foreach_norm(list(truth.values())))))
        scale = max(size[name] / math.sqrt(max(1, t.numel())) for name, t in truth.items())
        wrong, doubtful = set(), set()
        parts = [part.reshape(truth[name].shape) for name, part in values.items()]
        far = numbers(torch._foreach_norm(torch._foreach_sub(parts, [truth[n] for n in values]))) if values else []
        for name, distance in zip(values, far):
            dtype = self.wanted[name].dtype
            # A gradient of zero but for rounding (a bias before a normalisation) is judged against the others.
            floor = min(1e-3, (100 * torch.finfo(dtype).eps) ** 2) * scale * math.sqrt(truth[name].numel())
            near = TOLERANCE.get(dtype, 0.2) * size[name]
            if distance <= near:
                continue
            # In half precision the truth itself may be lost in rounding; NaN is wrong in any.
            close = distance < math.inf if dtype not in TOLERANCE else distance <= near + floor
            (doubtful if close else wrong).add(name)
        if doubtful and self.dtype != torch.float64:
            try:
                doubtful &= again(self._in_double())
            except Exception:  # a model that cannot be copied or converted
                pass
            wrong |= doubtful
        return wrong, size

    def _in_double(self) -> Engine:
        """The same in double precision, where a small gradient is not lost in rounding."""
        held = [v for m in self.model.modules() for v in vars(m).values() if isinstance(v, Tensor) and not v.is_leaf]
        return Engine(copy.deepcopy(self.model, {id(v): v.detach() for v in held}).double())
