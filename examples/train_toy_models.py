"""Train tiny T5 and Phi models on tasks whose answer is a token of the input, so that its source is known.

    python examples/train_toy_models.py --out FOLDER [--families t5 phi] [--tasks copy reverse lookup] [--steps N]

Tasks: `copy` and `reverse` of six letters ("a g c h f b :"), `lookup` of the value that stands behind a key
("a G c H f B d A : c" gives H). Symbols are distinct within a text, so each answer has exactly one source. Each model
trains in a few minutes on a CPU and is saved with a tokenizer, ready for

    attnlrp explain --model FOLDER/t5-lookup "a G c H f B d A : c"
"""

from __future__ import annotations

import argparse
import string
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PhiConfig, PhiForCausalLM, T5Config, T5ForConditionalGeneration

PAD, END, COLON, START = range(4)
LETTERS = 8
WORDS = ("<pad>", "</s>", ":", "<s>", *string.ascii_lowercase[:LETTERS], *string.ascii_uppercase[:LETTERS])
KEYS, VALUES = 4, 4 + LETTERS  # first index of the lower-case letters, and of the capitals
LENGTH = 6  # letters to copy or reverse
PAIRS = 4
ASKED = 8  # questions about one text while a look-up is trained


@dataclass(frozen=True)
class Samples:
    """Texts with their answers.

    Args:
        prompt: token indices (sample, token).
        answer: token indices (sample, step).
        source: where in the prompt the token of each step stands (sample, step).
    """

    prompt: Tensor
    answer: Tensor
    source: Tensor


def draw(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Distinct letters, as numbers from 0 (sample, letter)."""
    return torch.rand(count, LETTERS, generator=generator).argsort(-1)[:, :size]


def copy(count: int, generator: torch.Generator) -> Samples:
    letters = KEYS + draw(count, LENGTH, generator)
    return Samples(_closed(letters), letters, torch.arange(LENGTH).expand(count, -1))


def reverse(count: int, generator: torch.Generator) -> Samples:
    letters = KEYS + draw(count, LENGTH, generator)
    return Samples(_closed(letters), letters.flip(-1), torch.arange(LENGTH).flip(0).expand(count, -1))


def lookup(count: int, generator: torch.Generator, *, asked: int = 1) -> Samples:
    """Several keys may be asked in turn: the answer is then value, key, value, ..., and keys have the source -1."""
    keys, values = KEYS + draw(count, PAIRS, generator), VALUES + draw(count, PAIRS, generator)
    order = torch.randint(PAIRS, (count, asked), generator=generator)
    pairs = torch.stack([keys, values], -1).flatten(1)
    questions = torch.stack([keys.gather(1, order), values.gather(1, order)], -1).flatten(1)
    source = torch.stack([torch.full_like(order, -1), 2 * order + 1], -1).flatten(1)
    return Samples(torch.cat([_closed(pairs), questions[:, :1]], 1), questions[:, 1:], source[:, 1:])


def _closed(letters: Tensor) -> Tensor:
    return torch.cat([letters, torch.full((len(letters), 1), COLON)], 1)


TASKS: dict[str, Callable[[int, torch.Generator], Samples]] = {"copy": copy, "reverse": reverse, "lookup": lookup}


def build_t5(width: int = 64) -> Any:
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(WORDS),
            d_model=width,
            d_kv=width // 4,
            d_ff=2 * width,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=True,  # scales the logits, without which training starts slowly
            pad_token_id=PAD,
            eos_token_id=END,
            decoder_start_token_id=PAD,
        )
    )
    for name, parameter in model.named_parameters():
        if "relative_attention_bias" in name:  # heads that differ in where they look are found sooner
            torch.nn.init.normal_(parameter)
    return model


def build_phi(width: int = 64) -> Any:
    return PhiForCausalLM(
        PhiConfig(
            vocab_size=len(WORDS),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            resid_pdrop=0.0,
            initializer_range=width**-0.5,  # with less, attention starts flat, and a look-up is not found in minutes
            bos_token_id=START,
            eos_token_id=END,
            pad_token_id=PAD,
        )
    )


FAMILIES: dict[str, Callable[..., Any]] = {"t5": build_t5, "phi": build_phi}


def inputs(model: Any, samples: Samples) -> dict[str, Tensor]:
    """What the model reads while it writes the answer: it sees the steps before the one that it predicts."""
    count, before = len(samples.prompt), samples.answer[:, :-1]
    if model.config.is_encoder_decoder:
        encoder = torch.cat([samples.prompt, torch.full((count, 1), END)], 1)
        return {"input_ids": encoder, "decoder_input_ids": torch.cat([torch.full((count, 1), PAD), before], 1)}
    return {"input_ids": torch.cat([torch.full((count, 1), START), samples.prompt, before], 1)}


def logits(model: Any, samples: Samples) -> Tensor:
    """The logits of each step of the answer (sample, step, vocab)."""
    found: Tensor = model(**inputs(model, samples), use_cache=False).logits
    return found[:, -samples.answer.shape[1] :]


@torch.no_grad()
def accuracy(model: Any, samples: Samples) -> float:
    """Share of steps whose most probable token is right."""
    return (logits(model.eval(), samples).argmax(-1) == samples.answer).float().mean().item()


def train(
    family: str, task: str, *, steps: int = 6000, batch: int = 64, width: int = 64, rate: float = 2e-3, seed: int = 0
) -> Any:
    """Train until a batch of samples that were not seen is answered without a mistake, at most `steps` steps."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = FAMILIES[family](width)
    # with several questions about one text a look-up is learned in seconds, and with one in minutes or not at all
    draw_batch = partial(lookup, asked=ASKED) if task == "lookup" else TASKS[task]
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    for step in range(steps):
        samples = draw_batch(batch, generator)
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 100) * (1 - step / steps)
        wanted = samples.answer.masked_fill(samples.source < 0, -100)
        loss = F.cross_entropy(logits(model.train(), samples).flatten(0, 1), wanted.flatten())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % 100 == 99 and accuracy(model, TASKS[task](1000, generator)) == 1:
            break
    return model.eval()


def tokenizer(family: str) -> Any:
    """Words between spaces; T5 closes a text with </s>, Phi opens it with <s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "$A </s>" if family == "t5" else "<s> $A"
    words.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", START), ("</s>", END)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<pad>"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--steps", type=int, default=6000)
    arguments = parser.parse_args()
    for family in arguments.families:
        for task in arguments.tasks:
            start = time.perf_counter()
            model = train(family, task, steps=arguments.steps)
            score = accuracy(model, TASKS[task](2000, torch.Generator().manual_seed(1)))
            folder = arguments.out / f"{family}-{task}"
            model.save_pretrained(folder)
            tokenizer(family).save_pretrained(folder)
            print(f"{folder}: accuracy {score:.4f} on 2000 new texts, {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
