import numpy as np
import pytest

from train.data import digits


def test_split_is_by_instance_and_stratified():
    train, held = digits.load("train"), digits.load("validation")
    assert len(train) == 1437 and len(held) == 360
    both = np.concatenate([train.instance, held.instance])
    np.testing.assert_array_equal(np.sort(both), np.arange(1797))
    share = np.bincount(held.labels) / (np.bincount(train.labels) + np.bincount(held.labels))
    assert np.abs(share - 360 / 1797).max() < 0.005


def test_split_holds_the_table_of_scikit_learn():
    from sklearn.datasets import load_digits

    table = load_digits()
    held = digits.load("validation")
    np.testing.assert_allclose(held.images * 16, table.images[held.instance])
    np.testing.assert_array_equal(held.labels, table.target[held.instance])


def test_resample_matches_a_plain_bilinear_loop():
    image = np.random.default_rng(0).random((5, 7))
    matrix = np.array([[0.9, 0.2], [-0.3, 1.1]])
    got = digits.resample(image[None].astype(np.float32), 6, matrix[None])[0]

    def pixel(y, x):
        return image[y, x] if 0 <= y < 5 and 0 <= x < 7 else 0.0

    for i in range(6):
        for j in range(6):
            offset = matrix @ [(i + 0.5) / 6 * 5 - 2.5, (j + 0.5) / 6 * 7 - 3.5]
            y, x = offset[0] + 2.5 - 0.5, offset[1] + 3.5 - 0.5
            y0, x0 = int(np.floor(y)), int(np.floor(x))
            fy, fx = y - y0, x - x0
            want = (1 - fy) * ((1 - fx) * pixel(y0, x0) + fx * pixel(y0, x0 + 1))
            want += fy * ((1 - fx) * pixel(y0 + 1, x0) + fx * pixel(y0 + 1, x0 + 1))
            if not (-1 <= y <= 5 and -1 <= x <= 7):
                want = 0.0
            np.testing.assert_allclose(got[i, j], want, atol=1e-5)


def test_resampling_to_the_same_size_is_the_identity():
    plain = digits.load("validation").images
    np.testing.assert_allclose(digits.resample(plain, 8), plain, atol=1e-6)


def test_augmentation_is_mild_seeded_and_keeps_the_instance():
    plain = digits.digit_bank("train", variants=0)
    bank = digits.digit_bank("train", variants=2, seed=3)
    again = digits.digit_bank("train", variants=2, seed=3)
    other = digits.digit_bank("train", variants=2, seed=4)
    assert len(bank) == 2 * 1437 and bank.images.dtype == np.float32 and bank.images.shape[1:] == (16, 16)
    np.testing.assert_array_equal(bank.images, again.images)
    assert (bank.images != other.images).any()
    np.testing.assert_array_equal(bank.instance, np.tile(plain.instance, 2))
    first, second = bank.images[:1437].reshape(1437, -1), bank.images[1437:].reshape(1437, -1)
    assert (first != second).any(1).all()
    flat = plain.images.reshape(1437, -1)
    cosine = (flat * first).sum(1) / np.linalg.norm(flat, axis=1) / np.linalg.norm(first, axis=1)
    assert cosine.mean() > 0.9 and cosine.min() > 0.5
    assert bank.images.min() >= 0 and bank.images.max() <= 1


def test_validation_digits_are_plain():
    np.testing.assert_array_equal(
        digits.digit_bank("validation").images, digits.digit_bank("validation", variants=0).images
    )


@pytest.mark.parametrize(
    "bad", [{"split": "test"}, {"split": "train", "variants": -1}, {"split": "train", "size": 0}]
)
def test_bad_arguments_are_named(bad):
    name = list(bad)[-1]
    with pytest.raises(ValueError, match=f"{name}: expected .* got"):
        digits.digit_bank(**bad)
