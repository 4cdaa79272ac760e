"""Questions about digit scenes: the vocabulary, the kinds, and their one-sequence packing.

Packed kinds have T = 6 words, left-padded, and a one-word answer read at the final "?". They are

presence   "is there a 7 ?"                        yes or no, exactly balanced over consecutive scenes:
                                                   yes about a digit that is there, no about one that
                                                   is not, so hallucination can be scored as in POPE
place      "which digit at top-left ?"             occupied cells only: else "nothing there" becomes a
                                                   shortcut when visual tokens are pruned
count_all  "how many digits ?"                     the total
count_of   "how many 3 ?"                          three quarters of them about a digit that occurs
compare    "larger at top-left or bottom-right ?"  the larger of the digits in two occupied cells
reading    "first digit in top row ?"              first or last digit, left to right, of a row with digits

Reading also comes with answers of several words, to be generated one at a time (`transcripts`): "read top
row ?" or "read all digits ?", answered by the digits in raster order and "end". One-word answers keep the
packed kinds uniform (one prediction per question, scored by one comparison); the transcript joins them in
the same packed sequence, as a segment that is longer by its answer.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from train.data.digits import CLASSES
from train.data.draws import order, pick_cyclic, uniforms
from train.data.scenes import Scenes

WORDS = 6
KINDS = ("presence", "place", "count_all", "count_of", "compare", "reading")
MIX = (("presence", 3), ("place", 3), ("count", 1), ("compare", 1), ("reading", 1))
QUESTIONS, TRANSCRIPTS = 16, 15  # random streams; each entry of a mix uses the next one from QUESTIONS on
PRESENT_SHARE = 0.75  # of the count_of questions
PAD = "<pad>"


def axis_names(grid: int) -> tuple[list[str], list[str]]:
    """Names of rows and of columns: words up to 3 x 3, numbers from there on."""
    named = {
        1: (["middle"], ["center"]),
        2: (["top", "bottom"], ["left", "right"]),
        3: (["top", "middle", "bottom"], ["left", "center", "right"]),
    }
    numbered = [f"row{i}" for i in range(grid)], [f"column{i}" for i in range(grid)]
    return named.get(grid, numbered)


@dataclass(frozen=True)
class Vocabulary:
    """The words of scenes with grid x grid cells; ids follow the list, 0 pads, digit d is id 1 + d."""

    grid: int = 3

    @cached_property
    def words(self) -> tuple[str, ...]:
        rows, columns = axis_names(self.grid)
        cells = [f"{row}-{column}" for row in rows for column in columns]
        digits = [str(d) for d in range(CLASSES)]
        rest = "yes no end ? is there a which digit digits at how many larger or first last in row read all"
        return (PAD, *digits, *cells, *rows, *rest.split())

    @cached_property
    def ids(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str, length: int | None = None) -> np.ndarray:
        """Words separated by blanks to int32 ids, left-padded to `length`; unknown or too many words
        raise."""
        words = text.split()
        unknown = [word for word in words if word not in self.ids]
        if unknown:
            raise ValueError(f"text: expected words of the scene vocabulary, got {unknown[0]!r} in {text!r}")
        if length is not None and len(words) > length:
            raise ValueError(f"text: expected at most {length} words, got {len(words)}: {text!r}")
        pad = [0] * ((length or len(words)) - len(words))
        return np.array(pad + [self.ids[word] for word in words], np.int32)

    def decode(self, ids) -> str:
        """Ids to words, padding left out."""
        return " ".join(self.words[int(i)] for i in np.ravel(ids) if int(i) != 0)

    @cached_property
    def cell_ids(self) -> np.ndarray:
        rows, columns = axis_names(self.grid)
        return np.array([self.ids[f"{row}-{column}"] for row in rows for column in columns])

    @cached_property
    def row_ids(self) -> np.ndarray:
        return np.array([self.ids[row] for row in axis_names(self.grid)[0]])

    def fill(self, template: str, *blanks: np.ndarray) -> np.ndarray:
        """[S, WORDS] from a template whose "_" are replaced, in order, by the ids of `blanks` (int [S]
        each)."""
        count = len(blanks[0]) if blanks else 1
        known = [self.ids.get(word, -1) for word in template.split()]
        out = np.zeros((count, WORDS), np.int32)
        out[:, WORDS - len(known) :] = known
        for column, blank in zip(np.flatnonzero(out[0] == -1), blanks, strict=True):
            out[:, column] = blank
        return out


def digit_id(digit):
    """Word id of a digit or of a count."""
    return 1 + digit


def _presence(scenes: Scenes, vocab: Vocabulary, u: np.ndarray, n: int):
    present = scenes.presence.astype(bool)
    half = np.arange(n) // 2  # yes and no alternate: the j-th question is number j // 2 of its answer
    there = pick_cyclic(u[:, :CLASSES], present, n)[:, half]
    missing = pick_cyclic(u[:, :CLASSES], ~present, n)[:, half]
    yes = (scenes.index[:, None] + np.arange(n)) % 2 == 0
    # Nothing or everything there leaves one honest answer.
    yes = np.where(present.all(1)[:, None], True, yes & present.any(1)[:, None])
    asked = np.where(yes, there, missing)
    question = vocab.fill("is there a _ ?", digit_id(asked).ravel())
    return question, np.where(yes, vocab.ids["yes"], vocab.ids["no"]).ravel(), KINDS.index("presence")


def _place(scenes: Scenes, vocab: Vocabulary, u: np.ndarray, n: int):
    cell = pick_cyclic(u[:, : scenes.config.cells], scenes.digit >= 0, n)
    answer = digit_id(np.take_along_axis(scenes.digit, cell, 1))
    question = vocab.fill("which digit at _ ?", vocab.cell_ids[cell].ravel())
    return question, answer.ravel(), KINDS.index("place")


def _compare(scenes: Scenes, vocab: Vocabulary, u: np.ndarray, n: int):
    cells = scenes.config.cells
    u = u[:, : n * cells].reshape(-1, cells)
    digit = np.repeat(scenes.digit, n, 0)
    pair = pick_cyclic(u, digit >= 0, 2)
    answer = digit_id(np.take_along_axis(digit, pair, 1).max(1))
    named = vocab.cell_ids[pair]
    return vocab.fill("larger at _ or _ ?", named[:, 0], named[:, 1]), answer, KINDS.index("compare")


def _count(scenes: Scenes, vocab: Vocabulary, u: np.ndarray, n: int):
    question, answer, is_all = [], [], []
    present = scenes.presence.astype(bool)
    for j in range(n):
        draw = u[:, j * (CLASSES + 1) : (j + 1) * (CLASSES + 1)]
        total = (scenes.index + j) % 2 == 0
        some = (draw[:, CLASSES] < PRESENT_SHARE) | present.all(1)
        asked = order(draw[:, :CLASSES], np.where(some[:, None], present, ~present))[:, 0]
        number = np.where(total, (scenes.digit >= 0).sum(1), (scenes.digit == asked[:, None]).sum(1))
        word = np.where(total, vocab.ids["digits"], digit_id(asked))
        question.append(vocab.fill("how many _ ?", word))
        answer.append(digit_id(number))
        is_all.append(total)
    kind = np.where(np.stack(is_all, 1).ravel(), KINDS.index("count_all"), KINDS.index("count_of"))
    return np.stack(question, 1).reshape(-1, WORDS), np.stack(answer, 1).ravel(), kind


def _by_row(scenes: Scenes) -> np.ndarray:
    grid = scenes.config.grid
    return scenes.digit.reshape(-1, grid, grid)


def _reading(scenes: Scenes, vocab: Vocabulary, u: np.ndarray, n: int):
    grid, rows = scenes.config.grid, _by_row(scenes)
    row = pick_cyclic(u[:, :grid], (rows >= 0).any(2), n)
    first = u[:, grid : grid + n] < 0.5
    line = np.take_along_axis(rows, row[..., None], 1)  # [S, n, grid]
    from_left = (line >= 0).argmax(2)
    from_right = grid - 1 - (line[..., ::-1] >= 0).argmax(2)
    at = np.where(first, from_left, from_right)
    answer = digit_id(np.take_along_axis(line, at[..., None], 2))
    end = np.where(first, vocab.ids["first"], vocab.ids["last"])
    question = vocab.fill("_ digit in _ row ?", end.ravel(), vocab.row_ids[row].ravel())
    return question, answer.ravel(), KINDS.index("reading")


ASK = {
    "presence": (_presence, lambda grid, n: CLASSES),
    "place": (_place, lambda grid, n: grid**2),
    "count": (_count, lambda grid, n: n * (CLASSES + 1)),
    "compare": (_compare, lambda grid, n: n * grid**2),
    "reading": (_reading, lambda grid, n: grid + n),
}


@dataclass(frozen=True)
class Questions:
    """questions int32 [S, Q, T] (left-padded words), answers int32 [S, Q], kind int32 [S, Q] (place in
    KINDS)."""

    questions: np.ndarray
    answers: np.ndarray
    kind: np.ndarray

    def turn(self, number: np.ndarray, count: int) -> "Questions":
        """``count`` consecutive questions of each scene, the first by the scene's ``number`` int [S]: all come in turn."""
        total = self.kind.shape[1]
        if not 1 <= count <= total:
            raise ValueError(f"questions: expected 1 to {total} of a scene, got {count}")
        at = (np.asarray(number)[:, None] * count + np.arange(count)) % total
        take = lambda x: np.take_along_axis(x, at.reshape(at.shape + (1,) * (x.ndim - 2)), 1)  # noqa: E731
        return Questions(take(self.questions), take(self.answers), take(self.kind))


def ask(scenes: Scenes, mix: tuple[tuple[str, int], ...] = MIX, *, seed: int | None = None) -> Questions:
    """Questions for each scene, determined by (seed, scene number, mix).

    mix: (kind, number per scene), kinds being the keys of ASK ("count": count_all and count_of in turn).
    seed: None takes the scenes'. A scene with a single digit has no pair to compare: compare names its cell
    twice.
    """
    vocab = Vocabulary(scenes.config.grid)
    seed = scenes.seed if seed is None else seed
    count = len(scenes)
    if not mix:
        raise ValueError("mix: expected at least one (kind, number), got none")
    parts = []
    for position, (kind, n) in enumerate(mix):
        if kind not in ASK or n < 1:
            raise ValueError(f"mix: expected kinds of {list(ASK)} with a positive number, got {(kind, n)}")
        make, draws = ASK[kind]
        u = uniforms(seed, QUESTIONS + position, scenes.index, draws(scenes.config.grid, n))
        question, answer, number = make(scenes, vocab, u, n)
        number = np.broadcast_to(number, count * n).reshape(count, n)
        parts.append((question.reshape(count, n, WORDS), answer.reshape(count, n), number))
    return Questions(*(np.concatenate(arrays, 1).astype(np.int32) for arrays in zip(*parts, strict=True)))


def transcripts(scenes: Scenes, *, seed: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """One reading with an answer of several words per scene: a row that is not empty, or the whole scene.

    Returns questions int32 [S, T] and answers int32 [S, A]: the digits in raster order, "end", then padding;
    A = 1 + the largest number of digits a scene of this config can hold.
    """
    vocab, grid = Vocabulary(scenes.config.grid), scenes.config.grid
    u = uniforms(scenes.seed if seed is None else seed, TRANSCRIPTS, scenes.index, grid + 1)
    filled = np.concatenate([(_by_row(scenes) >= 0).any(2), np.ones((len(scenes), 1), bool)], 1)
    asked = order(u, filled)[:, 0]
    whole = asked == grid
    row = np.minimum(asked, grid - 1)
    question = np.where(
        whole[:, None], vocab.fill("read all digits ?"), vocab.fill("read _ row ?", vocab.row_ids[row])
    )
    cell_row = np.repeat(np.arange(grid), grid)
    read = (scenes.digit >= 0) & (whole[:, None] | (cell_row == row[:, None]))
    width = scenes.config.digits[1] + 1
    rank = np.argsort(~read, axis=1, kind="stable")[:, : width - 1]
    number = read.sum(1)[:, None]
    answer = np.zeros((len(scenes), width), np.int32)
    answer[:, :-1] = digit_id(np.take_along_axis(scenes.digit, rank, 1))
    column = np.arange(width)
    answer = np.where(column < number, answer, np.where(column == number, vocab.ids["end"], 0))
    return question.astype(np.int32), answer.astype(np.int32)


def pack(
    questions: np.ndarray, answers: np.ndarray, *more: tuple[np.ndarray, np.ndarray]
) -> dict[str, np.ndarray]:
    """One sequence per scene in the layout record (all [S, L]): tokens int32, targets int32, loss_mask
    float32, segment int32 (question number from 1; 0 = padding, to be seen by nothing), position int32
    (from 0 in each segment; padding counts in `questions`, so that every "?" stands alike, and not in `more`,
    whose answers are generated behind a prompt that has none).

    questions [S, Q, T] with answers [S, Q] take T tokens each; every (questions [S, T], answers [S, A]) of
    `more` takes T + A - 1, its answer fed back in. The answer is the target at "?"; nothing else is
    trained.
    """
    blocks = [(questions[:, j], answers[:, j, None]) for j in range(questions.shape[1])]
    columns = {name: [] for name in ("tokens", "targets", "loss_mask", "segment", "position")}
    for number, (question, answer) in enumerate((*blocks, *more), 1):
        width = question.shape[1]
        tokens = np.concatenate([question, answer[:, :-1]], 1)
        targets = np.zeros_like(tokens)
        targets[:, width - 1 :] = answer
        columns["tokens"].append(tokens)
        columns["targets"].append(targets)
        columns["loss_mask"].append((targets != 0).astype(np.float32))
        columns["segment"].append(np.where(tokens != 0, number, 0).astype(np.int32))
        position = np.arange(tokens.shape[1], dtype=np.int32)
        if number > len(blocks):
            position = np.maximum(position - (question == 0).sum(1, keepdims=True), 0)
        columns["position"].append(np.broadcast_to(position, tokens.shape).astype(np.int32))
    return {name: np.concatenate(parts, 1) for name, parts in columns.items()}


def render(vocab: Vocabulary, questions: np.ndarray, answers: np.ndarray | None = None) -> list[str]:
    """Lines such as "which digit at top-left ? 7" from questions [..., T] and answers [...] or [..., A]."""
    rows = questions.reshape(-1, questions.shape[-1])
    if answers is None:
        return [vocab.decode(row) for row in rows]
    return [
        f"{vocab.decode(row)} {vocab.decode(answer)}"
        for row, answer in zip(rows, answers.reshape(len(rows), -1), strict=True)
    ]
