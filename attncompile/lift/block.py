"""The block around a site: what makes its operands and what becomes of its output, recognised by what it computes.

From each operand the walk goes back against the flow of data, with the indices of the element that the attention
reads, through movements and casts, and names what it meets: rotary position maps, normalisations, caches, linear
maps. From the output it goes forward: gates, and the output projection.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from attncompile.frontends.graph import Cast, Concatenate, Graph, Indices, Linear, Move, Node, Opaque, Pointwise
from attncompile.ir import Expr, Index, Operation, Position, Project, Spec, TensorType, print_expr, simplify
from attncompile.ir.expr import ONE, Const, apply, substitute, symbols
from attncompile.lift.frequencies import read_frequencies
from attncompile.lift.norms import cuts, recognise_norm
from attncompile.lift.program import Binding, Layout, Site
from attncompile.lift.rotated import rotations
from attncompile.lift.step import Step

_D, _I = Index("d"), Index("i")
ROLES = {"g": "h", "j": "i", "e": "d"}
"""Axes of key and value under the names that queries have: one walk serves all three."""

_LONGEST = 64
"""Nodes that a walk passes."""


def attach_block(graph: Graph, site: Site) -> tuple[tuple[Operation, ...], tuple[Step, ...]]:
    """What surrounds a site: position maps and projections of its operands as operations, and every step.

    Steps stand in the order of data flow: those that make ``q``, then ``k``, ``v``, then those after the output.
    """
    if site.region is None or site.spec is None:
        return (), ()
    operations: list[Operation] = []
    steps: list[Step] = []
    scan = site.spec.scan()
    apart = {scan.gate, scan.rate, scan.past} if scan is not None else set()  # no vectors of heads
    for binding in (entry for entry in site.region.inputs if entry.layout is not None and entry.name not in apart):
        walked = _Walk(graph, site.spec, binding)
        operations += walked.operations
        steps += reversed(walked.steps)
    return tuple(operations), (*steps, *_after(graph, site.region.outputs[0].value))


def _shown(graph: Graph, value: str) -> str:
    """What a person calls a value."""
    given = graph.inputs.get(value)
    return given.name if given else graph.describe(value).name


def _element(layout: Layout, sizes: Mapping[str, Expr], shape: Indices) -> Indices:
    """Native indices of the Spec element at its axis symbols."""
    indices: list[Expr] = []
    for group, (start, stop) in zip(layout.groups, layout.places(), strict=True):
        index: Expr = Const(0)
        for axis in group:
            index = index * sizes[axis] + Index(ROLES.get(axis, axis))
        below: Expr = ONE
        digits: list[Expr] = []
        for place in reversed(range(start, stop)):
            digit = index // below
            digits.insert(0, simplify(digit % shape[place] if place > start else digit))
            below = simplify(below * shape[place])
        indices += digits
    return tuple(indices)


def _native_sizes(graph: Graph, kind: TensorType, binding: Binding) -> dict[str, Expr]:
    """Sizes of an operand's axes in the graph's own symbols, where an axis stands alone: the Spec's are renamed."""
    sizes = {axis.name: axis.size for axis in kind.axes}
    layout, shape = binding.layout, graph.infos[binding.value].shape
    groups = zip(layout.groups, layout.places(), strict=True) if layout is not None else ()
    return sizes | {
        group[0]: simplify(apply("mul", ONE, *shape[start:stop])) for group, (start, stop) in groups if len(group) == 1
    }


def operand_extents(graph: Graph, kind: TensorType, binding: Binding) -> dict[str, Expr]:
    """Sizes of an operand's axes under the names that queries have."""
    return {ROLES.get(axis, axis): size for axis, size in _native_sizes(graph, kind, binding).items()}


def operand_element(graph: Graph, kind: TensorType, binding: Binding) -> Indices:
    """Native indices of an operand's element at ``b h i d``; the binding has a layout."""
    assert binding.layout is not None
    return _element(binding.layout, _native_sizes(graph, kind, binding), graph.infos[binding.value].shape)


@dataclass
class _Walk:
    """Back from one operand of a site; ``steps`` are nearest first."""

    graph: Graph
    spec: Spec
    binding: Binding
    operations: list[Operation] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.name = self.binding.name
        kind = self.spec.types()[self.name]
        layout = self.binding.layout
        self.extents = operand_extents(self.graph, kind, self.binding)
        self.channels = simplify(self.extents["d"])
        heads = simplify(kind.sizes[1])
        self.heads = int(heads.value) if isinstance(heads, Const) else 1
        if layout is not None:
            self._follow(self.binding.value, operand_element(self.graph, kind, self.binding))

    def _note(self, kind: str, value: str, **facts: object) -> None:
        self.steps.append(Step(self.name, kind, _shown(self.graph, value), facts))

    def _follow(self, value: str, indices: Indices, projected: bool = False) -> None:
        """Name what makes a value, until nothing is recognised or the state of the model is reached."""
        for _ in range(_LONGEST):
            node = self.graph.producer.get(value)
            if isinstance(node, Move):
                value, indices = node.source, self._simplified(node.index_map(indices))
                continue
            if isinstance(node, Cast):
                value = node.source
                continue
            found = self._rotary(value, indices) or self._norm(value, indices)
            if found is not None:
                value, indices = found
                continue
            if isinstance(node, Concatenate):
                parts = list(self._parts(node, indices))
                if self._cache(node, indices):
                    value, indices = node.parts[-1], parts[-1][1]
                    continue
                if _D in symbols(indices[node.axis]):
                    self._joined(node, parts)
                return
            written = _written(node) if isinstance(node, Opaque) else None
            if written is not None and isinstance(node, Opaque):
                self._note("cache", value, form="written in place", past=_shown(self.graph, node.reads[0]))
                value = written
                continue
            if isinstance(node, Linear):
                self._linear(node, indices, projected)
                inner = self._narrower(node)
                if inner is None:
                    return
                value, indices, projected = node.source, (*indices[:-1], _D), True
                continue
            if isinstance(node, Pointwise):
                moved = self._scaled(node, indices)
                if moved is None:
                    return
                value, indices = moved
                continue
            return

    def _simplified(self, indices: Indices) -> Indices:
        simplifier = self.graph.simplifier(self.extents)
        return tuple(simplifier(index) for index in indices)

    # --- what is recognised ---------------------------------------------------------------------------------

    def _rotary(self, value: str, indices: Indices) -> tuple[str, Indices] | None:
        """A rotary map that makes the value at these indices, and what it rotates."""
        if self.name == "v" or not isinstance(self.graph.producer.get(value), Pointwise | Concatenate):
            return None
        if not isinstance(self.channels, Const) or not any(_D in symbols(index) for index in indices):
            return None
        found = next(rotations(self.graph, value, indices, self.extents), None)
        if found is None:
            return None
        position = replace(found.position, tensor=self.name, out=f"{self.name}_rotated")
        self.operations.append(position)
        frequencies = read_frequencies(self.graph, position)
        facts: dict[str, object] = {"convention": position.convention, "channels": position.channels}
        facts["of"] = int(self.channels.value)
        if frequencies is not None:
            facts |= {"base": frequencies.base, "scaling": frequencies.scaling}
            facts |= {"factor": frequencies.factor, "attention_factor": frequencies.attention}
        self._note("rotary", value, **facts)
        return found.source, found.indices

    def _norm(self, value: str, indices: Indices) -> tuple[str, Indices] | None:
        """A normalisation that makes the value, and what it normalises."""
        axis = next((n for n, index in enumerate(indices) if _D in symbols(index)), None)
        if axis is None or not isinstance(self.graph.producer.get(value), Pointwise | Opaque):
            return None
        norm = recognise_norm(self.graph, value, axis)
        if norm is None:
            return None
        each = "head" if self.channels == Const(norm.channels) else "position"
        self._note(
            "norm",
            value,
            form=norm.kind,
            channels=norm.channels,
            over=each,
            epsilon=norm.epsilon,
            weights=list(norm.weights),
        )
        return norm.source, indices

    def _parts(self, node: Concatenate, indices: Indices) -> Iterator[tuple[str, Indices, Expr, Expr]]:
        """The parts of a concatenation: value, indices, where it begins and how long it is."""
        begin: Expr = Const(0)
        for part in node.parts:
            length = self.graph.infos[part].shape[node.axis]
            inside = simplify(indices[node.axis] - begin)
            yield part, (*indices[: node.axis], inside, *indices[node.axis + 1 :]), begin, length
            begin = simplify(begin + length)

    def _cache(self, node: Concatenate, indices: Indices) -> bool:
        """Whether a concatenation puts new keys or values behind those of earlier steps."""
        if self.name == "q" or _I not in symbols(indices[node.axis]) or len(node.parts) != 2:
            return False
        past = node.parts[0]
        while isinstance(made := self.graph.producer.get(past), Move | Cast):
            past = made.source
        given = self.graph.inputs.get(past)
        if given is None or given.role not in ("user", "buffer"):
            return False
        self._note("cache", node.output, form="concatenated", past=given.name)
        return True

    def _joined(self, node: Concatenate, parts: list[tuple[str, Indices, Expr, Expr]]) -> None:
        """Channels from several places, each with steps of its own (multi-head latent attention)."""
        channels, outer = self.channels, self.extents
        for part, indices, begin, length in reversed(parts):
            start = simplify(indices[node.axis] - _D)
            first = simplify(Const(0) - start)
            self.extents = {**outer, "d": length}
            self.channels = simplify(length)
            count = len(self.steps)
            moved = tuple(simplify(substitute(index, {_D: _D + first})) for index in indices)
            self._follow(part, self._simplified(moved))
            last = simplify(begin + length - 1)
            where = f"channels {print_expr(begin)}–{print_expr(last)}"
            self.steps[count:] = [replace(step, part=step.part or where) for step in self.steps[count:]]
        self.channels, self.extents = channels, outer

    def _linear(self, node: Linear, indices: Indices, inner: bool) -> None:
        """A linear map: which outputs of it the operand reads says whether it is shared with others."""
        graph, shape = self.graph, self.graph.infos[node.weight].shape
        outputs, inputs = reversed(shape) if node.transposed else shape
        names = [_shown(graph, name) for name in (node.source, node.weight)]
        bias = _shown(graph, node.bias) if node.bias else ""
        facts: dict[str, object] = {"source": names[0], "kernel": names[1], "bias": bias}
        facts |= {"inputs": _number(inputs), "outputs": _number(outputs)}
        read, whole = self._outputs_read(indices[-1]), simplify(outputs)
        if not inner and read is not None and isinstance(whole, Const) and read < int(whole.value):
            facts |= {"form": "packed", "reads": print_expr(indices[-1])}
        self._note("linear", node.output, **facts)
        if not inner and not any(isinstance(operation, Project) for operation in self.operations):
            self.operations.append(Project(names[0], names[1], bias, self.heads, self.name))

    def _outputs_read(self, index: Expr) -> int | None:
        """How many outputs of a linear map an index runs over."""
        count = 1
        for symbol in symbols(index):
            size = self.extents.get(symbol.name) if isinstance(symbol, Index) else None
            size = simplify(size) if size is not None else None
            if not isinstance(size, Const):
                return None
            count *= int(size.value)
        return count

    def _narrower(self, node: Linear) -> Linear | None:
        """The first half of a low-rank map: a linear map to fewer channels, at most normalised in between."""
        start = self._unmoved(node.source)
        for value in (start, *(earlier for earlier, _ in cuts(self.graph, start))):
            made = self.graph.producer.get(value)
            if not isinstance(made, Linear):
                continue
            shapes = (self.graph.infos[name].shape for name in (made.output, made.source, node.output))
            sizes = [simplify(shape[-1]) for shape in shapes]
            rank, *wider = [size.value if isinstance(size, Const) else None for size in sizes]
            if rank is None or any(other is None or rank >= other for other in wider):
                return None
            if value != start:
                norm = recognise_norm(self.graph, start, len(self.graph.infos[start].shape) - 1)
                if norm is None or self._unmoved(norm.source) != value:
                    return None
            return made
        return None

    def _unmoved(self, value: str) -> str:
        """What a value is before movements and casts."""
        while isinstance(node := self.graph.producer.get(value), Move | Cast):
            value = node.source
        return value

    def _scaled(self, node: Pointwise, indices: Indices) -> tuple[str, Indices] | None:
        """A factor or a summand made of parameters and constants; the operand's own value goes on."""
        own = [x for x in node.operands if isinstance(x, str) and x in self.graph.varying]
        if node.operator not in ("mul", "add", "div") or len(own) != 1:
            return None
        if node.operator == "div" and node.operands[0] != own[0]:
            return None
        if self.graph.infos[own[0]].shape != self.graph.infos[node.output].shape:
            return None
        others = [x if isinstance(x, str) else print_expr(x, 4) for x in node.operands if x != own[0]]
        shown = ", ".join(_shown(self.graph, x) if x in self.graph.infos else x for x in others)
        self._note("bias" if node.operator == "add" else "scale", node.output, operator=node.operator, by=shown)
        return own[0], indices


def _number(size: Expr) -> int | str:
    size = simplify(size)
    return int(size.value) if isinstance(size, Const) else print_expr(size)


_WRITES = {"index_copy": 3, "index_put": 2, "scatter": 3, "slice_scatter": 1, "ScatterND": 2, "ScatterElements": 2}
"""Operations that write into a copy of their first input, and which input they write (ATen, ONNX)."""


def _written(node: Opaque) -> str | None:
    """What an operation writes into a buffer, if that is what it does."""
    name = node.what.removeprefix("aten.").split(".")[0].rstrip("_")
    return node.reads[-1] if name in _WRITES and len(node.reads) > 1 else None


# --- after the site -----------------------------------------------------------------------------------------


def _after(graph: Graph, value: str) -> Iterator[Step]:
    """Gates and the output projection."""
    for _ in range(_LONGEST):
        # a step that was stated in two ways leaves one of which nothing comes
        users = [u for u in graph.users.get(value, ()) if u.output in graph.outputs or graph.users.get(u.output)]
        if len(users) != 1:
            return
        (user,) = users
        if isinstance(user, Linear):
            names = [_shown(graph, name) for name in (user.weight, *([user.bias] if user.bias else []))]
            shape = graph.infos[user.weight].shape
            outputs, inputs = reversed(shape) if user.transposed else shape
            facts: dict[str, object] = {"kernel": names[0], "bias": names[1] if user.bias else ""}
            facts |= {"inputs": _number(inputs), "outputs": _number(outputs)}
            yield Step("out", "linear", _shown(graph, user.output), facts)
            return
        if isinstance(user, Pointwise) and user.operator == "mul":
            gate = _gate(graph, next((x for x in user.operands if isinstance(x, str) and x != value), None))
            if gate is None:
                return
            yield Step("out", "gate", _shown(graph, user.output), gate)
        elif isinstance(user, Opaque):
            info = graph.infos.get(user.output)  # None where its rank is not known
            norm = recognise_norm(graph, user.output, len(info.shape) - 1) if info is not None else None
            if norm is None:
                return
            facts = {"form": norm.kind, "channels": norm.channels, "epsilon": norm.epsilon}
            facts["weights"] = list(norm.weights)
            yield Step("out", "norm", _shown(graph, user.output), facts)
        elif not isinstance(user, Move | Cast):
            return
        value = user.output


def _gate(graph: Graph, value: str | None) -> dict[str, object] | None:
    """A factor that is a sigmoid of something that varies: its function and the linear map behind it."""
    node = _moved(graph, value)
    if not isinstance(node, Pointwise) or node.output not in graph.varying:
        return None
    function = "sigmoid"
    if node.operator == "mul":  # x · sigmoid(x)
        made = (graph.producer.get(x) for x in node.operands if isinstance(x, str))
        inner = [x for x in made if isinstance(x, Pointwise) and x.operator == "sigmoid"]
        if len(inner) != 1 or inner[0].operands[0] not in node.operands:
            return None
        function, node = "silu", inner[0]
    if node.operator != "sigmoid" or not isinstance(node.operands[0], str):
        return None
    facts: dict[str, object] = {"function": function}
    behind = _moved(graph, node.operands[0])
    if isinstance(behind, Linear):
        facts |= {"kernel": _shown(graph, behind.weight), "bias": _shown(graph, behind.bias) if behind.bias else ""}
    return facts


def _moved(graph: Graph, value: str | None) -> Node | None:
    """What makes a value, before movements and casts."""
    node = graph.producer.get(value or "")
    while isinstance(node, Move | Cast):
        node = graph.producer.get(node.source)
    return node


def rotary_base(graph: Graph, position: Position) -> float | None:
    """The base of the rotary frequencies ``base^(−2n/R)``, where they are constants of the graph."""
    found = read_frequencies(graph, position)
    return found.base if found else None
