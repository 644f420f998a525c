"""Identifiers of generated code: every name from a model is sanitised, and none is used twice."""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterable


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text))


MODULE_NAMES = _words("""
    tl triton torch math range float int abs min max len map str tuple getattr super print
    attend attend_forward scan_forward quantize_blocks quantize quantize_value_blocks quantize_values
    round_to_codes empty_codes
    cosine sine angles rotate rotate_sum_blocks rotate_quantize_blocks rotate_quantize
    cosine_query sine_query angles_query rotate_query rotate_sum_blocks_query rotate_quantize_blocks_query
    cosine_key sine_key angles_key rotate_key rotate_sum_blocks_key rotate_quantize_blocks_key
    rotate_quantize_query rotate_quantize_key
    score far_score visible edit sink sink_logit divisor whole t
    decay_factor feature_map update update_edited update_narrow to_e4m3 power_scale power_inverse
    join_sink tanh round_half_even floor_divide floor_modulo
    TILES REAL WHOLE TRUTH sizes_of expect tile_of COMPILED kind launch isinstance type
    later launch_rest concurrent set
    attend_split merge_splits weigh power_above weigh_scaled from_int8 from_int4 from_e4m3 e4m3_number asked_byte
    pairs_of capability_of
    key_scale key_shift value_scale value_shift DECODE_TILES WAVES LEAST_TILES FEW_QUERIES LONG_CACHE splits_of
""")
"""Names that a module defines or imports, and built-in ones that it uses."""

BACKWARD_NAMES = _words("""
    attend_backward prepare query_gradient key_value_gradient score_slope slope add_at TILES_QUERY TILES_KEY TILES_PAIR
    out lse grad_out grad_lse grad_query grad_key grad_value shift delta deterministic gradients zeros atomic
    queries keys warps stages lead room first_row last_row tiles like
    program blocks block b g h i j rows lanes channels features real_channels real_features row_first row_last
    key_first key_last query_tile grad_tile key_tile value_tile key_offsets value_offsets query_offsets
    grad_out_offsets
    query_own key_own value_own grad_out_own out_own
    grad_query_own grad_key_own grad_value_own at row_base key_base query_sum key_sum
    value_sum row_shift row_delta query_head grad_out_head key_head value_head out_tile where empty sink_weight
    logit_gradient score_gradient rest key_blocks row_blocks row_start row_stop ATOMIC
""")
"""Names of the backward module."""

LAUNCHER_NAMES = _words("""
    out lse queries keys warps stages chunk features entropies mass
    query_codes key_codes value_codes query_scale key_scale value_scale
    block rows programs splits peaks totals partial
""")
"""Local names of the launcher."""

ROTARY_NAMES = _words("""
    tensor mean codes scale sums stride_b stride_h stride_i stride_d code_stride B H I D BLOCK TILE PAIRS REST SMOOTH
    E4M3 b i d near far pairs real rows stop own both inside x first second first_cosine first_sine second_cosine
    second_sine blocks block head others kept places rest largest rounded unit channels index part
    dtype smooth batch heads length warps _
""")
"""Local names of the kernels that rotate and round, and of their launcher."""

KERNEL_NAMES = _words("""
    query key value out lse query_scale key_scale key_heads program blocks block part
    b g h i j s w x d e row_first row_last rows lanes channels features real_channels real_features
    query_rows out_rows
    query_offsets query_tile query_scales key_offsets key_tile key_scales value_offsets value_tile out_offsets
    accumulator peak total weights factor products logits shown inside offset start number keys
    first_start first_stop first_count main_start main_stop full_start full_stop before after key_first
    key_last log_decay distance between since until whole_chunk state key_sum positions read dtype
    query_features key_features seen decayed_query decayed_key result norm written index BLOCK_I BLOCK_J BLOCK_E
    CHUNK split splits row several place share count stop partial peaks totals PRODUCT CAPABILITY
    key_rows key_stored key_tile_0 key_tile_1 key_tile_2 key_tile_3
    value_rows value_stored value_tile_0 value_tile_1 value_tile_2 value_tile_3
    query_tile_0 query_tile_1 query_tile_2 query_tile_3 accumulator_0 accumulator_1 accumulator_2 accumulator_3
    query_peak query_shift query_excess part_offsets UNIT RAISED BITS excess too_much far_lanes
    key_start value_start
    entropies mass key_mass row_lse row_shift row_peak row_total moment entropy share
    rescale largest by_key by_channel key_terms value_terms value_scales shift part_peak part_total new_peak BLOCK_S
""") | frozenset(
    f"{name}_{number}"
    for name in ("query_tile", "key_tile", "value_tile", "key_stored", "value_stored", "accumulator")
    for number in range(64)
)
"""Local names of the kernels."""


class Names:
    """Gives out identifiers, each once."""

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self._taken = {*MODULE_NAMES, *taken}

    def fresh(self, wanted: str) -> str:
        """An identifier like ``wanted`` that nothing else has."""
        plain = re.sub(r"\W", "_", wanted, flags=re.ASCII).strip("_") or "tensor"
        if plain[0].isdigit() or keyword.iskeyword(plain):
            plain = f"t_{plain}"
        name, number = plain, 2
        while name in self._taken:
            name, number = f"{plain}_{number}", number + 1
        self._taken.add(name)
        return name

    def stem(self, wanted: str, suffixes: Iterable[str]) -> str:
        """An identifier like ``wanted`` that gives a new one with each of the suffixes."""
        suffixes = tuple(suffixes)
        stem, number = wanted, 2
        while any(f"{stem}{suffix}" in self._taken for suffix in suffixes):
            stem, number = f"{wanted}_{number}", number + 1
        self._taken.update(f"{stem}{suffix}" for suffix in suffixes)
        return stem
