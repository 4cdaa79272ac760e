"""The vision tower against its formula; patches, stems, select layers, classifier."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import tokens as token_methods
from models import vit
from models.bind import Bound
from tests.models import reference
from tests.models.small import TOWER, close, images, sharpen


@jax.jit
def windows(image):
    return vit.patchify(WIDE, image)


WIDE = vit.config(12, 3, 1, 8, 2, channels=2, stem=5)


def test_patches_are_windows_in_raster_order():
    image = images()
    close(windows(image), reference.patches(image, 3, 5), atol=0)
    plain = vit.patchify(TOWER, jnp.asarray(image))
    close(plain, reference.patches(image, 3, 3), atol=0)
    back = np.asarray(plain).reshape(2, 4, 4, 3, 3, 2).transpose(0, 1, 3, 2, 4, 5).reshape(image.shape)
    np.testing.assert_array_equal(back, image)
    meta = vit.patch_meta(TOWER)
    np.testing.assert_array_equal(meta.labels["row"][0], np.repeat(np.arange(4), 4))
    np.testing.assert_array_equal(meta.labels["col"][0], np.tile(np.arange(4), 4))


@pytest.mark.parametrize(
    ("changes", "post"),
    [
        ({"registers": 1, "classes": 5}, True),
        ({"activation": "quick_gelu", "pre_norm": True, "bias": True, "stem_bias": False, "layer_scale": True}, True),
        ({"cls": False, "stem": 5, "stem_hidden": 12, "activation": "gelu_tanh", "norm": "rms", "classes": 5}, True),
    ],
    ids=["deit", "clip", "siglip-with-a-stem"],
)
def test_rows_are_those_of_the_formula(changes, post):
    c = vit.config(12, 3, 2, 16, 2, channels=2, hidden=32, **changes)
    params = sharpen(vit.init(c), 2.0)
    params = jax.tree.map(lambda x: x + 0.1 * np.random.default_rng(x.size).normal(size=x.shape).astype(np.float32), params)
    bound = vit.bind(c, params)
    out = jax.jit(lambda p, x: vit.forward(Bound(bound.program, bound.arrays, p), x))(params, images())
    x, _, _ = reference.tower(params, c, images())
    x = reference.norm(reference.tree(params["norm"]), x, c.block.eps)
    close(out.streams.x, x, atol=2e-3)
    pooled = x[:, 0] if c.cls else x.mean(1)
    close(out.pooled, pooled, atol=2e-3)
    if c.classes:
        close(out.logits, reference.dense(reference.tree(params["classifier"]), pooled), atol=4e-3)
    assert dict(out.streams.groups) == ({"special": c.special} if c.special else {}) | {"vision": 16}


def test_a_select_layer_is_the_output_of_that_layer():
    params = sharpen(vit.init(TOWER), 2.0)
    bound = vit.bind(TOWER, params)
    out = vit.forward(bound, images(), layers_to_run=2)
    _, _, entered = reference.tower(params, TOWER, images())
    close(out.streams.x, entered[2], atol=2e-3)
    assert out.logits is None


def test_bfloat16_gradients_are_finite():
    c = vit.config(12, 3, 2, 16, 2, channels=2, hidden=32, classes=3)
    bound = vit.bind(c, None)

    @jax.jit
    @jax.grad
    def slope(params):
        out = vit.forward(Bound(bound.program, bound.arrays, params), images(), dtype=jnp.bfloat16)
        return jax.nn.log_softmax(out.logits)[:, 0].mean()

    found = slope(vit.init(c))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(found["layers"]["attn"]["q"]["kernel"]))


def test_what_is_refused():
    params = vit.init(TOWER)
    with pytest.raises(ValueError, match=r"image: expected \[batch, 12, 12, 2\], got shape \(2, 12, 12\)"):
        vit.forward(vit.bind(TOWER, params), images()[..., 0])
    with pytest.raises(ValueError, match="image: expected .* multiples of the patch, 3"):
        vit.config(13, 3, 1, 8, 2)
    with pytest.raises(ValueError, match="stem: expected 0 or at least the patch, 3, of the same parity"):
        vit.config(12, 3, 1, 8, 2, stem=4)
    with pytest.raises(ValueError, match=r"reduce\[vision\]: expected a layer between 1 and 2"):
        vit.bind(TOWER, params, reduce={"vision": token_methods.uniform(4)})
    with pytest.raises(ValueError, match="expected .*16.*got 17"):
        vit.bind(TOWER, params, reduce={"vision.1": token_methods.uniform(17)})
    with pytest.raises(ValueError, match="expected .*8.*got 9"):
        vit.bind(TOWER, params, reduce={"vision.1": token_methods.uniform(8), "vision.2": token_methods.uniform(9)})
