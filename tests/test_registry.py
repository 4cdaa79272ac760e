"""Names and arguments on a command line find their factory, or say what is wrong with them."""

import pytest

from jaxattn import registry


@pytest.fixture
def widget(monkeypatch):
    """A table of tokens factories that holds one factory only."""
    monkeypatch.setitem(registry._factories, "tokens", {})

    @registry.register("tokens")
    def keep_some(keep, *, alpha=0.5, layers=(1, 2), mode="mean"):
        return keep, alpha, layers, mode

    return keep_some


def test_parse_reads_literals_and_bare_words(widget):
    assert registry.parse("tokens", "keep_some:keep=64") == (64, 0.5, (1, 2), "mean")
    text = "keep-some: keep=None, alpha=1e-3, layers=(3, (4, 5)), mode=rank"
    assert registry.parse("tokens", text) == (None, 1e-3, (3, (4, 5)), "rank")
    assert registry.parse("tokens", "keep_some:keep=true,mode='a,b=c'") == (True, 0.5, (1, 2), "a,b=c")
    assert registry.get("tokens", "keep_some") is widget


@pytest.mark.parametrize(
    "text, message",
    [
        ("keep_sme:keep=1", "unknown tokens 'keep_sme'; did you mean keep_some"),
        ("keep_some", "missing argument 'keep'; accepted: keep, alpha=0.5"),
        ("keep_some:keep=1,alfa=2", "unknown argument 'alfa'; did you mean alpha"),
        ("keep_some:keep=1,keep=2", "'keep' is given twice"),
        ("keep_some:keep", "expected arg=value, got 'keep'"),
        ("keep_some:keep=(1,2", "do not close"),
        ("keep_some:keep=[1 2]", "expected a Python literal"),
    ],
)
def test_parse_says_what_is_wrong(widget, text, message):
    with pytest.raises(ValueError) as error:
        registry.parse("tokens", text)
    assert message in str(error.value)


def test_a_name_belongs_to_one_factory(widget):
    def keep_some(keep): ...

    with pytest.raises(ValueError, match="registered by"):
        registry.register("tokens")(keep_some)
    with pytest.raises(ValueError, match="socket: expected one of"):
        registry.register("token")


def test_families_register_by_being_there():
    """Every registered factory is documented, lives in a family, and is found under its own name."""
    for socket in registry.SOCKETS:
        for name in registry.names(socket):
            factory = registry.get(socket, name)
            assert factory.__name__ == name and factory.__doc__, (socket, name)
            assert factory.__module__.split(".")[1] in registry.FAMILIES, factory.__module__


@pytest.mark.parametrize(
    "text, message",
    [
        ("keep=many", "argument 'keep': expected int, got 'many'"),
        ("keep=1.5", "argument 'keep': expected int, got 1.5"),
        ("keep=true", "argument 'keep': expected int, got True"),
        ("keep=1,alpha=x", "argument 'alpha': expected float, got 'x'"),
        ("keep=1,layers=3", r"argument 'layers': expected tuple\[int, ...\] | None, got 3"),
        ("keep=1,layers=(3,x)", "expected a Python literal"),
        ("keep=1,grid=(1,2,3)", "argument 'grid'"),
        ("keep=1,on=1", "argument 'on': expected bool, got 1"),
    ],
)
def test_values_are_of_the_annotated_types(monkeypatch, text, message):
    monkeypatch.setitem(registry._factories, "tokens", {})

    @registry.register("tokens")
    def typed(keep: int, alpha: float = 0.5, layers: tuple[int, ...] | None = None, grid: tuple[int, int] = (1, 1),
              on: bool = False, anything: object = None):  # fmt: skip
        return keep, alpha, layers, grid, on, anything

    assert registry.parse("tokens", "typed:keep=2,alpha=1,layers=(3,),on=true,anything=(1,'x')") == (
        2, 1, (3,), (1, 1), True, (1, "x"))  # fmt: skip
    assert registry.parse("tokens", "typed:keep=2,layers=none")[2] is None
    with pytest.raises(ValueError, match=message):
        registry.parse("tokens", f"typed:{text}")
