"""Writes requirements/licences.csv: package, version, licence and locks of all that the three locks install.

python scripts/licences.py

A licence is what the package's metadata says, in SPDX's words where it says it in others; where it says nothing, what
its licence file begins with. The metadata of what is not installed here, such as CUDA's packages where there is no
GPU, is asked of the package registry, without the packages. Copies no text.
"""

import csv
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements"
LOCKS = ("cpu", "gpu", "lm-eval")
COLUMNS = ("package", "version", "licence", "locks")
# How metadata and licence files say it -> SPDX. `BSD` alone does not say how many clauses.
SAID = {
    "apache": "Apache-2.0",
    "apache 2.0": "Apache-2.0",
    "apache 2.0 license": "Apache-2.0",
    "apache license": "Apache-2.0",
    "apache license, version 2.0": "Apache-2.0",
    "apache software license": "Apache-2.0",
    "apache software license 2.0": "Apache-2.0",
    "bsd 2-clause license": "BSD-2-Clause",
    "bsd 3-clause license": "BSD-3-Clause",
    "3-clause bsd license": "BSD-3-Clause",
    "bsd license": "BSD",
    "bsd-derived (http://www.repoze.org/license.txt)": "BSD",
    "gnu general public license (gpl)": "GPL",
    "intel end user license agreement for developer tools": "Intel-EULA",
    "isc license": "ISC",
    "isc license (iscl)": "ISC",
    "mit license": "MIT",
    "the mit license": "MIT",
    "the mit license (mit)": "MIT",
    "nvidia proprietary software": "LicenseRef-NVIDIA-Proprietary",
    "nvidia software license": "LicenseRef-NVIDIA-Proprietary",
    "nvidia software license agreement": "LicenseRef-NVIDIA-Proprietary",
    "permission is hereby granted, free of charge, to any person obtaining a copy": "MIT",
    "psfl": "PSF-2.0",
    "public domain": "public-domain",
    "python software foundation license": "PSF-2.0",
}
# Of packages whose metadata says nothing: what their licence files say. cuda-toolkit brings no file, licence or other:
# it names packages.
LOOKED_UP = {
    "cuda-toolkit": "none-stated",
    "quack-kernels": "Apache-2.0",
    "torchcodec": "BSD-3-Clause",
} | dict.fromkeys(
    (f"nvidia-cutlass-dsl{part}" for part in ("", "-libs-base", "-libs-core", "-libs-cu12", "-libs-cu13")),
    "LicenseRef-NVIDIA-Proprietary",
)
EXPRESSION = re.compile(r"\(?[\w.-]+\)?(?: (?:AND|OR|WITH) \(?[\w.-]+\)?)*")


def spdx(text: str) -> str:
    """A licence as SPDX writes it; empty for a text that says it in no known way."""
    known = SAID.get(text.lower(), text)
    return known if EXPRESSION.fullmatch(known) and known != "UNKNOWN" else ""


def first_line(text: str | None) -> str:
    """The first line that is not empty."""
    return next((line.strip() for line in (text or "").splitlines() if line.strip()), "")


def statements(metadata: Mapping[str, Any]) -> Iterator[str]:
    """What a package's metadata, as JSON, says of its licence, the most exact first."""
    yield spdx(metadata.get("license_expression") or "")
    yield spdx(first_line(metadata.get("license")))
    classifiers = [c.rpartition(" :: ")[2] for c in metadata.get("classifier", []) if c.startswith("License :: ")]
    yield " AND ".join(filter(None, map(spdx, classifiers)))


def licence_files(package: Distribution) -> Iterator[str]:
    """What an installed package's licence files begin with."""
    for name in package.metadata.get_all("License-File", ["LICENSE"]):
        yield spdx(first_line(package.read_text(f"licenses/{name}") or package.read_text(name)))


def installed(name: str, version: str) -> Distribution | None:
    """The installed package, None where there is none. ValueError where another version is installed."""
    try:
        package = distribution(name)
    except PackageNotFoundError:
        return None
    if package.version.split("+")[0] != version:
        raise ValueError(f"{name} is installed as {package.version}, locked as {version}: run `make bootstrap`")
    return package


def licence(name: str, version: str, asked: Mapping[str, Mapping[str, Any]]) -> str:
    """A package's licence, its metadata among the `asked` where it is not installed. ValueError for an unknown one."""
    package = installed(name, version)
    said = [*statements(package.metadata.json if package else asked[name])]
    said += [*licence_files(package)] if package else []
    found = next(filter(None, [*said, LOOKED_UP.get(name)]), None)
    if not found:
        raise ValueError(f"{name} {version} states no licence in a known way: look it up and add how to SAID")
    return found


def ask(pins: Iterable[str]) -> dict[str, Mapping[str, Any]]:
    """The metadata of packages by name, from the registry. A pip of now: older ones load whole packages for it."""
    uv = [str(Path(sys.executable).with_name("uv")), "tool", "run", "-q", "--python", sys.executable]
    pip = [*uv, "--from", "pip>=25", "pip", "install", "-q", "--no-deps", "--ignore-installed", "--only-binary=:all:"]
    done = subprocess.run([*pip, "--dry-run", "--report", "-", *pins], stdout=subprocess.PIPE, check=True)
    found = [package["metadata"] for package in json.loads(done.stdout)["install"]]
    return {metadata["name"].lower().replace("_", "-"): metadata for metadata in found}


def main() -> None:
    """Write the table; its errors end in one sentence."""
    locks: dict[str, list[str]] = {}
    for lock in LOCKS:
        for line in (REQUIREMENTS / f"{lock}.lock").read_text(encoding="utf-8").splitlines():
            if line and not line.startswith("#"):
                locks.setdefault(line, []).append(lock)
    pins = {pin: pin.split("==") for pin in locks}
    try:
        absent = [pin for pin, parts in pins.items() if not installed(*parts)]
        asked = ask(absent) if absent else {}
        rows = sorted((*parts, licence(*parts, asked), " ".join(locks[pin])) for pin, parts in pins.items())
    except subprocess.CalledProcessError:
        raise SystemExit(f"ERROR  the package registry does not tell of {len(absent)} packages: see above") from None
    except ValueError as error:
        raise SystemExit(f"ERROR  {error}") from None
    with open(REQUIREMENTS / "licences.csv", "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, lineterminator="\n").writerows([COLUMNS, *rows])
    print(f"{len(rows)} packages: {len({row[2] for row in rows})} kinds of licence")


if __name__ == "__main__":
    main()
