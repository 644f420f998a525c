"""A language model with its cache in ONNX Runtime on a GPU: our conversion beside onnxruntime-genai's model builder.

    python -m benchmarks.onnx_cuda results.json [--precision fp16] [--layers N] [--context 8192] [--provider cuda]

All are made of one checkpoint of the shape of Llama-3.2-1B with random weights; `shared` is our conversion with
`--shared-buffer`. Everything a model reads and writes stays on the device (IO binding), logits of every position among
it. A model is called in two ways: `growing`, where the present cache is another buffer than the past one, and `shared`,
where both are one buffer of the whole length, as onnxruntime-genai calls a model whose configuration says
`past_present_share_buffer`, and for such models alone. Models take turns, round after round; a time is the median.
Needs `onnxruntime-gpu` and `onnxruntime-genai`, for `--provider cpu` plain `onnxruntime`.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

Call = Literal["growing", "shared"]
WARM_UP = 3
SPARE = 64
"""Positions of a shared buffer behind the last one that is used."""

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
}
ELEMENTS: Mapping[torch.dtype, int] = {
    torch.float32: 1,
    torch.float16: 10,
    torch.bfloat16: 16,
    torch.int64: 7,
    torch.int32: 6,
}
"""ONNX's number of an element type."""


@dataclass(frozen=True)
class Row:
    """One line of the results.

    Attributes:
        work: `prefill` or `step`; new, past: tokens given and tokens cached.
        call: how the cache is handed over.
        rounds: behind each median.
        ms: median milliseconds by model; fastest: the best round.
        failed: what models say that do not run it.
    """

    work: str
    new: int
    past: int
    call: Call
    rounds: int
    ms: dict[str, float]
    fastest: dict[str, float]
    failed: dict[str, str]


def write_checkpoint(folder: Path, layers: int, small: bool) -> None:
    """A checkpoint of the shape of Llama-3.2-1B, half precision, with random weights and a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=1024 if small else 128256, hidden_size=256 if small else 2048,
        intermediate_size=512 if small else 8192, num_hidden_layers=layers, num_attention_heads=4 if small else 32,
        num_key_value_heads=2 if small else 8, head_dim=64, rope_theta=500000.0, max_position_embeddings=131072,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).half().save_pretrained(folder)
    words = {f"w{number}": number for number in range(config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="w0", bos_token="w1", eos_token="w2", pad_token="w2"
    ).save_pretrained(folder)


def convert_ours(checkpoint: Path, out: Path, precision: str, provider: str, cache: str = "--cache") -> float:
    """`attncompile convert`; seconds that it took."""
    command = [sys.executable, "-m", "attncompile", "convert", str(checkpoint), "-o", str(out)]
    return _timed([*command, "--target", "onnx", cache, "--precision", precision, "--provider", provider])


def build_peer(checkpoint: Path, out: Path, precision: str, provider: str) -> float:
    """onnxruntime-genai's model builder; seconds that it took."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", str(checkpoint), "-o", str(out)]
    return _timed([*command, "-p", precision, "-e", provider, "-c", str(out.parent / "cache")])


def _timed(command: Sequence[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True)
    return round(time.perf_counter() - start, 1)


class Loaded:
    """A model of a folder in a session, with what its configuration says of the cache."""

    def __init__(self, folder: Path, provider: str) -> None:
        import onnxruntime

        settings = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
        decoder = settings["model"]["decoder"]
        self.layers: int = decoder["num_hidden_layers"]
        self.heads: int = decoder["num_key_value_heads"]
        self.size: int = decoder["head_size"]
        self.names: Mapping[str, str] = decoder["inputs"] | decoder["outputs"]
        self.shares: bool = settings["search"].get("past_present_share_buffer", False)
        self.device = "cuda" if provider == "cuda" else "cpu"
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        providers = [*(["CUDAExecutionProvider"] if provider == "cuda" else []), "CPUExecutionProvider"]
        self.session = onnxruntime.InferenceSession(str(folder / decoder["filename"]), options, providers=providers)
        if provider == "cuda" and self.session.get_providers()[0] != "CUDAExecutionProvider":
            raise SystemExit(f"{folder}: the CUDA provider did not load; ONNX Runtime's own message stands above")
        self.dtypes = {
            entry.name: TORCH_DTYPES[entry.type] for entry in (*self.session.get_inputs(), *self.session.get_outputs())
        }

    def bound(self, new: int, past: int, call: Call) -> tuple[Any, dict[str, torch.Tensor]]:
        """A binding of a call with everything on the device, and the tensors it names, which must outlive it."""
        total = past + new
        generator = torch.Generator().manual_seed(1)
        inputs = {
            self.names["input_ids"]: torch.randint(3, 1000, (1, new), generator=generator),
            self.names["attention_mask"]: torch.ones(1, total, dtype=torch.int64),
            self.names.get("position_ids", "position_ids"): torch.arange(past, total).unsqueeze(0),
        }
        tensors = {name: value.to(self.device) for name, value in inputs.items() if name in self.dtypes}
        vocabulary = self.session.get_outputs()[0].shape[-1]
        logits = self.names["logits"]
        tensors[logits] = torch.empty(1, new, vocabulary, dtype=self.dtypes[logits], device=self.device)
        for layer in range(self.layers):
            for side in ("key", "value"):
                before = self.names[f"past_{side}_names"] % layer
                after = self.names[f"present_{side}_names"] % layer
                dtype = self.dtypes[before]
                length = total + SPARE if call == "shared" else past
                cached = torch.randn(1, self.heads, length, self.size, generator=generator).to(dtype)
                tensors[before] = cached.to(self.device)
                if call == "growing":
                    tensors[after] = torch.empty(1, self.heads, total, self.size, dtype=dtype, device=self.device)
                else:
                    tensors[after] = tensors[before]
        binding = self.session.io_binding()
        for entry in self.session.get_inputs():
            binding.bind_input(entry.name, self.device, 0, *_described(tensors[entry.name]))
        for entry in self.session.get_outputs():
            binding.bind_output(entry.name, self.device, 0, *_described(tensors[entry.name]))
        return binding, tensors


def _described(tensor: torch.Tensor) -> tuple[int, tuple[int, ...], int]:
    return ELEMENTS[tensor.dtype], tuple(tensor.shape), tensor.data_ptr() or 1


def measure(models: Mapping[str, Loaded], work: str, new: int, past: int, call: Call, rounds: int) -> Row:
    """One row: each model in turn, `rounds` times."""
    bindings, failed = {}, {}
    for name, model in models.items():
        try:
            binding = model.bound(new, past, call)
            model.session.run_with_iobinding(binding[0])
            bindings[name] = binding
        except Exception as error:  # ONNX Runtime's errors share no base
            failed[name] = str(error).splitlines()[0][:300]
    times: dict[str, list[float]] = {name: [] for name in bindings}
    for number in range(-WARM_UP, rounds):
        for name in list(bindings)[:: 1 if number % 2 else -1]:
            _wait()
            start = time.perf_counter()
            models[name].session.run_with_iobinding(bindings[name][0])
            _wait()
            if number >= 0:
                times[name].append(1e3 * (time.perf_counter() - start))
    median = {name: round(statistics.median(found), 4) for name, found in times.items()}
    fastest = {name: round(min(found), 4) for name, found in times.items()}
    row = Row(work, new, past, call, rounds, median, fastest, failed)
    print(f"{work} {new} behind {past}, {call}: {median} {failed or ''}", flush=True)
    return row


def difference(models: Mapping[str, Loaded], new: int) -> dict[str, float]:
    """How far the models' logits of one prompt lie apart, beside their size."""
    found = {}
    for name, model in models.items():
        binding, tensors = model.bound(new, 0, "growing")
        model.session.run_with_iobinding(binding)
        _wait()
        found[name] = tensors[model.names["logits"]].float()
    first, *others = found.values()
    apart = max(float((first - other).abs().max()) for other in others)
    return {"largest": apart, "size": float(first.abs().max())}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    """Make both models, time them, write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", type=Path, help="where the JSON goes")
    parser.add_argument("--precision", default="fp16", help="as both converters call it")
    parser.add_argument("--provider", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--small", action="store_true", help="narrow layers, for a trial")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--folder", type=Path, help="where the models are made and kept; made anew without it")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = chosen.folder or Path(scratch)
        record = _record(folder, chosen)
    chosen.results.parent.mkdir(parents=True, exist_ok=True)
    chosen.results.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _record(folder: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    import onnxruntime

    checkpoint = folder / "checkpoint"
    if not checkpoint.exists():
        write_checkpoint(checkpoint, chosen.layers, chosen.small)
    makers = {"builder": build_peer, "ours": convert_ours, "shared": partial(convert_ours, cache="--shared-buffer")}
    with ThreadPoolExecutor() as pool:  # each is a process of its own
        making = {
            name: pool.submit(make, checkpoint, folder / name, chosen.precision, chosen.provider)
            for name, make in makers.items()
            if not (folder / name).exists()
        }
        seconds = {name: made.result() for name, made in making.items()}
    models = {name: Loaded(folder / name, chosen.provider) for name in ("ours", "shared", "builder")}
    apart = difference(models, min(1024, chosen.context))  # beyond where a conversion switches operators
    print(f"logits apart: {apart}", flush=True)
    called: dict[Call, dict[str, Loaded]] = {
        "growing": models,
        "shared": {name: model for name, model in models.items() if model.shares},
    }
    rows = []
    for call, taking in called.items():
        rows.append(measure(taking, "prefill", chosen.context, 0, call, max(5, chosen.rounds // 2)))
        rows.append(measure(taking, "step", 1, chosen.context, call, chosen.rounds))
    reports = {name: json.loads((folder / name / "report.json").read_text()) for name in ("ours", "shared")}
    return {
        "device": torch.cuda.get_device_name() if chosen.provider == "cuda" else platform.processor(),
        "cores": os.cpu_count(),
        "versions": {
            "onnxruntime": onnxruntime.__version__,
            "onnxruntime-genai": importlib.metadata.version("onnxruntime-genai"),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "date": datetime.date.today().isoformat(),
        "model": f"Llama-3.2-1B shape, {chosen.layers} layers, random weights",
        "precision": chosen.precision,
        "seconds_to_make": seconds,
        "logits_apart": apart,
        "shares_buffer": {name: model.shares for name, model in models.items()},
        "operators": {
            name: sorted({site["operator"] for site in report["sites"]}) for name, report in reports.items()
        },
        "rows": [asdict(row) for row in rows],
    }


if __name__ == "__main__":
    main()
