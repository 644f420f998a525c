"""What a precision does to answers: cosines of sentence embeddings, and perplexity of running text.

Both models run in ONNX Runtime on the same inputs. Texts are those of `benchmarks.checkpoints`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import numpy as np
import onnxruntime
import torch
import transformers

from benchmarks.checkpoints import checkpoint_folder

SENTENCES, BATCH = 500, 10
PIECES, PIECE = 8, 512
"""Pieces of each text, and tokens of a piece."""

Quality = Mapping[str, float]
Session = onnxruntime.InferenceSession


def sentences() -> list[str]:
    """Sentences of 40 to 300 characters, taken evenly from the whole of the Bible."""
    text = (checkpoint_folder("texts") / "kjv.txt").read_text(encoding="utf-8")
    found = [sentence.strip() for sentence in re.split(r"(?<=[.;:?!])\s+", text)]
    fitting = [sentence for sentence in found if 40 <= len(sentence) <= 300]
    return fitting[:: len(fitting) // SENTENCES][:SENTENCES]


def _run(session: Session, feed: Mapping[str, np.ndarray]) -> np.ndarray:
    names = {entry.name for entry in session.get_inputs()}
    return np.asarray(session.run(None, {name: array for name, array in feed.items() if name in names})[0])


def embedding_cosines(before: Session, after: Session) -> Quality:
    """Cosine between the mean-pooled embeddings of both models, over all sentences: mean and smallest."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint_folder("minilm"), local_files_only=True)
    texts, cosines = sentences(), []
    for first in range(0, len(texts), BATCH):
        encoded = tokenizer(texts[first : first + BATCH], padding=True, return_tensors="np")
        feed = {name: array.astype(np.int64) for name, array in encoded.items()}
        kept = feed["attention_mask"][:, :, None]
        one, other = ((_run(session, feed) * kept).sum(1) for session in (before, after))
        norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
        cosines.append((one * other).sum(1) / norms)
    whole = np.concatenate(cosines)
    return {"sentences": len(whole), "mean_cosine": float(whole.mean()), "smallest_cosine": float(whole.min())}


def next_tokens(before: Session, after: Session) -> Quality:
    """Perplexity of prose and code under both models, and how often both predict the same token."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint_folder("smollm2"), local_files_only=True)
    found: dict[str, float] = {}
    agreed = positions = 0
    for name in ("kjv.txt", "stdlib.py.txt"):
        text = (checkpoint_folder("texts") / name).read_text(encoding="utf-8")[: 12 * PIECES * PIECE]
        ids = np.asarray(tokenizer(text, verbose=False)["input_ids"][: PIECES * PIECE]).reshape(-1, PIECE)
        losses = [0.0, 0.0]
        for piece in ids:
            feed = {"input_ids": piece[None], "attention_mask": np.ones_like(piece)[None]}
            logits = [torch.from_numpy(_run(session, feed))[0] for session in (before, after)]
            target = torch.from_numpy(piece[1:])
            for place, one in enumerate(logits):
                losses[place] += float(torch.nn.functional.cross_entropy(one[:-1], target, reduction="sum"))
            agreed += int((logits[0].argmax(-1) == logits[1].argmax(-1)).sum())
            positions += PIECE
        count = len(ids) * (PIECE - 1)
        for when, loss in zip(("before", "after"), losses, strict=True):
            found[f"perplexity_{name.removesuffix('.txt')}_{when}"] = float(np.exp(loss / count))
    return {**found, "same_next_token": agreed / positions}


QUALITY: Mapping[str, Callable[[Session, Session], Quality]] = {
    "minilm": embedding_cosines,
    "smollm2": next_tokens,
}
"""How the answers of a model are compared."""
