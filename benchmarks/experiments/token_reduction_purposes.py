"""The axes and the probes of token reduction beyond efficiency, as Markdown:

    python -m benchmarks.experiments.token_reduction_purposes
"""

from __future__ import annotations

from jaxattn import registry
from jaxattn.analysis.taxonomy import examples, markdown, taxonomy
from jaxattn.analysis.token_reduction_purposes import non_monotone, oracle, steadiness, token_reduction_purposes


def main() -> None:
    """Print the taxonomy and the probes as Markdown."""
    known = examples()
    print(markdown(taxonomy(known)))
    if others := sorted(set(registry.names("tokens")) - set(known)):
        print("Placed by `classify` from a record, since they need arguments: " + ", ".join(others) + ".\n")
    named = {name: registry.get("tokens", name) for name in ("random", "uniform", "mean_pool", "fastervlm")}
    methods = {"oracle": oracle, **named}
    ratios = (1.0, 0.5, 0.25, 0.125, 0.0625)
    points = token_reduction_purposes(methods, ratios)
    print(markdown(points))
    for name in methods:
        mine = [p for p in points if p.method == name]
        best = non_monotone(ratios, [p.accuracy for p in mine], [p.error for p in mine])
        print(f"- {name}: " + (f"best at a keep ratio of {best}" if best else "nothing beats keeping everything"))
    print()
    print(markdown(steadiness({"everything": None, **methods})))


if __name__ == "__main__":
    main()
