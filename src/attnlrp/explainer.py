"""`Explainer`: from a text to its explanation; the task follows from the model."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypedDict, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from attnlrp import __version__, checkpoint, models
from attnlrp.changes import open_changes
from attnlrp.columns import Columns, arrange
from attnlrp.contexts import explaining
from attnlrp.engine import propagate
from attnlrp.errors import InputError, ModelError, NumericalError
from attnlrp.explanation import Candidate, ExplainedTarget, Explanation
from attnlrp.features import SparseAutoencoder
from attnlrp.gradients import OutputLayer, Places, gradients, watch_head
from attnlrp.images import MergedInputs, Picture, read_images
from attnlrp.inside import Inside, Wanted
from attnlrp.ledger import Ledger, audit
from attnlrp.memory import Choice, Plan, Planner
from attnlrp.prefixes import Prefixes
from attnlrp.readout import Outputs, Prediction, places_of
from attnlrp.rules import ATTNLRP, PRESETS, Rules
from attnlrp.targets import OTHERS, Continuation, Head, Neuron, Output, Scalar, Target
from attnlrp.tasks import TASKS, Question, Request, Slot, pad_of
from attnlrp.tokens import pieces, words
from attnlrp.units import Site, Unit, find_sites

__all__ = ["Explainer"]

CANDIDATES = 5

Kind: TypeAlias = "str | SparseAutoencoder"
Conversation: TypeAlias = "list[dict[str, Any]]"


class _Options(TypedDict, total=False):
    target: Target | Sequence[Target]
    against: str | int | None
    position: int | Sequence[int] | None
    generate: int
    context: str | Sequence[str] | None
    prefix: str | None
    image: Picture | Sequence[Picture] | None
    chat: bool
    output: Output
    temperature: float
    latent: Kind | Sequence[Kind]
    latent_top: int | None
    through: Unit | Sequence[Unit]


@dataclass(frozen=True)
class _Form:
    """How a slot becomes a number."""

    against: str | int | None
    output: Output
    temperature: float
    wanted: Wanted


class Explainer:
    """Explains the outputs of one model; what it is asked for follows from the model's task (see `attnlrp models`).

    Args:
        model: a language model or classifier of `transformers`; neither it nor its parameters are changed.
        tokenizer: its tokenizer; for a vision-language model, its processor.
        rules: table of rules.
        memory: "full", or "checkpoint" to compute each layer again in the backward pass instead of keeping what it
            computed: less memory, more time, the same relevance; "auto" estimates what a text takes before it runs,
            and chooses the fastest way that fits.
        memory_limit: with "auto": bytes that an explanation may take beyond the model; None for what is free.
        name: name of the model to keep with its explanations.

    Raises:
        ModelError: the model has no output that can be explained.

    Example:
        >>> explainer = Explainer.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
        >>> explainer("Paris is the capital of France. Berlin is the capital of").show()
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        rules: Rules = ATTNLRP,
        memory: Choice = "full",
        memory_limit: int | None = None,
        name: str | None = None,
    ) -> None:
        self._planner = Planner(model, memory, memory_limit)
        self.task = models.task_of(model)
        if self.task in models.IMAGE_TASKS:
            raise ModelError(
                f"{type(model).__name__} is a model for {self.task}: use attnlrp.ImageExplainer (attnlrp image)"
            )
        self.model, self.tokenizer, self.rules, self.memory = model, tokenizer, rules, memory
        self.name = name or getattr(model.config, "_name_or_path", "") or type(model).__name__
        processor = tokenizer if hasattr(tokenizer, "tokenizer") else None
        self.tokenizer = tokenizer if processor is None else processor.tokenizer
        self._prefixes = Prefixes(model, self.task)
        self._sites: tuple[Site, ...] | None = None
        self._accepted = set(inspect.signature(models.unwrapped(model).forward).parameters)
        self._task = TASKS[self.task](model, self.tokenizer, processor, self.name)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path | None = None,
        *,
        rules: Rules = ATTNLRP,
        memory: Choice = "full",
        memory_limit: int | None = None,
        device: str | None = None,
        dtype: str | torch.dtype | None = None,
        report: models.Report | None = None,
    ) -> Explainer:
        """Load a model by hub name, folder or GGUF file; without a name the packaged one (see `models.load`)."""
        model, tokenizer, shown = models.load(name, device=device, dtype=dtype, report=report)
        return cls(model, tokenizer, rules=rules, memory=memory, memory_limit=memory_limit, name=shown)

    @overload
    def __call__(self, text: str | Conversation, **options: Unpack[_Options]) -> Explanation: ...
    @overload
    def __call__(self, text: list[str] | tuple[str, ...], **options: Unpack[_Options]) -> list[Explanation]: ...
    def __call__(
        self,
        text: str | Conversation | list[str] | tuple[str, ...],
        *,
        target: Target | Sequence[Target] = None,
        against: str | int | None = None,
        position: int | Sequence[int] | None = None,
        generate: int = 0,
        context: str | Sequence[str] | None = None,
        prefix: str | None = None,
        image: Picture | Sequence[Picture] | None = None,
        chat: bool = False,
        output: Output = "logit",
        temperature: float = 1.0,
        latent: Kind | Sequence[Kind] = (),
        latent_top: int | None = 32,
        through: Unit | Sequence[Unit] = (),
    ) -> Explanation | list[Explanation]:
        """Explain one text, or a batch of texts (each as if it were alone; padding gets nothing).

        Args:
            text: the prompt, or a list of them; a conversation (list of {"role": ..., "content": ...}) for a model
                with a chat template; the question for extractive question answering.
            target: the output to explain: text or index of a token, name or index of a class, an answer out of
                `context`, a `Continuation` for the sum over several tokens, a `Neuron` for what it computes at
                `position` (default of a text with one output: where it is the most active); None for the model's own
                prediction. A list gives one row each (an answer gives two: its start and its end).
            against: an output to compare with (the difference of logits is explained), or `attnlrp.OTHERS`.
            position: token whose output is explained, negative from the end; default: the last for next tokens, the
                masks, the tokens of a class other than "O". A list gives one row each.
            generate: generate up to this many tokens greedily, and explain each of them: one row each.
            context: the text that holds the answer, for extractive question answering; one for each text.
            prefix: what the decoder of an encoder-decoder has written before the explained token.
            image: picture, file name, or several, for a vision-language model; its patches get relevance too.
            chat: put the text into the model's chat template, as what the user says.
            output: "logit", or "probability" for the softmax output.
            temperature: of that softmax; above 1 where the softmax is saturated.
            latent: record relevance inside the model, as `Explanation.latent`: any of "neurons", "heads", "residual"
                (the stream before, between and after the parts of each layer), "attention" (the weights), and the
                features of a `SparseAutoencoder`.
            latent_top: neurons that are kept of each layer; None for all.
            through: units, such as "layers.16.mlp:394" or `Neuron(16, 394)`, that relevance must go through to reach
                the input; of several layers, through each of them.

        Returns:
            An explanation, or a list of them for a list of texts.

        Raises:
            InputError: empty or too long text, options that exclude each other or that the task does not have.
            TargetError: a target that the model does not have.
            NumericalError: NaN or infinite logits or relevance.
            OutOfMemoryError: with what to change.
        """
        chat = chat or _is_conversation(text)
        single = isinstance(text, str) or not isinstance(text, Iterable) or _is_conversation(text)
        texts: list[Any] = [text] if single else list(text)
        targets: list[Any] = list(target) if isinstance(target, (list, tuple)) else [target]
        units = (through,) if isinstance(through, (str, Neuron, Head)) else tuple(through)
        kinds = (latent,) if isinstance(latent, (str, SparseAutoencoder)) else tuple(latent)
        form = _Form(against, output, temperature, Wanted(kinds, latent_top, units))
        asked = {"position": position, "generate": generate, "context": context, "prefix": prefix, "image": image}
        self._check(texts, targets, form, asked | {"chat": chat})
        contexts = [context] * len(texts) if context is None or isinstance(context, str) else list(context)
        if len(contexts) != len(texts):
            raise InputError(f"context: got {len(contexts)} for {len(texts)} texts, expected one for each text")
        pictures = read_images(image)
        questions = [
            Question(t, targets, position, generate, c, prefix, pictures, chat)
            for t, c in zip(texts, contexts, strict=True)
        ]
        with explaining():
            requests = [self._task.request(q) for q in questions]
            batches = [requests] if self._can_share(requests) else [[r] for r in requests]
            explanations = [e for batch in batches for e in self._explain(batch, form)]
        return explanations[0] if single else explanations

    def predict(self, text: str | Conversation, *, generate: int = 0, chat: bool = False) -> Prediction:
        """What the model says where an explanation would start: its logits, and what it generates greedily.

        Args:
            text: as for an explanation.
            generate: number of tokens; 0 for none.
            chat: put the text into the model's chat template, as what the user says.

        Raises:
            InputError: no text, or options that the task does not have.
        """
        chat = chat or _is_conversation(text)
        self._check([text], [None], _Form(None, "logit", 1.0, Wanted()), {"generate": generate, "chat": chat})
        question = Question(text, [None], None, 0, None, None, (), chat)
        request = self._task.request(question)
        inputs, kept = self._inputs([request])
        with torch.no_grad():
            outputs = Outputs(self.model(**inputs), 0, kept, request)
        slot = request.rows[0][0]
        more = self._task.request(dataclasses.replace(question, generate=generate)).rows if generate else []
        written = self.tokenizer.decode([row[0].target for row in more], skip_special_tokens=True)
        return Prediction(outputs(slot), written, lambda index: self._task.name([index], slot, request))

    def audit(
        self,
        text: str | Conversation,
        *,
        target: Target = None,
        context: str | None = None,
        prefix: str | None = None,
        image: Picture | Sequence[Picture] | None = None,
        chat: bool = False,
    ) -> Ledger:
        """Account for every unit of relevance of one explanation, its first row. See `attnlrp.audit`."""

        def explained(output: Any) -> Tensor:
            outputs = Outputs(output, 0, kept, request)
            slots = request.rows[0]
            return _total(slots, [self._scalar(slot, outputs, request, form) for slot in slots], outputs)

        form, chat = _Form(None, "logit", 1.0, Wanted()), chat or _is_conversation(text)
        self._check([text], [target], form, {"context": context, "prefix": prefix, "image": image, "chat": chat})
        question = Question(text, [target], context=context, prefix=prefix, images=read_images(image), chat=chat)
        with explaining():
            request = self._task.request(question)
            inputs, kept = self._inputs([request])
            return audit(self.model, inputs, target=explained, rules=self.rules)

    # --- what is asked ----------------------------------------------------------------------------------------------

    def _check(self, texts: list[Any], targets: list[Any], form: _Form, asked: dict[str, Any]) -> None:
        if not texts or not all(isinstance(t, str) or _is_conversation(t) for t in texts):
            raise InputError(f"text: got {texts!r:.60}, expected a string or a list of strings")
        if not targets:
            raise InputError("target: got an empty list, expected at least one target, or None for the prediction")
        generate = asked.get("generate", 0)
        if not isinstance(generate, int) or generate < 0:
            raise InputError(f"generate: got {generate!r}, expected a number of tokens")
        if form.output not in ("logit", "probability"):
            raise InputError(f"output: got {form.output!r}, expected 'logit' or 'probability'")
        if (form.output == "logit" and form.temperature != 1) or not form.temperature > 0:
            raise InputError(f"temperature: got {form.temperature}, expected more than 0, and output='probability'")
        if form.output == "probability" and form.against is not None:
            raise InputError("against: a contrast is a difference of logits; it excludes output='probability'")
        if generate and (targets != [None] or asked.get("position") is not None):
            raise InputError("generate: explains the generated tokens; it excludes target and position")
        used = {name for name, value in asked.items() if value is not None and value is not False and value != 0}
        used |= {"position"} if asked.get("position") is not None else set()
        used |= {"continuation"} if any(isinstance(t, Continuation) for t in targets) else set()
        for name in sorted(used - set(self._task.accepts)):
            tasks = [task for task, kind in TASKS.items() if name in kind.accepts]
            raise InputError(f"{name}: {self.name} is a model for {self.task}; this option is for {', '.join(tasks)}")

    def _can_share(self, requests: list[Request]) -> bool:
        """Whether one pass serves several texts; a decoder with a class head needs padding to find its token."""
        if any(r.extra for r in requests):
            return False
        if self.task == "sequence-classification" and self.model.config.get_text_config().pad_token_id is None:
            return False
        padded = len({len(r.ids) for r in requests}) > 1
        return self.task == "causal-lm" or not padded or "attention_mask" in self._accepted

    # --- from slots to explanations ---------------------------------------------------------------------------------

    def _explain(self, requests: list[Request], form: _Form) -> list[Explanation]:
        explain = partial(self._explain_together, form=form)
        return explain(requests) if form.wanted else self._prefixes.explained(requests, explain)

    def _explain_together(self, requests: list[Request], form: _Form) -> list[Explanation]:
        inputs, kept = self._inputs(requests)
        neurons = [slot.target for r in requests for row in r.rows for slot in row if isinstance(slot.target, Neuron)]
        inside = self._inside(inputs, form.wanted, neurons, len(requests))
        entry: AbstractContextManager[Any] = MergedInputs(self.model) if requests[0].extra else nullcontext()
        plan = self._planner.plan(self.rules, inputs, max(len(r.rows) for r in requests))
        saving = checkpoint.checkpointed(self.model) if plan.checkpoint else nullcontext()
        watched = inside or watch_head(self.model)
        with propagate(self.model, self.rules) as propagation, saving, entry as entered, watched as head:
            output = self.model(**inputs)
            outputs = [Outputs(output, k, kept, request, inside) for k, request in enumerate(requests)]
            scalars = [
                [[self._scalar(slot, at, request, form) for slot in row] for row in request.rows]
                for request, at in zip(requests, outputs, strict=True)
            ]
            values = [
                [_total(row, chosen, at) for row, chosen in zip(request.rows, rows, strict=True)]
                for request, rows, at in zip(requests, scalars, outputs, strict=True)
            ]
        if entered is None:
            decoder = self.model.config.is_encoder_decoder
            columns = arrange(propagation.embeddings, inputs["input_ids"], encoder_decoder=decoder, name=self.name)
        else:
            columns = [entered.columns(inputs["input_ids"], requests[0].segments)]
        relevance = self._relevance(columns, values, head, places_of(requests, kept), plan)
        read = [self._read(k, request, columns, relevance) for k, request in enumerate(requests)]
        return [
            self._explanation(*everything, form)
            for everything in zip(requests, read, scalars, values, outputs, strict=True)
        ]

    def _inside(self, inputs: dict[str, Any], wanted: Wanted, neurons: list[Neuron], batch: int) -> Inside | None:
        if not (wanted or neurons):
            return None
        if self._sites is None:
            self._sites = find_sites(self.model, inputs)
        return Inside(self.model, self._sites, wanted, neurons, batch=batch)

    def _inputs(self, requests: list[Request]) -> tuple[dict[str, Any], dict[int, int]]:
        """Padded model inputs, and where each explained position is found in the logits.

        If the model allows it, the logits of these positions are the only ones that it computes: with a large
        vocabulary the head is most of the cost.
        """
        pad = pad_of(self.model, self.tokenizer)
        ids = [r.ids[: r.read] for r in requests]
        inputs: dict[str, Any] = {"input_ids": self._padded(ids, pad)} | requests[0].extra
        if len({len(row) for row in ids}) > 1:
            inputs["attention_mask"] = self._padded([[1] * len(row) for row in ids], 0)
        types = [r.types[: r.read] for r in requests if r.types is not None]
        if types and "token_type_ids" in self._accepted:
            inputs["token_type_ids"] = self._padded(types, 0)
        if requests[0].decoder:
            inputs["decoder_input_ids"] = self._padded([r.decoder for r in requests], pad)
        if "use_cache" in self._accepted:
            inputs["use_cache"] = False
        positions = sorted({s.position for r in requests for row in r.rows for s in row if s.position is not None})
        if positions and "logits_to_keep" in self._accepted:
            inputs["logits_to_keep"] = torch.tensor(positions, device=self.model.device)
            return inputs, {p: k for k, p in enumerate(positions)}
        return inputs, {p: p for p in positions}

    def _padded(self, rows: list[list[int]], fill: int) -> Tensor:
        length = max(map(len, rows))
        return torch.tensor([row + [fill] * (length - len(row)) for row in rows], device=self.model.device)

    def _scalar(self, slot: Slot, outputs: Outputs, request: Request, form: _Form) -> Scalar:
        row = outputs(slot)
        if isinstance(slot.target, Neuron):
            return Scalar(slot.position, 0)
        if not torch.isfinite(row).all():
            raise NumericalError(
                f"{self.name}: the logits hold NaN or infinite values in {self.model.dtype}; "
                "use float32 or bfloat16 (--dtype), which have the range that float16 lacks"
            )
        size, against = row.shape[-1], form.against
        if slot.target is None:
            target = self._task.choose(slot, outputs.at, request)
        else:
            target = self._task.index(slot.target, slot, size, request, "target")
        if against is not None and against != OTHERS:
            against = self._task.index(against, slot, size, request, "against")
        return Scalar(slot.position, target, against, form.output, form.temperature)

    # --- relevance --------------------------------------------------------------------------------------------------

    def _relevance(
        self,
        columns: list[Columns],
        values: list[list[Tensor]],
        watched: Inside | OutputLayer,
        places: Places,
        plan: Plan,
    ) -> list[Tensor]:
        """Relevance of each kind of column: (target, batch, token)."""
        count, leaves = max(map(len, values)), [x for c in columns for x in c.leaves]
        totals = [torch.stack([own[k] for own in values if k < len(own)]).sum() for k in range(count)]
        if isinstance(watched, Inside):  # which acts on gradients as they come, one target after the other
            found: Iterable[tuple[Tensor, ...]] = (watched.gradients(t, leaves, k) for k, t in enumerate(totals))
        elif open_changes():
            found = gradients(totals, leaves, at_once=1)
        else:
            found = gradients(totals, leaves, at_once=plan.at_once, head=watched, places=places)
        result: list[list[Tensor]] = [[] for _ in columns]
        for of_target in found:
            of_leaf = iter(of_target)
            for rows, c in zip(result, columns, strict=True):
                rows.append(c.relevance([next(of_leaf) for _ in c.leaves]))
        relevance = [torch.stack(rows).cpu() for rows in result]
        if not all(torch.isfinite(r).all() for r in relevance):
            raise NumericalError(
                f"{self.name}: relevance overflows in {self.model.dtype}; use float32 or bfloat16 (--dtype)"
            )
        return relevance

    def _read(self, k: int, request: Request, columns: list[Columns], relevance: list[Tensor]) -> _Read:
        """Tokens and relevance of one text of a batch, without its padding."""
        given = len(request.ids[: request.read])
        lengths = [given, len(request.decoder) or given][: len(columns)]
        if any(r[:, k, n:].count_nonzero() for r, n in zip(relevance, lengths, strict=True)):
            raise ModelError(f"{self.name} lets padding take part in its decision: explain its texts one at a time")
        ids = request.ids + [i for c, n in zip(columns[1:], lengths[1:], strict=True) for i in c.ids[k, :n].tolist()]
        rows = [r[: len(request.rows), k, :n] for r, n in zip(relevance, lengths, strict=True)]
        rows.insert(1, rows[0].new_zeros(len(request.rows), len(request.ids) - given))
        written = len(ids) - len(request.ids)
        segments = ("encoder",) * len(request.ids) if written else request.segments
        return _Read(ids, segments + ("decoder",) * written, torch.cat(rows, dim=-1))

    def _explanation(
        self,
        request: Request,
        read: _Read,
        scalars: list[list[Scalar]],
        values: list[Tensor],
        outputs: Outputs,
        form: _Form,
    ) -> Explanation:
        texts = pieces(self.tokenizer, read.ids)
        specials = set(self.tokenizer.all_special_ids)
        special = tuple(i in specials for i in read.ids)
        rows = zip(request.rows, scalars, values, strict=True)
        return Explanation(
            tokens=texts,
            token_ids=tuple(read.ids),
            relevance=read.relevance,
            targets=tuple(
                self._target(request, slots[0], chosen, value.item(), outputs, form) for slots, chosen, value in rows
            ),
            special=special,
            segments=read.segments,
            words=words(texts, special, read.segments),
            model=self.name,
            rules=next((name for name, rules in PRESETS.items() if rules is self.rules), "custom"),
            task=self.task,
            version=__version__,
            latent=outputs.latent(len(request.rows)),
        )

    def _target(
        self, request: Request, slot: Slot, row: list[Scalar], value: float, outputs: Outputs, form: _Form
    ) -> ExplainedTarget:
        def name(*ids: int) -> str:
            return self._task.name(ids, slot, request)

        if isinstance(slot.target, Neuron):
            return outputs.explained(slot.target, slot, value)
        first = row[0]
        at = outputs(slot).detach().float()
        best = at.topk(min(CANDIDATES, len(at)))
        return ExplainedTarget(
            token=name(*(s.id for s in row)),
            id=first.id if len(row) == 1 else None,
            position=self._task.column(slot, first.id, request),
            logit=value,
            rank=int((at > at[first.id]).sum()) + 1 if len(row) == 1 else None,
            against=name(first.against) if isinstance(first.against, int) else first.against,
            unit=form.output,
            candidates=tuple(Candidate(name(i), i, v) for v, i in zip(*(t.tolist() for t in best), strict=True)),
        )


@dataclass(frozen=True)
class _Read:
    """What the model has read of one text: token indices, their origin, and relevance (target, token)."""

    ids: list[int]
    segments: tuple[str, ...]
    relevance: Tensor


def _total(slots: list[Slot], scalars: list[Scalar], outputs: Outputs) -> Tensor:
    return torch.stack([s.value(outputs(slot)) for slot, s in zip(slots, scalars, strict=True)]).sum()


def _is_conversation(text: Any) -> bool:
    return isinstance(text, (list, tuple)) and len(text) > 0 and all(isinstance(turn, dict) for turn in text)
