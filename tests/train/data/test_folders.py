import json
import re

import numpy as np
import pytest
from PIL import Image

from train.data import text
from train.data.pipeline import vit_dataset, vlm_dataset


def save(path, value, shape=(10, 12)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*shape, 3), value, np.uint8)).save(path)


@pytest.fixture
def classes(tmp_path):
    for name, value in (("bird", 40), ("cat", 200)):
        for i in range(6):
            save(tmp_path / name / f"{i}.png", value)
    return tmp_path


@pytest.fixture
def questions(tmp_path):
    lines = []
    for i in range(5):
        save(tmp_path / "images" / f"{i}.png", 50 * i)
        for word in ("dark", "light"):
            lines.append(
                {"image": f"images/{i}.png", "question": f"is {i} {word}?", "answer": f"maybe {word}"}
            )
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return file


def test_image_folder(classes):
    train = vit_dataset(classes, size=8, batch_size=10, epochs=1, drop_remainder=False)
    held = vit_dataset(classes, size=8, batch_size=2, split="validation", shuffle=False)
    assert train.info["classes"] == ("bird", "cat") and train.size == 10 and held.size == 2
    batch = next(iter(train))
    assert batch["image"].shape == (10, 8, 8, 3) and batch["image"].dtype == np.float32
    np.testing.assert_allclose(batch["image"][:, 0, 0, 0], np.where(batch["label"], 200, 40) / 255, atol=1e-6)
    assert next(iter(held))["label"].tolist() == [0, 1]
    grey = vit_dataset(classes, size=8, batch_size=2, channels=1)
    assert next(iter(grey))["image"].shape == (2, 8, 8, 1)


def test_bad_image_folders_are_named(classes, tmp_path):
    with pytest.raises(ValueError, match="^data: .*nowhere: expected a folder .* got no such"):
        vit_dataset(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="^data: .*expected a folder with one subfolder .* got a file"):
        vit_dataset(classes / "cat" / "0.png")
    with pytest.raises(ValueError, match="^data: .*got 0 subfolders"):
        vit_dataset(classes / "cat")
    with pytest.raises(ValueError, match="channels: expected 1 .grey. or 3 .RGB., got 4"):
        vit_dataset(classes, channels=4)
    (classes / "cat" / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"^data: .*broken\.png: expected a readable image"):
        vit_dataset(classes)
    (classes / "cat" / "broken.png").unlink()
    (classes / "dog").mkdir()
    with pytest.raises(ValueError, match="^data: .*dog: expected at least two images .* got 0"):
        vit_dataset(classes)


def test_jsonl_of_questions(questions):
    tokenizer = text.ByteTokenizer()
    train = vlm_dataset(questions, batch_size=4, size=16, length=40, shuffle=False, validation=0.2)
    held = vlm_dataset(questions, batch_size=2, size=16, length=40, split="validation", validation=0.2)
    assert train.size == 8 and held.size == 2 and train.info["vocab_size"] == 260
    batch = next(iter(train))
    assert batch["image"].shape == (4, 16, 16, 3) and batch["tokens"].shape == (4, 40)
    for r in range(4):
        live = batch["segment"][r] > 0
        asked = tokenizer.decode(batch["tokens"][r])
        question, answer = asked.split("\n")
        trained = batch["targets"][r][batch["loss_mask"][r] > 0]
        assert tokenizer.decode(trained) == answer and answer.startswith("maybe ")
        assert trained[-1] == tokenizer.eos and batch["tokens"][r, 0] == tokenizer.bos
        np.testing.assert_array_equal(batch["tokens"][r][live][1:], batch["targets"][r][live][:-1])
        np.testing.assert_array_equal(batch["position"][r][live], np.arange(live.sum()))
        number = int(question.split()[1])
        np.testing.assert_allclose(batch["image"][r], 50 * number / 255, atol=1e-6)
    seen = {
        tuple(image[0, 0])
        for image in next(iter(vlm_dataset(questions, batch_size=8, size=4, validation=0.2)))["image"]
    }
    assert not seen & {tuple(image[0, 0]) for image in next(iter(held))["image"]}


@pytest.mark.parametrize(
    "line, message",
    [
        ("{bad", "line 2: expected a JSON object, got Expecting property name"),
        ("[1]", "line 2: expected a JSON object, got a list"),
        (
            '{"image": "images/0.png", "question": "q"}',
            "line 2: expected a text under 'answer', got no 'answer' among",
        ),
        (
            '{"image": "images/0.png", "question": 3, "answer": "a"}',
            "line 2: expected a text under 'question', got 3",
        ),
        (
            '{"image": "gone.png", "question": "q", "answer": "a"}',
            r"line 2: expected a readable image, got .*gone\.png",
        ),
        (
            json.dumps({"image": "images/0.png", "question": "q" * 99, "answer": "a"}),
            "line 2: expected question and answer within length=40 tokens, got 102",
        ),
    ],
)
def test_bad_lines_are_named_by_number(questions, line, message):
    lines = questions.read_text().splitlines()
    lines[1] = line
    questions.write_text("\n".join(lines))
    found = 0
    for split in ("train", "validation"):  # too long a line is found in the split that holds its image
        try:
            vlm_dataset(questions, length=40, split=split)
        except ValueError as error:
            found += 1
            assert re.search("^data: .*data.jsonl " + message, str(error))
    assert found


def test_a_damaged_image_is_named_when_it_is_decoded(questions):
    file = questions.parent / "images" / "0.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(file)
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(
        ValueError, match=r"^data: .*data.jsonl line \d+: expected a readable image, got .*0\.png"
    ):
        for split in ("train", "validation"):
            for _ in iter(vlm_dataset(questions, batch_size=1, size=8, split=split, epochs=1)):
                pass


def test_other_bad_jsonl_inputs(tmp_path):
    with pytest.raises(ValueError, match="^data: .*got a folder"):
        vlm_dataset(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="^data: .*at least two images, got 0 images"):
        vlm_dataset(tmp_path / "empty.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\0")
    with pytest.raises(ValueError, match="^data: .*UnicodeDecodeError"):
        vlm_dataset(tmp_path / "binary.jsonl")
