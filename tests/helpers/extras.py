# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""What `pip install ".[extras]"` brings, and what it does not, of what is installed where the tests run."""

import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


def brought_by(extras):
    """The distributions that `pip install ".[extras]"` brings; None if this environment lacks one of them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    known = project["optional-dependencies"]
    waiting, seen = [*project["dependencies"], *(f"mdm_asr_hf[{extra}]" for extra in extras.split(","))], set()
    while waiting:
        requirement = Requirement(waiting.pop())
        name = canonicalize_name(requirement.name)
        its_extras = requirement.extras or {""}
        if name == "mdm-asr-hf":
            waiting += [line for extra in requirement.extras for line in known[extra]]
        elif (name, *sorted(its_extras)) not in seen:
            seen.add((name, *sorted(its_extras)))
            try:
                lines = map(Requirement, requires(name) or ())
            except PackageNotFoundError:
                return None
            waiting += [
                str(one)
                for one in lines
                if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in its_extras)
            ]
    return {name for name, *_ in seen}


def hidden(distributions):
    """The modules of this environment that none of these distributions has."""
    own = {"mdm-asr-hf", "pip", "setuptools"}
    if "ray" in distributions:
        # It brings them in a folder that it puts on the path itself.
        own |= {"colorama", "psutil"}
    return sorted(
        module
        for module, owners in packages_distributions().items()
        if module.isidentifier() and not {canonicalize_name(owner) for owner in owners} & (distributions | own)
    )


def link(distributions, environment):
    """Puts distributions of this environment into another one, which has none of its own."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    target = environment / "lib" / version / "site-packages"
    for name in distributions:
        one = distribution(name)
        for top in {file.parts[0] for file in one.files} - {"..", "__pycache__"}:
            if not (target / top).exists():
                (target / top).symlink_to(one.locate_file(top))
