import numpy as np
import pytest

from jaxattn.core.search import Search, expected_improvement, maximise, posterior


def test_the_process_goes_through_its_points():
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(12, 2))
    y = np.sin(3 * x[:, 0]) + x[:, 1]
    y = (y - y.mean()) / y.std()
    mean, deviation = posterior(x, y, x)
    np.testing.assert_allclose(mean, y, atol=0.05)
    _, far = posterior(x, y, np.array([[5.0, 5.0]]))
    assert far[0] > 0.5 > deviation.max()


def test_expected_improvement_is_an_expectation():
    draws = np.random.default_rng(0).normal(size=400_000)
    for mean, deviation in ((0.3, 0.5), (-1.0, 1.0)):
        want = np.maximum(mean + deviation * draws - 0.2, 0).mean()
        got = expected_improvement(np.array([mean]), np.array([deviation]), 0.2)[0]
        np.testing.assert_allclose(got, want, rtol=0.02)


def test_it_beats_random_points():
    target = {"a": 0.7, "b": -2.0}
    bounds = {"a": (0.0, 1.0), "b": (-5.0, 5.0)}

    def objective(p):
        return -((p["a"] - target["a"]) ** 2) - ((p["b"] - target["b"]) / 10) ** 2

    found = maximise(objective, bounds, calls=30, initial=8, seed=1)
    point, value = found.best
    chance = maximise(objective, bounds, calls=30, initial=30, seed=1).best[1]
    assert value > chance and value > -1e-3 and abs(point["a"] - 0.7) < 0.05


def test_refused():
    with pytest.raises(ValueError, match="bounds: expected"):
        Search({"a": (1.0, 0.0)})
    search = Search({"a": (0.0, 1.0)})
    search.tell(search.ask(), float("nan"))
    with pytest.raises(ValueError, match="at least one finite value"):
        _ = search.best
