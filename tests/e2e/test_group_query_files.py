"""Files as the model builder of onnxruntime-genai writes them: read, left alone, and given a window."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import attncompile
from attncompile.convert.runtime import session
from attncompile.plan.schema import load_plan
from attncompile.verify import derive_tolerance
from tests.onnx_files import operators

LAYERS, HEADS, GROUPS, CHANNELS, WIDTH, WORDS, POSITIONS = 2, 4, 2, 16, 64, 97, 128
SIZE = 5
"""Keys of a window."""


def builder_file(path: Path, *, window: int = -1, sinks: bool = False) -> Path:
    """A language model with a cache, in float32.

    Lengths are sums and shapes of the mask, angles are inside the attention calls, norms are ONNX Runtime's own and
    stand in the standard's domain, queries, keys and values are one product.
    """
    random, stored, nodes = np.random.default_rng(5), [], []

    def weight(name: str, array: np.ndarray) -> str:
        stored.append(numpy_helper.from_array(array, name))
        return name

    def drawn(name: str, *shape: int) -> str:
        return weight(name, (0.3 * random.standard_normal(shape)).astype(np.float32))

    def node(operator: str, reads: Sequence[str], made: Sequence[str], domain: str = "", **settings: object) -> str:
        name = f"{made[0].rpartition('/')[0]}/{operator}_{len(nodes)}"
        nodes.append(helper.make_node(operator, reads, made, name, domain=domain, **settings))
        return made[0]

    one = weight("one", np.array([1], np.int64))
    node("ReduceSum", ["attention_mask", one], ["counts"], keepdims=1)
    node("Cast", [node("Sub", ["counts", one], ["last"])], ["seqlens_k"], to=TensorProto.INT32)
    axis = weight("axis", np.array(1, np.int64))
    whole = node("Gather", [node("Shape", ["attention_mask"], ["sizes"]), axis], ["whole"], axis=0)
    node("Cast", [whole], ["total"], to=TensorProto.INT32)
    angles = np.arange(POSITIONS)[:, None] * 10000.0 ** (-np.arange(CHANNELS // 2) / (CHANNELS // 2))
    tables = [weight(name, part(angles).astype(np.float32)) for name, part in (("cos", np.cos), ("sin", np.sin))]
    gain = weight("gain", np.ones(WIDTH, np.float32))
    states = node("Gather", [drawn("embeddings", WORDS, WIDTH), "input_ids"], ["/model/embed/rows"])
    caches: dict[str, list[onnx.ValueInfoProto]] = {"past_key_values": [], "present": []}
    for layer in range(LAYERS):
        here, sides = f"/model/layers.{layer}/attn", [f"{layer}.key", f"{layer}.value"]
        normed = node("SimplifiedLayerNormalization", [states, gain], [f"{here}/norm"], epsilon=1e-6)
        weights = drawn(f"qkv.{layer}", WIDTH, (HEADS + 2 * GROUPS) * CHANNELS)
        packed = node("MatMul", [normed, weights], [f"{here}/qkv"])
        reads = [packed, "", "", *(f"past_key_values.{side}" for side in sides), "seqlens_k", "total", *tables]
        reads += ["", "", drawn(f"sinks.{layer}", HEADS)] if sinks else []
        made = [f"{here}/attended", *(f"present.{side}" for side in sides)]
        settings = {"num_heads": HEADS, "kv_num_heads": GROUPS, "do_rotary": 1, "local_window_size": window}
        attended = node("GroupQueryAttention", reads, made, "com.microsoft", **settings)
        mixed = node("MatMul", [attended, drawn(f"out.{layer}", HEADS * CHANNELS, WIDTH)], [f"{here}/out"])
        states = node("Add", [states, mixed], [f"{here}/sum"])
        for name, length in (("past_key_values", "past_sequence_length"), ("present", "total_sequence_length")):
            shape = ["batch_size", GROUPS, length, CHANNELS]
            caches[name] += [helper.make_tensor_value_info(f"{name}.{side}", 1, shape) for side in sides]
    node("MatMul", [states, drawn("head", WIDTH, WORDS)], ["logits"])
    ids, mask = ["batch_size", "sequence_length"], ["batch_size", "total_sequence_length"]
    inputs = [helper.make_tensor_value_info(*one) for one in (("input_ids", 7, ids), ("attention_mask", 7, mask))]
    logits = helper.make_tensor_value_info("logits", 1, [*ids, WORDS])
    graph = helper.make_graph(
        nodes, "main_graph", [*inputs, *caches["past_key_values"]], [logits, *caches["present"]], stored
    )
    imports = [helper.make_opsetid("", 14), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=7), path)
    return path


def steps(loaded: onnxruntime.InferenceSession, lengths: Sequence[int], count: int) -> list[np.ndarray]:
    """Logits of the last token of each row, behind a padded prompt and in every step after it; tokens are given.

    Rows are padded on the right, as such a file has it: each grows by its own next token in a step.
    """
    random, width = np.random.default_rng(1), max(lengths)
    names = [entry.name for entry in loaded.get_outputs()]
    empty = np.zeros((len(lengths), GROUPS, 0, CHANNELS), np.float32)
    feeds = {entry.name: empty for entry in loaded.get_inputs() if entry.name.startswith("past")}
    tokens, made = random.integers(3, WORDS, (len(lengths), width)), []
    for step in range(count):
        seen = np.array(lengths) + step
        feeds["input_ids"] = tokens
        feeds["attention_mask"] = (np.arange(width + step) < seen[:, None]).astype(np.int64)
        results = dict(zip(names, loaded.run(None, feeds), strict=True))
        last = np.array(lengths) - 1 if step == 0 else np.zeros(len(lengths), np.int64)
        made.append(results["logits"][np.arange(len(lengths)), last])
        feeds.update({n.replace("present", "past_key_values"): value for n, value in results.items() if n != "logits"})
        tokens = random.integers(3, WORDS, (len(lengths), 1))
    return made


def assert_alike(found: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    """As far apart as two orders of the longest sum are, in every layer."""
    for mine, theirs in zip(found, wanted, strict=True):
        reference = torch.from_numpy(theirs).double()
        bound = derive_tolerance(reference, torch.from_numpy(theirs), WIDTH * WIDTH * LAYERS).bound
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=bound)


@pytest.mark.parametrize("sinks", [False, True], ids=["plain", "sinks"])
def test_every_site_is_found(tmp_path: Path, sinks: bool) -> None:
    program = attncompile.lift(builder_file(tmp_path / "model.onnx", window=9, sinks=sinks))
    assert [site.name for site in program.sites] == ["model.layers.0.attn", "model.layers.1.attn"]
    for layer, site in enumerate(program.sites):
        assert site.status == "lifted", str(site.refusal)
        said = str(site.spec)
        assert "q[B,4,I,16]  k,v[B,2,J,16]" in said and "0.25·s" in said and "h // 2" in said
        own = "i + max(0, counts[b, 0] − I)"
        assert f"j ≤ {own} and j > {own} − 9" in said
        assert (f"sinks.{layer}[h]".replace(".", "_") in said.replace(".", "_")) == sinks


def test_a_call_stays_one_call(tmp_path: Path) -> None:
    file = builder_file(tmp_path / "model.onnx")
    made = attncompile.convert(file, tmp_path / "out")
    assert made.certificate.passed
    assert [site.operator for site in load_plan(tmp_path / "out" / "plan.json").sites] == ["original"] * LAYERS
    found = Counter(operators(tmp_path / "out" / "model.onnx"))
    assert found["GroupQueryAttention"] == LAYERS and not {"GatherND", "Softmax"} & set(found)
    said = {entry.inputs for entry in made.certificate.end_to_end}
    assert {"batch 3, length 33 behind 0", "batch 3, length 1 behind 5", "batch 1, length 9"} <= said


@pytest.mark.parametrize("sinks", [False, True], ids=["plain", "sinks"])
def test_a_window_is_the_operators_own(tmp_path: Path, sinks: bool) -> None:
    """In a padded batch too, whose rows have caches of different lengths."""
    file = builder_file(tmp_path / "model.onnx", sinks=sinks)
    passes = f"sparsify.window(size={SIZE}, sinks=0)"
    attncompile.convert(file, tmp_path / "out", passes=passes)
    assert "GroupQueryAttention" not in operators(tmp_path / "out" / "model.onnx")
    native = builder_file(tmp_path / "native.onnx", window=SIZE, sinks=sinks)
    made, right, whole = (session(one, "cpu") for one in (tmp_path / "out" / "model.onnx", native, file))
    for lengths in ((7,), (9, 4, 1), (3, 9)):
        wanted = steps(right, lengths, 8)
        assert_alike(steps(made, lengths, 8), wanted)
        assert np.abs(steps(whole, lengths, 8)[-1] - wanted[-1]).max() > 0.1  # the window hides something


def test_a_length_beyond_the_angles_is_told_by_the_runtime(tmp_path: Path) -> None:
    """What takes a call's place fails where the call fails, and gives no numbers."""
    file = builder_file(tmp_path / "model.onnx")
    attncompile.convert(file, tmp_path / "out", prefer="decomposed")
    for one in (file, tmp_path / "out" / "model.onnx"):
        with pytest.raises(Exception, match=r"cos_cache|out of data bounds"):
            steps(session(one, "cpu"), (POSITIONS + 1,), 1)
