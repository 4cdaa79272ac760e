"""Tokenizers, chat templates and image processing: what transformers makes of the same directories."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from models.hub import images, text

GOLDEN = Path(__file__).parents[2] / "golden" / "hf"


def test_text_is_encoded_decoded_and_rendered():
    """Ids, texts and chats of the recording; batches are padded behind."""
    pytest.importorskip("jinja2")
    words = text.read_text(GOLDEN / "words")
    expected = json.loads((GOLDEN / "words" / "expected.json").read_text())
    assert [words.encode(t) for t in expected["texts"]] == expected["ids"]
    assert [words.decode(i) for i in expected["ids"]] == expected["decoded"] == expected["texts"]
    for chat, rendered in zip(expected["chats"], expected["rendered"], strict=True):
        assert words.chat(chat["messages"], prompt=chat["add_generation_prompt"], tools=chat.get("tools")) == rendered
    ids, lengths = words.batch(expected["texts"][:2], pad=7)
    assert [row[:n].tolist() for row, n in zip(ids, lengths, strict=True)] == expected["ids"][:2]
    assert (ids[0, lengths[0] :] == 7).all() and (ids[1, lengths[1] :] == 7).all() and lengths[0] != lengths[1]
    assert words.stop == (words.tokenizer.token_to_id("</s>"),)


def test_templates_are_sandboxed_and_named(tmp_path):
    jinja2 = pytest.importorskip("jinja2")
    words = text.read_text(GOLDEN / "words")
    with pytest.raises(jinja2.exceptions.TemplateError, match="the system speaks first"):
        words.chat([dict(role="user", content="a"), dict(role="system", content="b")])
    with pytest.raises(jinja2.exceptions.SecurityError):
        text.render("{{ messages.append(1) }}", messages=[])
    with pytest.raises(ValueError, match=r"template: expected one of \['default'\], got 'rag'"):
        words.chat([], template="rag")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(GOLDEN / "words" / name, tmp_path)
    edited = json.loads((tmp_path / "tokenizer_config.json").read_text())
    edited["chat_template"] = [dict(name="default", template="{{ bos_token }}1"), dict(name="rag", template="2")]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(edited))
    (tmp_path / "generation_config.json").write_text(json.dumps(dict(eos_token_id=[5, 6])))
    named = text.read_text(tmp_path)
    assert named.chat([]) == "<s>1" and named.chat([], template="rag") == "2" and named.stop == (5, 6)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="expected tokenizer.json"):
        text.read_text(tmp_path)


@pytest.mark.parametrize("kind", ("clip", "siglip", "vit"))
def test_images(kind):
    """Equal to the processor's within rounding, for a wide, a tall, a grey and a transparent picture."""
    pytest.importorskip("PIL")
    fields = images.read_processor(GOLDEN / "images" / kind)
    with np.load(GOLDEN / "images" / "io.npz") as found:
        for i in range(4):
            np.testing.assert_allclose(images.prepare(found[f"image.{i}"], fields), found[f"{kind}.{i}"], atol=1e-5)


def test_processors_that_are_not_supported_are_named(tmp_path):
    with pytest.raises(ValueError, match="expected preprocessor_config.json"):
        images.read_processor(tmp_path)
    for fields in (dict(do_image_splitting=True), dict(do_pad=True), dict(merge_size=2, size=dict(height=3, width=3))):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
        with pytest.raises(ValueError, match=[*fields][-1]):
            images.read_processor(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps(dict(image_processor=dict(size=dict(height=3, width=3)))))
    assert images.prepare(np.zeros((5, 4), np.uint8), images.read_processor(tmp_path)).shape == (3, 3, 3)
