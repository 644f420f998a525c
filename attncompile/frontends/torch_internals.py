"""Every private or unstable name of torch that attncompile uses, behind names of our own.

Read against torch 2.11 and 2.13: each function below exists for one purpose, so a change in torch has one
place to be repaired. Nothing else in this package may import a module of torch whose name starts with an
underscore, nor `torch.fx.experimental`, `torch.fx.traceback`, `torch._dynamo`, `torch._inductor`,
`torch._subclasses`; but for `torch_logs`.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import sympy
import torch
import torch._dynamo
import torch.utils._pytree as pytree
from sympy.core.cache import clear_cache
from torch._decomp.decompositions_for_rng import PhiloxStateTracker
from torch._dynamo.exc import TensorifyScalarRestartAnalysis, UserError
from torch._dynamo.source import ConstantSource
from torch._dynamo.symbolic_convert import TensorifyState
from torch._guards import Source, TracingContext, detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export.dynamic_shapes import refine_dynamic_shapes_from_suggested_fixes
from torch.fx import traceback as fx_traceback
from torch.fx.experimental import proxy_tensor, symbolic_shapes
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv, guard_scalar, statically_known_true
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass
from torch.utils._sympy.functions import Max, Min

# --- fake tensors -------------------------------------------------------------------------------------------


def is_fake(value: object) -> bool:
    """True for a tensor that has a shape and a dtype but no data."""
    return isinstance(value, FakeTensor)


def is_wrapped(value: object) -> bool:
    """True for a tensor of a type that holds other tensors and says itself what operations do: a quantised weight."""
    return isinstance(value, torch.Tensor) and is_traceable_wrapper_subclass(value)


def outside_tracing() -> AbstractContextManager[Any]:
    """A context in which tensors are tensors, whatever is being traced around it."""
    return _disable_current_modes()


def fake_mode_of_graph(graph_module: torch.fx.GraphModule) -> FakeTensorMode | None:
    """The fake mode of the values on a graph's nodes; the value of a new node is computed in it."""
    for node in graph_module.graph.nodes:
        for value in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(value, FakeTensor):
                return value.fake_mode
    return None


def fake_inputs(values: Sequence[Any]) -> tuple[FakeTensorMode, list[Any]]:
    """Fakes of a back end's example inputs, and the mode they live in.

    While Dynamo compiles, they get the symbols that it gave the inputs (what is in the graph's own metadata
    will not do: it has seen every mutation of the trace). Otherwise sizes are numbers. The fakes are copies
    that a trace may resize or mutate; inputs that alias each other still do. In place of a wrapped tensor
    stands a plain one of its shape.
    """
    mode = detect_fake_mode(list(values)) or FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)
    return mode, [_fake(mode, value) if isinstance(value, torch.Tensor) else value for value in values]


def _fake(mode: FakeTensorMode, value: torch.Tensor) -> torch.Tensor:
    if isinstance(value, FakeTensor) and value.fake_mode is mode:
        fake = value
    else:
        context = TracingContext.try_get()
        known = context.tensor_to_context.get(value) if context is not None else None
        if known is None:
            fake = mode.from_tensor(value, static_shapes=True)
        else:
            fake = mode.from_tensor(
                value, static_shapes=False, symbolic_context=known, source=known.tensor_source, trace=False
            )
    if is_wrapped(fake):
        with mode:
            return torch.empty(fake.shape, dtype=fake.dtype, device=fake.device, requires_grad=fake.requires_grad)
    copy = fake.detach().requires_grad_(fake.requires_grad)
    # detach() forgets which symbol .item() stands for; ahead-of-time autograd restores it in the same way.
    symbol = scalar_symbol(fake)
    if symbol is not None:
        copy.item_memo = symbol  # type: ignore[attr-defined]
    return copy


def scalar_symbol(value: object) -> Any:
    """The symbol that ``.item()`` of a scalar fake tensor gives, or None.

    With ``dynamic=True`` Dynamo passes every Python float as such a tensor, module attributes such as a scale
    included.
    """
    return getattr(value, "item_memo", None) if isinstance(value, FakeTensor) else None


# --- symbolic sizes -----------------------------------------------------------------------------------------


def is_symbolic(size: object) -> bool:
    """True for a size or scalar that is a symbol rather than a number."""
    return isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool)


def varies(size: object) -> bool:
    """True for a size that is no number: an axis that should vary keeps its symbol where a trace found it fixed."""
    return isinstance(size, torch.SymInt) and not size.node.expr.is_number


def size_text(size: int | torch.SymInt) -> str:
    """A size as text: ``128`` or the symbol's expression such as ``s27`` or ``2*s27``."""
    return str(size.node.expr) if isinstance(size, torch.SymInt) else str(size)


def size_hint(size: int | torch.SymInt) -> int | None:
    """The size seen in the example inputs; None for a size that only exists at run time."""
    if not isinstance(size, torch.SymInt):
        return size
    hint = size.node.hint
    return None if hint is None else int(hint)


def size_range(size: int | torch.SymInt) -> tuple[int, int | None]:
    """Smallest and largest value of a size, as far as the trace knows; None for no upper bound."""
    if not isinstance(size, torch.SymInt):
        return size, size
    bounds = size.node.shape_env.bound_sympy(size.node.expr)
    lower = int(bounds.lower) if bounds.lower.is_finite else 0
    upper = int(bounds.upper) if bounds.upper.is_finite else None
    return lower, upper


def surely(condition: bool | torch.SymBool) -> bool:
    """True only if ``condition`` holds for every value of its symbols. Adds no guard."""
    return bool(statically_known_true(condition))


def decided(size: torch.SymInt) -> Any:
    """The expression of a size in which a larger or smaller of two numbers is that number, where the trace knows which.

    What a model has asked of its sizes (is the cache longer than its window?) is guarded, so it holds wherever the
    graph runs that Dynamo compiles now. Adds no guard.
    """
    expr, env = size.node.expr, size.node.shape_env
    if TracingContext.try_get() is None or not expr.has(Max, Min):
        return expr
    facts = [env.replace(fact) for guard in env.guards for fact in _not_negative(guard.expr)]

    def at_least(one: Any, other: Any) -> bool:
        difference = env.replace(one - other)
        return any(env.bound_sympy(difference - fact).lower >= 0 for fact in (0, *facts))

    def extreme(kind: Any, parts: tuple[Any, ...]) -> Any:
        for part in parts:
            if all(at_least(part, one) if kind is Max else at_least(one, part) for one in parts if one is not part):
                return part
        return kind(*parts)

    for kind in (Max, Min):
        expr = expr.replace(kind, lambda *parts, kind=kind: extreme(kind, parts))
    return expr


def _not_negative(guard: Any) -> list[Any]:
    """What is not negative where a comparison of two integers holds."""
    if not isinstance(guard, sympy.Rel) or not all(side.is_integer for side in guard.args):
        return []
    left, right = guard.args
    match guard.func:
        case sympy.Ge | sympy.Gt:
            return [left - right - int(guard.func is sympy.Gt)]
        case sympy.Le | sympy.Lt:
            return [right - left - int(guard.func is sympy.Lt)]
    return []


def fix_value(symbol: Any) -> int | float | bool:
    """The example's value of a symbol, with a guard: another value makes torch compile again."""
    value: int | float | bool = guard_scalar(symbol)
    return value


def restart_with_constants(symbols: Sequence[torch.SymFloat]) -> None:
    """Have Dynamo, which is calling, trace anew with the example's values of these floats for constants, guarded.

    It is what ahead-of-time autograd asks for, by the same exception, of floats that it can not make tensors of.

    Raises:
        TensorifyScalarRestartAnalysis: unless there are none, or each has been asked for before.
    """
    names = [str(symbol.node._expr) for symbol in symbols]  # without what is known of its value: the name stays
    wanted = [name for name in names if not TensorifyState.should_specialize(name)]
    if TracingContext.try_get() is None or not wanted:
        return
    for name in wanted:
        TensorifyState.specialize(name)
    raise TensorifyScalarRestartAnalysis


# --- tracing ------------------------------------------------------------------------------------------------


def trace_pre_dispatch(
    function: Callable[..., Any], mode: FakeTensorMode, inputs: Sequence[Any]
) -> torch.fx.GraphModule:
    """Run ``function`` on fake inputs of ``mode`` and record the ATen calls above autograd.

    Composite operators such as scaled_dot_product_attention, softmax and linear stay whole, and the graph can
    still be differentiated. Metadata of the nodes that `interpret` replays is kept.
    """
    # The inputs are fake already. Any tracing mode but "real" would convert them once more and lose the
    # symbols that belong to scalar inputs.
    tracer = make_fx(function, tracing_mode="real", pre_dispatch=True)
    with mode, fx_traceback.preserve_node_meta():
        return tracer(*inputs)


def trace_below_transforms(function: Callable[..., Any], inputs: Sequence[Any]) -> torch.fx.GraphModule:
    """Run ``function`` on the values of a trace that is going on, and record the ATen calls below vmap and autograd.

    The trace around it sees nothing of this; it records what the result does when that is run.
    """
    with disable_proxy_modes_tracing():
        return make_fx(function, tracing_mode="real")(*inputs)


def interpret(graph_module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """Run a graph node by node, so that a tracer around it sees each node's stack trace and module."""
    return torch.fx.Interpreter(graph_module).run(*inputs, enable_io_processing=False)


def is_plain_fake(value: torch.Tensor) -> bool:
    """True for a fake tensor of which size, strides, dtype and device say all: dense, unwrapped, a parameter or not."""
    kind = type(value)
    plain = kind is FakeTensor or (kind is torch.nn.Parameter and isinstance(value, FakeTensor))
    return plain and value.layout is torch.strided and not torch._C._functorch.is_functorch_wrapped_tensor(value)


def symbol_key(value: Any) -> Any:
    """The expression of a symbolic size, float or truth value: equal for values that are equal in every call."""
    return value.node.expr


class Recorder:
    """The trace that is going on, to which operations can be added that it has not seen.

    Obtained by :meth:`running`.
    """

    def __init__(self, tracer: Any) -> None:
        self.tracer = tracer

    @staticmethod
    def running() -> "Recorder | None":
        """Of the trace that is going on; None where there is none."""
        mode = proxy_tensor.get_proxy_mode()
        return None if mode is None else Recorder(mode.tracer)

    def node_of(self, tensor: torch.Tensor) -> torch.fx.Node | None:
        """The node that stands for a tensor now; None where it has none, or is known to be constant."""
        slot = proxy_tensor.get_proxy_slot(tensor, self.tracer, None)
        return None if slot is None or slot.constant is not None else slot.proxy.node

    def last_node(self) -> torch.fx.Node:
        """The last node recorded so far."""
        last: torch.fx.Node = self.tracer.graph._root.prev
        return last

    def nodes_after(self, last: torch.fx.Node) -> list[torch.fx.Node]:
        """The nodes recorded since."""
        found, node = [], self.last_node()
        while node is not last:
            found.append(node)
            node = node.prev
        return found[::-1]

    def pause(self, until: ExitStack) -> None:
        """Let operations run from now on, but not be recorded, nor seen by what else looks on while one traces.

        Args:
            until: what ends the pause when it is closed; where it holds anything, the pause has begun before.
        """
        if proxy_tensor.get_proxy_mode() is not None:
            for context in (disable_proxy_modes_tracing(), torch._C.DisableTorchFunction()):
                until.enter_context(context)

    def add(
        self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str, meta: dict[str, Any], value: Any
    ) -> torch.fx.Node:
        """Record an operation that has run; from now on its node stands for what it gave."""
        node = self.tracer.graph.create_node("call_function", target, args, kwargs, name)
        node.meta.update(meta)
        node.meta["val"] = proxy_tensor.extract_val(value)
        if isinstance(value, torch.Tensor):
            proxy_tensor.track_tensor(value, torch.fx.Proxy(node, self.tracer), constant=None, tracer=self.tracer)
        return node


def higher_order_calls(graph_module: torch.fx.GraphModule) -> set[str]:
    """Names of the operators that take graphs themselves: cond, flex_attention, autograd_function_apply."""
    return {
        str(node.target) for node in graph_module.graph.nodes if isinstance(node.target, torch._ops.HigherOrderOperator)
    }


def function_transforms(graph_module: torch.fx.GraphModule) -> set[str]:
    """The transforms that a graph from Dynamo enters: vmap, grad (vjp and jacrev too) or jvp.

    Inside, a value is wrapped: its shape is not what a node's metadata says to anyone else. What tracing makes of such
    calls differs between versions of torch: values get lost (2.13), or the calls stay in the graph (2.11).
    """
    called = (
        str(getattr(node.target, "__name__", ""))
        for module in graph_module.modules()
        if isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
        if node.op == "call_function"
    )
    return {name[: -len(_ENTERS)].lstrip("_") for name in called if name.endswith(_ENTERS)}


_ENTERS = "_increment_nesting"
"""How the name of a call that enters a function transform ends, as in ``_vmap_increment_nesting``."""


def bounds_transform(node: torch.fx.Node) -> bool:
    """Whether a node enters or leaves a function transform; nothing reads what such a call gives."""
    return node.op == "call_function" and str(getattr(node.target, "__name__", "")).endswith(_BOUNDS)


_BOUNDS = (_ENTERS, "_decrement_nesting")


def is_batched(value: object) -> bool:
    """Whether a traced value is one that vmap wraps: it has a shape, but no memory of its own to look at."""
    return isinstance(value, torch.Tensor) and torch._C._functorch.is_batchedtensor(value)


# --- export -------------------------------------------------------------------------------------------------


def is_export_refusal(error: BaseException) -> bool:
    """True for torch's own "this cannot be exported so" as opposed to an error of the model."""
    return isinstance(error, UserError)


def refined_shapes(error: BaseException, dynamic_shapes: Any) -> Any:
    """Dynamic shapes corrected as a constraint violation suggests; None when it suggests nothing usable."""
    text = str(error)
    if "Suggested fixes:" not in text:
        return None
    fixes = text.split("Suggested fixes:")[1].split("\n\n")
    try:
        # The message goes on after an empty line; the parser wants the fixes alone.
        return refine_dynamic_shapes_from_suggested_fixes(
            "Suggested fixes:\n" + next(part for part in fixes if part.strip()), dynamic_shapes
        )
    except Exception:  # whatever the parser raises means that there is no usable suggestion
        return None


# --- nested arguments ---------------------------------------------------------------------------------------


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """Leaves of nested arguments or results, and the structure to rebuild them with `unflatten`."""
    return pytree.tree_flatten(tree)


def unflatten(leaves: Sequence[Any], structure: Any) -> Any:
    """The inverse of `flatten`."""
    return pytree.tree_unflatten(list(leaves), structure)


def leaf_paths(tree: Any) -> list[str]:
    """A dotted path such as ``past_key_values.0.1`` for each leaf of ``tree``, in the order of `flatten`."""
    leaves, _ = pytree.tree_flatten_with_path(tree)
    return [".".join(_key_text(key) for key in path) for path, _ in leaves]


def _key_text(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key).strip(".[]'\"")


# --- Dynamo -------------------------------------------------------------------------------------------------


def input_source(placeholder: torch.fx.Node) -> tuple[str, bool] | None:
    """Where Dynamo found the value of a graph input: its Python source such as
    ``L['self']._modules['a'].scale`` and whether that lies inside a module. None for a placeholder that
    Dynamo did not make."""
    source = getattr(placeholder, "_dynamo_source", None)
    if not isinstance(source, Source):
        return None
    kind = source.guard_source
    return str(source.name), bool(kind.is_specialized_nn_module() or kind.is_unspecialized_nn_module())


def copy_input_identity(original: torch.fx.Node, copy: torch.fx.Node) -> None:
    """Make ``copy`` stand for the same Dynamo input as ``original``; ahead-of-time autograd asks for it."""
    if hasattr(original, "_dynamo_source"):
        copy._dynamo_source = original._dynamo_source
    for key, value in original.meta.items():
        copy.meta.setdefault(key, value)


def keep_identity(original: torch.fx.GraphModule, replacement: torch.fx.GraphModule) -> None:
    """Make ``replacement``, with the same inputs, stand for Dynamo's graph ``original`` where that is compiled.

    Ahead-of-time autograd learns from a Dynamo graph which inputs keep their memory, so that CUDA graphs neither copy
    weights and caches nor refuse to write to them, and where each input came from, for guards on inputs that are the
    same tensor. It takes all that from attributes which a copy of a graph does not have.
    """
    placeholders = (module.graph.find_nodes(op="placeholder") for module in (original, replacement))
    for before, after in zip(*placeholders, strict=True):
        copy_input_identity(before, after)
    known = getattr(original, "_param_name_to_source", None)
    if known is None:  # not made by Dynamo
        return
    own = (*replacement.named_parameters(remove_duplicate=False), *replacement.named_buffers(remove_duplicate=False))
    constants = {name: ConstantSource(f"attncompile.{name}") for name, _ in own}
    replacement._param_name_to_source = {**constants, **known}  # type: ignore[assignment]
    replacement.meta.update({key: value for key, value in original.meta.items() if key not in replacement.meta})


def recording_of(graph_module: torch.fx.GraphModule) -> AbstractContextManager[Any]:
    """The fake mode a graph was recorded in, as a context in which values of new nodes can be computed."""
    return fake_mode_of_graph(graph_module) or nullcontext()


def ahead_of_time(graph_module: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """The graph as ahead-of-time autograd runs it: forward and backward are graphs too, of plain operators.

    Run node by node, a checkpointed block draws other random numbers when it is computed again than at first.
    """
    from torch._dynamo.backends.debugging import aot_eager

    run: Callable[..., Any] = aot_eager(graph_module, list(example_inputs))
    return run


def inductor(
    graph_module: torch.fx.GraphModule, example_inputs: Sequence[Any], options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """Compile a graph, forward and backward, with Inductor, as its own torch.compile back end would."""
    from torch._inductor.compile_fx import compile_fx

    compiled: Any = compile_fx(graph_module, list(example_inputs), config_patches=options)
    return compiled


def drop_cuda_graphs() -> None:
    """Give back the memory and the graphs that Inductor's CUDA graphs hold, all of them: when Dynamo is reset.

    Nothing is imported for it: where that module is not loaded there are none.
    """
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is not None:
        trees.reset_cudagraph_trees()


def trace_artifact(name: str, lines: Sequence[str]) -> None:
    """Add lines to the trace of the compilation that is going on (``TORCH_TRACE``), where tlparse shows them."""
    from torch._logging import trace_structured

    trace_structured(
        "artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=lambda: "\n".join(lines)
    )


def modes() -> tuple[str, ...]:
    """The modes of torch.compile."""
    from torch._inductor import list_mode_options

    return tuple(list_mode_options())


def mode_options(mode: str | None) -> dict[str, Any] | None:
    """Inductor's settings for a mode of torch.compile such as ``reduce-overhead``; None for the default mode."""
    if mode in (None, "default"):
        return None
    from torch._inductor import list_mode_options

    options: dict[str, Any] = list_mode_options(mode)
    return options


# --- packages of AOTInductor --------------------------------------------------------------------------------


def cpp_compiler() -> str | None:
    """The C++ compiler that Inductor calls; None where there is none that works."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return get_cpp_compiler()
    except InvalidCxxCompiler:
        return None


def compile_package(program: torch.export.ExportedProgram, file: Path) -> None:
    """Compile an exported program with AOTInductor into a file that ends in ``.pt2``.

    Raises whatever Inductor or the C++ compiler does not like.
    """
    from torch._inductor import aoti_compile_and_package

    aoti_compile_and_package(program, package_path=str(file))


def open_package(file: Path) -> tuple[Callable[..., Any], dict[str, str]]:
    """What runs a package that `compile_package` wrote, and what AOTInductor noted about it (``AOTI_CPU_ISA``).

    The package's machine code is loaded into this process.
    """
    from torch._inductor import aoti_load_package

    loaded = aoti_load_package(str(file))
    return loaded, dict(loaded.get_metadata())


def forget_export(program: torch.export.ExportedProgram) -> None:
    """Let go of a graph that was exported and is not wanted any more, and of what was worked out for its sizes.

    torch keeps a node of it for each tensor in a table of its own, which serves to look for leaks while it exports;
    with a node lives the whole graph, until something else is exported. What it keeps for sizes that it sees again
    (shapes of results, facts, simplified terms) is of no use to other symbols, and is small, but lies between all that
    was made on the way: Python gives memory back by the megabyte, and only where nothing in it is left. The state of
    its random numbers, of fake tensors, holds all of that too; and the fake tensors that an environment of sizes tracks
    hold it in turn, by sizes that Python's collector does not see.
    """
    known: dict[int, Any] = getattr(proxy_tensor, "_FAKE_TENSOR_ID_TO_PROXY_MAP_FOR_EXPORT", {})
    known.clear()
    FakeTensorMode.cache_clear()
    PhiloxStateTracker.reset()
    mode = fake_mode_of_graph(program.graph_module)
    for name in ("tracked_fakes", "fake_tensor_cache"):
        held = getattr(mode.shape_env, name, None) if mode is not None else None
        if held:
            held.clear()
    for function in (*vars(symbolic_shapes).values(), *vars(ShapeEnv).values()):
        forget = getattr(function, "cache_clear", None)
        if callable(forget):
            forget()
    clear_cache()


def lacking_instructions(wanted: str) -> str | None:
    """The first of these vector instructions that this processor lacks; None where it has all, or torch does not know.

    ``wanted`` is what AOTInductor notes, such as ``AVX512 AVX512_VNNI``.
    """
    has: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    level = {"DEFAULT": 0, "AVX2": 1, "AVX512": 2}
    widest = level.get(torch.backends.cpu.get_cpu_capability(), max(level.values()))
    for name in wanted.split():
        known = has.get(_NAMES_OF_INSTRUCTIONS.get(name, name.lower()))
        if known is False or (known is None and level.get(name, 0) > widest):
            return name
    return None


_NAMES_OF_INSTRUCTIONS = {"AVX512": "avx512_f"}
"""What torch.cpu calls instructions that Inductor has another name for."""


def structure_text(structure: Any) -> str:
    """A structure of `flatten` as JSON. Raises NotImplementedError or ValueError for a type that has no such form."""
    return pytree.treespec_dumps(structure)


def structure_of_text(text: str) -> Any:
    """The inverse of `structure_text`. Raises ValueError or NotImplementedError for a type that is not registered."""
    return pytree.treespec_loads(text)


def symbol_ranges(program: torch.export.ExportedProgram) -> dict[str, tuple[int, int | None]]:
    """Smallest and largest value of each size of an exported program, by its symbol; None for no upper bound.

    The smallest is at least 1: torch traces no graph for empty tensors, whatever range it writes.
    """
    found = {}
    for symbol, bounds in program.range_constraints.items():
        lower, upper = (int(bound) if bound.is_Integer else None for bound in (bounds.lower, bounds.upper))
        found[str(symbol)] = (max(lower or 0, 1), upper)
    return found
