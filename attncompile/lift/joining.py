"""Attention that is written in pieces, as one: the graph view with two products where there were several.

Two identities of sums, which hold for any pieces:

- ``Σ_p c_p · W_p V_p = [c_0 W_0, c_1 W_1, …] [V_0; V_1; …]``: products of slices of the weights with different values,
  added up, are one product with the values behind each other;
- ``[Q K_0ᵀ, Q K_1ᵀ, …] = Q [K_0; K_1; …]ᵀ``: the scores of one query and several groups of keys are slices of one
  product with the keys behind each other.

They are applied where pieces of one row follow each other without overlap or gap. The values that they add to the view
(their names hold a ``#``) are none of the native graph; the operands that they join stay separate inputs of the site.
Whether the result is attention is then asked as of any other graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from attncompile.frontends.graph import (
    Concatenate,
    Contract,
    Graph,
    IndexMap,
    Indices,
    Info,
    Move,
    Node,
    Pointwise,
    Reduce,
)
from attncompile.ir import Expr, Index
from attncompile.ir.expr import ONE, ZERO, Const, symbols
from attncompile.lift.anchors import Anchor, normalisers, products_after, scores_behind
from attncompile.lift.axes import CHANNEL, KEY
from attncompile.lift.interpret import Interpreter
from attncompile.lift.operands import Operand, label_sizes, operand_indices, trace_operand
from attncompile.lift.pieces import (
    Piece,
    inverse,
    piece_of_weights,
    pieces_of_scores,
    placed,
    sums_of,
    tiled,
    total_of,
    weight_side,
)
from attncompile.lift.rows import Rows


def joined(graph: Graph) -> Graph:
    """The graph with all pieces joined that belong together; the graph itself where there are none."""
    view = _View(graph)
    for anchor in normalisers(graph):
        if anchor.kind not in ("softmax", "quotient"):
            continue
        weights = anchor.output if anchor.product is None else anchor.source
        products = [product for product in products_after(graph, weights) if product.output not in view.done]
        if len(products) > 1:
            _join_products(view, weights, products)
        scores = [score.contract for score in scores_behind(graph, anchor.source) if not score.mixes]
        if len(scores) > 1 and not any(score.output in view.done for score in scores):
            _join_scores(view, anchor, scores)
    return view.graph()


@dataclass
class _View:
    """What is added to a graph, and what it replaces."""

    base: Graph
    made: dict[str, Node] = field(default_factory=dict)
    infos: dict[str, Info] = field(default_factory=dict)
    owner: dict[str, str] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    left_over: set[str] = field(default_factory=set)

    def add(self, node: Node, of: str, shape: Iterable[Expr] = (), like: str = "") -> str:
        """A node of the view; one that has no shape given replaces a node of the graph."""
        self.made[node.output] = node
        if like:
            self.infos[node.output] = Info(tuple(shape), self.base.infos[like].dtype)
            self.owner[node.output] = self.base.owner.get(of, of)
        return node.output

    def graph(self) -> Graph:
        """The graph with the additions, in an order in which every value is made before it is read."""
        if not self.made:
            return self.base
        nodes = {node.output: self.made.get(node.output, node) for node in self.base.nodes}
        nodes |= self.made
        readers: dict[str, int] = {}
        for node in nodes.values():
            for name in node.inputs:
                readers[name] = readers.get(name, 0) + 1
        unread = [name for name in self.left_over if not readers.get(name) and name not in self.base.outputs]
        while unread:
            for read in nodes.pop(unread.pop()).inputs:
                readers[read] -= 1
                if not readers[read] and read in self.left_over and read not in self.base.outputs:
                    unread.append(read)
        return replace(
            self.base,
            nodes=_ordered(nodes),
            infos={**self.base.infos, **self.infos},
            owner={**self.base.owner, **self.owner},
        )


def _ordered(nodes: Mapping[str, Node]) -> tuple[Node, ...]:
    """The nodes with every one behind those that it reads, else as they were."""
    found: dict[str, Node] = {}
    for name in nodes:
        stack = [name]
        while stack:
            current = stack[-1]
            missing = [read for read in nodes[current].inputs if read in nodes and read not in found]
            if current in found or not missing:
                found.setdefault(current, nodes[stack.pop()])
            else:
                stack += missing
    return tuple(found.values())


def _moved(symbols_of: Sequence[Expr], indices: Indices) -> IndexMap:
    """The index map of a view whose axes are some symbols of the indices of what it shows."""
    return lambda at: placed(indices, dict(zip(symbols_of, at, strict=True)))


def _read(indices: Iterable[Indices], axes: Sequence[Index]) -> list[Index]:
    """The axes that some indices run over, in order."""
    found = {symbol for entries in indices for index in entries for symbol in symbols(index)}
    return [axis for axis in axes if axis in found]


# --- products with values -------------------------------------------------------------------------------------


def _join_products(view: _View, weights: str, products: Sequence[Contract]) -> None:
    """Join the products of slices of some weights that are added up."""
    graph = view.base
    pieces = [piece for product in products if (piece := piece_of_weights(graph, weights, product)) is not None]
    # the longest sum first: some of its pieces may follow each other too
    for value, group in sorted(sums_of(graph, pieces), key=lambda entry: -len(entry[1])):
        if value in view.made or any(piece.product.output in view.done for piece in group):
            continue
        row = tiled(group)
        total = total_of(graph, value, row) if row is not None else None
        if total is not None:
            _add_product(view, weights, value, total)


@dataclass(frozen=True)
class _Axes:
    """The axes of a joined product.

    Attributes:
        sizes: the symbols and their sizes.
        element: of the sum, over these symbols.
        separate: whether the sum has these axes itself.
    """

    sizes: Mapping[Index, Expr]
    element: Mapping[Expr, Expr]
    separate: bool


def _axes_of(graph: Graph, value: str, pieces: Sequence[Piece]) -> _Axes | None:
    """Axes of a sum in which heads and channels are apart: its own, or those of the piece that has most."""
    shape = graph.infos[value].shape
    outer = {Index(f"y{n}"): size for n, size in enumerate(shape)}
    for piece in pieces:
        plain = [index for index in piece.element if index != ZERO]
        wanted = {y for y, size in outer.items() if size != ONE}
        if all(isinstance(index, Index) for index in plain) and wanted <= set(plain):
            return _Axes(outer, {y: y for y in outer}, separate=True)
    piece = max(pieces, key=lambda piece: len(piece.element))
    axes = {Index(f"z{n}"): size for n, size in enumerate(graph.infos[piece.product.output].shape)}
    element = inverse(graph, piece.element, tuple(axes.values()), list(axes), outer)
    return None if element is None else _Axes(axes, element, separate=False)


def _add_product(view: _View, weights: str, value: str, pieces: Sequence[Piece]) -> None:
    graph = view.base
    axes = _axes_of(graph, value, pieces)
    if axes is None:
        return
    simplifier = graph.simplifier({axis.name: size for axis, size in axes.sizes.items()})
    sides: list[tuple[Indices, Indices]] = []
    names: list[tuple[str, str]] = []
    for piece in pieces:
        product = piece.product
        element = tuple(simplifier(index) for index in placed(piece.element, axes.element))
        summed: dict[str, Expr] = {product.summed[0]: KEY}
        side = weight_side(graph, weights, product)
        assert side is not None
        other = "right" if side == "left" else "left"
        sides.append(
            (
                operand_indices(graph, product, side, element, summed),
                operand_indices(graph, product, other, element, summed),
            )
        )
        names.append((product.left, product.right) if side == "left" else (product.right, product.left))
    values = _read([indices for _, indices in sides], list(axes.sizes))
    rows = [axis for axis in axes.sizes if axis not in values or axis in _read([found for found, _ in sides], [axis])]
    shared: list[tuple[str, tuple[str, ...]]] = []
    for place, (what, used) in enumerate((("weights", rows), ("values", values))):
        parts = []
        for n, piece in enumerate(pieces):
            shape = (*(axes.sizes[axis] for axis in used), piece.length)
            part, name = f"{value}#{what}{n}", names[n][place]
            move = Move(part, name, _moved([*used, KEY], sides[n][place]), "piece")
            view.add(move, piece.product.output, shape, name)
            if place == 0 and piece.factor != 1.0:
                scaled = Pointwise(f"{part}_scaled", "mul", (part, Const(piece.factor)))
                part = view.add(scaled, piece.product.output, shape, name)
            parts.append(part)
        whole = pieces[0].length
        for piece in pieces[1:]:
            whole = whole + piece.length
        shape = (*(axes.sizes[axis] for axis in used), graph.simplifier({})(whole))
        together = Concatenate(f"{value}#{what}", tuple(parts), len(used))
        view.add(together, value, shape, names[0][place])
        shared.append((together.output, (*(axis.name for axis in used), "j")))
    (left, left_labels), (right, right_labels) = shared
    output = value if axes.separate else f"{value}#product"
    product = Contract(output, left, right, left_labels, right_labels, tuple(axis.name for axis in axes.sizes))
    if axes.separate:
        view.add(product, value)
    else:
        view.add(product, value, tuple(axes.sizes.values()), value)
        widest = max(pieces, key=lambda piece: len(piece.element))
        outer = [Index(f"y{n}") for n in range(len(graph.infos[value].shape))]
        view.add(Move(value, output, _moved(outer, widest.element), "sum of the pieces"), value)
    old = {piece.product.output for piece in pieces}
    between = frozenset().union(*(graph.descendants(name, value) for name in old))
    view.left_over |= graph.ancestors([value], between) & between - {value}
    view.done |= old


# --- products that make scores --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scored:
    """A piece of the scores with what it is a product of, over the axes of what is normalised.

    Attributes:
        queries: the tensors that its queries could be said to be, nearest first.
        key: the operand that runs over the keys, and its element's indices.
    """

    piece: Piece
    queries: list[Operand]
    key: str
    key_indices: Indices


def _join_scores(view: _View, anchor: Anchor, products: Sequence[Contract]) -> None:
    """Join the products of one query with several groups of keys that are normalised together."""
    graph, source = view.base, anchor.source
    axis = anchor.axis
    if axis is None:
        total = graph.producer[anchor.total]
        assert isinstance(total, Reduce)
        axis = total.axes[0] % len(graph.infos[source].shape)
    behind = frozenset().union(*(graph.descendants(product.output, source) for product in products))
    rows = Rows.before(graph, source, behind)
    every = pieces_of_scores(graph, source, axis, products, rows.stops)
    whole = graph.infos[source].shape[axis]
    pieces = tiled([piece for piece in every if piece.length != whole])
    if pieces is None or len(pieces) < 2:
        return
    # the masks too may be made of products, and those of an earlier layer be behind the keys of this one
    behind = frozenset().union(*(graph.descendants(piece.product.output, source) for piece in pieces))
    shape = graph.infos[source].shape
    axes = {Index(f"y{n}"): size for n, size in enumerate(shape) if n != axis}
    found = [_scored(graph, piece, axes, behind) for piece in pieces]
    scored = [entry for entry in found if entry is not None]
    if len(scored) < len(pieces):
        return
    query = _common_query(scored)
    if query is None:
        return
    channels = {label_sizes(graph, entry.piece.product)[entry.piece.product.summed[0]] for entry in scored}
    if len(channels) != 1:
        return
    operand, factors = query
    _add_scores(view, source, axes, scored, operand, factors, channels.pop())


def _scored(graph: Graph, piece: Piece, axes: Mapping[Index, Expr], behind: frozenset[str]) -> _Scored | None:
    product = piece.product
    extents = {axis.name: size for axis, size in axes.items()}
    extents |= {"j": piece.length, "d": label_sizes(graph, product)[product.summed[0]]}
    indices = {
        side: operand_indices(graph, product, side, piece.element, {product.summed[0]: CHANNEL})
        for side in ("left", "right")
    }
    keyed = [side for side, found in indices.items() if any(KEY in symbols(index) for index in found)]
    if len(keyed) != 1 or product.left in behind or product.right in behind:
        return None
    key, query = (product.left, product.right) if keyed == ["left"] else (product.right, product.left)
    asked = indices["right" if keyed == ["left"] else "left"]
    queries = trace_operand(Interpreter(graph, {}, behind, extents), query, asked, frozenset([CHANNEL]))
    return _Scored(piece, queries, key, indices[keyed[0]])


def _common_query(scored: Sequence[_Scored]) -> tuple[Operand, list[Expr]] | None:
    """The nearest tensor that all pieces have as their queries, and what each multiplies it with."""
    for operand in scored[0].queries:
        factors = []
        for entry in scored:
            same = [q for q in entry.queries if (q.value, q.indices) == (operand.value, operand.indices)]
            if same and not any(isinstance(symbol, Index) for symbol in symbols(same[0].factor)):
                factors.append(same[0].factor)
        if len(factors) == len(scored):
            return operand, factors
    return None


def _add_scores(
    view: _View,
    source: str,
    axes: Mapping[Index, Expr],
    scored: Sequence[_Scored],
    query: Operand,
    factors: Sequence[Expr],
    channels: Expr,
) -> None:
    graph = view.base
    over_query = _read([query.indices], list(axes))
    over_keys = _read([entry.key_indices for entry in scored], list(axes))
    both = [axis for axis in axes if axis in over_query or axis in over_keys]
    length = scored[0].piece.length
    for entry in scored[1:]:
        length = length + entry.piece.length
    length = graph.simplifier({})(length)
    name = f"{source}#scores"
    slices: dict[str, IndexMap] = {}
    begin: Expr = ZERO
    for entry in scored:
        made = _slice(graph, entry.piece, {axis: axes[axis] for axis in both}, begin)
        if made is None:
            return
        slices[entry.piece.product.output] = made
        begin = graph.simplifier({})(begin + entry.piece.length)
    first = scored[0].piece.product.output
    q_shape = (*(axes[axis] for axis in over_query), channels)
    move = Move(f"{source}#queries", query.value, _moved([*over_query, CHANNEL], query.indices), "queries")
    view.add(move, first, q_shape, query.value)
    parts = []
    for n, entry in enumerate(scored):
        part = Move(f"{source}#keys{n}", entry.key, _moved([*over_keys, KEY, CHANNEL], entry.key_indices), "keys")
        shape = (*(axes[axis] for axis in over_keys), entry.piece.length, channels)
        parts.append(view.add(part, entry.piece.product.output, shape, entry.key))
    k_shape = (*(axes[axis] for axis in over_keys), length, channels)
    view.add(Concatenate(f"{source}#keys", tuple(parts), len(over_keys)), first, k_shape, scored[0].key)
    labels = [axis.name for axis in over_query], [axis.name for axis in over_keys], [axis.name for axis in both]
    product = Contract(
        name, move.output, f"{source}#keys", (*labels[0], "d"), (*labels[1], "j", "d"), (*labels[2], "j")
    )
    view.add(product, first, (*(axes[axis] for axis in both), length), first)
    for entry, factor in zip(scored, factors, strict=True):
        output = entry.piece.product.output
        if factor == Const(1.0):
            view.add(Move(output, name, slices[output], "slice of the scores"), output)
            continue
        part = Move(f"{output}#slice", name, slices[output], "slice of the scores")
        view.add(part, output, graph.infos[output].shape, output)
        view.add(Pointwise(output, "mul", (part.output, factor)), output)
    view.done |= {entry.piece.product.output for entry in scored}


def _slice(graph: Graph, piece: Piece, axes: Mapping[Index, Expr], begin: Expr) -> IndexMap | None:
    """Where in the joined scores an element of a piece stands; ``None`` where the piece has other axes."""
    shape = graph.infos[piece.product.output].shape
    places = [Index(f"u{n}") for n in range(len(shape))]
    found = inverse(graph, piece.element, shape, places, {**axes, KEY: piece.length})
    if found is None:
        return None
    at = (*(found[axis] for axis in axes), found[KEY] + begin)
    return _moved(places, at)


__all__ = ["joined"]
