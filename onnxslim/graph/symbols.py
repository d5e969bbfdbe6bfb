"""Sizes that are known only when a model runs, as integer polynomials over named unknowns.

Two sizes are equal for every input when their polynomials are; so ``n * 2 / 2`` is ``n``, and ``(h + 1) // 2`` computed
in two places is one size. What is no polynomial (a rounded division, a maximum) becomes an unknown of its own, named by
the expression, so that the same expression is the same unknown.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

__all__ = [
    "Element",
    "Symbol",
    "SymbolicSize",
    "ceil_divide",
    "divide",
    "equal",
    "floor_divide",
    "fresh",
    "has_bounds",
    "lower_bound",
    "maximum",
    "minimum",
    "product",
    "remainder",
    "symbol",
]


@dataclass(frozen=True, order=True)
class Symbol:
    """An integer that the model gets to know when it runs; equal names mean equal integers.

    Attributes:
        name: unique for what it stands for.
        least: what it is never below; None where it may be any integer.
    """

    name: str
    least: int | None = 0


_Monomial: TypeAlias = tuple[Symbol, ...]


class SymbolicSize:
    """An integer polynomial with at least one unknown; immutable, and equal to every polynomial of the same terms."""

    __slots__ = ("_hash", "terms")

    def __init__(self, terms: dict[_Monomial, int]) -> None:
        self.terms = terms
        self._hash = hash(frozenset(terms.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SymbolicSize) and self._hash == other._hash and self.terms == other.terms

    def __hash__(self) -> int:
        return self._hash

    def __add__(self, other: Element) -> Element:
        terms = dict(self.terms)
        for monomial, factor in _terms(other).items():
            terms[monomial] = terms.get(monomial, 0) + factor
        return _normal(terms)

    __radd__ = __add__

    def __mul__(self, other: Element) -> Element:
        terms: dict[_Monomial, int] = {}
        for (left, a), (right, b) in itertools.product(self.terms.items(), _terms(other).items()):
            monomial = tuple(sorted((*left, *right), key=_name))
            terms[monomial] = terms.get(monomial, 0) + a * b
        return _normal(terms)

    __rmul__ = __mul__

    def __neg__(self) -> Element:
        return self * -1

    def __sub__(self, other: Element) -> Element:
        return self + (other * -1)

    def __rsub__(self, other: int) -> Element:
        return -self + other

    def __repr__(self) -> str:
        parts = []
        for monomial, factor in sorted(self.terms.items(), key=lambda term: [symbol.name for symbol in term[0]]):
            names = "*".join(symbol.name for symbol in monomial)
            parts.append(str(factor) if not names else names if factor == 1 else f"{factor}*{names}")
        return "+".join(parts)


Element: TypeAlias = int | SymbolicSize
"""An integer that is known, or one that is known only when the model runs."""

_counter = itertools.count()
# Longer expressions are forgotten: in a deep network they would grow with every layer.
_LONGEST_NAME = 160


def _name(symbol: Symbol) -> str:
    return symbol.name


def _terms(value: Element) -> dict[_Monomial, int]:
    return value.terms if isinstance(value, SymbolicSize) else {(): value}


def _normal(terms: dict[_Monomial, int]) -> Element:
    kept = {monomial: factor for monomial, factor in terms.items() if factor}
    if not kept:
        return 0
    return kept[()] if len(kept) == 1 and () in kept else SymbolicSize(kept)


def symbol(name: str, least: int | None = 0) -> SymbolicSize:
    """The size with this name."""
    return SymbolicSize({(Symbol(name, least),): 1})


def fresh(least: int | None = 0) -> SymbolicSize:
    """A size of which nothing is known but that it is at least ``least``; equal to itself only."""
    return symbol(f"?{next(_counter)}", least)


def _derived(name: str, least: int | None) -> SymbolicSize:
    """The size that an expression stands for."""
    return fresh(least) if len(name) > _LONGEST_NAME else symbol(name, least)


def product(sizes: Iterable[Element]) -> Element:
    """All sizes multiplied; 1 where there are none."""
    total: Element = 1
    for size in sizes:
        total = total * size
    return total


def lower_bound(value: Element) -> int | None:
    """What a value is never below; None where that is not known."""
    if isinstance(value, int):
        return value
    total = 0
    for monomial, factor in value.terms.items():
        product = factor
        for each in monomial:
            if each.least is None or each.least < 0:
                return None
            product *= each.least
        if factor < 0 and monomial:
            return None
        total += product
    return total


def has_bounds(value: Element) -> bool:
    """Whether a value is made of sizes alone: only such sums and differences cannot wrap around."""
    return isinstance(value, int) or all(each.least is not None for monomial in value.terms for each in monomial)


def equal(first: Element, second: Element) -> bool | None:
    """Whether two values are equal for every input (True), for none (False), or it depends or is not known (None)."""
    difference = first - second
    if isinstance(difference, int):
        wraps = abs(difference) >= 2**63 and not (has_bounds(first) and has_bounds(second))
        return None if wraps else difference == 0
    for each in (difference, -difference):
        bound = lower_bound(each)
        if bound is not None and bound > 0:
            return False
    return None


def divide(value: Element, divisor: Element) -> Element | None:
    """The quotient, rounded towards zero as integer Div does.

    None where the divisor may be zero, and where the sign of a symbolic value or divisor is not known.
    """
    if isinstance(value, int) and isinstance(divisor, int):
        return None if divisor == 0 else abs(value) // abs(divisor) * (1 if (value < 0) == (divisor < 0) else -1)
    bound, least = lower_bound(value), lower_bound(divisor)
    if bound is None or bound < 0 or least is None or least < 1:
        return None
    return _floor(value, divisor)


def _floor(value: Element, divisor: Element) -> Element:
    """value // divisor for a divisor above zero; multiples of the divisor leave the rounding exactly."""
    whole: Element = 0
    rest = value
    if isinstance(divisor, int):
        for monomial, factor in _terms(value).items():
            multiple = factor // divisor
            if multiple:
                whole = whole + _normal({monomial: multiple})
                rest = rest - _normal({monomial: multiple * divisor})
    else:
        for term, factor in _terms(value).items():
            quotient = _monomial_quotient(term, factor, divisor)
            if quotient is not None:
                whole, rest = whole + quotient, rest - quotient * divisor
    if isinstance(rest, int) and isinstance(divisor, int):
        return whole + rest // divisor
    if isinstance(rest, int) and 0 <= rest < (lower_bound(divisor) or 0):
        return whole
    bound = lower_bound(rest)
    return whole + _derived(f"(({rest})//({divisor}))", None if bound is None or bound < 0 else 0)


def _monomial_quotient(monomial: _Monomial, factor: int, divisor: SymbolicSize) -> Element | None:
    """factor * monomial / divisor where the divisor is a single term that divides it."""
    if len(divisor.terms) != 1:
        return None
    ((other, by),) = divisor.terms.items()
    left = list(monomial)
    for each in other:
        if each not in left:
            return None
        left.remove(each)
    return None if factor % by else _normal({tuple(left): factor // by})


def ceil_divide(value: Element, divisor: int) -> Element:
    """value / divisor, rounded up, for a divisor above zero."""
    return _floor(value + (divisor - 1), divisor)


def floor_divide(value: Element, divisor: int) -> Element:
    """value / divisor, rounded down, for a divisor above zero."""
    return _floor(value, divisor)


def remainder(value: Element, divisor: Element) -> Element | None:
    """value mod divisor, for a value that is not negative and a divisor above zero; None otherwise."""
    bound, least = lower_bound(value), lower_bound(divisor)
    if bound is None or bound < 0 or least is None or least < 1:
        return None
    return value - _floor(value, divisor) * divisor


def maximum(first: Element, second: Element) -> Element:
    """The larger of two values."""
    return _pick(first, second, "max")


def minimum(first: Element, second: Element) -> Element:
    """The smaller of two values."""
    return _pick(first, second, "min")


def _pick(first: Element, second: Element, kind: str) -> Element:
    if isinstance(first, int) and isinstance(second, int):
        return max(first, second) if kind == "max" else min(first, second)
    for a, b in ((first, second), (second, first)) if has_bounds(first) and has_bounds(second) else ():
        bound = lower_bound(a - b)
        if bound is not None and bound >= 0:
            return a if kind == "max" else b
    bounds = [lower_bound(first), lower_bound(second)]
    known = [bound for bound in bounds if bound is not None]
    least = max(known, default=None) if kind == "max" else min(known) if len(known) == 2 else None
    names = sorted((str(first), str(second)))
    return _derived(f"{kind}({names[0]},{names[1]})", least)
