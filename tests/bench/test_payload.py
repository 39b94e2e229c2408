from __future__ import annotations

import numpy as np
import pytest

from legion_shm.native_bench.payload import Order, Use, expected_use, make, problem_of, use

USES: tuple[Use, ...] = ("touch", "read", "none")
SHAPES = [(1024,), (1, 4, 64, 64), (1, 64, 64, 3), (300_032,)]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_tensor_that_came_whole_passes_and_its_use_gives_what_was_expected(shape: tuple[int, ...]) -> None:
    for reply in (False, True):
        for how in USES:
            order = Order(shape, how, 5, 6)
            tensor = make(order, reply=reply)
            assert problem_of(tensor, order, reply=reply) == ""
            assert use(tensor, order.use) == expected_use(order, reply=reply)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("place", [0, 4096 // 2, -1])
def test_one_changed_byte_is_found_wherever_it_is(shape: tuple[int, ...], place: int) -> None:
    order = Order(shape, "touch", 5, 6)
    tensor = make(order)
    tensor.numpy().reshape(-1).view(np.uint8)[place] ^= 1
    assert problem_of(tensor, order)


def test_another_message_and_a_missing_page_are_found_by_the_touch_alone() -> None:
    order, other = Order((300_032,), "touch", 5, 6), Order((300_032,), "touch", 7, 8)
    assert use(make(other), "touch") != expected_use(order)
    torn = make(order)
    torn.numpy()[1024:2048] = 0
    assert use(torn, "touch") != expected_use(order)


def test_a_wrong_shape_or_type_is_a_problem() -> None:
    order = Order((1024,), "touch", 5, 6)
    assert "expected float32" in problem_of(make(order).reshape(2, 512), order)
    assert "expected float32" in problem_of(make(order).double(), order)


def test_a_picture_survives_eight_bits_and_a_changed_pixel_does_not() -> None:
    order = Order((2, 96, 128, 3), "touch", 5, 6, "picture")
    tensor = make(order)
    rounded = (tensor * 255).round() / 255
    assert problem_of(rounded, order) == ""
    assert expected_use(order) is None
    rounded[1, 80, 100, 2] = 1 - rounded[1, 80, 100, 2]
    assert "frame 1" in problem_of(rounded, order)


def test_an_order_survives_plain_values() -> None:
    order = Order((1, 2, 3), "read", 5, 6, "picture", corrupt=True)
    assert Order.from_plain(order.plain()) == order


def test_the_answer_that_is_to_be_spoiled_differs() -> None:
    order = Order((1024,), "touch", 5, 6, corrupt=True)
    assert problem_of(make(order, reply=True), order, reply=True)
    assert problem_of(make(order), order) == ""
