"""`weight_relevance`: how much each weight has contributed to the decisions on a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attnlrp.changes import changing
from attnlrp.errors import InputError
from attnlrp.explainer import Explainer
from attnlrp.operations import find
from attnlrp.units import PRODUCTS, Weights

__all__ = ["weight_relevance"]

_READ = PRODUCTS | {"conv"}


def weight_relevance(
    explainer: Explainer, texts: Iterable[str], *, weights: str = "*", absolute: bool = False, **options: Any
) -> dict[str, Tensor]:
    """Relevance of the weights of linear layers, convolutions and experts, summed over texts.

    The relevance of w_ij is w_ij x_j g_i, its share of what arrives at output i of its layer: the weight times its
    gradient under the rules. Exact for layers under the epsilon rule; under gamma it is that of the plain weights.

    Args:
        explainer: the model, and the rules.
        texts: what is explained, one at a time.
        weights: pattern of names, as in `model.named_parameters()`, such as "*.mlp.*".
        absolute: sum |relevance| of each text, so that texts that disagree do not cancel; as used for pruning.
        options: of the explanation, such as `target=` or `position=`; with several targets, the sum over them.

    Returns:
        For each weight by name its relevance, in its own shape, float32 or wider.

    Raises:
        InputError: no text, or no weight of that name reads anything.

    Example:
        >>> relevance = weight_relevance(explainer, texts, weights="*.mlp.*", absolute=True)
        >>> unimportant = {name: r < r.quantile(0.2) for name, r in relevance.items()}
    """
    model = explainer.model
    names = {n for n, p in model.named_parameters(remove_duplicate=False) if p.dim() > 1 and fnmatchcase(n, weights)}
    if not names:
        some = [n for n, p in model.named_parameters() if p.dim() > 1][:4]
        raise InputError(f"weights: no weight is called {weights!r}; expected a pattern of names such as {some}")
    found, count = _Gradients(model, names), 0
    total: dict[str, Tensor] = {}
    with changing([found]):
        for text in texts:
            explainer(text, **options)
            count += 1
            for name, relevance in found.taken().items():
                own = relevance.abs() if absolute else relevance
                total[name] = total[name] + own if name in total else own
    if not total:
        reason = "no weight of that name reads what depends on the text" if count else "got no texts"
        raise InputError(f"weights {weights!r}: {reason}")
    return total


class _Gradients(TorchFunctionMode):
    """Adds up the gradients of weights, which the explained model does not have itself."""

    def __init__(self, model: nn.Module, names: set[str]) -> None:
        super().__init__()
        self._weights, self._names = Weights(model), names
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}
        self._acts = False  # a mode that was entered twice is asked twice

    def taken(self) -> dict[str, Tensor]:
        """Weight times gradient since the last call."""
        sums, self._sums = self._sums, {}
        return {name: (parameter.detach() * total).cpu() for name, (parameter, total) in sums.items()}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, operation = kwargs or {}, find(func)
        if self._acts or operation is None or operation.name not in _READ:
            return func(*args, **kwargs)
        self._acts = True
        try:
            result = func(*args, **kwargs)
        finally:
            self._acts = False
        if isinstance(result, Tensor) and result.requires_grad:
            self._watch(func, args, kwargs, result)
        return result

    def _watch(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
        given: dict[int | str, Any] = dict(enumerate(args)) | kwargs
        for key, value in given.items():
            weight = self._weights.find(value)
            if weight is not None and weight[0] in self._names and value.dim() > 1:
                plain = {k: v.detach() if isinstance(v, Tensor) else v for k, v in given.items()}
                result.register_hook(partial(self._add, weight, func, plain, key))

    def _add(
        self,
        weight: tuple[str, Tensor, int],
        func: Callable[..., Any],
        given: dict[int | str, Any],
        key: int | str,
        gradient: Tensor,
    ) -> None:
        """The operation again, differentiated by its weight."""
        name, parameter, start = weight
        with torch.enable_grad():
            live = given[key].detach().requires_grad_()
            values = given | {key: live}
            args = [v for k, v in values.items() if isinstance(k, int)]
            result = func(*args, **{k: v for k, v in values.items() if isinstance(k, str)})
        (found,) = torch.autograd.grad(result, live, gradient)
        if name not in self._sums:
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            self._sums[name] = (parameter, torch.zeros_like(parameter, dtype=dtype))
        total = self._sums[name][1]
        total.as_strided(live.shape, live.stride(), start).add_(found)
