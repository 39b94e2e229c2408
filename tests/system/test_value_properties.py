"""Generated values of every kind, through a worker and back: the same to the bit.

``LEGION_VALUE_EXAMPLES`` sets how many.
"""

from __future__ import annotations

import enum
import os
from collections import deque
from dataclasses import dataclass
from fractions import Fraction
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from legion_shm import Supervisor
from tests.system.support import flow, spec
from tests.transport.codec_values import Sample, assert_same, values

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

EXAMPLES = int(os.environ.get("LEGION_VALUE_EXAMPLES", "2000"))
SPEC = spec(codec_modules=[__name__])


class Hue(enum.Enum):
    RED = "r"
    BLUE = 2


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclass
class Held:
    value: Any
    more: Any = None


@st.composite
def wrapped(draw: st.DrawFn) -> tuple[str, Any, Sample]:
    return draw(st.sampled_from(["held", "pair", "deque", "twice", "plain"])), None, draw(values())


def build(kind: str, inner: Any) -> Any:
    others = [Hue.RED, Fraction(1, 3), PurePosixPath("a/b"), {Hue.BLUE: 1}]
    return {
        "held": Held(inner, others),
        "pair": Pair(inner, others),
        "deque": deque([inner, *others], maxlen=9),
        "twice": [Held(inner), Pair(inner, inner)],
        "plain": inner,
    }[kind]


def parts(kind: str, value: Any) -> list[Any]:
    if kind == "held":
        return [value.value, value.more]
    if kind == "twice":
        return [value[0].value, *value[1]]
    return list(value) if kind in ("pair", "deque") else [value]


@pytest.mark.timeout(600)
def test_generated_values_go_through_a_worker_and_come_back_the_same() -> None:
    with Supervisor() as legion:

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        )
        @given(wrapped())
        def check(case: tuple[str, Any, Sample]) -> None:
            kind, _, sample = case
            value = build(kind, sample.value)
            got = legion.submit(flow("TestPass"), inputs=[value], spec=SPEC).result(timeout=60)["output_1"]
            assert type(got) is type(value)
            for sent, back in zip(parts(kind, value), parts(kind, got), strict=True):
                if kind == "twice" or not isinstance(sent, (Fraction, PurePosixPath, Hue)):
                    if any(isinstance(item, Fraction) for item in (sent if isinstance(sent, list) else [])):
                        assert sent == back
                    else:
                        assert_same(sent, back)
                else:
                    assert sent == back

        check()


TWO_CHANNELS = {
    "in": {"class_type": "LegionImporter", "inputs": {}},
    "out": {"class_type": "LegionExporter", "inputs": {"input_1": ["in", 0], "input_2": ["in", 1]}},
}


def test_what_two_channels_share_is_one_object_in_the_worker_and_in_the_results() -> None:
    image, names = torch.rand(1, 64, 64, 3), ["a", "b"]
    with Supervisor() as legion:

        def sent(first: Any, second: Any) -> Any:
            return legion.submit(TWO_CHANNELS, inputs=[first, second], spec=SPEC).result(timeout=60)

        got = sent(image, [image, names])
        assert got["output_2"][0] is got["output_1"]
        assert torch.equal(got["output_1"], image)
        again = sent(got["output_1"], got["output_2"])  # a worker's output, back to it by handle
        assert again["output_2"][0] is again["output_1"]
        apart = sent(image, [image.clone(), names])
        assert apart["output_2"][0] is not apart["output_1"]
