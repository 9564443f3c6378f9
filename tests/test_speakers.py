"""Every claim of the table of spellings that can be run, against the library that it is about.

Those of libraries that the tests do not need otherwise run where these are installed:

    sh benchmarks/conventions/setup.sh FOLDER
    PYTHONPATH=FOLDER python -m pytest tests/test_speakers.py -m "slow or not slow"
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import asked
import pytest
from speakers import SPEAKERS

from attnzoo.conventions import SPELLINGS

#: Of the packages that the tests need otherwise.
AT_HAND = ("torch", "transformers", "xformers", "onnx", "onnxruntime")


def found(name: str) -> dict[str, Any]:
    """What the library itself says of each claim."""
    speaker, one = SPEAKERS[name], SPELLINGS[name]
    said = one.layout.replace("(", "").replace(")", "")  # heads and width in one axis
    answers: dict[str, Any] = {}
    for claim in speaker.claims:
        if claim in ("decay", "state"):
            answers["decay"], answers["state"] = asked.gates(speaker, said)
        elif claim in ("arguments", "l2_norm"):
            answers[claim] = getattr(asked, claim)(speaker, getattr(one, claim))
        elif claim in ("mask", "hidden_row"):
            answers[claim] = getattr(asked, claim)(speaker, said, one.mask)
        else:
            answers[claim] = getattr(asked, claim)(speaker, said)
    if answers.get("layout") == said:
        answers["layout"] = one.layout
    return {claim: answers[claim] for claim in speaker.claims}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if speaker.package in AT_HAND else pytest.mark.slow)
        for name, speaker in SPEAKERS.items()
    ],
)
def test_what_is_claimed_of_a_library_is_what_it_does(name: str) -> None:
    try:
        version(SPEAKERS[name].package)
    except PackageNotFoundError as missing:
        pytest.skip(str(missing))
    one = SPELLINGS[name]
    assert found(name) == {claim: getattr(one, claim) for claim in SPEAKERS[name].claims}


def test_the_table_names_what_was_asked() -> None:
    for name, one in SPELLINGS.items():
        claims = SPEAKERS[name].claims if name in SPEAKERS else ()
        assert set(one.tested) == set(claims), name
        assert bool(one.tested) == bool(one.date)
