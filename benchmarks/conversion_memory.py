"""Memory and processor time of conversions to ONNX, stage by stage.

    python -m benchmarks.conversion_memory OUT.json CHECKPOINT… [-- OPTION…]

Each checkpoint is converted as ``attncompile convert --cache`` does, with the options behind ``--``, in a process of
its own. A thread of it reads the resident memory every few milliseconds: what is its own (anonymous), and pages of
files that are mapped, of which the system has as many copies as it likes. ``peak_bytes`` is the system's own count of
the largest resident set. What importing PyTorch and transformers takes is stated, and taken off for ``copies``: bytes
of memory for each byte of the checkpoint's weights. Linux.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CHILD = """
import json, resource, sys, threading, time

def resident():
    found = {}
    for line in open("/proc/self/status"):
        name, _, value = line.partition(":")
        if name in ("VmRSS", "RssAnon", "RssFile"):
            found[name] = 1024 * int(value.split()[0])
    return found

import torch, transformers, attncompile
import attncompile.convert.onnx
imported, stages, current, done = resident(), {}, ["opening"], threading.Event()

def watch():
    while not done.wait(0.005):
        now, most = resident(), stages.setdefault(current[0], {})
        for name, size in now.items():
            most[name] = max(most.get(name, 0), size)

def progress(stage):
    current[0] = stage.partition(":")[0]

watcher = threading.Thread(target=watch)
watcher.start()
options = json.loads(sys.argv[3])
start = time.process_time()
try:
    attncompile.convert(sys.argv[1], sys.argv[2], progress=progress, **options)
finally:
    done.set()
    watcher.join()
peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"imported": imported, "stages": stages, "peak_bytes": peak,
                  "processor_seconds": round(time.process_time() - start, 1)}))
"""


def measured(checkpoint: Path, options: dict[str, Any]) -> dict[str, Any]:
    """One conversion in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-c", CHILD, str(checkpoint), f"{scratch}/out", json.dumps(options)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{checkpoint}: {done.stderr.strip().splitlines()[-1]}")
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    weights = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    own = max(stage["RssAnon"] for stage in found["stages"].values()) - found["imported"]["RssAnon"]
    return {
        "checkpoint": checkpoint.name,
        "options": options,
        "weight_bytes": weights,
        "copies": round((found["peak_bytes"] - found["imported"]["VmRSS"]) / weights, 2),
        "copies_anonymous": round(own / weights, 2),
        **found,
    }


def options_of(words: list[str]) -> dict[str, Any]:
    """``--shared-buffer --precision int4`` as arguments of :func:`attncompile.convert`."""
    found: dict[str, Any] = {"cache": True}
    for word in words:
        if word.startswith("--"):
            name = word[2:].replace("-", "_")
            found[name] = True
        else:
            found[name] = word
    return found


def main(out: Path, checkpoints: list[Path], options: dict[str, Any]) -> None:
    """Convert each and write what was seen."""
    rows = []
    for checkpoint in checkpoints:
        rows.append(measured(checkpoint, options))
        print({name: rows[-1][name] for name in ("checkpoint", "copies", "copies_anonymous", "peak_bytes")}, flush=True)
    record = {"date": time.strftime("%Y-%m-%d"), "load_average": list(os.getloadavg()), "rows": rows}
    out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    if cut < 2:
        raise SystemExit("usage: python -m benchmarks.conversion_memory OUT.json CHECKPOINT… [-- OPTION…]")
    main(Path(words[0]), [Path(word) for word in words[1:cut]], options_of(words[cut + 1 :]))
