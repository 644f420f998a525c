"""Whole models: the ``torch.compile`` back end beside everything else that a user could call.

    python -m benchmarks.backend benchmarks/results/backend_h200.json [--rows prefill] [--rounds 7]
    python -m benchmarks.backend benchmarks/results/backend_cpu.json --device cpu
    python -m benchmarks.backend OUT --rows training --contenders inductor,attncompile  # times to compile, in one group
    python -m benchmarks.backend OUT --rows bloom --trial --layers 1 --together 1       # does it run? without a GPU

Every contender is a process of its own that makes the same model with the same random weights, compiles it with empty
caches and keeps it; all compile at the same time. Then they take turns: in every round each of them makes a few calls
of each size, alone on the device, and medians of the rounds are reported. Where the device's memory does not hold all
of a row (``together``), as many as it holds do so, and then the next ones: times to compile are comparable within such
a group, whose number stands beside them. One compiled model serves all the sizes of
its row, unless the contender is called ``static``, which compiles for each. Results are compared with those of the
row's first contender that ran, its ``judge``: the same weights in float32, which is not timed, where a row has it and
it fits in memory.

``prefill`` is one forward pass without a cache over that many tokens, ``decode`` one step over a full static cache of
8192 tokens, ``training`` a forward and a backward pass. ``eager`` and ``sdpa`` are the attention code that the model
is loaded with; the compilers are none, Inductor, and ours with Inductor for the rest.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.report import Report, arguments, chosen
from benchmarks.timing import orders

Run = Callable[[], torch.Tensor]

CONTEXT = 8192
"""Tokens in the cache of a decoding step."""

COPY = 4.3e12
"""Bytes a second that an H200 copies: what a step that only moves its bytes would need."""


@dataclass(frozen=True)
class Contender:
    """Who computes a model.

    Attributes:
        name: in the report.
        attention: which of the model's own implementations it is loaded with.
        compiler: what compiles it.
        dynamic: whether one compilation serves all sizes.
        backend: the one of PyTorch's attention back ends to which SDPA is pinned.
        judge: it computes in float32 and is not timed.
    """

    name: str
    attention: Literal["eager", "sdpa", "flex_attention"]
    compiler: Literal["none", "inductor", "attncompile"]
    dynamic: bool = True
    backend: Literal["", "CUDNN_ATTENTION", "FLASH_ATTENTION"] = ""
    judge: bool = False


@dataclass(frozen=True)
class Work:
    """A row.

    Attributes:
        name: of the row.
        model: whose shape.
        phase: what is timed.
        sizes: tokens of a prefill or of a training step, rows of a decoding step.
        contenders: who takes part.
        batch: rows of a prefill.
        device: where it runs: in bfloat16 on a GPU, in float32 on a CPU.
        together: how many contenders the device's memory holds.
    """

    name: str
    model: Literal["llama", "gemma2", "bloom", "smollm2", "minilm"]
    phase: Literal["prefill", "decode", "training"]
    sizes: tuple[int, ...]
    contenders: tuple[Contender, ...]
    batch: int = 1
    device: Literal["cuda", "cpu"] = "cuda"
    together: int = 16

    def groups(self) -> list[tuple[Contender, ...]]:
        """The contenders, as many at a time as there is memory for."""
        starts = range(0, len(self.contenders), self.together)
        return [self.contenders[start : start + self.together] for start in starts]

    def trial(self) -> Work:
        """The same on a CPU, at a 64th of the sizes: no measurement."""
        return dataclasses.replace(self, device="cpu", sizes=tuple(max(1, size // 64) for size in self.sizes))

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return torch.bfloat16 if self.device == "cuda" else torch.float32


FLOAT32 = Contender("float32", "eager", "none", judge=True)
EAGER = Contender("eager", "eager", "none")
SDPA = Contender("sdpa", "sdpa", "none")
PINNED = Contender("sdpa cuDNN", "sdpa", "none", backend="CUDNN_ATTENTION")
FLEX = Contender("flex", "flex_attention", "none")
STATIC = Contender("inductor static", "sdpa", "inductor", dynamic=False)
DYNAMIC = Contender("inductor", "sdpa", "inductor")
EAGER_STATIC = Contender("inductor static (eager)", "eager", "inductor", dynamic=False)
EAGER_DYNAMIC = Contender("inductor (eager)", "eager", "inductor")
OURS = Contender("attncompile", "sdpa", "attncompile")
OURS_EAGER = Contender("attncompile (eager)", "eager", "attncompile")

WORKS: tuple[Work, ...] = (
    Work("llama-prefill", "llama", "prefill", (2048, 8192, 32768),
         (EAGER, SDPA, PINNED, FLEX, STATIC, DYNAMIC, OURS, OURS_EAGER)),
    Work("llama-eager", "llama", "prefill", (8192, 131072), (EAGER, EAGER_STATIC, OURS_EAGER)),
    Work("gemma2-prefill", "gemma2", "prefill", (8192, 32768),
         (FLOAT32, EAGER, FLEX, EAGER_STATIC, EAGER_DYNAMIC, OURS_EAGER)),
    Work("bloom-prefill", "bloom", "prefill", (8192, 32768),
         (FLOAT32, EAGER, EAGER_STATIC, EAGER_DYNAMIC, OURS_EAGER)),
    Work("llama-decode", "llama", "decode", (1, 32), (SDPA, STATIC, OURS)),
    # logits of 8192 tokens and what the backward pass keeps: three models fill the memory
    Work("llama-training", "llama", "training", (8192,), (SDPA, PINNED, FLEX, STATIC, DYNAMIC, OURS), together=3),
    Work("smollm2-prefill", "smollm2", "prefill", (2048,), (SDPA, STATIC, DYNAMIC, OURS), device="cpu"),
    Work("minilm-encode", "minilm", "prefill", (128,), (SDPA, STATIC, DYNAMIC, OURS), batch=32, device="cpu"),
)  # fmt: skip


def config_of(kind: str, layers: int | None) -> Any:
    """The shape of Llama-3.2-1B, Gemma-2-2B, BLOOM-1b7, SmolLM2-135M or all-MiniLM-L6-v2."""
    from transformers import BertConfig, BloomConfig, Gemma2Config, LlamaConfig

    if kind == "gemma2":
        return Gemma2Config(num_hidden_layers=layers or 26)
    if kind == "bloom":
        return BloomConfig(hidden_size=2048, n_head=16, n_layer=layers or 24)
    if kind == "smollm2":
        return LlamaConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers or 30,
            num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
        )  # fmt: skip
    if kind == "minilm":
        return BertConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=layers or 6)
    return LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers or 16,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, rope_theta=500000.0,
        max_position_embeddings=131072, tie_word_embeddings=True,
    )  # fmt: skip


def model_of(work: Work, contender: Contender, layers: int | None) -> torch.nn.Module:
    """The model with the same random weights for everybody, a judge's rounded as the others' are."""
    from transformers import AutoModel, AutoModelForCausalLM

    torch.manual_seed(0)
    factory = AutoModel if work.model == "minilm" else AutoModelForCausalLM
    with torch.device(work.device):
        config = config_of(work.model, layers)
        model = factory.from_config(config, attn_implementation=contender.attention, dtype=work.dtype)
    if contender.judge:
        model = model.float()
    return model.eval()  # type: ignore[no-any-return]


def pinned(contender: Contender) -> AbstractContextManager[None]:
    """SDPA on one of its back ends, where the contender says so."""
    if not contender.backend:
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(getattr(SDPBackend, contender.backend))


def compiled(function: Callable[..., Any], contender: Contender, graphs: bool) -> Callable[..., Any]:
    """The function as the contender compiles it; with CUDA graphs where steps are short."""
    if contender.compiler == "none":
        return function
    options: dict[str, Any] = {"mode": "reduce-overhead"} if graphs else {}
    dynamic = contender.dynamic and not graphs
    if contender.compiler == "inductor":
        return torch.compile(function, dynamic=dynamic, **options)
    from attncompile.backend import attncompile  # by its name it is only found where the package is installed

    return torch.compile(function, backend=attncompile, dynamic=dynamic, **options)


class Model:
    """A contender's model, ready to be called with any size of its row."""

    def __init__(self, work: Work, contender: Contender, layers: int | None) -> None:
        self.work, self.contender = work, contender
        self.model: Any = model_of(work, contender, layers)
        self.function = compiled(self._function(), contender, graphs=work.phase == "decode")
        self.caches: dict[int, Any] = {}

    def _function(self) -> Callable[..., Any]:
        if self.work.phase == "decode":
            return lambda tokens, cache: self.model(tokens, past_key_values=cache, use_cache=True).logits
        if self.work.phase == "training":
            return lambda tokens: self.model(tokens, labels=tokens, use_cache=False).loss
        if self.work.model == "minilm":
            return lambda tokens: self.model(tokens).last_hidden_state
        base = self.model.get_decoder()
        return lambda tokens: base(tokens, use_cache=False).last_hidden_state

    def run(self, size: int) -> torch.Tensor:
        """One call: hidden states, logits or the loss."""
        if self.work.phase == "decode":
            return self._step(size)
        device = self.work.device
        generator = torch.Generator(device=device).manual_seed(size)
        shape = (self.work.batch, size)
        tokens = torch.randint(0, self.model.config.vocab_size, shape, device=device, generator=generator)
        if self.work.phase == "training":
            loss = self.function(tokens)
            loss.backward()
            self.model.zero_grad(set_to_none=True)
            return loss.detach()  # type: ignore[no-any-return]
        with torch.no_grad():
            return self.function(tokens)  # type: ignore[no-any-return]

    def _step(self, size: int) -> torch.Tensor:
        if size not in self.caches:
            self.caches = {size: self._cache(size)}
        cache = self.caches[size]
        for layer in cache.layers:
            layer.cumulative_length.fill_(CONTEXT - 1)
        tokens = torch.full((size, 1), 17, device=self.work.device)
        with torch.no_grad():
            if self.contender.compiler != "none":
                torch.compiler.cudagraph_mark_step_begin()
            return self.function(tokens, cache)  # type: ignore[no-any-return]

    def _cache(self, size: int) -> Any:
        from transformers import StaticCache

        config = self.model.config
        cache = StaticCache(config, max_cache_len=CONTEXT)
        heads, channels = config.num_key_value_heads, config.head_dim
        cache.early_initialization(size, heads, channels, self.work.dtype, torch.device(self.work.device))
        generator = torch.Generator(device=self.work.device).manual_seed(size)
        for layer in cache.layers:
            layer.keys.normal_(generator=generator)
            layer.values.normal_(generator=generator)
        return cache


def wait() -> None:
    """Until the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def milliseconds(run: Run, repeats: int) -> float:
    """Time of one call, the host's included, as a user's clock would show it."""
    wait()
    begun = time.perf_counter()
    for _ in range(repeats):
        run()
    wait()
    return (time.perf_counter() - begun) / repeats * 1e3


def answer(model: Model, request: dict[str, Any]) -> dict[str, Any]:
    """What a process says to one request: a first call, with what it gave, or the time of some."""
    size = request["size"]
    try:
        if "release" in request:
            torch.cuda.empty_cache()
            return {}
        if "save" not in request:
            once = milliseconds(lambda: model.run(size), 1)
            repeats = max(1, min(20, int(request["together"] / once)))
            return {"ms": milliseconds(lambda: model.run(size), repeats) if repeats > 1 else once}
        begun = time.perf_counter()
        result = model.run(size)
        wait()
        first = time.perf_counter() - begun
        shown = result.flatten()[-65536:].float().cpu()
        torch.save(shown, request["save"])
        for _ in range(3):  # CUDA graphs are recorded in the second call and replayed in the third
            model.run(size)
        if model.work.device == "cpu":
            return {"first_s": first}
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return {"first_s": first, "peak_gib": peak / 2**30}
    except Exception as error:
        if model.work.device == "cuda":
            torch.cuda.empty_cache()
        return {"failure": f"{type(error).__name__}: {error}".partition("\n")[0][:200]}


def inside(work: Work, contender: Contender, layers: int | None) -> None:
    """What a contender's process does: make the model, then answer one request a line."""
    torch._dynamo.config.recompile_limit = 64
    model = Model(work, contender, layers)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    print("{}", file=out, flush=True)
    with pinned(contender):
        for line in sys.stdin:
            print(json.dumps(answer(model, json.loads(line))), file=out, flush=True)


class Process:
    """A contender's process."""

    def __init__(self, work: Work, contender: Contender, folder: Path, layers: int | None, trial: bool) -> None:
        self.name, self.judge = contender.name, contender.judge
        own = folder / f"{work.name}-{contender.name}".replace(" ", "-")
        own.mkdir()
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(own / "inductor"),
                       "TRITON_CACHE_DIR": str(own / "triton"), "XDG_CACHE_HOME": str(own / "cache")}  # fmt: skip
        command = [sys.executable, "-m", "benchmarks.backend", "-", "--inside", f"{work.name}/{contender.name}"]
        self.errors = own / "errors.txt"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [*command, "--layers", str(layers or 0), *(["--trial"] if trial else [])],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment,
            )  # fmt: skip
        self.folder = own

    def ask(self, request: dict[str, Any]) -> None:
        """Send a request."""
        assert self.process.stdin
        with suppress(BrokenPipeError):
            print(json.dumps(request), file=self.process.stdin, flush=True)

    def hear(self) -> dict[str, Any]:
        """Its answer; a failure when the process has ended."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            return {"failure": "the process ended: " + self.errors.read_text()[-300:].replace("\n", " ")}
        return json.loads(line)  # type: ignore[no-any-return]

    def warnings(self) -> list[str]:
        """What our own back end has warned of."""
        lines = self.errors.read_text().splitlines()
        return sorted({line.partition("Warning: ")[2] for line in lines if "attncompile:" in line})[:5]


@contextmanager
def processes(
    work: Work, contenders: tuple[Contender, ...], folder: Path, layers: int | None, trial: bool
) -> Iterator[list[Process]]:
    """Contenders of a row, ready; they end with the context, and give their memory back."""
    made = [Process(work, contender, folder, layers, trial) for contender in contenders]
    try:
        for process in made:
            process.hear()
        yield made
    finally:
        for process in made:
            process.process.kill()
            process.process.wait()


Results = dict[tuple[str, int], dict[str, Any]]
"""What is known of a contender at a size."""


def first_calls(running: list[Process], size: int) -> dict[str, dict[str, Any]]:
    """What each gave, kept in a file, and how long its first call took: all at the same time."""
    for process in running:
        process.ask({"size": size, "save": str(process.folder / f"{size}.pt")})
    answers = {process.name: process.hear() for process in running}
    for process in running:
        if "OutOfMemory" in answers[process.name].get("failure", ""):  # others may hold what it needs
            for other in running:
                other.ask({"size": size, "release": True})
            for other in running:
                other.hear()
            process.ask({"size": size, "save": str(process.folder / f"{size}.pt")})
            answers[process.name] = process.hear()
    return answers


def in_turns(running: list[Process], size: int, answers: dict[str, dict[str, Any]], rounds: int) -> None:
    """Add to the answers the median and spread of the milliseconds of each, or why there is none."""
    times: dict[str, list[float]] = {p.name: [] for p in running if not p.judge and "failure" not in answers[p.name]}
    every = orders(len(running))
    for turn in range(rounds):
        for process in (running[place] for place in every[turn % len(every)]):
            if process.name in times:
                process.ask({"size": size, "together": 60})
                found = process.hear()
                if "ms" in found:
                    times[process.name].append(found["ms"])
                else:
                    answers[process.name] |= found
                    times.pop(process.name)
    for name, found in times.items():
        median = statistics.median(found)
        answers[name] |= {"ms": median, "min_ms": min(found), "spread": (max(found) - min(found)) / median}


def measure(work: Work, rounds: int, layers: int | None, trial: bool = False) -> list[dict[str, Any]]:
    """A row for each size."""
    results: Results = {}
    saved: dict[tuple[str, int], Path] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, contenders in enumerate(work.groups()):
            with processes(work, contenders, Path(folder), layers, trial) as running:
                answers = {size: first_calls(running, size) for size in work.sizes}
                for size in work.sizes:
                    in_turns(running, size, answers[size], rounds)
                    for process in running:
                        result = answers[size][process.name] | ({"group": number} if len(work.groups()) > 1 else {})
                        if process.name.startswith("attncompile"):
                            result["warnings"] = process.warnings()
                        results[process.name, size] = result
                        if (process.folder / f"{size}.pt").exists():
                            saved[process.name, size] = process.folder / f"{size}.pt"
        return [compared(work, size, results, saved, layers) for size in work.sizes]


def compared(
    work: Work, size: int, results: Results, saved: dict[tuple[str, int], Path], layers: int | None
) -> dict[str, Any]:
    """A row: what all contenders gave, with the distance of each from the first that gave something, its judge."""
    names = [contender.name for contender in work.contenders]
    judge = next((name for name in names if (name, size) in saved), None)
    if judge is not None:
        reference = torch.load(saved[judge, size])
        for name in names:
            if (name, size) in saved:
                found = torch.load(saved[name, size])
                results[name, size]["difference"] = float((found - reference).norm() / reference.norm())
    row: dict[str, Any] = {"name": f"{work.name}-{size}", "size": size, "judge": judge,
                           "results": {name: results[name, size] for name in names}}  # fmt: skip
    return row | ({"floor_ms": floor(work, size, layers)} if work.phase == "decode" else {})


def floor(work: Work, size: int, layers: int | None) -> float:
    """Milliseconds in which the weights and the cache of a step could be copied."""
    config = config_of(work.model, layers)
    weights = sum(p.numel() for p in _meta(config).parameters())
    cache = 2 * config.num_hidden_layers * size * CONTEXT * config.num_key_value_heads * config.head_dim
    return 2 * (weights + cache) / COPY * 1e3


def _meta(config: Any) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)  # type: ignore[no-any-return]


def shown(result: dict[str, Any]) -> str:
    """A result in a printed line."""
    if "failure" in result:
        return str(result["failure"])[:60]
    if "ms" not in result:
        return f"judge (first {result['first_s']:.0f} s)"
    return f"{result['ms']:.2f} ms (first {result['first_s']:.0f} s, {result['difference']:.1e})"


def main() -> None:
    """Measure, print a line for each size, write JSON after each row."""
    parser = arguments(__doc__, rounds=7)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="which rows (default cuda)")
    parser.add_argument("--contenders", default="", help="only those with one of these in their names")
    parser.add_argument("--layers", type=int, default=0, help="fewer layers, for a trial")
    parser.add_argument("--trial", action="store_true", help="a GPU's rows on the CPU at a 64th of their sizes")
    parser.add_argument("--together", type=int, default=0, help="how many contenders at a time; 0: as the row says")
    parser.add_argument("--inside", default="", help="ROW/CONTENDER: be one of the processes")
    options = parser.parse_args()
    if options.device == "cuda" and not options.trial and not options.inside and not torch.cuda.is_available():
        parser.error("this needs a GPU; torch.cuda.is_available() is false: see --device cpu and --trial")
    if options.together < 0:
        parser.error(f"--together is a number of contenders, or 0; {options.together} was given")
    layers = options.layers or None
    if options.inside:
        row, _, name = options.inside.partition("/")
        work = next(work for work in WORKS if work.name == row)
        work = work.trial() if options.trial else work
        inside(work, next(contender for contender in work.contenders if contender.name == name), layers)
        return
    facts = {"rounds": options.rounds, "layers": layers or "all", "context": CONTEXT}
    report = Report(options.output, facts | ({"trial": "no measurement"} if options.trial else {}))
    for work in chosen((work for work in WORKS if work.device == options.device), options.rows):
        work = dataclasses.replace(
            work.trial() if options.trial else work,
            contenders=chosen(work.contenders, options.contenders),
            together=options.together or work.together,
        )
        rows = measure(work, options.rounds, layers, options.trial)
        report.add(*rows)
        for row in rows:
            least = f"floor {row['floor_ms']:.2f} ms" if "floor_ms" in row else ""
            print(row["name"], {name: shown(found) for name, found in row["results"].items()}, least, flush=True)


if __name__ == "__main__":
    main()
