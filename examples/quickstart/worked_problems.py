"""Worked problems in arithmetic and algebra, generated from a seed: the generated part of the quickstart's `math` domain.

Each problem shows its steps, so that a model can learn the procedure and not only the answer.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from fractions import Fraction


def worked_problems(seed: int) -> Iterator[tuple[str, str]]:
    """Endless documents of five to nine problems of one kind: (text, kind). The same seed gives the same documents."""
    rng = random.Random(seed)
    kinds = list(_KINDS)
    while True:
        kind = rng.choice(kinds)
        problems = [_KINDS[kind](rng) for _ in range(rng.randint(5, 9))]
        yield "\n\n".join(problems) + "\n", kind


def _addition(rng: random.Random) -> str:
    a, b = rng.randint(100, 99999), rng.randint(100, 99999)
    lines, carry = [f"Add {a} and {b}, digit by digit from the right."], 0
    for place in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**place % 10, b // 10**place % 10
        total = x + y + carry
        lines.append(f"{x} + {y}" + (f" + {carry}" if carry else "") + f" = {total}: write {total % 10}, carry {total // 10}.")
        carry = total // 10
    return "\n".join([*lines, f"So {a} + {b} = {a + b}."])


def _multiplication(rng: random.Random) -> str:
    a, tens, ones = rng.randint(12, 999), 10 * rng.randint(1, 9), rng.randint(1, 9)
    b = tens + ones
    return (
        f"Multiply {a} by {b}.\nSplit {b} into {tens} and {ones}.\n{a} x {tens} = {a * tens}\n{a} x {ones} = {a * ones}\n"
        f"{a * tens} + {a * ones} = {a * b}\nSo {a} x {b} = {a * b}."
    )


def _division(rng: random.Random) -> str:
    divisor, number = rng.randint(3, 25), rng.randint(200, 9999)
    lines, rest, quotient = [f"Divide {number} by {divisor}."], 0, 0
    for digit in map(int, str(number)):
        rest = rest * 10 + digit
        times = rest // divisor
        lines.append(f"{divisor} goes into {rest} {times} times, leaving {rest - times * divisor}.")
        rest, quotient = rest - times * divisor, quotient * 10 + times
    return "\n".join([*lines, f"So {number} = {divisor} x {quotient} + {rest}."])


def _linear(rng: random.Random) -> str:
    x, a, b = rng.randint(-12, 12), rng.choice([-9, -7, -5, -4, -3, -2, 2, 3, 4, 5, 6, 8]), rng.randint(1, 30)
    c = a * x + b
    return f"Solve {a}x + {b} = {c}.\nSubtract {b} from both sides: {a}x = {c - b}.\nDivide by {a}: x = {x}."


def _quadratic(rng: random.Random) -> str:
    p, q = sorted((rng.randint(-9, 9), rng.randint(-9, 9)))
    equation = f"x^2 {_signed(-(p + q))}x {_signed(p * q)} = 0"
    roots = f"x = {p} or x = {q}" if p != q else f"x = {p}, a double root"
    return (
        f"Solve {equation}.\nLook for two numbers whose sum is {p + q} and whose product is {p * q}: {p} and {q}.\n"
        f"(x {_signed(-p)})(x {_signed(-q)}) = 0, so {roots}."
    )


def _fractions(rng: random.Random) -> str:
    a, b = (Fraction(rng.randint(1, 12), rng.randint(2, 15)) for _ in range(2))
    common = math.lcm(a.denominator, b.denominator)
    x, y = int(a * common), int(b * common)
    return (
        f"Compute {a} + {b}.\nA common denominator is {common}: {a} = {x}/{common} and {b} = {y}/{common}.\n"
        f"{x}/{common} + {y}/{common} = {x + y}/{common} = {a + b}."
    )


def _divisor(rng: random.Random) -> str:
    a, b = sorted((rng.randint(20, 3000), rng.randint(20, 3000)), reverse=True)
    lines, x, y = [f"Find the greatest common divisor of {a} and {b} with Euclid's algorithm."], a, b
    while y:
        lines.append(f"{x} = {x // y} x {y} + {x % y}")
        x, y = y, x % y
    return "\n".join([*lines, f"The last remainder that is not zero is {x}, so gcd({a}, {b}) = {x}."])


def _percent(rng: random.Random) -> str:
    price, percent = rng.randint(2, 60) * 20, rng.choice([5, 10, 15, 20, 25, 30, 40, 60])
    off = price * percent // 100
    thing = rng.choice(["coat", "bicycle", "lamp", "table", "watch", "radio", "carpet", "kettle"])
    return (
        f"A {thing} costs {price} dollars and its price is cut by {percent} percent. What does it cost now?\n"
        f"{percent} percent of {price} is {price} x {percent} / 100 = {off}.\n{price} - {off} = {price - off}. "
        f"The {thing} costs {price - off} dollars."
    )


def _derivative(rng: random.Random) -> str:
    powers = sorted(rng.sample(range(1, 7), 3), reverse=True)
    terms = [(rng.choice([-5, -4, -3, -2, 2, 3, 4, 5, 7]), n) for n in powers]
    steps = "\n".join(f"The derivative of {_term(c, n)} is {_term(c * n, n - 1)}." for c, n in terms)
    return f"Differentiate f(x) = {_sum(terms)}.\n{steps}\nSo f'(x) = {_sum([(c * n, n - 1) for c, n in terms])}."


def _sequence(rng: random.Random) -> str:
    first, step, num = rng.randint(1, 40), rng.randint(2, 15), rng.randint(5, 30)
    last = first + (num - 1) * step
    return (
        f"Add the first {num} terms of {first}, {first + step}, {first + 2 * step}, ...\n"
        f"The last term is {first} + {num - 1} x {step} = {last}.\n"
        f"The sum is {num} x ({first} + {last}) / 2 = {num * (first + last) // 2}."
    )


def _signed(value: int) -> str:
    return f"+ {value}" if value >= 0 else f"- {-value}"


def _term(coefficient: int, power: int) -> str:
    return str(coefficient) if power == 0 else f"{coefficient}x" if power == 1 else f"{coefficient}x^{power}"


def _sum(terms: list[tuple[int, int]]) -> str:
    return " + ".join(_term(c, n) for c, n in terms).replace("+ -", "- ")


_KINDS = {
    "addition": _addition,
    "multiplication": _multiplication,
    "division": _division,
    "linear equations": _linear,
    "quadratic equations": _quadratic,
    "fractions": _fractions,
    "greatest common divisor": _divisor,
    "percentages": _percent,
    "derivatives": _derivative,
    "arithmetic sequences": _sequence,
}
