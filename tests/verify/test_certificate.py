"""``certificate.json`` is written, read back, and refuses what is not so."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import pytest

from attncompile.verify import (
    Certificate,
    check_site,
    load_certificate,
    measured,
    refused_site,
    save_certificate,
)
from tests.cases import BY_NAME
from tests.tampering import change
from tests.verify.test_sites import interpreted


def example() -> Certificate:
    spec = BY_NAME["causal-padding"].spec
    return Certificate(
        model="tiny", target="torch", plan="0" * 16,
        sites=(
            check_site("layers.0", spec, functools.partial(interpreted, spec), operator="definition"),
            refused_site("layers.1", "its weights are returned"),
        ),
        end_to_end=(
            measured("max_abs logits", None, 1e-6, "2 × 7 tokens", 1e-4),
            measured("perplexity", 25.6, 27.2, "1024 tokens", None),
        ),
    )


def test_round_trip(tmp_path: Path) -> None:
    certificate = example()
    path = tmp_path / "certificate.json"
    save_certificate(certificate, path)
    assert load_certificate(path) == certificate
    assert certificate.passed
    content = json.loads(path.read_text())
    assert content["schema"] == 1 and "torch" in content["versions"]
    assert list(tmp_path.iterdir()) == [path]


def test_not_a_number_survives(tmp_path: Path) -> None:
    entry = measured("perplexity", 25.6, math.nan, "x", 1.0)
    certificate = example().model_copy(update={"end_to_end": (entry,)})
    save_certificate(certificate, tmp_path / "c.json")
    loaded = load_certificate(tmp_path / "c.json")
    assert math.isnan(loaded.end_to_end[0].after)
    assert not loaded.passed and "went from 25.6 to nan" in loaded.failures()[0]


def test_a_number_beyond_its_tolerance_fails() -> None:
    entry = measured("max_abs logits", None, 1.0, "x", 1e-4)
    certificate = example().model_copy(update={"end_to_end": (entry,)})
    assert certificate.failures() == ("max_abs logits on x went from None to 1.0, 0.0001 is allowed",)


@pytest.mark.parametrize(("after", "as_error", "as_number"), [
    (1.05e-3, True, True), (0.95e-3, True, True), (0.5e-3, True, False), (1.5e-3, False, False),
    (math.nan, False, False), (math.inf, False, False),
])
def test_an_error_may_shrink_and_another_number_may_not(after: float, as_error: bool, as_number: bool) -> None:
    assert measured("error of logits", 1e-3, after, "x", 1e-4, error=True).passed is as_error
    assert measured("logits", 1e-3, after, "x", 1e-4).passed is as_number


@pytest.mark.parametrize(("path", "value", "message"), [
    (("sites", 0, "cases", 0, "max_abs"), 1e9, r"at sites.0.cases.0: says passed, but the error 1e\+09"),
    (("sites", 0, "cases", 0, "passed"), "maybe", "not valid at sites.0.cases.0.passed"),
    (("sites", 0, "fingerprint"), "f" * 16, "the Spec of layers.0 does not have the fingerprint ffff"),
    (("sites", 0, "spec"), "nonsense", "not valid at sites.0: "),
    (("sites", 0, "status"), "fine", "status: Input should be 'checked', 'unchanged' or 'rolled back'"),
    (("schema",), 2, "not valid at schema: Input should be 1"),
    (("extra",), 1, "not valid at extra: Extra inputs are not permitted"),
    (("end_to_end", 0, "passed"), False, "passed is False, but None → 1e-06"),
])
def test_tampering(tmp_path: Path, path: tuple[str | int, ...], value: object, message: str) -> None:
    file = tmp_path / "certificate.json"
    save_certificate(example(), file)
    change(file, path, value)
    with pytest.raises(ValueError, match=message) as caught:
        load_certificate(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("content", "message"), [
    (None, "cannot read the certificate .*: No such file"),
    (b"{", "is not valid: Invalid JSON"),
    (b"\xff\xfe\x00", "is not a text file"),
    (b"[]", "is not valid: Input should be an object"),
])
def test_no_certificate(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "certificate.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_certificate(file)
