from dataclasses import replace

import numpy as np
import pytest

from train.data import digits
from train.data.pipeline import split_scenes
from train.data.scenes import BACKGROUND, SceneConfig, make_scenes

CONFIG = SceneConfig()


@pytest.fixture(scope="module")
def bank():
    return digits.digit_bank("train", variants=1)


@pytest.fixture(scope="module")
def scenes(bank):
    return make_scenes(bank, CONFIG, seed=7, start=0, stop=600)


def test_shapes_and_types(scenes):
    assert scenes.images.shape == (600, 96, 96) and scenes.images.dtype == np.float32
    assert scenes.patch_labels.shape == (600, 144) and scenes.patch_labels.dtype == np.int32
    assert scenes.presence.shape == (600, 10) and scenes.presence.dtype == np.float32
    assert scenes.box.shape == (600, 9, 4) and scenes.box.dtype == np.int32


def test_a_scene_depends_on_its_number_alone(bank, scenes):
    part = make_scenes(bank, CONFIG, seed=7, start=250, stop=262)  # across a block of the painter
    for name in ("pixels", "digit", "instance", "box"):
        np.testing.assert_array_equal(getattr(part, name), getattr(scenes, name)[250:262])
    other = make_scenes(bank, CONFIG, seed=8, start=250, stop=262)
    assert (other.pixels != part.pixels).mean() > 0.5
    assert (part.pixels[0] != part.pixels[1]).mean() > 0.5


def test_validation_scenes_hold_validation_digits_only():
    train, held = split_scenes("train", 300), split_scenes("validation", 300)
    seen, unseen = (set(s.instance[s.instance >= 0].tolist()) for s in (train, held))
    assert unseen <= set(digits.load("validation").instance.tolist())
    assert seen <= set(digits.load("train").instance.tolist())
    assert not seen & unseen
    assert not (train.box == held.box).all((1, 2)).any()  # layouts are drawn apart as well


def test_every_digit_is_where_its_box_says_and_what_its_label_says(bank):
    quiet = make_scenes(bank, replace(CONFIG, noise=0.0), seed=1, start=0, stop=50)
    images = quiet.images
    image_of = {int(i): image for i, image in zip(bank.instance, bank.images, strict=True)}
    label_of = dict(zip(bank.instance.tolist(), bank.labels.tolist(), strict=True))
    for s in range(50):
        left = images[s].copy()
        for cell in range(9):
            if quiet.digit[s, cell] < 0:
                assert quiet.instance[s, cell] == -1 and (quiet.box[s, cell] == -1).all()
                continue
            y0, x0, y1, x1 = quiet.box[s, cell]
            assert (
                (y0 // 32, x0 // 32) == divmod(cell, 3)
                and y1 <= (cell // 3 + 1) * 32
                and x1 <= (cell % 3 + 1) * 32
            )
            assert y0 % 8 == 0 and x0 % 8 == 0 and y1 - y0 == x1 - x0 == 16
            ink, instance = images[s, y0:y1, x0:x1], quiet.instance[s, cell]
            assert label_of[instance] == quiet.digit[s, cell]
            contrast = (ink * image_of[instance]).sum() / (image_of[instance] ** 2).sum()
            assert 0.69 < contrast < 1.01
            np.testing.assert_allclose(ink, contrast * image_of[instance], atol=0.01)
            left[y0:y1, x0:x1] = 0
        assert np.abs(left).max() < 0.004  # half a quantisation step: nothing outside the boxes


def test_patch_labels_and_presence_follow_from_the_digits(scenes):
    for s in range(40):
        want = np.full((12, 12), BACKGROUND)
        for digit, (y0, x0, y1, x1) in zip(scenes.digit[s], scenes.box[s], strict=True):
            if digit >= 0:
                want[y0 // 8 : y1 // 8, x0 // 8 : x1 // 8] = digit
        np.testing.assert_array_equal(scenes.patch_labels[s].reshape(12, 12), want)
        assert set(np.flatnonzero(scenes.presence[s])) == set(scenes.digit[s][scenes.digit[s] >= 0])


def test_statistics_are_those_asked_for(scenes):
    occupied = scenes.digit >= 0
    number = occupied.sum(1)
    assert number.min() == 2 and number.max() == 6
    assert np.abs(np.bincount(number, minlength=7)[2:] / 600 - 0.2).max() < 0.06
    assert np.abs(occupied.mean(0) - 4 / 9).max() < 0.08
    assert np.abs(np.bincount(scenes.digit[occupied], minlength=10) / occupied.sum() - 0.1).max() < 0.04
    shift = (scenes.box[..., :2] % 32)[occupied]
    assert np.abs(np.bincount(shift.ravel() // 8, minlength=3) / shift.size - 1 / 3).max() < 0.04
    empty = np.ones((600, 96, 96), bool)
    for s, cell in zip(*np.nonzero(occupied), strict=True):
        y0, x0, y1, x1 = scenes.box[s, cell]
        empty[s, y0:y1, x0:x1] = False
    background = scenes.images[empty]
    assert abs(background.mean()) < 0.002 and abs(background.std() - 0.08) < 0.002


def test_share_of_scenes_with_few_classes(bank):
    full = make_scenes(bank, replace(CONFIG, digits=(9, 9)), seed=2, start=0, stop=500)
    few = full.presence.sum(1) <= 3  # nine free draws from ten classes give three or fewer once in thousands
    assert abs(few.mean() - 0.4) < 0.07
    assert (
        make_scenes(bank, replace(CONFIG, repeat_share=1.0), seed=2, start=0, stop=99).presence.sum(1) <= 3
    ).all()


def test_dense_scenes(bank):
    dense = make_scenes(bank, CONFIG.dense(), seed=0, start=0, stop=100)
    number = (dense.digit >= 0).sum(1)
    assert number.min() == 5 and number.max() == 9


@pytest.mark.parametrize("canvas, origins", [(64, [0, 24, 48]), (72, [0, 24, 48]), (96, [0, 32, 64])])
def test_other_canvases_stay_on_the_patch_grid(bank, canvas, origins):
    config = SceneConfig(canvas=canvas)
    assert config.origins.tolist() == origins
    some = make_scenes(bank, config, seed=0, start=0, stop=30)
    box = some.box[some.digit >= 0]
    assert (box % 8 == 0).all() and box.max() <= canvas
    assert ((some.patch_labels != BACKGROUND).sum(1) == 4 * (some.digit >= 0).sum(1)).all()


def test_digits_off_the_patch_grid_label_the_patches_they_mostly_cover(bank):
    some = make_scenes(bank, SceneConfig(step=1), seed=0, start=0, stop=60)
    assert (some.box[some.digit >= 0] % 8 != 0).any()
    assert ((some.patch_labels != BACKGROUND).sum(1) == 4 * (some.digit >= 0).sum(1)).all()


@pytest.mark.parametrize(
    "bad",
    [{"canvas": 95}, {"grid": 7}, {"digits": (0, 3)}, {"digits": (5, 10)}, {"step": 0}, {"repeat_share": 2}],
)
def test_bad_configs_are_named(bad):
    with pytest.raises(ValueError, match=f"{list(bad)[0]}: expected .* got"):
        SceneConfig(**bad)


def test_bad_banks_and_ranges_are_named(bank):
    with pytest.raises(ValueError, match="bank: expected images of side 8"):
        make_scenes(bank, SceneConfig(digit=8), seed=0, start=0, stop=1)
    no_sevens = np.flatnonzero(bank.labels != 7)
    part = digits.DigitBank(bank.images[no_sevens], bank.labels[no_sevens], bank.instance[no_sevens])
    with pytest.raises(ValueError, match=r"bank: expected every digit 0-9, got none of \[7\]"):
        make_scenes(part, CONFIG, seed=0, start=0, stop=1)
    with pytest.raises(ValueError, match="start"):
        make_scenes(bank, CONFIG, seed=0, start=3, stop=3)
