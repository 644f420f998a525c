"""Writes through views are pure functions of indices; torch, which writes to real memory, is the judge."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable

import pytest
import torch

from attncompile.frontends.aten import aten_graph
from attncompile.frontends.capture import Captured, capture_export
from attncompile.frontends.graph import Graph, Move, Opaque
from attncompile.frontends.memory import entangled_results, memory_versions
from attncompile.frontends.view_writes import CHANGED, NoInverse, inverted, view_path
from attncompile.ir import Index, simplify
from attncompile.ir.expr import Const, substitute
from tests.frontends.test_aten import INPUTS, B, as_module, elements, resized
from tests.recorded import recorded

Program = Callable[..., torch.Tensor]


def captured(function: Program) -> Captured:
    names = list(inspect.signature(function).parameters)
    return capture_export(as_module(function), (), {name: INPUTS[name]() for name in names})


def check(function: Program) -> Graph:
    """Interpretation and the proof's evaluator give what torch gives, at several lengths."""
    module, names = as_module(function), list(inspect.signature(function).parameters)
    found = captured(function)
    graph = aten_graph(found)
    (output,) = graph.outputs
    for length in (B, 7, 4):
        feeds = {name: resized(INPUTS[name](), length) for name in names}
        wide = {name: t.double() if t.is_floating_point() else t for name, t in feeds.items()}
        with torch.no_grad():
            expected = module(**{name: t.clone() for name, t in wide.items()})
        sizes = {
            str(size): extent
            for name in names
            for size, extent in zip(graph.infos[name].shape, feeds[name].shape, strict=True)
        }
        torch.testing.assert_close(elements(graph, output, recorded(found, wide), sizes).double(), expected.double())
        (run,) = graph.evaluate([output], wide, sizes).values()
        torch.testing.assert_close(run.double(), expected.double())
    return graph


def slices(x, y):
    z = x.clone()
    z[:, 1:-1] = y[:, :-2]
    z[:, :, 2:] += 1
    return z


def selected_rows(x, y):
    z = x * 1
    z[:, 0] = y[:, 1]
    z[:, -1].mul_(3)
    return z


def every_second(x, y):
    z = torch.empty_like(x)
    z[..., ::2] = -y[..., 1::2]
    z[..., 1::2] = x[..., ::2]
    return z


def every_second_of_symbolic_length(x):
    z = x.clone()
    z[:, 1::2] *= -2.0
    return z


def filled_in_parts(x, y):
    z = x.new_empty(x.shape)
    z[:, :2] = x[:, :2]
    z[:, 2:] = y[:, 2:]
    return z


def filled_by_quarters(x, y):
    z = x.new_empty(x.shape)
    z[:, :2, :1] = x[:, :2, :1]
    z[:, 2:, :1] = y[:, 2:, :1]
    z[:, :2, 1:] = y[:, :2, 1:]
    z[:, 2:, 1:] = x[:, 2:, 1:]
    return z


def write_beside_a_view_between_others(x, y):
    z = x.new_empty(x.shape)
    part = z[..., :2]
    z[:, :2] = x[:, :2]
    z[:, :, 2:] = 1.0
    z[:, 2:] = y[:, 2:]
    return part * 2


def later_write_wins(x, y):
    z = x.clone()
    z[:, 1:] = y[:, 1:]
    z[:, :3] = 2.0
    return z


def earlier_write_lost(x, y):
    z = x.clone()
    z[:, :3] = 2.0
    z[:, 1:] = y[:, 1:]
    return z


def through_a_reshape(x, y):
    z = x.clone()
    z.view(x.shape[0], -1, 2)[..., 1] = y.reshape(x.shape[0], -1, 2)[..., 0]
    return z


def through_a_transpose(x, y):
    z = x.clone()
    z.transpose(1, 2)[:, 0].add_(y[:, :, 0])
    return z


def read_through_another_view(x, y):
    z = x.clone()
    flat, turned = z.view(x.shape[0], -1), z.transpose(1, 2)
    turned[:, 1:3] = y.transpose(1, 2)[:, 1:3]
    return flat


def read_before_and_after(x, y):
    z = x.clone()
    part = z[:, 1:]
    early = part * 1
    z[:, :2] = y[:, :2]
    return early - 2 * part


def view_of_a_view(x, y):
    z = x.clone()
    z[:, 1:][:, :, 1:].transpose(1, 2)[:, 0] = y[:, 1:, 3]
    return z.unsqueeze(1).squeeze(1)


def on_the_diagonal(x, y):
    z = (x[:, :4, :4] + 0.0).contiguous()
    z.diagonal(1, 1, 2).fill_(5.0)
    z.diagonal(-2, 1, 2).copy_(y[:, :2, 0])
    return z


def one_part_of_a_split(x, y):
    z = x.clone()
    first, second = z.split(2, -1)
    second.copy_(y[..., :2])
    first.add_(second)
    return z


def all_of_it_through_a_view(x, y):
    z = torch.empty_like(x)
    z.transpose(1, 2).copy_(y.transpose(1, 2))
    return z


def flattened(x, p):
    z = x.clone()
    z.flatten(1).masked_fill_(p[:, :1], 7.0)
    return z


def written_twice_and_read_between(x, y):
    z = x.clone()
    z[:, 0] = y[:, 0]
    between = z.clone()
    z[:, 0] = 1.0
    return between + 10 * z


def masked_part(x, p):
    z = x.clone()
    z[:, 1:, :2].masked_fill_(p[:, 1:, None], -3.0)
    return z


def values_written_are_views_themselves(x, y):
    z = x.clone()
    z[:, 1:] = z[:, :-1].clone()
    return z


PROGRAMS: tuple[Program, ...] = (
    slices, selected_rows, every_second, every_second_of_symbolic_length, filled_in_parts, filled_by_quarters,
    write_beside_a_view_between_others,
    later_write_wins, earlier_write_lost, through_a_reshape, through_a_transpose, read_through_another_view,
    read_before_and_after, view_of_a_view, on_the_diagonal, one_part_of_a_split, all_of_it_through_a_view, flattened,
    written_twice_and_read_between, masked_part, values_written_are_views_themselves,
)  # fmt: skip


@pytest.mark.parametrize("function", PROGRAMS, ids=lambda function: function.__name__)
def test_a_write_through_a_view(function: Program) -> None:
    graph = check(function)
    assert not [node for node in graph.nodes if isinstance(node, Opaque) and node.what.startswith(CHANGED)]


VIEWS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    lambda z: z[:, 1:],
    lambda z: z[:, :-2],
    lambda z: z[..., 1:3],
    lambda z: z[..., ::2],
    lambda z: z[:, 1::2],
    lambda z: z[:, 2],
    lambda z: z.transpose(0, 1),
    lambda z: z.permute(2, 0, 1),
    lambda z: z.unsqueeze(-1),
    lambda z: z.unflatten(-1, (2, -1)) if isinstance(z.shape[-1], int) and z.shape[-1] == 4 else z,
    lambda z: z.narrow(1, 1, 2),
    lambda z: z.movedim(0, -1),
)


@pytest.mark.parametrize("seed", range(12))
def test_chance_writes_through_chance_views(seed: int) -> None:
    def function(x):
        draw, views = random.Random(seed), [x.clone()]
        for step in range(2):
            for _ in range(2):
                source = draw.choice(views)
                shown = draw.choice(VIEWS[:] if source.dim() == 3 else VIEWS[6:7])
                if source.dim() == 3 and source is not views[0]:
                    shown = draw.choice(VIEWS[6:9])
                views.append(shown(source) if source.dim() >= 2 else source)
            draw.choice(views).mul_(-1.5 - step)
            draw.choice(views).add_(step + 0.25)
        return views[0] + 0.0

    check(function)


def test_what_has_no_inverse_stays_opaque_with_the_reason() -> None:
    def function(x, y):
        z = x.clone()
        z.unfold(2, 2, 1)[..., 0].add_(1.0)
        return z * y

    graph = aten_graph(captured(function))
    (node,) = [node for node in graph.nodes if isinstance(node, Opaque)]
    assert node.what == f"{CHANGED} (unfold shows overlapping windows)"


def test_a_repeated_axis_has_no_inverse() -> None:
    move = Move("out", "x", lambda indices: (indices[0],), "expand")
    with pytest.raises(NoInverse, match="more than once"):
        inverted(move, (Const(3),), (Const(3), Const(5)))


def test_the_inverse_of_a_slice_says_what_lies_inside() -> None:
    move = Move("out", "x", lambda indices: (2 + 3 * indices[0],), "slice")
    inside, place = inverted(move, (Const(20),), (Const(4),))((Index("x"),))
    for position in range(20):
        found = [simplify(substitute(e, {Index("x"): Const(position)})) for e in (*inside, *place)]
        assert all(e == Const(True) for e in found[:-1]) == (position in (2, 5, 8, 11))
        if position in (2, 5, 8, 11):
            assert found[-1] == Const((position - 2) // 3)


def test_what_a_write_of_no_elements_puts_down_is_not_needed() -> None:
    def function(x, y):
        z = x.new_empty(x.shape)
        z[:] = x
        z[:, :, x.shape[2] :] = y[:, :, :0]
        return z * 2

    found = captured(function)
    graph = aten_graph(found)
    x = torch.randn(INPUTS["x"]().shape, dtype=torch.float64)
    sizes = {str(size): extent for size, extent in zip(graph.infos["x"].shape, x.shape, strict=True)}
    (run,) = graph.evaluate(list(graph.outputs), {"x": x}, sizes).values()
    assert torch.equal(run, 2 * x)


def test_what_a_write_of_all_elements_covers_is_not_needed() -> None:
    def function(x, y):
        z = x.roll(-1, 1)
        z[:, :].copy_(y)
        return z * 2

    graph = aten_graph(captured(function))
    (written,) = [node for node in graph.nodes if isinstance(node, Move) and node.what == "written"]
    assert graph.native_inputs[written.output] == written.inputs
    y = torch.randn(INPUTS["y"]().shape, dtype=torch.float64)
    sizes = {str(size): extent for size, extent in zip(graph.infos["y"].shape, y.shape, strict=True)}
    (run,) = graph.evaluate(list(graph.outputs), {"y": y}, sizes).values()
    assert torch.equal(run, 2 * y)


def test_views_are_followed_to_the_tensor_that_owns_the_memory() -> None:
    def function(x):
        z = x.clone()
        z.narrow(1, 1, 2).transpose(1, 2).add_(1.0)
        return z

    graph = captured(function).graph_module.graph
    (writer,) = [node for node in graph.nodes if str(node.target).startswith("aten.add_")]
    assert [node.name for node in view_path(writer)] == ["clone", "narrow", "transpose"]


def entangled(function: Program) -> set[str]:
    graph = captured(function).graph_module.graph
    return set(entangled_results(graph, memory_versions(graph)))


def test_what_another_tensor_shows_later_can_not_be_replaced() -> None:
    def shown_by_its_source(x):
        z = x * 2
        z.view(-1).add_(1.0)
        return z

    def shown_by_its_views(x):
        z = x * 2
        flat = z.view(-1)
        z.add_(1.0)
        return flat

    def not_written_later(x):
        z = x * 2
        z.view(-1).add_(1.0)
        return z.view(-1) * 3

    assert {"mul", "view"} <= entangled(shown_by_its_source)
    assert "view" in entangled(shown_by_its_views) and "mul" not in entangled(shown_by_its_views)
    assert "mul_1" not in entangled(not_written_later)
