"""A text completion service over a converted language model, with onnxruntime-genai:

    attncompile convert SmolLM2-135M -o smollm2
    pip install onnxruntime-genai
    python examples/serve_onnx.py smollm2 8000
    curl -d '{"prompt": "The capital of France is", "tokens": 16}' http://127.0.0.1:8000/
"""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any


def completion(og: Any, model: Any, prompt: str, count: int) -> str:
    """The prompt and at most ``count`` tokens that follow."""
    tokenizer = og.Tokenizer(model)
    ids = tokenizer.encode(prompt)
    settings = og.GeneratorParams(model)
    settings.set_search_options(max_length=len(ids) + count, do_sample=False)
    generator = og.Generator(model, settings)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    text: str = tokenizer.decode(generator.get_sequence(0))
    return text


def main(folder: str, port: int) -> None:
    """Answer on this machine's own address until interrupted."""
    import onnxruntime_genai as og

    model = og.Model(folder)

    class Completion(BaseHTTPRequestHandler):
        """``POST {"prompt": …, "tokens": …}`` gives ``{"text": …}``."""

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = completion(og, model, asked["prompt"], asked.get("tokens", 32))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"text": text}).encode() + b"\n")

    HTTPServer(("127.0.0.1", port), Completion).serve_forever()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
