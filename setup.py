"""Packaging: `training/`, `eval/` and `configs/` of the checkout become parts of `lazyclip`.

`training` and `eval` are generic names, so nothing but `lazyclip` goes into site-packages.
"""

from setuptools import find_packages, setup


def under(folder: str) -> list[str]:
    """List a top-level folder and its sub-packages under the name `lazyclip`."""
    return [f"lazyclip.{folder}", *(f"lazyclip.{folder}.{p}" for p in find_packages(folder))]


setup(
    packages=[*find_packages("src"), *under("training"), *under("eval"), "lazyclip.configs"],
    package_dir={
        "": "src",
        "lazyclip.training": "training",
        "lazyclip.eval": "eval",
        "lazyclip.configs": "configs",
    },
    package_data={
        "lazyclip": ["py.typed"],
        "lazyclip.configs": ["*/*.json", "*/*.yaml", "*/*.txt", "*/*.csv", "*/*/*.csv"],
    },
)
