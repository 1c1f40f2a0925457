"""What is wrong with a setting is said in one form: class, setting, what would be right, what was given, a remedy."""

import pickle
from concurrent.futures import ProcessPoolExecutor
from math import inf, nan
from multiprocessing import get_context

import pytest

from latentdm.errors import UserError, UserTypeError, attributed
from latentdm.validation import Check

check = Check("Mask")


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: check.integer("boxes", 0, 1), "Mask: boxes must be an integer of at least 1, got 0"),
        (lambda: check.integer("boxes", True, 1, 32), "Mask: boxes must be an integer in 1…32, got True"),
        (lambda: check.integer("move", 2.0, -8, 8, "use 2"), "Mask: move must be an integer in −8…8, got 2.0; use 2"),
        (lambda: check.number("share", nan, 0, 1), "Mask: share must be a number in 0…1, got nan"),
        (lambda: check.number("share", inf), "Mask: share must be a number, got inf"),
        (lambda: check.number("share", -1, 0), "Mask: share must be a number of at least 0, got -1"),
        (lambda: check.probability("flip", "x"), "Mask: flip must be a probability in 0…1, got 'x'"),
        (lambda: check.choice("kind", "c", ("a", "b")), "Mask: kind must be one of a, b, got 'c'"),
        (lambda: check.choice("kind", ["a"], ("a", "b")), "Mask: kind must be one of a, b, got ['a']"),
        (lambda: check.integers("n", (2, 1), 1, 4), "Mask: n must be two integers in 1…4, in order, got [2, 1]"),
        (lambda: check.integers("sides", 3, 1), "Mask: sides must be two integers of at least 1, in order, got 3"),
    ],
)
def test_what_is_wrong_is_said_in_one_form(call, text):
    with pytest.raises(UserError) as caught:
        call()
    assert str(caught.value) == text


def test_what_is_right_is_returned():
    assert check.integer("n", 3, 1) == 3
    assert check.number("x", 1, 0, 1) == 1.0
    assert check.probability("p", 0) == 0.0
    assert check.choice("kind", "a", ("a",)) == "a"
    assert check.integers("sides", [1, 4], 1, 4) == (1, 4)


def test_an_error_names_the_innermost_class_that_claims_it():
    with pytest.raises(UserError) as caught, attributed("Outer"), attributed("Inner"):
        raise UserError("pixels: empty")
    assert str(caught.value) == "Inner: pixels: empty"


def test_a_wrong_type_is_a_type_error_and_a_value_error():
    assert issubclass(UserTypeError, TypeError)
    assert issubclass(UserTypeError, ValueError)


def failing():
    with attributed("Owner"):
        raise UserError("said")


def test_an_error_keeps_its_owner_between_processes():
    with pytest.raises(UserError) as caught:
        failing()
    assert str(pickle.loads(pickle.dumps(caught.value))) == "Owner: said"
    with ProcessPoolExecutor(1, get_context("fork")) as pool, pytest.raises(UserError, match=r"^Owner: said$"):
        pool.submit(failing).result()
