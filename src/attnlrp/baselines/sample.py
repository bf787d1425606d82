"""One sample as a baseline reads it: its features, the score of others in their place, relevance of its shape."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from attnlrp.columns import widen
from attnlrp.errors import InputError, ModelError

__all__ = ["Method", "Sample", "Score", "as_result", "opened", "require_positive"]

Score: TypeAlias = Callable[[Any], Tensor]
"""From the output of a model to the explained scalar of each row of the batch (batch,)."""

_SHARED = ("logits_to_keep", "cache_position")  # tensors that every row of a batch has in common


class Method(Protocol):
    """What explains one sample; the interface of every baseline, and of anything that is compared with them."""

    def __call__(self, model: Any, inputs: Mapping[str, Any], target: Score) -> Tensor:
        """Signed relevance in float32 on the CPU: (token,) of `input_ids`, or (height, width) of `pixel_values`.

        Args:
            model: a model of `transformers`; it is left as it was.
            inputs: its keyword arguments for one sample (batch of 1), with `input_ids` or `pixel_values`.
            target: from its output to the explained scalar of each row (batch,).
        """
        ...


class Sample:
    """The features of one sample, and the score of other features in their place.

    Features of a text are its token embeddings (1, token, hidden), before positions are added; of an encoder-decoder,
    those of its encoder. Features of an image are its pixels (1, channel, height, width).

    Args:
        model: a model in evaluation mode; see `opened`.
        inputs: its keyword arguments for one sample.
        target: from its output to the explained scalar of each row.

    Attributes:
        features: in float32 or better, detached.
    """

    def __init__(self, model: Any, inputs: Mapping[str, Any], target: Score) -> None:
        self.model, self.inputs, self.target = model, dict(inputs), target
        self.key = _feature_key(inputs)
        self.is_image = self.key == "pixel_values"
        self.encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        given: Tensor = inputs[self.key]
        if self.is_image:
            self.features = widen(given.detach().clone())
        else:
            self._table = _embedding_table(model)
            self.features = widen(self._table(given).detach().clone())
        if self.features.dim() != (4 if self.is_image else 3):
            raise InputError(f"inputs: {self.key} has shape {tuple(given.shape)}, expected one sample in a batch of 1")

    @property
    def size(self) -> int:
        """Number of tokens, or of pixels."""
        return int(self.features[0, 0].numel()) if self.is_image else int(self.features.shape[1])

    def output(self, features: Tensor, **extra: Any) -> Any:
        """The output of the model for a batch of features; `extra` are further keyword arguments."""
        changed = self.expanded(len(features)) | extra
        if self.is_image:
            return self.model(**changed | {self.key: features.to(self.inputs[self.key].dtype)})
        pending = [features]
        handle = self._table.register_forward_hook(partial(_substitute, pending, type(self.model).__name__))
        try:
            output = self.model(**changed)
        finally:
            handle.remove()
        if pending:
            raise ModelError(
                f"{type(self.model).__name__} does not look its tokens up in get_input_embeddings(): this baseline "
                "cannot change them"
            )
        return output

    def score(self, features: Tensor) -> Tensor:
        """The explained scalar of each row of a batch of features (batch,)."""
        return self.value(self.output(features), len(features))

    def value(self, output: Any, rows: int) -> Tensor:
        """The explained scalar of each row of an output (batch,).

        Raises:
            InputError: the target gives something else.
        """
        value = self.target(output)
        if not isinstance(value, Tensor) or value.shape != (rows,):
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"target: got {got}, expected one scalar for each row of the batch, of shape ({rows},)")
        return widen(value)

    def expanded(self, rows: int) -> dict[str, Any]:
        """The inputs for a batch of `rows` rows; what is not of one sample passes through."""
        return {name: self._expand(name, value, rows) for name, value in self.inputs.items()}

    def relevance(self, attribution: Tensor) -> Tensor:
        """Relevance from that of each number of the features: summed over the hidden dimension, or the channels."""
        return as_result(attribution[0].sum(dim=0 if self.is_image else -1))

    def groups(self, patch: int) -> Tensor:
        """Numbers that are switched at once: of a token (1, token, 1), or a square of pixels (1, 1, height, width).

        Args:
            patch: edge of the squares in pixels; those at the right and bottom edges may be smaller.
        """
        device = self.features.device
        if not self.is_image:
            return torch.arange(self.size, device=device)[None, :, None]
        height, width = self.features.shape[-2:]
        rows, columns = (torch.arange(n, device=device) // patch for n in (height, width))
        return (rows[:, None] * (int(columns[-1]) + 1) + columns)[None, None]

    def spread(self, values: Tensor, patch: int) -> Tensor:
        """Relevance from that of each group (group,); the pixels of a square get equal parts of it."""
        groups = self.groups(patch).flatten()
        shared = values.flatten()[groups] / groups.bincount()[groups]
        return as_result(shared.reshape(self.features.shape[-2:] if self.is_image else (self.size,)))

    @contextmanager
    def seeded(self, seed: int) -> Iterator[None]:
        """Random numbers that depend on the seed and on the input alone; the state of the generators is restored."""
        device = self.features.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self.number(seed))
            yield

    def number(self, seed: int) -> int:
        """A number from the seed and the content of the input."""
        content = self.inputs[self.key].detach().cpu().contiguous()
        raw = content.float() if content.is_floating_point() else content
        digest = hashlib.sha256(f"{seed} {tuple(content.shape)}".encode() + raw.numpy().tobytes()).digest()
        return int.from_bytes(digest[:6], "big")

    def _expand(self, name: str, value: Any, rows: int) -> Any:
        single = isinstance(value, Tensor) and value.dim() > 0 and len(value) == 1 and name not in _SHARED
        return value.expand(rows, *value.shape[1:]) if single else value


@contextmanager
def opened(model: Any, inputs: Mapping[str, Any], target: Score) -> Iterator[Sample]:
    """A sample of a model that is in evaluation mode and takes no gradients of its parameters, while the block is open.

    Raises:
        InputError: the inputs hold neither `input_ids` nor `pixel_values`, or more than one sample.
        ModelError: the model does not say where it looks up its tokens.
    """
    training = [(module, module.training) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for module, _ in training:
            module.training = False
        for parameter, _ in trained:
            parameter.requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad():
            yield Sample(model, inputs, target)
    finally:
        for module, mode in training:
            module.training = mode
        for parameter, flag in trained:
            parameter.requires_grad_(flag)


def as_result(relevance: Tensor) -> Tensor:
    """Relevance as every baseline returns it: float32, on the CPU, outside of any graph."""
    return relevance.detach().to("cpu", torch.float32)


def require_positive(**numbers: Any) -> None:
    """Refuse parameters that are not above 0; None stands for a default.

    Raises:
        InputError: naming the parameter.
    """
    for name, number in numbers.items():
        if number is not None and not number > 0:
            raise InputError(f"{name}: got {number}, expected a number above 0")


def _feature_key(inputs: Mapping[str, Any]) -> str:
    for key in ("pixel_values", "input_ids"):
        if isinstance(inputs.get(key), Tensor):
            if len(inputs[key]) != 1:
                raise InputError(f"inputs: {key} holds {len(inputs[key])} samples, expected a batch of 1")
            return key
    raise InputError(f"inputs: got {sorted(inputs)}, expected input_ids or pixel_values")


def _embedding_table(model: Any) -> nn.Module:
    """The module that looks up the tokens of the text: of the encoder, if there is a decoder beside it."""
    owners = [model]
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and hasattr(model, "get_encoder"):
        owners.insert(0, model.get_encoder())
    for owner in owners:
        try:
            table = owner.get_input_embeddings()
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(table, nn.Module):
            return table
    raise ModelError(f"{type(model).__name__} has no get_input_embeddings(): expected a text model of transformers")


def _substitute(pending: list[Tensor], name: str, module: Any, args: Any, looked_up: Tensor) -> Tensor | None:
    """Forward hook of the table: its first result is replaced; a decoder that shares the table keeps its own."""
    if not pending:
        return None
    features = pending.pop()
    if looked_up.shape != features.shape:
        raise ModelError(
            f"{name} looks up {tuple(looked_up.shape)}, expected {tuple(features.shape)}: other tokens than its text"
        )
    return features.to(looked_up.dtype)
