"""Install the folder `experiments` as a part of the library, which pyproject.toml cannot express."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[
        *find_namespace_packages(include=["subliminal_theory*"]),
        *(f"subliminal_theory.{name}" for name in find_namespace_packages(include=["experiments*"])),
    ],
    package_dir={"subliminal_theory.experiments": "experiments"},
)
