"""Take a graph of a model: pre-dispatch ATen, from `torch.export` or from Dynamo, in one shape for both.

*Pre-dispatch* means above autograd: composite operators (scaled_dot_product_attention, softmax, linear,
matmul) are still whole, so the graph says what the model said, and it can still be differentiated.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from attncompile.frontends import torch_internals
from attncompile.frontends.containers import register_containers
from attncompile.frontends.errors import CaptureError, first_line
from attncompile.frontends.module_floats import with_fixed_module_floats
from attncompile.frontends.positions import rows_of_positions
from attncompile.frontends.regenerated_views import without_regenerated_views
from attncompile.frontends.repeated_calls import RepeatedCalls
from attncompile.frontends.source import SourceLine, dotted_path, innermost_model_frame
from attncompile.frontends.vmap_regions import without_vmap
from attncompile.frontends.whole_calls import NotCut, with_whole_calls, without_whole_calls

Role = Literal["parameter", "buffer", "constant", "user"]


@dataclass(frozen=True)
class CapturedInput:
    """One placeholder of a captured graph.

    ``name`` is a dotted parameter name (``model.layers.0.self_attn.q_proj.weight``) or a user argument
    (``input_ids``, ``past_key_values.0.1``). ``value`` is what to feed it when it is no user input: the
    tensor itself, or a constant. It is None for user inputs, and for parameters that Dynamo gave only as fake
    tensors.
    """

    placeholder: str
    name: str
    role: Role
    value: Any = field(default=None, repr=False)


@dataclass(frozen=True)
class Captured:
    """A graph of a model and what its inputs and outputs are.

    ``graph_module`` takes one positional argument per entry of ``inputs`` and returns a flat tuple, named by
    ``outputs``. Every node has ``meta["val"]`` (fake tensor, symbol or number). ``dynamic_axes`` maps a user
    input to its axes of variable size and their names (``batch``, ``length``); ``size_names`` maps the symbol
    of such a size as it appears in the graph (``s53``) to that name. ``notes`` are sentences for the user,
    such as why an axis is fixed.
    """

    graph_module: torch.fx.GraphModule
    inputs: tuple[CapturedInput, ...]
    outputs: tuple[str, ...]
    origin: Literal["export", "dynamo"]
    notes: tuple[str, ...] = ()
    dynamic_axes: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    size_names: Mapping[str, str] = field(default_factory=dict)
    keywords: tuple[str, ...] = ()
    input_structure: Any = None
    output_structure: Any = None

    def flat_inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """The arguments of ``graph_module`` for a call of the exported model with ``args`` and ``kwargs``.

        Raises ValueError when the call has other arguments than the captured one.
        """
        if self.origin != "export":
            raise ValueError("a graph from Dynamo is called with its flat inputs, as torch.compile does")
        if set(kwargs) != set(self.keywords):
            raise ValueError(
                f"the graph was captured with the keyword arguments {', '.join(self.keywords) or '(none)'}; "
                f"this call has {', '.join(kwargs) or '(none)'}"
            )
        ordered = {name: kwargs[name] for name in self.keywords}
        leaves, structure = torch_internals.flatten((tuple(args), ordered))
        if structure != self.input_structure:
            raise ValueError(
                f"the graph was captured with arguments of the structure {self.input_structure}; "
                f"this call has {structure}"
            )
        given = iter(leaves)
        return [next(given) if entry.role == "user" else entry.value for entry in self.inputs]

    def run(self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Call the captured graph as the exported model is called; returns what the model returns."""
        results = self.graph_module(*self.flat_inputs(args, kwargs or {}))
        return torch_internals.unflatten(results, self.output_structure)


# --- where a node comes from --------------------------------------------------------------------------------


def module_path(node: torch.fx.Node) -> str:
    """Dotted path of the innermost module that a node ran in, such as ``model.layers.3.self_attn``.

    It is "" at the top and for nodes that torch inserted. In a graph from Dynamo the path starts at the
    module whose ``forward`` was compiled.
    """
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    # Export marks the nodes that its own passes insert.
    return "" if path.startswith("_empty_nn_module_stack") else dotted_path(path)


def module_type(node: torch.fx.Node) -> str:
    """Class name of the innermost module that a node ran in, such as ``LlamaAttention``; "" if unknown."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    kind = list(stack.values())[-1][1]
    return kind.__name__ if isinstance(kind, type) else str(kind).rsplit(".", 1)[-1]


def source_line(node: torch.fx.Node) -> SourceLine | None:
    """The line of model code that made a node, torch's own frames skipped; None for an inserted node."""
    return innermost_model_frame(node.meta.get("stack_trace"))


# --- torch.export -------------------------------------------------------------------------------------------

_ROUNDS_OF_REFINEMENT = 4


def capture_export(
    model: torch.nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic: bool = True,
) -> Captured:
    """Export ``model`` as it computes without gradients in evaluation mode.

    With ``dynamic`` the batch and sequence axes of the example inputs get symbolic sizes (`dynamic_axes_of`);
    an axis that the model itself fixes falls back to its size in the example, and a note says so. Raises
    CaptureError when the model cannot be exported even with fixed sizes.
    """
    args, kwargs = tuple(args), dict(kwargs or {})
    notes: list[str] = []
    wanted = dynamic_axes_of(args, kwargs) if dynamic else ()
    with evaluating(model):
        program = _export(model, args, kwargs, wanted, notes)
    graph_module = program.graph_module
    inputs = tuple(_exported_inputs(program))
    axes, size_names = _named_axes(_user_tensors(program, inputs), wanted, notes)
    notes.extend(_mutation_notes(program))
    structure = program.call_spec.out_spec
    outputs = [spec.arg for spec in program.graph_signature.output_specs if spec.kind.name == "USER_OUTPUT"]
    placeholder_outputs = torch_internals.unflatten([str(index) for index in range(len(outputs))], structure)
    return Captured(
        graph_module=graph_module,
        inputs=inputs,
        outputs=tuple(
            path or f"output_{index}" for index, path in enumerate(torch_internals.leaf_paths(placeholder_outputs))
        ),
        origin="export",
        notes=tuple(dict.fromkeys(notes)),
        dynamic_axes=axes,
        size_names=size_names,
        keywords=tuple(kwargs),
        input_structure=torch_internals.flatten((args, kwargs))[1],
        output_structure=structure,
    )


def exported_program(
    model: torch.nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    axes: Sequence[Mapping[int, str]] | None = None,
) -> tuple[torch.export.ExportedProgram, tuple[str, ...]]:
    """The exported program of `capture_export` as torch's own ONNX exporter takes it, and the notes.

    ``axes`` are the names of the axes that vary, for each tensor in order; `dynamic_axes_of` unless given. A name
    such as ``past + length`` is a size that follows from others.

    Raises CaptureError when the model cannot be exported.
    """
    args, kwargs = tuple(args), dict(kwargs or {})
    notes: list[str] = []
    wanted = dynamic_axes_of(args, kwargs) if axes is None else axes
    with evaluating(model):
        program = _export(model, args, kwargs, wanted, notes)
    _named_axes(_user_tensors(program, tuple(_exported_inputs(program))), wanted, notes)
    return program, tuple(dict.fromkeys(notes))


def fixes_axes(
    model: torch.nn.Module, kwargs: Mapping[str, Any], axes: Sequence[Mapping[int, str]]
) -> bool:
    """Whether an export computes with the size of an axis that should vary.

    Args:
        model: what would be exported; kwargs: of a call; axes: names of those that vary, for each tensor in order.

    Raises:
        CaptureError: when the model cannot be exported.
    """
    with evaluating(model):
        program = _export(model, (), dict(kwargs), axes, [])
    tensors = _user_tensors(program, tuple(_exported_inputs(program)))
    return any(
        asked.keys() - dict(_symbolic_axes(tensor)).keys() for tensor, asked in zip(tensors, axes, strict=True)
    )


def dynamic_axes_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[dict[int, str], ...]:
    """Names for the axes that should vary: ``{axis: name}`` for each tensor, in the order of the arguments.

    Axis 0 of every tensor is a batch. Axis 1 of tokens and token masks (integer or boolean, rank 2) and of
    embedded tokens (float, rank 3) is a sequence; so is every later axis of a tensor of rank 3 and more that
    has the size of a known token sequence, such as those of a 4-D mask. Axis 1 of raw sound, which models of
    transformers call ``input_values``, and of its mask counts samples. Axes of equal role and size share a
    name. An axis of size 1 broadcasts and stays fixed, and so do all others.
    """
    tensors = [leaf for leaf in torch_internals.flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
    sound = kwargs.get("input_values")
    samples = sound.shape if isinstance(sound, torch.Tensor) and sound.dim() == 2 else None
    tokens = {tensor.shape[1] for tensor in tensors if tensor.dim() == 2 and not tensor.is_floating_point()}
    names: dict[tuple[str, int], str] = {}

    def name(role: str, size: int) -> str:
        taken = sum(1 for key in names if key[0] == role)
        return names.setdefault((role, size), f"{role}_{taken + 1}" if taken else role)

    def axes(tensor: torch.Tensor) -> dict[int, str]:
        found: dict[int, str] = {}
        for axis, size in enumerate(tensor.shape):
            if size > 1 and axis == 0:
                found[axis] = name("batch", size)
            elif size > 1 and tensor.shape == samples:
                found[axis] = name("samples", size)
            elif size > 1 and _is_sequence_axis(tensor, axis, tokens):
                found[axis] = name("length", size)
        return found

    # Tokens first: their length is the one to call "length".
    found = {id(tensor): axes(tensor) for tensor in sorted(tensors, key=torch.is_floating_point)}
    return tuple(found[id(tensor)] for tensor in tensors)


def _is_sequence_axis(tensor: torch.Tensor, axis: int, token_sizes: set[int]) -> bool:
    if tensor.dim() == 2:
        return axis == 1 and not tensor.is_floating_point()
    if tensor.dim() == 3 and axis == 1 and tensor.is_floating_point():
        return True
    return tensor.dim() >= 3 and tensor.shape[axis] in token_sizes


def _export(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    axes: Sequence[Mapping[int, str]],
    notes: list[str],
) -> torch.export.ExportedProgram:
    """Export with named axes, corrected as torch suggests; then with axes that torch may fix itself; then
    with fixed sizes. Every retreat leaves a note."""
    register_containers(model)
    if any(axes):
        shapes = _shape_tree(model, args, kwargs, axes, named=True)
        for _ in range(_ROUNDS_OF_REFINEMENT):
            try:
                return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
            except Exception as error:
                failure = first_line(error)
                shapes = torch_internals.refined_shapes(error, shapes)
            if shapes is None:
                break
        notes.append(f"torch.export rejected the named dynamic sizes: {failure}")
        try:
            shapes = _shape_tree(model, args, kwargs, axes, named=False)
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
        except Exception as error:
            notes.append(f"only the sizes of the example can be exported: {first_line(error)}")
    try:
        return torch.export.export(model, args, kwargs, strict=False)
    except Exception as error:
        raise CaptureError(
            "torch.export",
            type(model).__name__,
            first_line(error),
            'torch.compile(model, backend="attncompile") goes around what export cannot trace',
        ) from error


def _shape_tree(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    axes: Sequence[Mapping[int, str]],
    *,
    named: bool,
) -> Any:
    """``dynamic_shapes`` for torch.export: one Dim per name, or an automatic one per axis.

    A size that follows from others has no Dim of its own; the model says what it is. The length of a model with a table
    of positions is bounded: torch rejects one that is not, at the end of an export, which then has to be made again.
    """
    names = {name for found in axes for name in found.values()}
    bounds = {"length": rows_of_positions(model)}
    dims: dict[str, Any] = {
        name: torch.export.Dim(name, max=bounds.get(name)) if named and name.isidentifier() else torch.export.Dim.AUTO
        for name in names
    }
    shapes = torch.export.ShapesCollection()
    tensors = [leaf for leaf in torch_internals.flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
    for tensor, found in zip(tensors, axes, strict=True):
        if found:
            shapes[tensor] = {axis: dims[name] for axis, name in found.items()}
    return shapes.dynamic_shapes(model, args, kwargs)


def _exported_inputs(program: torch.export.ExportedProgram) -> Iterator[CapturedInput]:
    roles: Mapping[str, Role] = {
        "PARAMETER": "parameter",
        "BUFFER": "buffer",
        "CONSTANT_TENSOR": "constant",
        "CUSTOM_OBJ": "constant",
        "USER_INPUT": "user",
    }
    for spec in program.graph_signature.input_specs:
        role = roles.get(spec.kind.name)
        if role is None:
            raise CaptureError(
                "torch.export",
                "the model",
                f"its input {spec.arg.name} is a {spec.kind.name}, which has no meaning here",
                'torch.compile(model, backend="attncompile") may handle it',
            )
        if role == "user":
            yield CapturedInput(spec.arg.name, spec.arg.name, role)
            continue
        target = spec.target or spec.arg.name
        tables = (program.state_dict, program.constants)
        value = next((table[target] for table in tables if target in table), None)
        yield CapturedInput(spec.arg.name, target, role, value)


def _user_tensors(program: torch.export.ExportedProgram, inputs: Sequence[CapturedInput]) -> list[torch.fx.Node]:
    """Where a program takes the user's tensors, in the order of the arguments."""
    placeholders = zip(_placeholders(program.graph_module), inputs, strict=True)
    return [
        node for node, entry in placeholders if entry.role == "user" and isinstance(node.meta.get("val"), torch.Tensor)
    ]


def _named_axes(
    tensors: Sequence[torch.fx.Node], wanted: Sequence[Mapping[int, str]], notes: list[str]
) -> tuple[dict[str, dict[int, str]], dict[str, str]]:
    """Which axes of the user's tensors did become dynamic, by name, and the symbol of each name.

    An axis that was wanted and is fixed leaves a note. Two symbols for one name (torch did not need them
    equal) get names of their own.
    """
    axes: dict[str, dict[int, str]] = {}
    size_names: dict[str, str] = {}
    for position, node in enumerate(tensors):
        asked = wanted[position] if wanted else {}
        dynamic = dict(_symbolic_axes(node))
        for axis in asked.keys() - dynamic.keys():
            size = node.meta["val"].shape[axis]
            notes.append(f"axis {axis} of {node.name} is fixed at {size}: the model computes with that size")
        for axis, symbol in dynamic.items():
            name = size_names.get(symbol) or asked.get(axis, symbol)
            taken = {other for key, other in size_names.items() if key != symbol}
            size_names[symbol] = f"{name}_{symbol}" if name in taken else name
            axes.setdefault(node.name, {})[axis] = size_names[symbol]
    return axes, size_names


def _symbolic_axes(node: torch.fx.Node) -> Iterator[tuple[int, str]]:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        for axis, size in enumerate(value.shape):
            if torch_internals.varies(size):
                yield axis, torch_internals.size_text(size)


def _mutation_notes(program: torch.export.ExportedProgram) -> Iterator[str]:
    for spec in program.graph_signature.output_specs:
        if spec.kind.name not in ("USER_OUTPUT", "TOKEN"):
            yield f"the model writes to {spec.target} ({spec.kind.name.lower().replace('_', ' ')})"


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


# --- Dynamo -------------------------------------------------------------------------------------------------


_RUNS_ANYWAY = "it runs as torch compiles it, without rewritten attention"


def capture_dynamo(graph_module: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Captured:
    """Lower the torch-level graph that Dynamo hands to a back end to pre-dispatch ATen.

    The result takes and returns exactly what ``graph_module`` does (symbolic sizes included) and replaces it
    before eager execution, ahead-of-time autograd or Inductor. ``graph_module`` itself is not changed.

    Floats that belong to a module (a scale, an epsilon; inputs under ``dynamic=True``) become constants with
    a guard, so that another value compiles anew; floats that the caller passes stay inputs. Raises
    CaptureError when the graph holds something that has no ATen form.
    """
    placeholders = _placeholders(graph_module)
    mode, fakes = torch_internals.fake_inputs(example_inputs)
    fixed = with_fixed_module_floats(graph_module, fakes)
    try:
        cut = without_whole_calls(fixed, differentiates(fakes))
    except NotCut as error:
        raise CaptureError("Dynamo", "the compiled function", f"{error}", _RUNS_ANYWAY) from error
    source = without_vmap(cut.graph_module if cut is not None else fixed)
    if cut is not None:
        mode, fakes = torch_internals.fake_inputs([*example_inputs, *cut.results])
    try:
        traced = torch_internals.trace_pre_dispatch(
            lambda *flat: RepeatedCalls(source).run(*flat, enable_io_processing=False),
            mode,
            fakes,
        )
    except Exception as error:
        raise CaptureError(
            "Dynamo",
            "the compiled function",
            first_line(error),
            _RUNS_ANYWAY,
        ) from error
    without_regenerated_views(traced, _unseen(traced))
    if cut is not None:
        traced = with_whole_calls(traced, cut, fixed)
    reason = _lost_in_tracing(graph_module, source, traced, fakes)
    if reason is not None:
        raise CaptureError("Dynamo", "the compiled function", reason, _RUNS_ANYWAY)
    _adopt_calling_convention(graph_module, traced)
    return Captured(
        graph_module=traced,
        inputs=tuple(
            _dynamo_input(before, after.name, given)
            for before, after, given in zip(placeholders, _placeholders(traced), example_inputs, strict=True)
        ),
        outputs=tuple(f"output_{index}" for index, _ in enumerate(_results(traced))),
        origin="dynamo",
        dynamic_axes={
            dotted_path(named[0]) if (named := torch_internals.input_source(node)) else node.name: found
            for node in _placeholders(traced)
            if (found := dict(_symbolic_axes(node)))
        },
    )


def _lost_in_tracing(
    before: torch.fx.GraphModule, source: torch.fx.GraphModule, after: torch.fx.GraphModule, inputs: Sequence[Any]
) -> str | None:
    """Why the traced graph is not the same function, or None. ``source`` is what was traced in place of ``before``.

    Three things vanish without an error: a custom backward, once its forward has been traced through; what a
    function transform such as vmap does to the values inside it; and values that only existed while the tracer
    looked.
    """
    if differentiates(inputs):
        lost = torch_internals.higher_order_calls(before) - torch_internals.higher_order_calls(after)
        if lost:
            return f"{', '.join(sorted(lost))} has a gradient of its own, which ATen does not hold"
    transforms = torch_internals.function_transforms(source)
    if transforms:
        return f"it computes inside {', '.join(sorted(transforms))} of torch.func, which ATen does not hold"
    for node in _unseen(after):
        reader = next(iter(node.users), node)
        place = source_line(reader)
        where = f" (at {place})" if place else ""
        return f"{reader.name} works on memory that only the model knows, such as that of x.data{where}"
    return None


def _unseen(traced: torch.fx.GraphModule) -> list[torch.fx.Node]:
    """The tensors of a traced graph that no call will have, since they existed only while it was traced."""
    held = [node for node in traced.graph.nodes if node.op == "get_attr"]
    return [node for node in held if torch_internals.is_fake(getattr(traced, node.target, None))]


def differentiates(inputs: Sequence[Any]) -> bool:
    """Whether gradients of some input are recorded."""
    return torch.is_grad_enabled() and any(
        isinstance(value, torch.Tensor) and value.requires_grad for value in inputs
    )


def _adopt_calling_convention(original: torch.fx.GraphModule, traced: torch.fx.GraphModule) -> None:
    """Give the traced graph the input names, input identities and graph metadata of the original."""
    for before, after in zip(_placeholders(original), _placeholders(traced), strict=True):
        after.target = before.target
        after._rename(before.name)
        torch_internals.copy_input_identity(before, after)
    traced.meta.update(original.meta)
    traced.graph.lint()
    traced.recompile()


def _dynamo_input(node: torch.fx.Node, name: str, given: Any) -> CapturedInput:
    """What an input of Dynamo's graph is; ``name`` is what it is called in the traced graph, where its own is taken."""
    found = torch_internals.input_source(node)
    source, in_module = found if found is not None else (node.name, False)
    role: Role = "user"
    if isinstance(given, torch.nn.Parameter) or "._parameters[" in source:
        role = "parameter"
    elif "._buffers[" in source:
        role = "buffer"
    elif in_module and isinstance(given, torch.Tensor):
        role = "constant"
    known = role != "user" and not torch_internals.is_fake(given) and not torch_internals.is_wrapped(given)
    return CapturedInput(name, dotted_path(source), role, given if known else None)


def _placeholders(graph_module: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return [node for node in graph_module.graph.nodes if node.op == "placeholder"]


def _results(graph_module: torch.fx.GraphModule) -> tuple[Any, ...]:
    result = graph_module.graph.output_node().args[0]
    return tuple(result) if isinstance(result, tuple | list) else (result,)
