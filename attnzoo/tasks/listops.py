"""ListOps: nested operations on lists of digits, to be evaluated."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from attnzoo.arguments import check_flag
from attnzoo.tasks.task import PARTS, TEST, TRAINING, Batch, Task, at_least

OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
TOKENS = (*map(str, range(10)), *OPERATORS, "]")
PADDING = len(TOKENS)
# Long Range Arena's: an argument is a digit with this probability, above the greatest depth
DIGIT_SHARE = 0.75
HELD_OUT = 2000  # expressions of validation, and of test, as in Long Range Arena


@dataclass(frozen=True)
class ListOps(Task):
    """Nangia and Bowman 2018, arXiv:1804.06028, in the form of Long Range Arena (Tay et al. 2020,
    arXiv:2011.04006, section 2.2.1): minimum, maximum, median (its floor) and sum modulo 10 of
    lists; the answer is a digit. Sequences are padded to `length`.

    length: most tokens.
    shortest: fewest.
    depth: most operators inside one another, the outer one included.
    arguments: most of one list (2 at least).
    causal: whether no token sees later ones, for attentions that cannot; else all see all, as in
    Long Range Arena. The answer is read off the mean of all tokens either way.
    expressions: different ones to train on. Long Range Arena: length 2000, shortest 500, depth 9
    (its code, lra_benchmarks/data/listops.py, counts the digits of the innermost list as the tenth
    level), arguments 10, 96,000 expressions.
    """

    length: int = 64
    shortest: int = 8
    depth: int = 4
    arguments: int = 5
    expressions: int = 20_000
    causal: bool = False

    name = "listops"
    title = "ListOps"
    form = "encoder"

    def __post_init__(self) -> None:
        self._check_positive("causal")
        check_flag("causal", self.causal)
        at_least(
            "shortest",
            self.shortest,
            4,
            "the shortest expression is an operator, two digits and a bracket",
        )
        at_least("length", self.length, self.shortest, f"shortest={self.shortest}")
        at_least("arguments", self.arguments, 2, "a list has two arguments")
        most = 1 + self.arguments if self.depth == 1 else 10**9
        if self.shortest > most + 1:
            raise ValueError(
                f"shortest={self.shortest} cannot be reached with depth=1 and "
                f"arguments={self.arguments}; give a greater depth"
            )

    @property
    def is_causal(self) -> bool:
        return self.causal

    @property
    def vocabulary_size(self) -> int:
        return len(TOKENS) + 1

    @property
    def answers(self) -> int:
        return 10

    @property
    def outputs(self) -> int:
        return 10

    @cached_property
    def _parts(self) -> dict[str, tuple[Tensor, Tensor]]:
        return _generate(self)

    def examples(self, part: str, count: int, generator: torch.Generator) -> Batch:
        tokens, values = self._parts[part]
        if part == TRAINING:
            rows = torch.randint(len(tokens), (count,), generator=generator)
        elif count <= len(tokens):
            rows = torch.arange(count)
        else:
            raise ValueError(
                f"held_out={count} is more than the {len(tokens)} expressions of {part}; give fewer"
            )
        inputs = tokens[rows].long()
        return Batch(inputs, values[rows], mask=inputs != PADDING)

    def baselines(self, count: int) -> dict[str, float]:
        """Beside those of every task, two that see the outer list alone: the answer that its
        operator has most often in the training part, and its operator applied to the digits that
        stand directly in it (where none does, the former). What scores no more may know of no
        nesting."""
        tokens, values = self._parts[TRAINING]
        usual = torch.zeros(len(OPERATORS), self.outputs, dtype=torch.long)
        usual.index_put_(
            (tokens[:, 0].long() - 10, values), torch.ones_like(values), accumulate=True
        )
        asked, right = (part[:count] for part in self._parts[TEST])
        frequent = usual.argmax(1)[asked[:, 0].long() - 10]
        direct = [_direct_value(expression) for expression in asked.tolist()]
        applied = torch.tensor(
            [
                own if value is None else value
                for value, own in zip(direct, frequent.tolist(), strict=True)
            ]
        )
        found = {"outer operator": frequent, "outer operator and its digits": applied}
        return {
            **super().baselines(count),
            **{label: (guess == right).float().mean().item() for label, guess in found.items()},
        }


def evaluate(expression: str) -> int:
    """The value of an expression such as "[MAX 2 9 [MIN 4 7 ] 0 ]". Raises ValueError when it is
    none."""
    return evaluate_tokens(tuple(map(_index, expression.split())))


def evaluate_tokens(tokens: tuple[int, ...]) -> int:
    """The value of an expression in token numbers. Raises ValueError when it is none."""
    stack: list[list[int]] = [[-1]]
    for token in tokens:
        if token < 10:
            stack[-1].append(token)
        elif token < 14:
            stack.append([token - 10])
        else:
            operator, *values = stack.pop()
            if not stack or not values:
                raise ValueError("the expression closes a list that is empty or was not opened")
            stack[-1].append(_apply(OPERATORS[operator], values))
    if len(stack) != 1 or len(stack[0]) != 2:
        raise ValueError("the expression is not one whole value")
    return stack[0][1]


def _direct_value(tokens: list[int]) -> int | None:
    """The outer operator applied to its own digits, as if no list stood beside them; None when it
    has none.

    tokens: padded.
    """
    depth, digits = 0, []
    for token in tokens:
        depth += 1 if 10 <= token < 14 else -1 if token == 14 else 0
        if token < 10 and depth == 1:
            digits.append(token)
    return _apply(OPERATORS[tokens[0] - 10], digits) if digits else None


def _apply(operator: str, values: list[int]) -> int:
    if operator == "[MIN":
        return min(values)
    if operator == "[MAX":
        return max(values)
    if operator == "[SM":
        return sum(values) % 10
    ordered, middle = sorted(values), len(values) // 2
    return ordered[middle] if len(values) % 2 else (ordered[middle - 1] + ordered[middle]) // 2


def _index(word: str) -> int:
    if word not in TOKENS:
        raise ValueError(f"{word!r} is no word of ListOps; the words are {' '.join(TOKENS)}")
    return TOKENS.index(word)


@cache
def _generate(task: ListOps) -> dict[str, tuple[Tensor, Tensor]]:
    """Tokens and values of the three parts; no expression is in two. One seed: every run of a task
    has the same expressions."""
    draw = random.Random(0)
    found: dict[tuple[int, ...], None] = {}
    wanted, tries = task.expressions + 2 * HELD_OUT, 0
    while len(found) < wanted:
        tokens: list[int] = []
        if _write(task, draw, 1, tokens) and len(tokens) >= task.shortest:
            found[tuple(tokens)] = None
        tries += 1
        if tries > 1000 * (len(found) + 100):
            raise ValueError(
                f"only {len(found)} of {tries} random expressions have {task.shortest} to "
                f"{task.length} tokens, each a new one, and"
                f" expressions={task.expressions} need {wanted}; widen the range of lengths, or "
                "change depth, arguments or expressions"
            )
    expressions = list(found)
    inputs = torch.full((wanted, task.length), PADDING, dtype=torch.int8)
    for row, expression in zip(inputs, expressions, strict=True):
        row[: len(expression)] = torch.tensor(expression, dtype=torch.int8)
    values = torch.tensor([evaluate_tokens(expression) for expression in expressions])
    sizes = (task.expressions, HELD_OUT, HELD_OUT)
    return dict(zip(PARTS, zip(inputs.split(sizes), values.split(sizes), strict=True), strict=True))


def _write(task: ListOps, draw: random.Random, depth: int, tokens: list[int]) -> bool:
    """Append an operator with its arguments; False, and stop, once it is too long."""
    tokens.append(10 + draw.randrange(len(OPERATORS)))
    for _ in range(draw.randint(2, task.arguments)):
        if len(tokens) >= task.length:
            return False
        if depth == task.depth or draw.random() < DIGIT_SHARE:
            tokens.append(draw.randrange(10))
        elif not _write(task, draw, depth + 1, tokens):
            return False
    tokens.append(PADDING - 1)
    return len(tokens) <= task.length
