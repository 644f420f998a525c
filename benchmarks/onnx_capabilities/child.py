"""Runs prepared models on the ONNX Runtime that it finds; a program of its own, so that a crash is a result.

    python child.py FOLDER PROVIDER FIRST LAST

``N.onnx`` with its inputs ``N.npz`` gives ``N.out.npz``: the results of two runs, those of the second under ``again_``
and their names. Two lines go to the standard output for each: ``N begins``, and ``N ran`` or ``N refused`` with the
error.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime


def run(folder: Path, number: int, provider: str) -> None:
    """Run one model twice."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    told = json.loads((folder / f"{number}.json").read_text())
    chosen = {}
    if provider == "CUDAExecutionProvider":
        chosen = {"use_tf32": "0"}  # products of float32 numbers are to be such
        if told["operator"]:  # its own kernel, and not the CPU's
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    session = onnxruntime.InferenceSession(
        str(folder / f"{number}.onnx"), options, providers=[provider], provider_options=[chosen]
    )
    fed = dict(np.load(folder / f"{number}.npz"))
    made, again = (_results(session, fed, told["shared"]) for _ in range(2))
    np.savez(folder / f"{number}.out.npz", **made, **{f"again_{name}": array for name, array in again.items()})


def _results(
    session: onnxruntime.InferenceSession, fed: dict[str, np.ndarray], shared: dict[str, str]
) -> dict[str, np.ndarray]:
    names = [entry.name for entry in session.get_outputs()]
    if not shared:
        return dict(zip(names, session.run(None, fed), strict=True))
    binding = session.io_binding()
    # a copy each time: what is written in place is an input
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array.copy()) for name, array in fed.items()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    for name in names:
        if name in shared:
            binding.bind_ortvalue_output(name, values[shared[name]])
        else:
            binding.bind_output(name)
    session.run_with_iobinding(binding)
    return dict(zip(names, [value.numpy().copy() for value in binding.get_outputs()], strict=True))


def main() -> None:
    """See the module."""
    folder, provider, first, last = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    print("version", onnxruntime.__version__, flush=True)
    for number in range(first, last):
        print(number, "begins", flush=True)
        try:
            run(folder, number, provider)
            said = "ran"
        except Exception as error:  # ONNX Runtime's errors share no base
            said = "refused " + " ".join(str(error).split())
        print(number, said, flush=True)


if __name__ == "__main__":
    main()
