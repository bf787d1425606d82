"""`Recorder`: notes the relevance of units inside the model while it is explained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attnlrp.columns import widen
from attnlrp.eager import eager_attention
from attnlrp.errors import InputError, ModelError
from attnlrp.features import SparseAutoencoder
from attnlrp.intervention import at_place
from attnlrp.latent import Latent, LatentLayer
from attnlrp.operations import VIEWS, find
from attnlrp.units import PRODUCTS, SUMS, Rows, Site, Taps, blocks_of

__all__ = ["KINDS", "Recorder", "is_in_decoder"]

KINDS = ("neurons", "heads", "residual", "attention")

_STREAM, _WEIGHTS = "_attnlrp_stream", "_attnlrp_weights"
_CARRIES = VIEWS | frozenset("dropout to type float double half bfloat16 clone masked_fill nan_to_num type_as".split())
_NORMALISES = frozenset("layer_norm rms_norm mul".split())


@dataclass
class _Note:
    """One tensor whose relevance is noted, and what was noted of it for each target."""

    name: str
    kind: str
    units: int
    value: Tensor
    rows: Rows | None = None
    decompose: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None  # into units, where they are not numbers
    version: int = 0
    noted: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)


class Recorder:
    """Notes relevance inside the model, from the same backward pass that brings it to the input.

    Open it inside of `propagate`, run the model, call `begin(k)` before the backward pass of target k, then `latent`.

    Args:
        model: the model that is explained.
        sites: its units, see `attnlrp.units.find_sites`.
        kinds: what to note: any of "neurons", "heads", "residual", "attention", and dictionaries of features.
        top: units that are kept of each layer; None for all.
        batch: number of texts in the pass.

    Raises:
        InputError: another kind.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        kinds: Sequence[str | SparseAutoencoder],
        *,
        top: int | None = 32,
        batch: int = 1,
    ) -> None:
        self._dictionaries = [kind for kind in kinds if isinstance(kind, SparseAutoencoder)]
        unknown = [kind for kind in kinds if kind not in (*KINDS, *self._dictionaries)]
        if unknown or not kinds:
            raise InputError(
                f"latent: got {unknown or 'nothing'}, expected any of {', '.join(KINDS)}, or a SparseAutoencoder"
            )
        if top is not None and top < 1:
            raise InputError(f"latent_top: got {top}, expected at least 1, or None for all units")
        self._model, self._sites, self._top, self._batch = model, sites, top, batch
        self._kinds = frozenset(kind for kind in kinds if isinstance(kind, str))
        self._target = 0
        self._notes: list[_Note] = []
        self._attention: list[_Note] = []  # of which the layer is known only when its output projection is reached
        wanted = {"neurons", "heads"} & self._kinds | ({"heads"} if "attention" in self._kinds else set())
        self._taps = {site: partial(self._tap, site) for site in sites if site.kind in wanted}
        self._blocks = blocks_of(model, sites) if "residual" in self._kinds else {}
        self._open = ExitStack()

    def __enter__(self) -> Recorder:
        try:
            if "attention" in self._kinds:
                self._open.enter_context(eager_attention(self._model))
                self._open.enter_context(_Attention(self._watch_attention))
            if self._blocks:
                self._open.enter_context(_Stream(self._blocks, self._watch_stream))
            for dictionary in self._dictionaries:
                watch = partial(self._watch_features, dictionary)
                self._open.enter_context(at_place(self._model, self._sites, dictionary.place, watch))
            if self._taps:
                self._open.enter_context(Taps(self._model, self._taps))
        except BaseException:
            self._open.close()
            raise
        return self

    def __exit__(self, *exception: Any) -> None:
        self._open.close()

    def begin(self, target: int) -> None:
        """The backward pass of this target is next."""
        self._target = target

    def latent(self, row: int, targets: int, lengths: Sequence[int]) -> Latent:
        """What was noted for one text.

        Args:
            row: which text of the batch.
            targets: number of its targets.
            lengths: number of its tokens, without padding; of an encoder-decoder, of both; none for an image, whose
                positions differ from layer to layer.

        Raises:
            ModelError: nothing was computed from the input at any unit.
        """
        layers = [self._layer(note, row, targets, lengths) for note in self._notes if note.noted and note.name]
        if not layers:
            raise ModelError("latent: no relevance came to any unit of the kinds that were asked for")
        return Latent(tuple(layers))

    # --- in the forward pass ----------------------------------------------------------------------------------------

    def _tap(self, site: Site, x: Tensor, rows: Rows | None) -> Tensor:
        if site.kind == "heads":
            for note in self._attention:
                note.name = self._named(f"{site.name}.weights", "attention")
                self._notes.append(note)
            self._attention.clear()
        if site.kind not in self._kinds:
            return x
        return self._watch(_Note(self._named(site.name, site.kind), site.kind, site.units, x, rows), x)

    def _watch(self, note: _Note, x: Tensor) -> Tensor:
        if not x.requires_grad:
            return x
        y = x.view_as(x)
        note.value, note.version = x.detach(), x._version
        y.register_hook(partial(self._note, note))
        if note.kind != "attention":
            self._notes.append(note)
        return y

    def _watch_attention(self, weights: Tensor) -> Tensor:
        note = _Note("", "attention", weights.shape[-3], weights)
        watched = self._watch(note, weights)
        if watched is not weights:
            self._attention.append(note)
        return watched

    def _watch_stream(self, x: Tensor) -> Callable[[str], None]:
        """Note a tensor of the residual stream; its name is given later."""
        note = _Note("", "residual", 1, x.detach(), version=x._version)
        if x.requires_grad:
            x.register_hook(partial(self._note, note))
            self._notes.append(note)
        return partial(setattr, note, "name")

    def _watch_features(self, dictionary: SparseAutoencoder, x: Tensor) -> Tensor:
        name = self._named(f"{dictionary.place}.features", "features")
        return self._watch(_Note(name, "features", dictionary.features + 2, x, decompose=dictionary.decompose), x)

    def _named(self, name: str, kind: str) -> str:
        """The name of a layer; of one that is used again, with the number of the use."""
        used = sum(n.kind == kind and n.name.partition("@")[0] == name for n in self._notes)
        return f"{name}@{used}" if used else name

    # --- in the backward pass ---------------------------------------------------------------------------------------

    def _note(self, note: _Note, grad: Tensor) -> None:
        if note.value._version != note.version:
            raise ModelError(f"{note.name}: the model writes into its units after it has used them")
        with torch.no_grad():
            note.noted[self._target] = self._reduced(note, note.value, grad)

    def _reduced(self, note: _Note, value: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        """total (batch, token), indices (batch, kept), relevance and activation (batch, kept, token), and maps."""
        activation, relevance, *maps = self._by_unit(note, widen(value), widen(grad))
        many = self._top is not None and note.kind in ("neurons", "features")
        indices = relevance.sum(dim=1).abs().topk(min(self._top or 0, note.units) if many else note.units).indices
        chosen = indices[:, None].expand(-1, relevance.shape[1], -1)
        kept = [x.gather(2, chosen).transpose(1, 2).cpu() for x in (relevance, activation)]
        own = [x.gather(1, indices[..., None, None].expand_as(x)).cpu() for x in maps]
        return (relevance.sum(dim=-1).cpu(), indices.cpu(), *kept, *own)

    def _by_unit(self, note: _Note, value: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        """Activation and relevance (batch, token, unit); of attention also relevance (batch, head, query, key)."""
        if note.kind == "attention":
            if value.shape[:-3].numel() != self._batch:
                raise ModelError(
                    f"latent: the weights of {note.name} are computed in windows, shape {tuple(value.shape)}, "
                    'expected one map for each head; ask for "heads" instead'
                )
            value, grad = (x.reshape(self._batch, note.units, *x.shape[-2:]) for x in (value, grad))
            relevance = value * grad
            return value.amax(dim=-1).transpose(1, 2), relevance.sum(dim=-1).transpose(1, 2), relevance
        if note.kind == "residual" and value.dim() > 3:  # channels may lie on any axis: all is one position
            value, grad = (x.reshape(self._batch, 1, -1) for x in (value, grad))
        if note.decompose is not None:
            activation, relevance = note.decompose(value, grad)
        else:
            numbers = value.unflatten(-1, (note.units, -1))
            activation = numbers.squeeze(-1) if numbers.shape[-1] == 1 else numbers.norm(dim=-1)
            relevance = (value * grad).unflatten(-1, (note.units, -1)).sum(dim=-1)
        return self._by_token(activation, note.rows), self._by_token(relevance, note.rows)

    def _by_token(self, x: Tensor, rows: Rows | None) -> Tensor:
        """(batch, token, unit), from rows of tokens in any arrangement."""
        units = x.shape[-1]
        x = x.reshape(-1, units)
        if rows is not None:
            x = x.new_zeros(rows.size, units).index_add(0, rows.tokens, x)
        return x.reshape(self._batch if len(x) % self._batch == 0 else 1, -1, units)

    # --- afterwards -------------------------------------------------------------------------------------------------

    def _layer(self, note: _Note, row: int, targets: int, lengths: Sequence[int]) -> LatentLayer:
        zeros = tuple(torch.zeros_like(x) for x in next(iter(note.noted.values())))
        noted = [note.noted.get(k, zeros) for k in range(targets)]
        total, indices, relevance, activation, *maps = (torch.stack([x[k] for x in noted]) for k in range(len(zeros)))
        at = row if total.shape[1] > row else 0
        width = total.shape[-1]
        decoder = len(lengths) > 1 and is_in_decoder(note.name)
        length, offset = (lengths[-1], lengths[0]) if decoder else ((*lengths, width)[0], 0)
        ordered = width == length if lengths else note.value.dim() < 3 or len(note.value) == 1  # else in windows
        return LatentLayer(
            name=note.name,
            kind=note.kind,
            units=note.units,
            total=total[:, at, :length],
            indices=indices[:, at],
            relevance=relevance[:, at, :, :length],
            activation=activation[:, at, :, :length],
            offset=offset if width >= length and (self._batch > 1 or ordered) else None,
            attention=maps[0][:, at, :, :length] if maps else None,
        )


def is_in_decoder(name: str) -> bool:
    """Whether a layer of an encoder-decoder, by its address, belongs to the decoder."""
    return "decoder" in name.split(".") or name.startswith("decoder")


class _Attention(TorchFunctionMode):
    """Hands the weights of attention, which are multiplied with values, to a function."""

    def __init__(self, watch: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        operation = find(func)
        name = "" if operation is None else operation.name
        if name in PRODUCTS and args and isinstance(args[0], Tensor) and hasattr(args[0], _WEIGHTS):
            args = (self._watch(args[0]), *args[1:])
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dim() > 2:
            carries = name in _CARRIES and isinstance(args[0], Tensor) and hasattr(args[0], _WEIGHTS)
            if name == "softmax" or carries:
                setattr(result, _WEIGHTS, True)
        return result


class _Stream(TorchFunctionMode):
    """Follows the residual stream through blocks: what a block is given, each sum with it, and what the block gives."""

    def __init__(self, blocks: Mapping[str, nn.Module], watch: Callable[[Tensor], Callable[[str], None]]) -> None:
        super().__init__()
        self._blocks, self._watch = blocks, watch
        self._sums: list[tuple[Tensor, Callable[[str], None]]] | None = None  # of the block that runs
        self._uses: dict[str, int] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> _Stream:
        for name, block in self._blocks.items():
            self._hooks.append(block.register_forward_pre_hook(partial(self._begin, name), with_kwargs=True))
            self._hooks.append(block.register_forward_hook(partial(self._end, name)))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()

    def _begin(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = _first((*args, *kwargs.values()))
        if x is not None:
            self._uses[name] = self._uses.get(name, -1) + 1
            setattr(x, _STREAM, True)
            self._watch(x)(f"{self._address(name)}:before")
            self._sums = []

    def _end(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        result, sums, self._sums = _first((output,)), self._sums or [], None
        if result is None:
            return
        if sums and sums[-1][0] is not result:  # a norm follows the last sum
            sums[-1][1]("")
            sums = [*sums[:-1], (result, self._watch(result))]
        if not sums:
            sums = [(result, self._watch(result))]
        address = self._address(name)
        for k, (_, rename) in enumerate(sums[:-1]):
            rename(f"{address}:between" if len(sums) == 2 else f"{address}:between.{k + 1}")
        sums[-1][1](f"{address}:after")

    def _address(self, name: str) -> str:
        return f"{name}@{self._uses[name]}" if self._uses[name] else name

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        operation = find(func)
        if self._sums is None or operation is None or not isinstance(result, Tensor):
            return result
        name, given = operation.name, [v for v in args if isinstance(v, Tensor)]
        streams = [v for v in given if hasattr(v, _STREAM) and v.shape == result.shape]
        if streams and name in SUMS and len(given) > 1 and given[1].shape == result.shape:
            setattr(result, _STREAM, True)
            self._sums.append((result, self._watch(result)))
        elif streams and (name in _CARRIES or name in _NORMALISES):
            setattr(result, _STREAM, True)
        return result


def _first(values: Sequence[Any]) -> Tensor | None:
    """The first tensor of features among what a module is given or gives."""
    return next((v for v in _tensors(values) if v.is_floating_point() and v.dim() > 1), None)


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
