"""What pyproject.toml cannot say: the folder `experiments` is installed as a part of the library."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[
        *find_namespace_packages(include=["subliminal_theory*"]),
        *(f"subliminal_theory.{name}" for name in find_namespace_packages(include=["experiments*"])),
    ],
    package_dir={"subliminal_theory.experiments": "experiments"},
)
