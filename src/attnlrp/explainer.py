"""`Explainer`: from a text to its explanation; the task follows from the model."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from attnlrp import __version__, models
from attnlrp.engine import Propagation, propagate
from attnlrp.errors import InputError, ModelError, NumericalError, OutOfMemoryError, TargetError
from attnlrp.explanation import Candidate, ExplainedTarget, Explanation
from attnlrp.ledger import Ledger, audit
from attnlrp.rules import ATTNLRP, PRESETS, Rules
from attnlrp.targets import OTHERS, Continuation, Output, Scalar, Target, class_index, token_index
from attnlrp.tokens import name_of, pieces, words

__all__ = ["Explainer"]

CANDIDATES = 5


class _Options(TypedDict, total=False):
    target: Target | Sequence[Target]
    against: str | int | None
    position: int | Sequence[int] | None
    generate: int
    output: Output
    temperature: float


@dataclass(frozen=True)
class _Slot:
    """An output that is not decided yet: None stands for the prediction at its position."""

    position: int | None
    target: str | int | None


@dataclass(frozen=True)
class _Request:
    """One text, tokenised, and what to explain of it: each row is a sum over slots."""

    ids: list[int]
    prompt: int  # how many of the ids are the prompt; the rest was generated or given as its continuation
    rows: list[list[_Slot]]


@dataclass(frozen=True)
class _Form:
    """How a slot becomes a number."""

    against: str | int | None
    output: Output
    temperature: float


class Explainer:
    """Explains the outputs of one model.

    Args:
        model: a language model or a classifier of `transformers`; neither it nor its parameters are changed.
        tokenizer: its tokenizer.
        rules: table of rules.
        name: name of the model to keep with its explanations.

    Raises:
        ModelError: the model has no output that can be explained.

    Example:
        >>> explainer = Explainer.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
        >>> explainer("Paris is the capital of France. Berlin is the capital of").show()
    """

    def __init__(self, model: Any, tokenizer: Any, *, rules: Rules = ATTNLRP, name: str | None = None) -> None:
        self.task = models.task_of(model)
        self.model, self.tokenizer, self.rules = model, tokenizer, rules
        self.name = name or getattr(model.config, "_name_or_path", "") or type(model).__name__
        self._accepted = set(inspect.signature(model.forward).parameters)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path | None = None,
        *,
        rules: Rules = ATTNLRP,
        device: str | None = None,
        dtype: str | torch.dtype | None = None,
        report: models.Report | None = None,
    ) -> Explainer:
        """Load a model by hub name, folder or GGUF file; without a name the packaged one (see `models.load`)."""
        model, tokenizer, shown = models.load(name, device=device, dtype=dtype, report=report)
        return cls(model, tokenizer, rules=rules, name=shown)

    @overload
    def __call__(self, text: str, **options: Unpack[_Options]) -> Explanation: ...
    @overload
    def __call__(self, text: list[str] | tuple[str, ...], **options: Unpack[_Options]) -> list[Explanation]: ...
    def __call__(
        self,
        text: str | list[str] | tuple[str, ...],
        *,
        target: Target | Sequence[Target] = None,
        against: str | int | None = None,
        position: int | Sequence[int] | None = None,
        generate: int = 0,
        output: Output = "logit",
        temperature: float = 1.0,
    ) -> Explanation | list[Explanation]:
        """Explain one text, or a batch of texts (each as if it were alone; padding gets nothing).

        Args:
            text: the prompt, or a list of them.
            target: the output to explain: text or index of a token, name or index of a class, a `Continuation` for the
                sum over several tokens; None for the model's own prediction. A list gives one row each.
            against: an output to compare with (the difference of logits is explained), or `attnlrp.OTHERS`.
            position: token whose next-token prediction is explained, negative from the end; default: the last. A list
                gives one row each.
            generate: generate up to this many tokens greedily, and explain each of them: one row each.
            output: "logit", or "probability" for the softmax output.
            temperature: of that softmax; above 1 where the softmax is saturated.

        Returns:
            An explanation, or a list of them for a list of texts.

        Raises:
            InputError: empty or too long text, options that exclude each other.
            TargetError: a target that the model does not have.
            NumericalError: NaN or infinite logits or relevance.
            OutOfMemoryError: with what to change.
        """
        single = isinstance(text, str) or not isinstance(text, Iterable)
        texts: list[Any] = [text] if single else list(text)
        targets: list[Any] = list(target) if isinstance(target, (list, tuple)) else [target]
        form = _Form(against, output, temperature)
        self._check(texts, targets, position, generate, form)
        with _memory(), _gradients():
            requests = [self._request(t, targets, position, generate) for t in texts]
            batches = [requests] if self._can_share else [[r] for r in requests]
            explanations = [e for batch in batches for e in self._explain(batch, form)]
        return explanations[0] if single else explanations

    def audit(self, text: str, *, target: str | int | None = None) -> Ledger:
        """Account for every unit of relevance of one explanation. See `attnlrp.audit`."""

        def explained(output: Any) -> Tensor:
            logits = _Logits(output.logits[0], kept)
            scalar = self._scalar(request.rows[0][0], logits, _Form(None, "logit", 1.0))
            return scalar.value(logits(scalar.position))

        with _memory(), _gradients():
            request = self._request(text, [target], None, 0)
            inputs, kept = self._inputs([request])
            return audit(self.model, inputs, target=explained, rules=self.rules)

    # --- from options to slots --------------------------------------------------------------------------------------

    def _check(self, texts: list[Any], targets: list[Any], position: Any, generate: Any, form: _Form) -> None:
        if not texts or not all(isinstance(t, str) for t in texts):
            raise InputError(f"text: got {texts!r:.60}, expected a string or a list of strings")
        if not targets:
            raise InputError("target: got an empty list, expected at least one target, or None for the prediction")
        if not isinstance(generate, int) or generate < 0:
            raise InputError(f"generate: got {generate!r}, expected a number of tokens")
        if form.output not in ("logit", "probability"):
            raise InputError(f"output: got {form.output!r}, expected 'logit' or 'probability'")
        if (form.output == "logit" and form.temperature != 1) or not form.temperature > 0:
            raise InputError(f"temperature: got {form.temperature}, expected more than 0, and output='probability'")
        if form.output == "probability" and form.against is not None:
            raise InputError("against: a contrast is a difference of logits; it excludes output='probability'")
        if generate and (targets != [None] or position is not None):
            raise InputError("generate: explains the generated tokens; it excludes target and position")
        continued = any(isinstance(t, Continuation) for t in targets)
        if self.task != "causal-lm" and (generate or position is not None or continued):
            raise InputError(f"generate, position and Continuation need a causal language model, got {self.task}")

    def _request(self, text: str, targets: list[Any], position: Any, generate: int) -> _Request:
        ids = self._encode(text, generate)
        if generate:
            sequence = self._generate(ids, generate)
            rows = [[_Slot(k - 1, sequence[k])] for k in range(len(ids), len(sequence))]
            return _Request(sequence[:-1], len(ids), rows)
        if self.task != "causal-lm":
            return _Request(ids, len(ids), [[_Slot(None, t)] for t in targets])
        positions = [len(ids) - 1] if position is None else _positions(position, len(ids))
        if any(isinstance(t, Continuation) for t in targets):
            return self._continuation(text, ids, targets, positions)
        count = max(len(positions), len(targets))
        if {len(positions), len(targets)} - {1, count}:
            raise InputError(
                f"got {len(targets)} targets and {len(positions)} positions, expected as many, or one of them"
            )
        positions, targets = positions * (count // len(positions)), targets * (count // len(targets))
        return _Request(ids, len(ids), [[_Slot(p, t)] for p, t in zip(positions, targets, strict=True)])

    def _continuation(self, text: str, ids: list[int], targets: list[Any], positions: list[int]) -> _Request:
        if len(targets) != 1 or positions != [len(ids) - 1]:
            raise InputError("target: a Continuation follows the whole prompt and must be the only target")
        whole = self.tokenizer(text + targets[0].text, verbose=False).input_ids
        if whole[: len(ids)] == ids:
            more = whole[len(ids) :]
        else:  # the last token of the prompt would grow into the continuation
            more = self.tokenizer.encode(targets[0].text, add_special_tokens=False)
        if not more:
            raise TargetError(f"target: the continuation {targets[0].text!r} has no token")
        self._check_length(len(ids) + len(more) - 1)
        slots = [_Slot(len(ids) - 1 + k, token) for k, token in enumerate(more)]
        return _Request([*ids, *more[:-1]], len(ids), [slots])

    def _encode(self, text: str, generate: int) -> list[int]:
        ids: list[int] = self.tokenizer(text, verbose=False).input_ids
        if not set(ids) - set(self.tokenizer.all_special_ids):
            raise InputError(f"text: {text!r} has nothing to explain; give at least one token")
        self._check_length(len(ids) + generate)
        return ids

    def _check_length(self, length: int) -> None:
        config = self.model.config.get_text_config()
        limits = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len")]
        limit = min([n for n in (*limits, self.tokenizer.model_max_length) if n], default=math.inf)
        if length > limit:
            raise InputError(f"text: {length} tokens are more than the context of {self.name}, {limit}; shorten it")

    def _generate(self, ids: list[int], count: int) -> list[int]:
        prompt = torch.tensor([ids], device=self.model.device)
        greedy = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
        mask = torch.ones_like(prompt)
        with torch.no_grad():
            sequence = self.model.generate(
                prompt, attention_mask=mask, max_new_tokens=count, pad_token_id=self._pad, **greedy
            )
        return sequence[0].tolist()  # type: ignore[no-any-return]

    # --- from slots to explanations ---------------------------------------------------------------------------------

    @property
    def _pad(self) -> int:
        pad = self.model.config.get_text_config().pad_token_id
        return int(next((i for i in (pad, self.tokenizer.pad_token_id) if i is not None), 0))

    @property
    def _can_share(self) -> bool:
        """Whether one pass serves several texts: a decoder with a class head needs padding to find its token."""
        return self.task == "causal-lm" or self.model.config.get_text_config().pad_token_id is not None

    def _explain(self, requests: list[_Request], form: _Form) -> list[Explanation]:
        inputs, kept = self._inputs(requests)
        with propagate(self.model, self.rules) as propagation:
            output = self.model(**inputs).logits
            logits = [_Logits(row, kept) for row in output]
            scalars = [
                [[self._scalar(slot, at, form) for slot in row] for row in request.rows]
                for request, at in zip(requests, logits, strict=True)
            ]
            values = [
                [torch.stack([s.value(at(s.position)) for s in row]).sum() for row in rows]
                for rows, at in zip(scalars, logits, strict=True)
            ]
        relevance = self._relevance(propagation, values, inputs["input_ids"])
        for k, request in enumerate(requests):
            if relevance[:, k, len(request.ids) :].count_nonzero():
                raise ModelError(f"{self.name} lets padding take part in its decision: explain its texts one at a time")
        return [
            self._explanation(request, relevance[: len(rows), k, : len(request.ids)], rows, values[k], logits[k], form)
            for k, (request, rows) in enumerate(zip(requests, scalars, strict=True))
        ]

    def _inputs(self, requests: list[_Request]) -> tuple[dict[str, Any], dict[int | None, int]]:
        """Padded model inputs, and where each explained position is found in the logits.

        If the model allows it, the logits of these positions are the only ones that it computes: with a large
        vocabulary the head is most of the cost.
        """
        device, length = self.model.device, max(len(r.ids) for r in requests)
        ids = [r.ids + [self._pad] * (length - len(r.ids)) for r in requests]
        inputs: dict[str, Any] = {"input_ids": torch.tensor(ids, device=device)}
        if any(len(r.ids) < length for r in requests):
            mask = [[1] * len(r.ids) + [0] * (length - len(r.ids)) for r in requests]
            inputs["attention_mask"] = torch.tensor(mask, device=device)
        if "use_cache" in self._accepted:
            inputs["use_cache"] = False
        positions = sorted({s.position for r in requests for row in r.rows for s in row if s.position is not None})
        if positions and "logits_to_keep" in self._accepted:
            inputs["logits_to_keep"] = torch.tensor(positions, device=device)
            return inputs, {p: k for k, p in enumerate(positions)}
        return inputs, {p: p for p in positions}

    def _scalar(self, slot: _Slot, logits: _Logits, form: _Form) -> Scalar:
        row = logits(slot.position)
        if not torch.isfinite(row).all():
            raise NumericalError(
                f"{self.name}: the logits hold NaN or infinite values in {self.model.dtype}; "
                "use float32 or bfloat16 (--dtype), which have the range that float16 lacks"
            )
        target = int(row.argmax()) if slot.target is None else self._index(slot.target, row, "target")
        against = form.against
        if against is not None and against != OTHERS:
            against = self._index(against, row, "against")
        return Scalar(slot.position, target, against, form.output, form.temperature)

    def _index(self, target: str | int, row: Tensor, option: str) -> int:
        if self.task == "causal-lm":
            return token_index(target, self.tokenizer, row.shape[-1], option=option)
        return class_index(target, self._labels, option=option)

    @property
    def _labels(self) -> list[str]:
        return [self.model.config.id2label[k] for k in range(self.model.config.num_labels)]

    def _relevance(self, propagation: Propagation, values: list[list[Tensor]], ids: Tensor) -> Tensor:
        """value * gradient, summed over the hidden dimension in float32 or better: (target, batch, token)."""
        inputs = [x for shown, x in propagation.embeddings if shown.shape == ids.shape]
        if not inputs:
            raise ModelError(
                f"{self.name} does not look its tokens up in get_input_embeddings(): use attnlrp.propagate"
            )
        count = max(map(len, values))
        result = []
        for k in range(count):
            total = torch.stack([own[k] for own in values if k < len(own)]).sum()
            grads = torch.autograd.grad(total, inputs, retain_graph=k < count - 1)
            rows = [(_wide(x.detach()) * _wide(g)).sum(dim=-1) for x, g in zip(inputs, grads, strict=True)]
            result.append(torch.stack(rows).sum(dim=0))
        relevance = torch.stack(result).cpu()
        if not torch.isfinite(relevance).all():
            raise NumericalError(
                f"{self.name}: relevance overflows in {self.model.dtype}; use float32 or bfloat16 (--dtype)"
            )
        return relevance

    def _explanation(
        self,
        request: _Request,
        relevance: Tensor,
        rows: list[list[Scalar]],
        values: list[Tensor],
        logits: _Logits,
        form: _Form,
    ) -> Explanation:
        texts = pieces(self.tokenizer, request.ids)
        specials = set(self.tokenizer.all_special_ids)
        special = tuple(i in specials for i in request.ids)
        return Explanation(
            tokens=texts,
            token_ids=tuple(request.ids),
            relevance=relevance,
            targets=tuple(
                self._target(row, value.item(), logits, form) for row, value in zip(rows, values, strict=True)
            ),
            special=special,
            segments=tuple("prompt" if k < request.prompt else "generated" for k in range(len(texts))),
            words=words(texts, special),
            model=self.name,
            rules=next((name for name, rules in PRESETS.items() if rules is self.rules), "custom"),
            task=self.task,
            version=__version__,
        )

    def _target(self, row: list[Scalar], value: float, logits: _Logits, form: _Form) -> ExplainedTarget:
        first = row[0]
        at = logits(first.position).detach().float()
        best = at.topk(min(CANDIDATES, len(at)))
        candidates = [Candidate(self._name(i), i, v) for v, i in zip(*(t.tolist() for t in best), strict=True)]
        return ExplainedTarget(
            token=self._name(*(s.id for s in row)),
            id=first.id if len(row) == 1 else None,
            position=first.position,
            logit=value,
            rank=int((at > at[first.id]).sum()) + 1 if len(row) == 1 else None,
            against=self._name(first.against) if isinstance(first.against, int) else first.against,
            unit=form.output,
            candidates=tuple(candidates),
        )

    def _name(self, *ids: int) -> str:
        if self.task == "causal-lm":
            return name_of(self.tokenizer, ids)
        return self._labels[ids[0]]


@dataclass(frozen=True)
class _Logits:
    """The logits of one text: called with a position, its row (vocab,); None where there is one output."""

    values: Tensor
    kept: dict[int | None, int]

    def __call__(self, position: int | None) -> Tensor:
        row = self.values if position is None else self.values[self.kept[position]]
        return _wide(row)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _positions(position: int | Sequence[int], length: int) -> list[int]:
    wanted = list(position) if isinstance(position, Iterable) else [position]
    for p in wanted:
        if not isinstance(p, int) or not -length <= p < length:
            raise InputError(f"position: got {p!r}, expected {-length} to {length - 1} for a text of {length} tokens")
    if not wanted:
        raise InputError("position: got an empty list, expected at least one position")
    return [p % length for p in wanted]


@contextmanager
def _gradients() -> Iterator[None]:
    """Whatever the caller has turned off."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def _memory() -> Iterator[None]:
    """Say what to change if the explanation does not fit into memory."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        reason: Exception = error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error) and "out of memory" not in str(error):
            raise
        reason = error
    else:
        return
    said = str(reason).splitlines() or [type(reason).__name__]
    raise OutOfMemoryError(
        "out of memory: explain fewer texts at a time, use bfloat16 (--dtype bfloat16), a shorter text, or a device "
        f"with more memory (--device); the system said: {said[0]}"
    ) from reason
