"""A stream per purpose, and nothing global."""

# ruff: noqa: PT012 - a block that fails half-way is what is tested
from __future__ import annotations

import pytest
import torch

from bdbench.seeds import derive, generator, scoped


def draw(rng: torch.Generator) -> list[int]:
    return torch.randint(0, 1_000_000, (4,), generator=rng).tolist()


def test_equal_purposes_give_equal_streams() -> None:
    assert draw(generator(3, "poison", "choose")) == draw(generator(3, "poison", "choose"))


@pytest.mark.parametrize(
    "other",
    [(4, "a", 1), (3, "a", 2), (3, "b", 1), (3, "a", "1"), (3, 1, "a"), (3, "a1"), (3, "a"), (3, "a", 1, 1)],
)
def test_any_other_seed_or_purpose_gives_another_stream(other: tuple[int | str, ...]) -> None:
    seed, *purpose = other
    assert derive(3, "a", 1) != derive(int(seed), *purpose)


def test_parts_of_a_purpose_do_not_run_together() -> None:
    assert derive(0, "ab", "c") != derive(0, "a", "bc")


def test_the_derived_seed_is_the_same_on_every_machine() -> None:
    assert derive(0, "poison", "choose") == 7419668098005019496


@pytest.mark.parametrize("seed", [0, 1, -1, 2**64])
def test_a_derived_seed_fits_torch(seed: int) -> None:
    assert 0 <= derive(seed, "x") < 2**63
    draw(generator(seed, "x"))


def test_a_scoped_block_draws_from_its_purpose() -> None:
    with scoped(1, "weights"):
        first = torch.rand(3)
    torch.rand(7)
    with scoped(1, "weights"):
        second = torch.rand(3)
    with scoped(1, "dropout"):
        third = torch.rand(3)
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_a_scoped_block_leaves_the_global_state_as_it_was() -> None:
    before = torch.get_rng_state()
    with scoped(1, "weights"):
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_scoped_block_restores_the_global_state_after_an_error() -> None:
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), scoped(1, "weights"):
        torch.rand(3)
        _ = 1 / 0
    assert torch.equal(torch.get_rng_state(), before)
