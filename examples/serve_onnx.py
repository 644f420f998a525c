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


def request(body: bytes) -> tuple[str, int]:
    """The prompt and the number of tokens that are asked for.

    Raises:
        ValueError: for anything else than ``{"prompt": text, "tokens": 1 or more}``.
    """
    asked = json.loads(body)
    prompt = asked.get("prompt") if isinstance(asked, dict) else None
    count = asked.get("tokens", 32) if isinstance(asked, dict) else None
    if not isinstance(prompt, str) or not prompt or type(count) is not int or count < 1:
        raise ValueError(f'send {{"prompt": text, "tokens": 1 or more}}, not {asked!r}')
    return prompt, count


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
            try:
                prompt, count = request(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
            except ValueError as error:
                self.answer(400, {"error": str(error)})
            else:
                self.answer(200, {"text": completion(og, model, prompt, count)})

        def answer(self, status: int, told: dict[str, str]) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(told).encode() + b"\n")

    HTTPServer(("127.0.0.1", port), Completion).serve_forever()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
