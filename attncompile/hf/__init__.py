"""Attention of Hugging Face models, without tracing: ``attn_implementation="attncompile"``.

    import attncompile.hf
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("path", attn_implementation="attncompile")
    model.generate(**inputs)
    print(attncompile.hf.explain(model))

Importing this registers the name in transformers' `AttentionInterface` and `AttentionMaskInterface`. Every call of a
layer is stated as the Spec that lifting would find in the model's graph, and runs on the target that the back end of
``torch.compile`` would choose for it.
"""

from __future__ import annotations

import inspect

from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from attncompile.hf.attention import attention_forward
from attncompile.hf.mask import StatedMask, stated_mask
from attncompile.hf.sites import Explanation, SiteReport, explain, forget

NAME = "attncompile"
"""What ``attn_implementation`` is to be."""

if "q_length" not in inspect.signature(sdpa_mask).parameters:
    import transformers

    raise ImportError(
        f"attncompile.hf needs a transformers whose masks are given by lengths and offsets; {transformers.__version__} "
        "is older: pip install -U transformers"
    )

AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, stated_mask)

__all__ = ["NAME", "Explanation", "SiteReport", "StatedMask", "attention_forward", "explain", "forget", "stated_mask"]
