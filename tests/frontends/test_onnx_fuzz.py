"""Ten thousand damaged files of many kinds: each is read, or refused in one sentence with nothing written, and what is
converted gives what ONNX Runtime gives for the file itself.

They are read by a process of its own, in bounded memory (:mod:`tests.frontends.damage_worker`), so that a crash below
Python, a hang and a bomb are all seen. Hypothesis draws the damage, and shrinks what fails.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import onnx
import pytest

from tests.frontends.damage import damaged, surroundings
from tests.frontends.damage_pool import Reader
from tests.frontends.damaged_sources import bodies, encoder, first_attention, linear_call, recurrence, small_sources

Sources = Mapping[str, onnx.ModelProto]
BLOCKS, CASES = 20, 500
DONE = ("made", "refused", "unforeseen")


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    with Reader() as one:
        yield one


@pytest.fixture(scope="module")
def few() -> Sources:
    return {"encoder": encoder(), "bodies": bodies(), "recurrence": recurrence(), "linear attention": linear_call()}


@pytest.fixture(scope="module")
def many(onnx_files: dict[str, Path]) -> Sources:
    """With the first attention of files that others made."""
    return {**small_sources(), **{name: first_attention(file) for name, file in onnx_files.items()}}


def read_damaged(
    sources: Sources, reader: Reader, folder: Path, examples: int, seed: int, what: Mapping[str, float]
) -> None:
    """Read so many damaged files; ``what`` is done with them, by how often."""
    inside = surroundings(folder)
    file, out = inside / "model.onnx", inside / "out"

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(st.sampled_from(sorted(sources)), st.randoms(use_true_random=False))
    def each(name: str, draw: random.Random) -> None:
        do = draw.choices(list(what), list(what.values()))[0]
        file.write_bytes(damaged(sources[name], draw))
        outcome, said = reader.read(do, file, out)
        shutil.rmtree(out, ignore_errors=True)
        assert outcome in DONE, f"{do} of a damaged {name}: {said}"

    each()


@pytest.mark.parametrize("do", ["lift", "inspect", "convert"])
def test_what_is_whole_is_read(few: Sources, reader: Reader, tmp_path: Path, do: str) -> None:
    # conversions of the others are tested elsewhere, and take seconds
    for name, model in few.items() if do != "convert" else [("linear attention", few["linear attention"])]:
        onnx.save(model, tmp_path / "model.onnx")
        assert reader.read(do, tmp_path / "model.onnx", tmp_path / name) == ("made", ""), name


def test_damage_of_some_kinds(few: Sources, reader: Reader, tmp_path: Path) -> None:
    read_damaged(few, reader, tmp_path, 60, 0, {"lift": 0.9, "inspect": 0.1})


@pytest.mark.slow
@pytest.mark.parametrize("block", range(BLOCKS))
def test_very_much_damage(many: Sources, reader: Reader, tmp_path: Path, block: int) -> None:
    read_damaged(many, reader, tmp_path, CASES, 1 + block, {"lift": 0.83, "inspect": 0.15, "convert": 0.02})


@pytest.mark.slow
def test_damage_in_conversions(many: Sources, reader: Reader, tmp_path: Path) -> None:
    read_damaged(many, reader, tmp_path, 300, 99, {"convert": 1.0})


# What was found like this, once and for all


def refusal(data: bytes, reader: Reader, folder: Path, do: str = "lift") -> str:
    file = surroundings(folder) / "model.onnx"
    file.write_bytes(data)
    outcome, said = reader.read(do, file, file.parent / "out")
    return said or outcome


def with_location(location: str) -> bytes:
    model = bodies()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return model.SerializeToString()


@pytest.mark.parametrize("location", ["\x00", "loop", "link", "../secret", "x" * 5000])
def test_data_that_is_nowhere_or_outside(location: str, reader: Reader, tmp_path: Path) -> None:
    assert refusal(with_location(location), reader, tmp_path) == "refused"


def test_an_input_without_an_element_type(reader: Reader, tmp_path: Path) -> None:
    """ONNX Runtime's inference of shapes begins a pass after the other then, and comes to no end."""
    model = bodies()
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.UNDEFINED
    assert refusal(model.SerializeToString(), reader, tmp_path) in ("made", "refused")


def test_a_shape_beyond_all_numbers(reader: Reader, tmp_path: Path) -> None:
    model = bodies()
    model.graph.initializer[0].dims.extend([2**62] * 70)
    assert refusal(model.SerializeToString(), reader, tmp_path) == "refused"


def test_the_runtimes_own_errors_are_no_defect(reader: Reader, tmp_path: Path) -> None:
    """A newer format than it reads: a proof that needs it is not given, and the file is described all the same."""
    model = bodies()
    model.ir_version = 14
    assert refusal(model.SerializeToString(), reader, tmp_path) == "made"


def test_an_error_below_is_quoted_from_its_root(reader: Reader, tmp_path: Path) -> None:
    model = bodies()
    model.functions[0].node.add(op_type="Attend", domain="pkg.local", input=["q", "k", "v"], output=["again"])
    said = refusal(model.SerializeToString(), reader, tmp_path)
    assert "Cyclic dependency" in said and "export it again" in said


def test_a_size_that_is_no_number(reader: Reader, tmp_path: Path) -> None:
    model = recurrence()
    model.graph.input[1].type.tensor_type.shape.dim[0].dim_param = "1/0"
    assert refusal(model.SerializeToString(), reader, tmp_path) == "made"


def test_a_call_that_the_runtime_does_not_take_is_not_proven(reader: Reader, tmp_path: Path) -> None:
    model = bodies()
    next(node for node in model.graph.node if node.output[0] == "yt").input.append("")
    assert refusal(model.SerializeToString(), reader, tmp_path) == "made"


def test_types_that_no_inference_survives(reader: Reader, tmp_path: Path) -> None:
    """ONNX's own runs out of a vector, which is a ValueError of nobody's."""
    model = bodies()
    next(node for node in model.graph.node if node.output[0] == "v").op_type = "GroupQueryAttention"
    loop = next(node for node in model.graph.node if node.op_type == "Loop")
    next(part for part in loop.attribute if part.name == "body").g.node[0].op_type = "Loop"
    assert refusal(model.SerializeToString(), reader, tmp_path, "convert") in ("made", "refused")


def test_a_split_into_other_parts_than_it_says(reader: Reader, tmp_path: Path) -> None:
    """It takes the process down: ONNX's shape inference reads behind its list of sizes."""
    model = bodies()
    node = next(node for node in model.graph.node if node.op_type == "Split")
    next(part for part in node.attribute if part.name == "num_outputs").i = 1
    assert refusal(model.SerializeToString(), reader, tmp_path) == "refused"


@pytest.mark.slow
def test_a_size_that_no_shape_tells(onnx_files: dict[str, Path], reader: Reader, tmp_path: Path) -> None:
    model = first_attention(onnx_files["minilm-int8"])
    model.graph.output[0].name = "input_ids"
    assert refusal(model.SerializeToString(), reader, tmp_path) == "made"


@pytest.mark.parametrize("do", ["lift", "convert"])
def test_the_other_name_of_the_standard_operators(reader: Reader, tmp_path: Path, do: str) -> None:
    model = onnx.ModelProto.FromString(linear_call().SerializeToString())
    (standard,) = (versions for versions in model.opset_import if not versions.domain)
    standard.domain = "ai.onnx"
    assert refusal(model.SerializeToString(), reader, tmp_path, do) == "made"
