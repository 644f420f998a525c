"""Graphs from torch.export and Dynamo: the same function, whole operators, and where each node is from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from attncompile.frontends import torch_internals
from attncompile.frontends.capture import (
    Captured,
    capture_dynamo,
    capture_export,
    dynamic_axes_of,
    exported_program,
    fixes_axes,
    module_path,
    module_type,
    source_line,
)
from attncompile.frontends.checkpoint import open_model
from attncompile.frontends.errors import CaptureError
from attncompile.frontends.source import dotted_path, frames, innermost_model_frame


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def tiny(kind: str, attention: str = "sdpa") -> Any:
    """The three architectures of the real checkpoints, small and random."""
    sizes: dict[str, Any] = {"vocab_size": 97, "attn_implementation": attention}
    if kind == "llama":
        llama = transformers.LlamaConfig(
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=3,
            num_key_value_heads=1,
            **sizes,
        )
        return transformers.LlamaForCausalLM(llama).eval()
    if kind == "bert":
        bert = transformers.BertConfig(
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=3,
            max_position_embeddings=64,
            **sizes,
        )
        return transformers.BertModel(bert).eval()
    whisper = transformers.WhisperConfig(
        d_model=24,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=3,
        decoder_attention_heads=3,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_mel_bins=8,
        max_source_positions=15,
        max_target_positions=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        **sizes,
    )
    return transformers.WhisperForConditionalGeneration(whisper).eval()


def call(kind: str, batch: int, length: int) -> dict[str, Any]:
    tokens = torch.randint(3, 97, (batch, length))
    if kind == "whisper":
        return {
            "input_features": torch.randn(batch, 8, 30),
            "decoder_input_ids": tokens,
            "use_cache": False,
        }
    mask = torch.ones_like(tokens)
    # Left for the decoder and right for the encoder; the last row, when it is not the only one.
    if batch > 1:
        mask[-1, slice(None, 2) if kind == "llama" else slice(-2, None)] = 0
    return {"input_ids": tokens, "attention_mask": mask, "use_cache": False}


def main_output(result: Any) -> torch.Tensor:
    output: torch.Tensor = result[0]
    return output


def targets(captured: Captured) -> set[str]:
    return {str(node.target) for node in captured.graph_module.graph.nodes if node.op == "call_function"}


def node_of(captured: Captured, target: str) -> torch.fx.Node:
    return next(node for node in captured.graph_module.graph.nodes if str(node.target) == target)


# What the two spellings of attention must still be called in the graph.
WHOLE = {"sdpa": "aten.scaled_dot_product_attention.default", "eager": "aten.softmax.int"}


# --- torch.export -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "attention"), [("llama", "eager"), ("bert", "sdpa"), ("whisper", "sdpa")])
def test_exported_graph_is_the_model_at_every_size(kind: str, attention: str) -> None:
    model = tiny(kind, attention)
    captured = capture_export(model, (), call(kind, 2, 13))
    assert WHOLE[attention] in targets(captured)
    assert "aten.linear.default" in targets(captured)
    for batch, length in [(2, 13), (1, 7), (3, 29)]:
        kwargs = call(kind, batch, length)
        with torch.no_grad():
            expected, found = model(**kwargs), captured.run((), kwargs)
        assert type(found) is type(expected)
        torch.testing.assert_close(main_output(found), main_output(expected), rtol=0, atol=0)
    tokens = "decoder_input_ids" if kind == "whisper" else "input_ids"
    assert captured.dynamic_axes[tokens] == {0: "batch", 1: "length"}
    assert sorted(captured.size_names.values()) == ["batch", "length"]


def test_inputs_know_their_role_and_nodes_their_module_and_line() -> None:
    model = tiny("llama", "eager")
    captured = capture_export(model, (), call("llama", 2, 13))
    by_name = {entry.name: entry for entry in captured.inputs}
    weight = by_name["model.layers.0.self_attn.q_proj.weight"]
    assert weight.role == "parameter"
    assert weight.value is model.get_parameter(weight.name)
    assert by_name["model.rotary_emb.inv_freq"].role == "buffer"
    assert by_name["input_ids"].role == "user"
    assert by_name["input_ids"].value is None
    assert captured.outputs == ("logits",)
    softmax = node_of(captured, "aten.softmax.int")
    assert module_path(softmax) == "model.layers.0.self_attn"
    assert module_type(softmax) == "LlamaAttention"
    line = source_line(softmax)
    assert line is not None
    assert Path(line.file).name == "modeling_llama.py"
    assert str(line).startswith(f"modeling_llama.py:{line.line}  ")


def test_fixed_sizes_kept_modes_and_refused_arguments() -> None:
    model = tiny("bert").train()
    model.get_submodule("pooler").eval()
    captured = capture_export(model, (), call("bert", 2, 13), dynamic=False)
    assert captured.dynamic_axes == {}
    assert captured.notes == ()
    assert model.training
    assert not model.get_submodule("pooler").training
    kwargs = call("bert", 2, 13)
    del kwargs["attention_mask"]
    with pytest.raises(ValueError, match="captured with the keyword arguments input_ids, attention_mask"):
        captured.run((), kwargs)


class DataDependent(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if bool(x.sum() > 0) else x - 1


class FixedLength(torch.nn.Module):
    """Dynamic in the batch only: the table has one row per position."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = torch.nn.Parameter(torch.randn(11, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.positions


def test_a_model_that_cannot_be_exported_is_refused_with_the_reason() -> None:
    with pytest.raises(CaptureError, match=r"no graph of DataDependent .*torch\.compile"):
        capture_export(DataDependent(), (torch.randn(2, 3),))


def test_a_length_that_the_model_fixes_leaves_the_batch_dynamic() -> None:
    captured = capture_export(FixedLength(), (torch.randn(2, 11, 4),))
    assert captured.dynamic_axes == {"x": {0: "batch"}}
    assert captured.notes == ("axis 1 of x is fixed at 11: the model computes with that size",)
    assert exported_program(FixedLength(), (torch.randn(2, 11, 4),))[1] == captured.notes
    x = torch.randn(5, 11, 4)
    torch.testing.assert_close(captured.run((x,)), FixedLength.forward(captured_module(captured), x))


class OneLengthApart(FixedLength):
    """A fixed length beside one that may be any but one, which no range of torch's can say."""

    def forward(self, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (2.0 if tokens.shape[1] == 5 else 1.0) + tokens.sum(1)[:, None, None]


def test_an_axis_that_an_automatic_size_fixes_is_fixed() -> None:
    """It keeps its symbol, which stands for a number."""
    inputs = {"x": torch.randn(2, 11, 4), "tokens": torch.zeros(2, 7, dtype=torch.int64)}
    captured = capture_export(OneLengthApart(), (), inputs)
    assert captured.dynamic_axes == {"x": {0: "batch"}, "tokens": {0: "batch", 1: "length"}}
    rejected, fixed = captured.notes
    assert "rejected the named dynamic sizes" in rejected
    assert fixed == "axis 1 of x is fixed at 11: the model computes with that size"
    assert fixes_axes(OneLengthApart(), inputs, [{0: "batch", 1: "rows"}, {0: "batch", 1: "length"}])
    assert not fixes_axes(OneLengthApart(), inputs, [{0: "batch"}, {0: "batch", 1: "length"}])


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_one_export_is_enough(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Of a model with a table of positions, too: torch learns its rows before it rejects a length without a bound."""
    made: list[object] = []

    def counted(*args: Any, **settings: Any) -> torch.export.ExportedProgram:
        made.append(settings["dynamic_shapes"])
        return export(*args, **settings)

    export = torch.export.export
    monkeypatch.setattr(torch.export, "export", counted)
    tokens = torch.randint(0, 97, (2, 7))
    captured = capture_export(tiny(kind), (), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})
    assert len(made) == 1 and captured.notes == ()
    assert captured.dynamic_axes == {name: {0: "batch", 1: "length"} for name in ("input_ids", "attention_mask")}


def captured_module(captured: Captured) -> FixedLength:
    module = FixedLength()
    module.positions = next(entry.value for entry in captured.inputs if entry.role == "parameter")
    return module


AXES = {
    "tokens and their mask share both names": (
        [torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.bool)],
        [{0: "batch", 1: "length"}, {0: "batch", 1: "length"}],
    ),
    "a batch and a length of equal size do not": (
        [torch.zeros(5, 5, dtype=torch.int64)],
        [{0: "batch", 1: "length"}],
    ),
    "two lengths get two names": (
        [torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 7, dtype=torch.int64)],
        [{0: "batch", 1: "length"}, {0: "batch", 1: "length_2"}],
    ),
    "a 4-D mask has the length of its tokens": (
        [torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 1, 5, 5)],
        [{0: "batch", 1: "length"}, {0: "batch", 2: "length", 3: "length"}],
    ),
    "tokens name the length even when they come second": (
        [torch.zeros(2, 8, 30), torch.zeros(2, 5, dtype=torch.int64)],
        [{0: "batch", 1: "length_2"}, {0: "batch", 1: "length"}],
    ),
    "size 1 broadcasts, images and vectors only have a batch": (
        [torch.zeros(1, 5, dtype=torch.int64), torch.zeros(3, 3, 8, 8), torch.zeros(3, 6)],
        [{1: "length"}, {0: "batch"}, {0: "batch"}],
    ),
}


@pytest.mark.parametrize("case", AXES, ids=str)
def test_which_axes_vary(case: str) -> None:
    tensors, expected = AXES[case]
    assert list(dynamic_axes_of(tuple(tensors), {})) == expected


# --- Dynamo -------------------------------------------------------------------------------------------------

Rest = Callable[[torch.fx.GraphModule, Any], Any]
RESTS: dict[str, Rest] = {
    "eager": lambda graph_module, inputs: graph_module,
    "ahead-of-time autograd": lambda graph_module, inputs: torch._dynamo.lookup_backend("aot_eager")(
        graph_module, inputs
    ),
}


class Recorder:
    """A torch.compile back end that captures, keeps what it captured, and runs the captured graph."""

    def __init__(self, rest: Rest = RESTS["eager"]) -> None:
        self.rest = rest
        self.captured: list[Captured] = []

    def __call__(self, graph_module: torch.fx.GraphModule, inputs: Any) -> Any:
        self.captured.append(capture_dynamo(graph_module, inputs))
        return self.rest(self.captured[-1].graph_module, inputs)


@pytest.mark.parametrize(
    ("kind", "attention", "dynamic"),
    [("llama", "sdpa", True), ("bert", "eager", False), ("whisper", "eager", True)],
)
def test_a_compiled_model_is_the_model(kind: str, attention: str, dynamic: bool) -> None:
    model, backend = tiny(kind, attention), Recorder()
    compiled = torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)
    for batch, length in [(2, 13), (3, 29)]:
        kwargs = call(kind, batch, length)
        with torch.no_grad():
            found, expected = compiled(**kwargs), model(**kwargs)
        torch.testing.assert_close(main_output(found), main_output(expected), rtol=0, atol=0)
    assert len(backend.captured) == (1 if dynamic else 2)
    assert WHOLE[attention] in targets(backend.captured[0])


@pytest.mark.parametrize(
    ("kind", "rest", "dynamic"),
    [("llama", "eager", True), ("bert", "ahead-of-time autograd", False)],
)
def test_gradients_pass_through_a_captured_graph(kind: str, rest: str, dynamic: bool) -> None:
    model = tiny(kind, "eager")
    compiled = torch.compile(model, backend=Recorder(RESTS[rest]), dynamic=dynamic)
    kwargs = call(kind, 2, 13)
    gradients = []
    for function in (model, compiled):
        model.zero_grad()
        main_output(function(**kwargs)).square().mean().backward()
        # Ahead-of-time autograd gives zeros to parameters that were not used, where eager gives nothing.
        gradients.append(
            [
                torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                for parameter in model.parameters()
            ]
        )
    torch.testing.assert_close(gradients[1], gradients[0])


def test_generation_with_a_growing_cache() -> None:
    model, backend = tiny("llama"), Recorder()
    tokens = torch.randint(3, 97, (2, 5))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(tokens, **options)
    model.forward = torch.compile(model.forward, backend=backend)
    assert torch.equal(model.generate(tokens, **options), expected)
    names = {entry.name for entry in backend.captured[-1].inputs}
    assert "past_key_values.layers.0.keys" in names


def test_a_dynamo_graph_knows_names_roles_modules_and_lines() -> None:
    model, backend = tiny("llama", "eager"), Recorder()
    kwargs = call("llama", 2, 13)
    torch.compile(model, backend=backend, dynamic=True)(**kwargs)
    captured = backend.captured[0]
    roles = {entry.name: (entry.role, entry.value) for entry in captured.inputs}
    name = "model.layers.0.self_attn.q_proj.weight"
    assert roles[name] == ("parameter", model.get_parameter(name))
    assert roles["model.rotary_emb.inv_freq"][0] == "buffer"
    assert roles["input_ids"] == ("user", None)
    assert roles["input_ids.size(1)"] == ("user", None)
    assert captured.dynamic_axes["attention_mask"].keys() == {0, 1}
    softmax = node_of(captured, "aten.softmax.int")
    assert module_path(softmax) == "model.layers.0.self_attn"
    assert module_type(softmax) == "LlamaAttention"
    line = source_line(softmax)
    assert line is not None
    assert "softmax" in line.code
    assert all("val" in node.meta for node in captured.graph_module.graph.nodes if node.op != "output")


class Scaled(torch.nn.Module):
    """One float of the module, one of the caller; a size, a None and a tensor come back."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 0.5
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, temperature: float) -> tuple[torch.Tensor, int, None]:
        with torch.no_grad():
            shift = x * 2
        return self.linear(x) * self.scale * temperature + shift, x.shape[0] * 2, None


@pytest.mark.parametrize("rest", RESTS)
def test_floats_of_modules_are_constants_with_a_guard(rest: str) -> None:
    model, backend = Scaled(), Recorder(RESTS[rest])
    compiled = torch.compile(model, backend=backend, dynamic=True)

    def check(rows: int, temperature: float) -> None:
        x = torch.randn(rows, 4)
        found, expected = compiled(x, temperature), model(x, temperature)
        torch.testing.assert_close(found[0], expected[0])
        assert found[1:] == expected[1:]

    check(3, 0.25)
    compilations = len(backend.captured)
    multiplications = [
        node.args[1] for node in backend.captured[-1].graph_module.graph.nodes if str(node.target) == "aten.mul.Tensor"
    ]
    assert 0.5 in multiplications
    check(5, 0.75)  # another size and another float of the caller: the same graph
    assert len(backend.captured) == compilations
    model.scale = 0.75
    check(5, 0.75)
    assert len(backend.captured) > compilations


@pytest.mark.parametrize("rest", RESTS)
def test_inputs_that_the_graph_writes_to(rest: str) -> None:
    def update(x: torch.Tensor, cache: torch.Tensor, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cache.index_copy_(0, at, x)
        cache.unsqueeze_(0)
        return cache[0] + 1, cache

    x, at = torch.randn(2, 4), torch.tensor([1, 3])
    caches = [torch.zeros(6, 4), torch.zeros(6, 4)]
    expected = update(x, caches[0], at)
    found = torch.compile(update, backend=Recorder(RESTS[rest]), dynamic=True)(x, caches[1], at)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(caches[1], caches[0])
    assert caches[1].shape == (1, 6, 4)


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: torch.Tensor) -> torch.Tensor:
        return x.round()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


LOSSES: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "grad inside vmap": (
        lambda x: torch.vmap(torch.func.grad(lambda row: (row * row).sum()))(x),
        "inside grad, vmap of torch.func",
    ),
    "grad": (lambda x: torch.func.grad(lambda y: (y * y).sum())(x), "inside grad of torch.func"),
    "vjp": (lambda x: torch.func.vjp(torch.sin, x)[1](x)[0], "inside grad of torch.func"),
}


@pytest.mark.parametrize("case", LOSSES)
def test_what_ATen_would_lose_is_refused(case: str) -> None:
    function, reason = LOSSES[case]
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=reason):
        torch.compile(function, backend=Recorder())(torch.randn(3, 4, requires_grad=True))


def _mapped(x: torch.Tensor) -> torch.Tensor:
    return torch.vmap(lambda row: torch.softmax(row, -1) * row.sum())(x)


def _mapped_twice(x: torch.Tensor) -> torch.Tensor:
    rows, columns = torch.arange(x.shape[0]), torch.arange(x.shape[1])
    seen = torch.vmap(torch.vmap(lambda i, j: (j <= i) & (x[i, j] > 0), (None, 0)), (0, None))(rows, columns)
    return torch.where(seen, x, 0.0)


@pytest.mark.parametrize("function", [_mapped, _mapped_twice], ids=lambda function: function.__name__)
@pytest.mark.parametrize("dynamic", [False, True])
def test_what_vmap_does_becomes_operations_on_whole_tensors(
    function: Callable[[torch.Tensor], torch.Tensor], dynamic: bool
) -> None:
    recorder = Recorder()
    compiled = torch.compile(function, backend=recorder, dynamic=dynamic)
    for rows in (3, 5):
        x, y = (torch.linspace(-1, 2, rows * 4).view(rows, 4).requires_grad_() for _ in range(2))
        found, expected = compiled(x), function(y)
        torch.testing.assert_close(found, expected)
        found.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("recorded", [False, True])
def test_a_custom_gradient_is_kept(recorded: bool) -> None:
    x = torch.randn(3, 4, requires_grad=recorded)
    compiled = torch.compile(lambda x: StraightThrough.apply(x) * 2, backend=Recorder())
    found = compiled(x)
    assert torch.equal(found, x.round() * 2)
    if recorded:
        (gradient,) = torch.autograd.grad(found.sum(), x)
        assert torch.equal(gradient, torch.full_like(x, 2.0))


@pytest.mark.slow
def test_inductor_takes_a_captured_graph() -> None:
    model = tiny("llama")
    compiled = torch.compile(model, backend=Recorder(torch_internals.inductor), dynamic=True)
    kwargs = call("llama", 2, 13)
    expected, found = model(**kwargs), compiled(**kwargs)
    torch.testing.assert_close(found.logits, expected.logits)
    parameter = model.get_parameter("model.layers.0.self_attn.q_proj.weight")
    torch.testing.assert_close(
        *(torch.autograd.grad(result.logits.square().mean(), parameter)[0] for result in (found, expected))
    )


# --- real weights -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "attention"),
    [
        ("minilm_folder", "sdpa"),
        ("minilm_folder", "eager"),
        ("whisper_folder", "sdpa"),
        ("whisper_folder", "eager"),
        ("smollm2_folder", "eager"),
    ],
)
def test_real_checkpoints(folder: str, attention: Any, request: pytest.FixtureRequest) -> None:
    opened = open_model(request.getfixturevalue(folder), attn_implementation=attention)
    args, kwargs = opened.example(2, 41)
    captured = capture_export(opened.model, args, kwargs)
    backend = Recorder()
    compiled = torch.compile(opened.model, backend=backend, dynamic=True)
    for batch, length in [(2, 41), (3, 64)]:
        args, kwargs = opened.example(batch, length)
        with torch.no_grad():
            expected = main_output(opened.model(*args, **kwargs))
            exported = main_output(captured.run(args, kwargs))
            found = main_output(compiled(*args, **kwargs))
        torch.testing.assert_close(exported, expected, rtol=0, atol=0)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert len(backend.captured) == 1


# --- sources ------------------------------------------------------------------------------------------------

PATHS = {
    "L['self']._modules['layers']._modules['0']._parameters['weight']": "layers.0.weight",
    "L['self'].model.layers.3.self_attn": "model.layers.3.self_attn",
    "L['self']": "self",
    "L['kwargs']['input_ids']": "input_ids",
    "L['kwargs']['input_ids'].size()[1]": "input_ids.size(1)",
    "L['input_ids']": "input_ids",
    "L['args'][0]": "args.0",
    "L['past_key_values'].layers[0].keys": "past_key_values.layers.0.keys",
    "model.layers.3": "model.layers.3",
    "": "",
}


@pytest.mark.parametrize("name", PATHS)
def test_dotted_path(name: str) -> None:
    assert dotted_path(name) == PATHS[name]


TRACE = """Traceback (most recent call last):
  File "/home/me/model.py", line 12, in forward
    return self.attention(x)
           ^^^^^^^^^^^^^^^^^
  File "/usr/lib/python3/site-packages/torch/nn/functional.py", line 99, in softmax
    ret = input.softmax(dim)
"""


def test_the_innermost_line_of_the_model_is_preferred_to_torch() -> None:
    line = innermost_model_frame(TRACE)
    assert line is not None
    assert str(line) == "model.py:12  return self.attention(x)"
    assert line.function == "forward"
    assert [frame.line for frame in frames(TRACE)] == [12, 99]


def test_torch_alone_is_better_than_nothing() -> None:
    line = innermost_model_frame(TRACE[TRACE.index('  File "/usr') :])
    assert line is not None
    assert str(line) == "functional.py:99  ret = input.softmax(dim)"
    assert innermost_model_frame(None) is None
    assert innermost_model_frame("no frames here") is None
