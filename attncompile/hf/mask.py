"""The mask interface: a mask of transformers as an expression over positions, not as a map.

transformers asks for the mask of a call once and hands it to every layer. What it gets here is a :class:`StatedMask`:
text such as ``j ≤ (i + O)`` and the tensors that the text reads. It passes for a four-dimensional mask wherever models
hand masks on, and becomes a tensor of truth values as soon as anything computes with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers.masking_utils import causal_mask_function, eager_mask, prepare_padding_mask, sdpa_mask

from attncompile.codegen.pytorch.tracing import being_traced
from attncompile.hf.models import NUMBERS, OWN, STATED, handling
from attncompile.hf.sites import say_kept
from attncompile.hf.terms import Unstated, state

PADDING = "attention_mask"
"""What a Spec calls the tensor that marks padding."""


class StatedMask(BlockMask):
    """A mask that says which positions see each other.

    It is a `BlockMask` by name only: transformers hands those on untouched.

    Attributes:
        text: the mask over ``b i j``; ``O`` is the position of the first query, ``P`` that of the first key.
        tensors: what the text reads, and ``names``: what it calls them.
        offsets: ``O`` and ``P``, integers or tensors of one element.
        lengths: batch size, number of queries, number of keys.
        reason: why the mask is a tensor of truth values that the text only reads; empty where it is stated.
        numbers: dtype of the map that computing with the mask gives, 0 where visible and else the lowest number, or
            ``None`` for truth values.
        recipe: makes the map of truth values.
    """

    def __init__(
        self,
        text: str,
        tensors: tuple[torch.Tensor, ...],
        names: tuple[str, ...],
        offsets: tuple[Any, Any],
        lengths: tuple[int, int, int],
        reason: str,
        numbers: torch.dtype | None,
        recipe: Callable[[], torch.Tensor],
    ) -> None:
        self.text, self.tensors, self.names, self.offsets, self.lengths = text, tensors, names, offsets, lengths
        self.reason, self.numbers, self.recipe = reason, numbers, recipe

    @property
    def shape(self) -> tuple[int, ...]:
        """As of the map: batch, one for all heads, queries, keys."""
        batch, queries, keys = self.lengths
        return batch, 1, queries, keys

    @property
    def ndim(self) -> int:
        """Four, as of the map."""
        return 4

    @property
    def dtype(self) -> torch.dtype:
        """As of the map."""
        return torch.bool if self.numbers is None else self.numbers

    def dim(self) -> int:
        """Four, as of the map."""
        return 4

    def size(self, axis: int | None = None) -> Any:
        """The shape of the map, or the size of one of its axes."""
        return self.shape if axis is None else self.shape[axis]

    def visible(self) -> torch.Tensor:
        """Truth values ``[batch, 1, queries, keys]``."""
        return self.recipe()

    def dense(self) -> torch.Tensor:
        """The map as the model's code expects it: truth values, or numbers that are added to scores."""
        return self.recipe() if self.numbers is None else added(self.recipe(), self.numbers)

    def contiguous(self) -> StatedMask:
        """Itself: `generate` asks for it before each step."""
        return self

    def to(self, *targets: Any, **options: Any) -> Any:
        """Itself on another device; in another dtype it is the map."""
        if any(isinstance(target, torch.dtype) for target in (*targets, *options.values())):
            return self.dense().to(*targets, **options)
        moved = tuple(tensor.to(*targets, **options) for tensor in self.tensors)
        if all(new is old for new, old in zip(moved, self.tensors, strict=True)):
            return self
        offsets = tuple(o.to(*targets, **options) if isinstance(o, torch.Tensor) else o for o in self.offsets)
        return StatedMask(
            self.text,
            moved,
            self.names,
            (offsets[0], offsets[1]),
            self.lengths,
            self.reason,
            self.numbers,
            lambda: self.visible().to(*targets, **options),
        )

    def __getitem__(self, index: Any) -> Any:
        return self.dense()[index]

    def __repr__(self) -> str:
        return f"StatedMask({self.text}, shape={self.shape})"

    __str__ = __repr__

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"a stated mask has no attribute {name!r}")
        return getattr(self.dense(), name)

    def __invert__(self) -> torch.Tensor:
        return ~self.dense()

    def __and__(self, other: Any) -> torch.Tensor:
        return self.dense() & other

    def __or__(self, other: Any) -> torch.Tensor:
        return self.dense() | other

    def __add__(self, other: Any) -> torch.Tensor:
        return self.dense() + other

    def __mul__(self, other: Any) -> torch.Tensor:
        return self.dense() * other

    __rand__, __ror__, __radd__, __rmul__ = __and__, __or__, __add__, __mul__

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*_computed(args), **{name: _computed((value,))[0] for name, value in (kwargs or {}).items()})


def _computed(values: Any) -> list[Any]:
    """The values, with maps in place of stated masks, also in lists of tensors."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, StatedMask):
            found.append(value.dense())
        else:
            found.append(_computed(value) if isinstance(value, list | tuple) else value)
    return found


def added(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Numbers that are added to scores: 0 where visible, else the lowest of the dtype, as transformers has it."""
    return torch.zeros((), dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)


_WHOLE = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}


def stated_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    config: Any = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **options: Any,
) -> StatedMask | torch.Tensor | None:
    """The mask of a call, for transformers' ``AttentionMaskInterface``; arguments as those of its ``eager_mask``.

    A causal mask is never left out: what a missing one would mean depends on the model. A model whose code does not
    take stated masks gets what transformers' own functions give.
    """
    if isinstance(q_offset, torch.Tensor):
        # 0 with an empty static cache; else a copy, since the cache counts on in place before the layers read it
        empty = q_length > 1 and _may_look(q_offset) and int(q_offset) == 0
        q_offset = 0 if empty else q_offset.clone()
    sizes: dict[str, Any] = {"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length}
    options |= {"q_offset": q_offset, "kv_offset": kv_offset, "use_vmap": use_vmap, "device": device}
    options |= {"mask_function": mask_function, "attention_mask": attention_mask, "dtype": dtype, "config": config}
    how = STATED if config is None else handling(type(config).__module__)
    if STATED not in how:
        if OWN in how:
            say_kept(type(config).__name__, "the model does not call attention through transformers' interface", False)
        return (eager_mask if OWN in how or NUMBERS in how else sdpa_mask)(**sizes, **options)

    def recipe() -> torch.Tensor:
        visible = sdpa_mask(**sizes, **(options | _WHOLE))
        assert visible is not None  # nothing was allowed to be left out
        return visible

    numbers = dtype if NUMBERS in how else None
    lengths = (batch_size, q_length, kv_length)
    try:
        padding = _padding(lengths, q_offset, kv_offset, attention_mask)
        local = options.get("local_size")
        if options.get("allow_is_bidirectional_skip") and padding is None and (local is None or kv_length < local):
            return None  # as transformers' own functions do: some models take another way without a mask
        text, tensors, names = _statement(lengths, q_offset, kv_offset, mask_function, padding)
        tensors = tuple(tensor.to(device) if tensor.numel() == 1 else tensor for tensor in tensors)  # as torch allows
        return StatedMask(text, tensors, names, (q_offset, kv_offset), lengths, "", numbers, recipe)
    except Unstated as error:
        reason = f"its mask is read from a tensor: {error}"
    made = recipe()
    return StatedMask("t0[b, 0, i, j]", (made,), ("mask",), (0, 0), lengths, reason, numbers, lambda: made)


def _statement(
    lengths: tuple[int, int, int],
    q_offset: Any,
    kv_offset: Any,
    mask_function: Callable[..., Any],
    padding: torch.Tensor | str | None,
) -> tuple[str, tuple[torch.Tensor, ...], tuple[str, ...]]:
    """Text of the mask, the tensors it reads and their names.

    Raises:
        Unstated: for a mask function that does something without a term.
    """
    batch, queries, keys = lengths
    query = "i" if not isinstance(q_offset, torch.Tensor) and q_offset == 0 else "(i + O)"
    key = "j" if not isinstance(kv_offset, torch.Tensor) and kv_offset == 0 else "(j + P)"
    reaches = {
        "b": batch,
        "0": 1,
        query: None if isinstance(q_offset, torch.Tensor) else q_offset + queries,
        key: None if isinstance(kv_offset, torch.Tensor) else kv_offset + keys,
    }
    said = state(mask_function, query, key, reaches)
    tensors = said.captured.tensors
    names = [f"mask_{number}" for number in range(len(tensors))]
    text = said.text
    if isinstance(padding, str):
        text = f"({text} and {padding})"
    elif padding is not None:
        names.append(PADDING)
        text = f"({text} and t{len(tensors)}[b, j])"
        tensors = [*tensors, padding]
    return text, tuple(tensors), tuple(names)


def _may_look(tensor: torch.Tensor) -> bool:
    """Whether Python may decide by a tensor's values: not while a graph is made or captured of what it does."""
    return not being_traced(tensor) and not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _padding(
    lengths: tuple[int, int, int], q_offset: Any, kv_offset: Any, attention_mask: torch.Tensor | None
) -> torch.Tensor | str | None:
    """Which keys are no padding: truth values ``[batch, keys]``, or text; ``None`` where all are.

    Whether all are is looked at, as transformers does for its own implementations, unless a graph is traced or the
    cache is static: what is called again and again should be one program.

    Raises:
        Unstated: for padding that is not stated for each key of each row.
    """
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2 or attention_mask.dtype is not torch.bool:
        raise Unstated(f"padding has {attention_mask.ndim} axes and dtype {attention_mask.dtype}")
    if isinstance(kv_offset, torch.Tensor):
        raise Unstated("the first key's position is known to a tensor only")
    _, queries, keys = lengths
    look = _may_look(attention_mask) and not isinstance(q_offset, torch.Tensor)
    if look and q_offset == 0 and kv_offset == 0 and attention_mask.shape[1] == queries and bool(attention_mask.all()):
        return "(j < I)" if queries < keys else None  # an empty static cache has room behind
    padding = prepare_padding_mask(attention_mask, keys, kv_offset)
    assert padding is not None  # as there is one to prepare
    padding = padding[:, kv_offset : kv_offset + keys]
    return None if look and bool(padding.all()) else padding
