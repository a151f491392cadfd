"""What every operation has: schema, fake kernel, batching rule, and the fallback on the reference.

``torch.ops.fastmeta.*`` run the compiled kernels, and ``torch.ops.fastmeta_triton.*``, of the same schemas, those in Triton.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_libraries = {}  # by namespace; an operation lives as long as its library


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What an operation computes in: float64 for float64, float32 for everything smaller."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Operation:
    """A forward operation ``name(*tensors, *numbers) -> results`` and its backward.

    ``name_backward(grads, needs, *tensors, *numbers, *results) -> gradients`` takes one gradient for each differentiable result, and gives
    one for each position in ``gradients``; bit k of ``needs`` asks for the k-th, and one that is not asked for comes back without
    elements. With ``saves`` the forward has a last argument ``save``: whether to fill the results that only the backward uses.

    Args:
        arguments: the arguments in the language of schemas, tensors first.
        tensors: how many of them are tensors.
        gradients: positions of the tensors that have gradients.
        results: how many results there are; ``visible``: how many of them, at the front, are for the caller;
            ``undifferentiable``: positions of the visible ones that have no gradient.
        reference: ``(*tensors, *numbers) -> visible results`` in plain PyTorch, differentiable to any order.
        fake: ``(*tensors, *numbers) -> results`` without contents, as after saving.
        hidden: ``(tensors, numbers, visible results) -> hidden results`` of the fallback; None: zeros, for a backward that needs none.
        calls_torch: its kernels call PyTorch's products, which autocast would round.
        folds: a vmapped dimension becomes part of the first one of every tensor; else the operation runs once for each.
    """

    name: str
    arguments: str
    tensors: int
    gradients: tuple[int, ...]
    results: int
    visible: int
    reference: Callable
    fake: Callable
    undifferentiable: tuple[int, ...] = ()
    hidden: Callable | None = None
    saves: bool = False
    calls_torch: bool = False
    folds: bool = True

    @property
    def differentiable(self) -> tuple[int, ...]:
        return tuple(i for i in range(self.visible) if i not in self.undifferentiable)

    def needed(self, needs: int, tensors) -> list[int]:
        """Positions of the tensors whose gradients the bits of ``needs`` ask for; integers have none."""
        return [position for k, position in enumerate(self.gradients) if needs >> k & 1 and tensors[position].is_floating_point()]

    def vjp(self, grads, tensors, numbers, wanted) -> tuple[Tensor, ...]:
        """The gradients of the tensors at the positions ``wanted``, by the reference function."""

        def function(*inputs):
            arguments = list(tensors)
            for i, t in zip(wanted, inputs):
                arguments[i] = t
            results = self.reference(*arguments, *numbers)
            return tuple(results[i] for i in self.differentiable)

        return torch.func.vjp(function, *(tensors[i] for i in wanted))[1](tuple(grads))

    def define(self, namespace: str, kernels: dict[str, Callable] | None = None) -> None:
        """Declare both operations, with a kernel for whatever has none of its own; ``kernels``: of CUDA, forward and backward by name."""
        library = _libraries.setdefault(namespace, torch.library.Library(namespace, "FRAGMENT"))
        saved = ", ".join(f"Tensor result_{i}" for i in range(self.results))
        grads = ", ".join(f"Tensor grad_{i}" for i in self.differentiable)
        outs = [", ".join(["Tensor"] * count) for count in (self.results, len(self.gradients))]
        library.define(f"{self.name}({self.arguments}{', bool save' if self.saves else ''}) -> ({outs[0]})")
        library.define(f"{self.name}_backward({grads}, int needs, {self.arguments}, {saved}) -> ({outs[1]})")
        for name, kernel, fake in ((self.name, self._fallback, self._fake),
                                   (self.name + "_backward", self._fallback_backward, self._fake_backward)):
            library.impl(name, kernel, "CompositeExplicitAutograd")
            if kernels:
                library.impl(name, kernels[name], "CUDA")
            torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
            rule = _fold if self.folds else _loop
            torch.library.register_vmap(f"{namespace}::{name}", rule(getattr(getattr(torch.ops, namespace), name).default), lib=library)

    def _declared(self, results):
        """To torch's dispatcher a single result is a tensor, not a tuple of one."""
        return results if self.results > 1 else results[0]

    def _fake(self, *arguments):
        save = True
        if self.saves:
            *arguments, save = arguments
        results = self.fake(*arguments)
        return self._declared(results if save else (*results[:self.visible], *(t.new_empty(0) for t in results[self.visible:])))

    def _fake_backward(self, *arguments):
        _, needs, tensors, _ = self._parts(arguments)
        needed = self.needed(needs, tensors)
        return tuple(torch.empty_like(tensors[i], memory_format=torch.contiguous_format) if i in needed else tensors[0].new_empty(0)
                     for i in self.gradients)

    @torch.no_grad()
    def _fallback(self, *arguments):
        save = True
        if self.saves:
            *arguments, save = arguments
        tensors, numbers = _accumulating(arguments[:self.tensors]), arguments[self.tensors:]
        visible = self.reference(*tensors, *numbers)
        if self.hidden is not None:
            hidden = self.hidden(tensors, numbers, visible)
        else:
            hidden = [torch.zeros_like(t) if save else t.new_empty(0) for t in self.fake(*tensors, *numbers)[self.visible:]]
        dtype = arguments[0].dtype
        # A result may be one of the arguments, where nothing is to be done; an operation must not return its argument.
        return self._declared((*(t.to(dtype, copy=any(t is given for given in tensors)) for t in visible), *hidden))

    def _fallback_backward(self, *arguments):
        grads, needs, tensors, numbers = self._parts(arguments)
        needed = self.needed(needs, tensors)
        with torch.enable_grad():
            found = self.vjp(_accumulating(grads), _accumulating(tensors), numbers, needed)
        found = {i: g.detach().to(tensors[i].dtype).contiguous() for i, g in zip(needed, found)}
        return tuple(found.get(i, tensors[0].new_empty(0)) for i in self.gradients)

    def _parts(self, arguments):
        """``(grads, needs, tensors, numbers)`` of the arguments of the backward."""
        first = len(self.differentiable)
        tensors, numbers = first + 1, first + 1 + self.tensors
        return arguments[:first], arguments[first], arguments[tensors:numbers], arguments[numbers:len(arguments) - self.results]


def _accumulating(tensors):
    """Floating tensors in the accumulation dtype, the others as they are."""
    return [t.to(accumulation_dtype(t.dtype)) if t is not None and t.is_floating_point() else t for t in tensors]


def _fold(op):
    """The vmapped dimension is one more episode dimension: fold it into B, and unfold the results."""

    def rule(info, in_dims, *arguments):
        def fold(x, dim):
            if not isinstance(x, Tensor):
                return x
            x = x.unsqueeze(0).expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            return x.flatten(0, 1)
        results = op(*(fold(x, dim) for x, dim in zip(arguments, in_dims)))
        # A gradient that was not needed has no elements and one dimension.
        return tuple(r.unflatten(0, (info.batch_size, r.shape[0] // info.batch_size)) for r in results), (0,) * len(results)
    return rule


def _loop(op):
    """One call for each element of the vmapped dimension, where weights are among the arguments."""

    def rule(info, in_dims, *arguments):
        calls = [op(*(x.select(dim, i) if isinstance(x, Tensor) and dim is not None else x for x, dim in zip(arguments, in_dims)))
                 for i in range(info.batch_size)]
        if isinstance(calls[0], Tensor):
            return torch.stack(calls), 0
        results = tuple(torch.stack(each) for each in zip(*calls))
        return results, (0,) * len(results)
    return rule
