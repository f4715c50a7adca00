"""A plan by some options of a configuration."""

import t5x_sparsity as ts


def make_plan(shapes, *, axes=None, algorithm=None, **options):
    algorithm = ts.Static() if algorithm is None else algorithm
    return ts.SparsityConfig(algorithm=algorithm, **options).plan(shapes, axes)
