"""``torch.compile`` with attncompile on a small random Llama: same tokens, attention rewritten.

python examples/compile_a_model.py
"""

from __future__ import annotations

import torch
import transformers


def main() -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1000,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    prompt = torch.randint(1000, (2, 40))

    # No import of attncompile: the back end is found by its name where the package is installed.
    options = {"rest": "eager", "verbose": True}  # without "rest", Inductor compiles what is not attention
    compiled = torch.compile(model, backend="attncompile", options=options)

    with torch.no_grad():
        expected, actual = model(prompt).logits, compiled(prompt).logits
    print(f"largest difference of the logits: {(expected - actual).abs().max():.1e}")


if __name__ == "__main__":
    main()
