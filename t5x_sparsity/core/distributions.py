"""How layers share a total sparsity."""

import math
from collections.abc import Mapping, Sequence

Shapes = Mapping[str, Sequence[int]]


def uniform(shapes: Shapes, sparsity: float, weights: Mapping[str, int]) -> dict[str, float]:
    """Every layer at the same sparsity.

    >>> uniform({"wi": (8, 32), "wo": (32, 32)}, 0.5, {"wi": 256, "wo": 1024})
    {'wi': 0.5, 'wo': 0.5}

    Args:
      shapes: path -> shape of a slice.
      sparsity: of all weights together, in [0, 1].
      weights: path -> number of weights, of all slices.
    """
    return {path: sparsity for path in shapes}


def er(shapes: Shapes, sparsity: float, weights: Mapping[str, int]) -> dict[str, float]:
    """Erdos-Renyi: density proportional to (a + b) / (a b), of a layer's last two dims.

    Mocanu et al. 2018, arXiv:1707.04780; as used by Evci et al. 2020, arXiv:1911.11134, section 3.
    Arguments as of `uniform`.
    """
    return _scaled({p: s[-2:] for p, s in shapes.items()}, sparsity, weights)


def erk(shapes: Shapes, sparsity: float, weights: Mapping[str, int]) -> dict[str, float]:
    """Erdos-Renyi-Kernel: `er` over all dims (Evci et al. 2020, arXiv:1911.11134, section 3).

    >>> levels = erk({"wi": (8, 32), "wo": (32, 32)}, 0.75, {"wi": 256, "wo": 1024})
    >>> {path: round(level, 3) for path, level in levels.items()}
    {'wi': 0.519, 'wo': 0.808}
    """
    return _scaled(shapes, sparsity, weights)


DISTRIBUTIONS = {"uniform": uniform, "er": er, "erk": erk}


def check_distribution(name: str) -> None:
    """Raises ValueError for an unknown name."""
    if name not in DISTRIBUTIONS:
        raise ValueError(
            f"unknown sparsity distribution {name!r} (SPARSITY_DISTRIBUTION); choose one of "
            + ", ".join(repr(n) for n in DISTRIBUTIONS)
        )


def distribute(
    name: str, shapes: Shapes, sparsity: float, slices: Mapping[str, int] | None = None
) -> dict[str, float]:
    """The sparsity of each layer, in [0, 1], such that the total over all of them is `sparsity`.

    Args:
      name: 'uniform', 'er' or 'erk'.
      shapes: path -> shape of a slice.
      sparsity: of all weights together, in [0, 1].
      slices: path -> slices of the layer, 1 where it is missing; all get the same sparsity.

    Raises:
      ValueError: an unknown name.
    """
    check_distribution(name)
    slices = slices or {}
    weights = {p: math.prod(s) * slices.get(p, 1) for p, s in shapes.items()}
    return DISTRIBUTIONS[name](shapes, sparsity, weights)


def _scaled(dims: Shapes, sparsity: float, weights: Mapping[str, int]) -> dict[str, float]:
    """density = eps sum(dims) / prod(dims), with eps such that the total is right.

    A layer whose density would be above 1 is dense, together with all that tie with it, and eps is
    recomputed for the rest.
    """
    raw = {p: sum(d) / math.prod(d) for p, d in dims.items()}
    budget = (1 - sparsity) * sum(weights.values())
    left = sorted(raw, key=lambda p: -raw[p])
    dense: set[str] = set()
    while left:
        eps = budget / sum(raw[p] * weights[p] for p in left)
        if eps * raw[left[0]] <= 1:
            return {p: 0.0 if p in dense else 1 - eps * raw[p] for p in raw}
        top = raw[left[0]]
        full = [p for p in left if raw[p] >= top * (1 - 1e-12)]
        dense.update(full)
        budget -= sum(weights[p] for p in full)
        left = [p for p in left if p not in dense]
    return {p: 0.0 for p in raw}
