"""Packages the library, and gin/sparsity as the package `sparsity`, for gin includes."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["t5x_sparsity", "t5x_sparsity.*"]),
        "sparsity",
        "sparsity.embedded",
    ],
    package_dir={
        "t5x_sparsity": "t5x_sparsity",
        "sparsity": "gin/sparsity",
        "sparsity.embedded": "gin/sparsity/embedded",
    },
    package_data={
        "sparsity": ["*.gin"],
        "sparsity.embedded": ["*.gin"],
        "t5x_sparsity": ["py.typed"],
        "t5x_sparsity.commands": ["*/*.html", "*/*.css", "*/*.js"],
    },
)
