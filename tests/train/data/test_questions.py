"""Questions are checked by reading them: rendered, parsed, and answered from the scene by plain Python."""

from dataclasses import replace

import numpy as np
import pytest

from train.data import digits
from train.data.questions import ASK, KINDS, MIX, Vocabulary, ask, pack, render, transcripts
from train.data.scenes import SceneConfig, make_scenes

ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
VOCAB = Vocabulary(3)


@pytest.fixture(scope="module")
def scenes():
    bank = digits.digit_bank("train", variants=1)
    return make_scenes(bank, SceneConfig(), seed=3, start=0, stop=1000)


@pytest.fixture(scope="module")
def asked(scenes):
    return ask(scenes)


def truth(words: list[str], grid: np.ndarray) -> str:
    """The answer to a question about grid [3, 3] (-1 = empty); named cells and rows must hold something."""

    def at(cell):
        row, column = cell.split("-")
        digit = grid[ROWS.index(row), COLUMNS.index(column)]
        assert digit >= 0, "an empty cell was asked about"
        return digit

    here = [int(d) for d in grid.ravel() if d >= 0]
    match words:
        case ["is", "there", "a", digit, "?"]:
            return "yes" if int(digit) in here else "no"
        case ["which", "digit", "at", cell, "?"]:
            return str(at(cell))
        case ["how", "many", "digits", "?"]:
            return str(len(here))
        case ["how", "many", digit, "?"]:
            return str(here.count(int(digit)))
        case ["larger", "at", one, "or", two, "?"]:
            assert one != two
            return str(max(at(one), at(two)))
        case [("first" | "last") as end, "digit", "in", row, "row", "?"]:
            line = [d for d in grid[ROWS.index(row)] if d >= 0]
            return str(line[0] if end == "first" else line[-1])
        case ["read", "all", "digits", "?"]:
            return " ".join(map(str, here)) + " end"
        case ["read", row, "row", "?"]:
            line = [str(d) for d in grid[ROWS.index(row)] if d >= 0]
            assert line
            return " ".join(line) + " end"
    raise AssertionError(f"unknown question {words}")


def test_every_answer_is_true(scenes, asked):
    kinds = {
        "is": "presence", "which": "place", "larger": "compare", "first": "reading", "last": "reading",
    }  # fmt: skip
    for s in range(250):
        grid = scenes.digit[s].reshape(3, 3)
        for q in range(asked.kind.shape[1]):
            question = VOCAB.decode(asked.questions[s, q]).split()
            assert VOCAB.decode(asked.answers[s, q]) == truth(question, grid)
            kind = kinds.get(question[0]) or ("count_all" if "digits" in question else "count_of")
            assert KINDS[asked.kind[s, q]] == kind


def test_transcripts_are_true(scenes):
    questions, answers = transcripts(scenes)
    assert questions.shape == (1000, 6) and answers.shape == (1000, 7)
    whole = 0
    for s in range(250):
        words = VOCAB.decode(questions[s]).split()
        whole += "all" in words
        assert VOCAB.decode(answers[s]) == truth(words, scenes.digit[s].reshape(3, 3))
    assert 40 < whole < 160


def test_shapes_types_and_left_padding(asked):
    assert asked.questions.shape == (1000, 9, 6) and asked.answers.shape == asked.kind.shape == (1000, 9)
    assert asked.questions.dtype == asked.answers.dtype == asked.kind.dtype == np.int32
    assert (asked.questions[..., -1] == VOCAB.ids["?"]).all()
    word = asked.questions != 0
    assert (word[..., :-1] <= word[..., 1:]).all()


def test_presence_is_exactly_balanced_and_unpredictable_from_the_question(asked):
    presence = asked.kind == KINDS.index("presence")
    yes = asked.answers[presence] == VOCAB.ids["yes"]
    assert yes.mean() == 0.5
    digit = asked.questions[presence][:, -2] - 1
    by_digit = np.array([yes[digit == d].mean() for d in range(10)])
    assert np.abs(by_digit - 0.5).max() < 0.08


def test_questions_of_a_kind_differ_where_the_scene_allows(scenes, asked):
    crowded = (scenes.digit >= 0).sum(1) >= 3
    place = asked.questions[crowded][:, 3:6, -2]
    assert all(len(set(row)) == 3 for row in place.tolist())
    varied = scenes.presence.sum(1) >= 2
    presence = asked.questions[varied][:, :3, -2]
    assert all(len(set(row)) == 3 for row in presence.tolist())


def test_counts_alternate_and_include_zero(asked):
    kind = asked.kind[:, 6]
    assert (kind == KINDS.index("count_all")).sum() == (kind == KINDS.index("count_of")).sum() == 500
    zero = (asked.answers[:, 6] == 1)[kind == KINDS.index("count_of")].mean()
    assert abs(zero - 0.25) < 0.07


def test_questions_depend_on_the_scene_number_alone(scenes, asked):
    part = ask(scenes.take(slice(40, 60)))
    np.testing.assert_array_equal(part.questions, asked.questions[40:60])
    np.testing.assert_array_equal(part.answers, asked.answers[40:60])
    assert (ask(scenes, seed=4).questions != asked.questions).any()


def test_scenes_without_a_choice_are_asked_honestly():
    bank = digits.digit_bank("validation")
    single = make_scenes(bank, replace(SceneConfig(), digits=(1, 1)), seed=0, start=0, stop=40)
    asked = ask(single, (("presence", 3), ("place", 3), ("reading", 2)))
    for s in range(40):
        for question, answer in zip(asked.questions[s], asked.answers[s], strict=True):
            assert VOCAB.decode(answer) == truth(
                VOCAB.decode(question).split(), single.digit[s].reshape(3, 3)
            )


@pytest.mark.parametrize("grid", [1, 2, 4])
def test_other_grids_have_their_own_words(grid):
    config = SceneConfig(canvas=32 * grid, grid=grid, digits=(1, grid**2))
    scenes = make_scenes(digits.digit_bank("validation"), config, seed=0, start=0, stop=20)
    vocab = Vocabulary(grid)
    asked = ask(scenes, (("place", 2), ("reading", 1)))
    for s in range(20):
        for j in range(2):
            cell = int(np.flatnonzero(vocab.cell_ids == asked.questions[s, j, -2])[0])
            assert asked.answers[s, j] == 1 + scenes.digit[s, cell]
    assert len(set(vocab.words)) == len(vocab.words)


def test_vocabulary_round_trip_and_errors():
    text = "larger at top-left or bottom-right ?"
    ids = VOCAB.encode(text, 8)
    assert ids.tolist()[:2] == [0, 0] and VOCAB.decode(ids) == text
    assert Vocabulary(3) == VOCAB and hash(Vocabulary(3)) == hash(VOCAB)
    with pytest.raises(ValueError, match="text: expected words of the scene vocabulary, got 'cat'"):
        VOCAB.encode("is there a cat ?")
    with pytest.raises(ValueError, match="text: expected at most 3 words, got 6"):
        VOCAB.encode(text, 3)


def test_render_says_question_and_answer(asked):
    lines = render(VOCAB, asked.questions[0], asked.answers[0])
    assert len(lines) == 9 and lines[0].startswith("is there a ") and lines[0].split()[-1] in ("yes", "no")


def test_pack_trains_the_answers_and_nothing_else(scenes, asked):
    question, answer = transcripts(scenes)
    record = pack(asked.questions, asked.answers, (question, answer))
    assert {a.shape for a in record.values()} == {(1000, 9 * 6 + 6 + 6)}
    asks = record["tokens"] == VOCAB.ids["?"]
    np.testing.assert_array_equal(record["targets"][asks].reshape(1000, 10)[:, :9], asked.answers)
    for s in range(20):
        last = record["segment"][s] == 10
        trained = last & (record["loss_mask"][s] > 0)
        np.testing.assert_array_equal(record["targets"][s][trained], answer[s][answer[s] != 0])
        # Fed back: what follows "?" in the input is the answer without its last word.
        fed = record["tokens"][s][np.flatnonzero(last & asks[s])[0] + 1 :]
        np.testing.assert_array_equal(fed, answer[s][:-1])
        # Positions of a transcript are those of a prompt without padding.
        words = np.flatnonzero(last)
        np.testing.assert_array_equal(record["position"][s][words], np.arange(len(words)))
    np.testing.assert_array_equal(record["segment"] == 0, record["tokens"] == 0)
    np.testing.assert_array_equal(record["position"][0, :12], np.tile(np.arange(6), 2))
    assert record["loss_mask"].sum() == 9000 + (answer != 0).sum()


@pytest.mark.parametrize("mix", [(), (("colour", 1),), (("place", 0),)])
def test_bad_mixes_are_named(scenes, mix):
    with pytest.raises(ValueError, match="mix: expected"):
        ask(scenes.take(slice(0, 2)), mix)


def test_the_usual_mix_asks_every_kind(asked):
    assert {kind for kind, _ in MIX} == set(ASK)
    assert set(np.unique(asked.kind)) == set(range(len(KINDS)))


def test_questions_come_in_turn(scenes, asked):
    """One question of a scene at a time: the scene's own, and all kinds alike often over consecutive scenes."""
    one, total = asked.turn(scenes.index, 1), asked.kind.shape[1]
    assert one.questions.shape == (len(scenes), 1, asked.questions.shape[2])
    for i, number in enumerate(scenes.index):
        np.testing.assert_array_equal(one.questions[i, 0], asked.questions[i, number % total])
        assert one.answers[i, 0] == asked.answers[i, number % total] and one.kind[i, 0] == asked.kind[i, number % total]
    whole = asked.turn(scenes.index, total)
    np.testing.assert_array_equal(np.sort(whole.answers, 1), np.sort(asked.answers, 1))
    with pytest.raises(ValueError, match=f"questions: expected 1 to {total} of a scene, got 0"):
        asked.turn(scenes.index, 0)
