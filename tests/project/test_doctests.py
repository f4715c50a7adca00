"""Runs the examples in docstrings, and requires one of each name that a user would copy."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import t5x_sparsity as ts
from t5x_sparsity import algorithms, core, monitoring, transformation
from t5x_sparsity.core import distributions, packing, topk


def modules_of(package):
    names = [m.name for m in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")]
    return [package.__name__, *names]


MODULES = [
    *modules_of(core),
    *modules_of(algorithms),
    *modules_of(monitoring),
    transformation.__name__,
]

# at least one algorithm of each family
WITH_EXAMPLE = [
    *(ts.sparsify, ts.apply_masks, ts.sparsity_summary, ts.SparsityConfig, ts.Rule, ts.Algorithm),
    *(ts.RigL, ts.Magnitude, ts.GlobalMagnitude, ts.MagnitudeSTE, ts.TopKAST, ts.ACDC, ts.Static),
    *(ts.Unstructured, ts.NByM, ts.Block, ts.Channel, ts.ConstantFanIn),
    *(ts.Periodic, ts.OneShot, ts.Listed, ts.Never),
    *(ts.Constant, ts.Cosine, ts.Polynomial, ts.Exponential),
    *(topk.top_k_mask, packing.pack),
    *(distributions.uniform, distributions.erk, algorithms.choose),
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0  # the captured output shows what was got


@pytest.mark.parametrize("documented", WITH_EXAMPLE, ids=lambda x: x.__name__)
def test_has_an_example(documented):
    assert doctest.DocTestParser().get_examples(inspect.getdoc(documented))
