"""Trained models whose answers are known: does relevance find the token, name or word that the answer comes from?

    python benchmarks/trained.py [--models FOLDER] [--data FOLDER] [--speech FILE.wav ...] [--samples 500]

Toy models (T5, Phi; examples/train_toy_models.py) are trained, or loaded from the folder of --models. With --data, a
folder with `stories260k/` (llama2.c) and `stories_moe/` (Mixtral), these are audited and asked for names. If the
package of examples/whisper_tiny.py is installed, Whisper is audited on a tone, on synthetic speech if the package of
examples/speech.py is installed, and on the files of --speech (with the times of their words, as pocketsphinx aligns
them, beside them). Relevance is signed throughout, and the explained output
is the logit of the predicted token. Counts come with their standard errors; chance is the mean of 1 / candidates.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import attnlrp
from attnlrp.evaluation import Output, Perturbation, Sample, compare, curves, mean
from attnlrp.rules import ATTNLRP, CP_LRP, GRADIENT, Layer, Rules, constant
from shared import machine

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import llama2c
import speech
import train_toy_models as toy
import whisper_tiny as whisper

METHODS: dict[str, Rules] = {"attnlrp": ATTNLRP, "cp-lrp": CP_LRP, "gradient": GRADIENT}
CONSTANT_ROUTER: Rules = ATTNLRP | {Layer("*.mlp.gate"): constant}
ROUTERS: dict[str, Rules] = {"attnlrp": ATTNLRP, "constant router": CONSTANT_ROUTER} | {
    name: METHODS[name] for name in ("cp-lrp", "gradient")
}

Row = dict[str, Any]


def rate(hits: Sequence[bool] | Sequence[float]) -> Row:
    return mean([float(h) for h in hits]).to_dict()


def books(model: Any, inputs: Any, rules: Rules = ATTNLRP, target: Any = None) -> Row:
    ledger = attnlrp.audit(model, inputs, rules=rules, target=target)
    return {
        "closes": ledger.closes,
        "error": ledger.error,
        "target": ledger.target,
        "inputs": ledger.inputs,
        "absorbed": {k: v for k, v in ledger.absorbed.items() if v},
    }


def rounded(value: Any) -> Any:
    """Five digits are more than the samples are good for."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


# --- toys ---------------------------------------------------------------------------------------------------------


def toy_model(family: str, task: str, folder: Path | None) -> Any:
    path = folder / f"{family}-{task}" if folder else None
    if path is None or not (path / "config.json").is_file():
        return toy.train(family, task)
    kind = transformers.AutoModelForSeq2SeqLM if family == "t5" else transformers.AutoModelForCausalLM
    return kind.from_pretrained(path).eval()


def toy_relevance(model: Any, samples: toy.Samples, step: Tensor, rules: Rules) -> tuple[Tensor, Tensor]:
    """Relevance (sample, token) of the encoder's input or of all that a decoder reads; and what the model predicts."""
    row = torch.arange(len(step))
    with attnlrp.propagate(model, rules) as propagation:
        chosen = toy.logits(model, samples)[row, step]
    best = chosen.argmax(-1)
    embeddings = propagation.embeddings[0][1]
    (grad,) = torch.autograd.grad(chosen[row, best].sum(), embeddings)
    return (embeddings * grad).sum(-1).detach(), best


def toy_row(family: str, task: str, folder: Path | None, count: int) -> Row:
    start = time.perf_counter()
    model = toy_model(family, task, folder)
    trained = time.perf_counter() - start
    generator = torch.Generator().manual_seed(1)
    samples = toy.TASKS[task](count, generator)
    step = torch.randint(samples.answer.shape[1], (count,), generator=generator)
    right = toy_relevance(model, samples, step, ATTNLRP)[1] == samples.answer[torch.arange(count), step]
    samples = toy.Samples(*(t[right] for t in (samples.prompt, samples.answer, samples.source)))
    step = step[right]
    row = torch.arange(len(step))
    ids = toy.inputs(model, samples)["input_ids"]
    read = torch.full_like(step, ids.shape[1]) if family == "t5" else toy_read(samples, step)
    candidates = (torch.arange(ids.shape[1]) < read[:, None]) & (ids != toy.START) & (ids != toy.END)
    source = samples.source[row, step] + (family == "phi")  # behind <s>
    found: Row = {}
    for name, rules in METHODS.items():
        relevance = toy_relevance(model, samples, step, rules)[0].masked_fill(~candidates, -torch.inf)
        positive = relevance.clamp(min=0)
        found[name] = {
            "copied token is first": rate((relevance.argmax(-1) == source).tolist()),
            "its share of positive relevance": rate(
                (positive[row, source] / positive.sum(-1).clamp(min=1e-30)).tolist()
            ),
        }
    one = toy.Samples(*(t[:1, :] for t in (samples.prompt, samples.answer, samples.source)))
    return {
        "model": f"{family}-{task}",
        "accuracy": toy.accuracy(model, toy.TASKS[task](2000, generator)),
        "training or loading, seconds": trained,
        "explained": len(step),
        "of": count,
        "chance": (1 / candidates.sum(-1).double()).mean().item(),
        "methods": found,
        "ledger in float64": books(model.double(), toy.inputs(model, one)),
    }


def toy_read(samples: toy.Samples, step: Tensor) -> Tensor:
    """How many tokens a decoder has read when it predicts a step."""
    return 1 + samples.prompt.shape[1] + step


# --- stories ------------------------------------------------------------------------------------------------------

STORIES = (
    "Once upon a time, there was a little girl named Lily. One day,",
    "Tom and his mom went to the park. They saw a big red ball. Tom wanted to",
    "The dog was sad because he lost his bone. He looked under the bed and",
    "Once upon a time, in a big forest, there lived a small bird. The bird liked to sing",
    "Sue had a new toy car. She played with it all day. Her friend Max asked,",
)
NAMES = "Lily Tim Tom Sue Max Sam Ben Anna Jack Mia Lucy Sara Bob Amy Jane Spot Jim Billy Kitty Timmy".split()
TEMPLATES = (
    "Once upon a time, there was a little girl named {0}. One day,",
    "Once upon a time, there was a little boy named {0}. One day,",
    "There was a dog named {0}. The dog liked to run. One day,",
    "Once upon a time, there was a cat named {0}. Every day,",
    "Once upon a time, there was a child named {0}. The child was very happy. One day,",
)


def token_relevance(model: Any, ids: Tensor, rules: Rules, against: Sequence[int] | None = None) -> tuple[Tensor, int]:
    """Relevance for the most likely token, against the mean of some others if asked, and which token it is."""
    with attnlrp.propagate(model, rules) as propagation:
        logits = model(input_ids=ids, use_cache=False).logits[0, -1]
    embeddings = propagation.embeddings[0][1]
    explained = logits.max() - (logits[against].mean() if against else 0)
    (grad,) = torch.autograd.grad(explained, embeddings)
    return (embeddings * grad).sum(-1)[0].detach(), int(logits.argmax())


def by_word(pieces: list[str], relevance: Tensor) -> dict[str, float]:
    """Sums over the pieces of a word, and over words that are the same; the start token is left out."""
    words: list[tuple[str, float]] = []
    for piece, value in zip(pieces[1:], relevance[1:].tolist(), strict=True):
        if piece.startswith(" ") or not words or not piece.isalpha() or not words[-1][0].isalpha():
            words.append((piece.strip(), value))
        else:
            words[-1] = (words[-1][0] + piece, words[-1][1] + value)
    total: dict[str, float] = {}
    for word, value in words:
        total[word] = total.get(word, 0.0) + value
    return total


def name_rows(model: Any, tokenizer: llama2c.Tokenizer, tables: dict[str, Rules]) -> Row:
    """Texts after which the model says the name that they hold: is that name the most relevant word?

    The logit of the name also has to do with what makes any name likely here; the logit against the mean of the other
    names is about this name.
    """
    first = {name: tokenizer.encode(name)[1] for name in NAMES}
    found: Row = {}
    for kind in ("logit", "against other names"):
        hits: dict[str, list[bool]] = {table: [] for table in tables}
        shares: dict[str, list[float]] = {table: [] for table in tables}
        chance: list[float] = []
        for name, text in ((name, template.format(name)) for name in NAMES for template in TEMPLATES):
            ids = torch.tensor([tokenizer.encode(text)])
            if token_relevance(model, ids, GRADIENT)[1] != first[name]:
                continue
            others = sorted(set(first.values()) - {first[name]}) if kind != "logit" else None
            for table, rules in tables.items():
                relevance, _ = token_relevance(model, ids, rules, others)
                words = by_word([tokenizer.pieces[k] for k in ids[0]], relevance)
                hits[table].append(max(words, key=lambda w: words[w]) == name)
                shares[table].append(max(words[name], 0) / max(sum(max(v, 0) for v in words.values()), 1e-30))
            chance.append(1 / len(words))
        methods = {t: {"name is first": rate(hits[t]), "its share of positive": rate(shares[t])} for t in tables}
        asked = len(NAMES) * len(TEMPLATES)
        found[kind] = {"asked": asked, "said": len(chance), "chance": mean(chance).mean, "methods": methods}
    return found


def story_audits(model: Any, tokenizer: llama2c.Tokenizer, tables: dict[str, Rules]) -> list[Row]:
    rows = []
    for text in STORIES:
        ids = torch.tensor([tokenizer.encode(text)])
        inputs = {"input_ids": ids, "use_cache": False}
        with torch.no_grad():
            plain = model.float()(**inputs).logits
        with attnlrp.propagate(model):
            changed = (model(**inputs).logits.detach() - plain).abs().max().item()
        relevance, best = token_relevance(model, ids, ATTNLRP)
        words = by_word([tokenizer.pieces[k] for k in ids[0]], relevance)
        row: Row = {
            "text": text,
            "predicted": tokenizer.pieces[best],
            "largest change of a logit": changed,
            "finite": bool(relevance.isfinite().all()),
            "most relevant words": sorted(words, key=lambda w: -words[w])[:3],
            "ledger in float32": books(model, inputs),
        }
        model.double()
        row["ledger in float64"] = {name: books(model, inputs, rules) for name, rules in tables.items()}
        rows.append(row)
    model.float()
    return rows


def routers_absorb(model: Any, tokenizer: llama2c.Tokenizer) -> Row:
    """What the routers of all layers take, pass on and absorb, in parts of the explained logit."""
    model.double()
    parts: dict[str, list[float]] = {"received": [], "passed": [], "absorbed": [], "absorbed by attention": []}
    for text in STORIES:
        inputs = {"input_ids": torch.tensor([tokenizer.encode(text)]), "use_cache": False}
        ledger = attnlrp.audit(model, inputs)
        softmaxes = [e for e in ledger.entries if e.operation == "softmax"]
        routers = [e for e in softmaxes if ".gate" in e.module]
        parts["received"].append(sum(e.received for e in routers) / ledger.target)
        parts["passed"].append(sum(e.passed for e in routers) / ledger.target)
        parts["absorbed"].append(sum(e.received - e.passed for e in routers) / ledger.target)
        rest = sum(e.received - e.passed for e in softmaxes) / ledger.target
        parts["absorbed by attention"].append(rest - parts["absorbed"][-1])
    model.float()
    return {name: rate(values) for name, values in parts.items()}


def faithfulness(model: Any, teacher: Any, tables: dict[str, Rules], count: int, length: int = 64) -> Row:
    """Area between the LeRF and MoRF curves of the predicted token's logit, on stories that the dense model made up."""
    torch.manual_seed(0)
    start = torch.ones(count, 1, dtype=torch.long)
    stories = teacher.generate(
        start, do_sample=True, top_k=0, max_new_tokens=length - 1, min_new_tokens=length - 1, pad_token_id=0
    )
    perturbation = Perturbation(model)
    special = torch.zeros(length, dtype=torch.bool)
    special[0] = True
    areas: dict[str, list[float]] = {name: [] for name in tables}
    for k, ids in enumerate(stories[:, None]):
        for name, rules in tables.items():
            relevance, best = token_relevance(model, ids, rules)
            sample = Sample(str(k), {"input_ids": ids}, Output(best), special)
            areas[name].append(curves(perturbation, sample, relevance, steps=32, special="keep").metrics()["area"])
    differences = {
        f"attnlrp - {name}": compare(areas["attnlrp"], areas[name]).to_dict() for name in tables if name != "attnlrp"
    }
    return {"tokens": length, "area": {n: rate(v) for n, v in areas.items()}, "difference": differences}


def stories(folder: Path, count: int) -> Row:
    dense = llama2c.load(folder / "stories260k" / "stories260K.bin")
    tokenizer = llama2c.Tokenizer(folder / "stories260k" / "tok512.bin", dense.config.vocab_size)
    experts = transformers.MixtralForCausalLM.from_pretrained(folder / "stories_moe").eval()
    found: Row = {}
    for name, model, tables in (("stories260k", dense, METHODS), ("stories_moe", experts, ROUTERS)):
        audited = {table: rules for table, rules in tables.items() if table != "gradient"}
        found[name] = {
            "names": name_rows(model, tokenizer, tables),
            "faithfulness": faithfulness(model, dense, tables, count),
            "audits": story_audits(model, tokenizer, audited),
        }
        print(json.dumps({name: {k: v for k, v in found[name].items() if k != "audits"}}), flush=True)
    found["stories_moe"]["routers, in parts of the logit"] = routers_absorb(experts, tokenizer)
    return found


# --- speech -------------------------------------------------------------------------------------------------------

SENTENCES = (
    "my dog likes to sleep in the garden",
    "the children played football after school",
    "she bought fresh bread and butter yesterday",
    "our teacher wrote a letter to the president",
    "the river runs through a green valley",
    "he painted the kitchen window yellow",
    "winter brings snow to the northern mountains",
    "the doctor gave him bitter medicine",
)
FRAMES, GAP = 100, 0.15  # frames of 10 ms in a second; seconds between words
WINDOW = 10  # seconds; Whisper's own window of 30 s costs four times as much


def audio_relevance(model: Any, mel: Tensor, ids: list[int], wanted: Sequence[int], rules: Rules) -> list[Tensor]:
    """Relevance of each frame of 10 ms for the tokens at the wanted places, each behind those before it."""
    mel = mel.clone().requires_grad_()
    with attnlrp.propagate(model, rules):
        logits = model(input_features=mel, decoder_input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    grads = [torch.autograd.grad(logits[k - 1, ids[k]], mel, retain_graph=True)[0] for k in wanted]
    return [(mel * grad).sum(1)[0].detach() for grad in grads]


@dataclass(frozen=True)
class Utterance:
    """Samples at 16 kHz, the words with their first and last frame, and the number of frames."""

    samples: Any
    words: list[tuple[str, int, int]]
    frames: int

    def span(self, word: str) -> tuple[int, int] | None:
        """Where a word is that is said once."""
        found = [(first, last) for said, first, last in self.words if said == word]
        return found[0] if len(found) == 1 else None


def synthetic(sentence: str) -> Utterance:
    """A sentence spoken word by word, so that the times are known."""
    parts: list[Tensor] = []
    words = []
    for word in sentence.split():
        start = sum(map(len, parts))
        voice = torch.from_numpy(speech.speak(word))
        loud = (voice.abs() > 0.01).nonzero()
        parts += [voice[int(loud[0]) : int(loud[-1]) + 1], torch.zeros(int(GAP * speech.SAMPLING_RATE))]
        end = start + len(parts[-2])
        words.append((word, start * FRAMES // speech.SAMPLING_RATE, -(-end * FRAMES // speech.SAMPLING_RATE)))
    samples = torch.cat(parts)
    return Utterance(samples.numpy(), words, len(samples) * FRAMES // speech.SAMPLING_RATE)


def recorded(file: Path) -> Utterance:
    """A recording with its alignment beside it: {"w": [{"b": start, "d": seconds, "t": word}, ...]}."""
    samples = whisper.read_wave(file)
    words = [
        (entry["t"].partition("(")[0], int(entry["b"] * FRAMES), int((entry["b"] + entry["d"]) * FRAMES))
        for entry in json.loads(file.with_suffix(".json").read_text())["w"]
    ]
    return Utterance(samples, words, len(samples) * FRAMES // whisper.SAMPLING_RATE)


def word_rows(model: Any, tokenizer: Any, utterances: Sequence[Utterance], *, smooth: int = 10) -> Row:
    """Words that are transcribed as they were said, once in an utterance: are the most relevant 100 ms theirs?"""
    hits: dict[str, list[bool]] = {name: [] for name in METHODS}
    shares: dict[str, list[float]] = {name: [] for name in METHODS}
    chance: list[float] = []
    texts = []
    for heard in utterances:
        mel = whisper.features(heard.samples, seconds=WINDOW)
        ids = whisper.transcribe(model, mel)
        texts.append(tokenizer.decode(ids).strip())
        spans = {k: heard.span(tokenizer.decode([ids[k]]).strip().lower()) for k in range(2, len(ids) - 1)}
        whole = {k: s for k, s in spans.items() if s and not tokenizer.decode(ids[k + 1 : k + 2])[:1].isalpha()}
        for name, rules in METHODS.items():
            found = audio_relevance(model, mel, ids, list(whole), rules)
            for (first, last), frames in zip(whole.values(), found, strict=True):
                relevance = frames[: heard.frames]
                window = relevance.unfold(0, smooth, 1).sum(-1)
                hits[name].append(first <= int(window.argmax()) + smooth // 2 < last)
                positive = relevance.clamp(min=0)
                shares[name].append((positive[first:last].sum() / positive.sum().clamp(min=1e-30)).item())
        chance += [(last - first) / heard.frames for first, last in whole.values()]
    methods = {n: {"peak in word": rate(hits[n]), "share of positive in word": rate(shares[n])} for n in METHODS}
    return {"words": len(chance), "chance": mean(chance).mean, "methods": methods, "transcribed": texts}


def speech_audit(model: Any, tokenizer: Any, name: str, samples: Any) -> Row:
    """The ledger of the token in the middle of a transcript, of the features and of the decoder's tokens apart."""
    mel = whisper.features(samples, seconds=WINDOW)
    ids = whisper.transcribe(model.float(), mel)
    at = max(3, len(ids) // 2)
    inputs = {"input_features": mel, "decoder_input_ids": torch.tensor([ids[:at]]), "use_cache": False}
    with torch.no_grad():
        plain = model(**inputs).logits
    with attnlrp.propagate(model):
        changed = (model(**inputs).logits.detach() - plain).abs().max().item()

    def explained(output: Any) -> Tensor:
        logit: Tensor = output.logits[0, -1, ids[at]]
        return logit

    row: Row = {
        "audio": name,
        "transcribed": tokenizer.decode(ids).strip(),
        "explained": tokenizer.decode([ids[at]]),
        "largest change of a logit": changed,
        "ledger in float32": books(model, inputs, target=explained),
    }
    inputs["input_features"] = mel.double()
    row["ledger in float64"] = books(model.double(), inputs, target=explained)
    model.float()
    return row


def listening(files: Sequence[Path]) -> Row | None:
    path = whisper.folder()
    if path is None:
        print(f"Whisper is left out: {whisper.INSTALL}", flush=True)
        return None
    model, tokenizer = whisper.shorten(whisper.load(path), WINDOW), whisper.load_tokenizer(path)
    sounds = {"tone of 440 Hz": whisper.tone()} | {file.name: whisper.read_wave(file) for file in files}
    found: Row = {"window, seconds": WINDOW, "words": {}}
    aligned = [recorded(file) for file in files if file.with_suffix(".json").is_file()]
    if aligned:
        found["words"]["recorded"] = word_rows(model, tokenizer, aligned)
    if speech.installed():
        sounds["synthetic speech"] = speech.speak("My dog likes to sleep in the garden.")
        found["words"]["synthetic"] = word_rows(model, tokenizer, [synthetic(sentence) for sentence in SENTENCES])
    else:
        print(f"Synthetic speech is left out: {speech.INSTALL}", flush=True)
    found["audits"] = [speech_audit(model, tokenizer, name, samples) for name, samples in sounds.items()]
    print(json.dumps(found), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="folder of train_toy_models.py; without it they are trained")
    parser.add_argument("--data", type=Path, help="folder with stories260k/ and stories_moe/")
    parser.add_argument(
        "--speech", type=Path, nargs="*", default=[], help="16-bit mono files at 16 kHz, FILE.json beside them"
    )
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--stories", type=int, default=100, help="texts for faithfulness")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "trained.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    results: Row = {"machine": machine(), "toys": [], "stories": None, "whisper": None}
    for family in toy.FAMILIES:
        for task in toy.TASKS:
            results["toys"].append(toy_row(family, task, arguments.models, arguments.samples))
            print(json.dumps(results["toys"][-1]), flush=True)
    results["stories"] = stories(arguments.data, arguments.stories) if arguments.data else None
    results["whisper"] = listening(arguments.speech)
    arguments.out.write_text(json.dumps(rounded(results), indent=1) + "\n")


if __name__ == "__main__":
    main()
