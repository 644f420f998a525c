"""Ways in which people write attention, and what each of them says.

A row states the canonical score, mask, KV head and so on of every site that its function holds. The functions
are written as published models write them; sizes are tiny.
"""

from __future__ import annotations

from tests.lift.forms import Table
from tests.lift.spellings import calls, masks, operands, products, sinks, weights

SPELLINGS = Table()
for part in (products, operands, masks, weights, sinks, calls):
    SPELLINGS.rows += part.TABLE.rows
