"""Writes requirements/licences.csv: package, version and licence of all that requirements/cpu.lock installs.

python scripts/licences.py

A licence is what the installed package's metadata says, in SPDX's words where it says it in others; where it says
nothing, what its licence file begins with. Copies no text.
"""

import csv
import re
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements"
COLUMNS = ("package", "version", "licence")
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
    "permission is hereby granted, free of charge, to any person obtaining a copy": "MIT",
    "psfl": "PSF-2.0",
    "public domain": "public-domain",
    "python software foundation license": "PSF-2.0",
}
EXPRESSION = re.compile(r"\(?[\w.-]+\)?(?: (?:AND|OR|WITH) \(?[\w.-]+\)?)*")


def spdx(text: str) -> str:
    """A licence as SPDX writes it; empty for a text that says it in no known way."""
    known = SAID.get(text.lower(), text)
    return known if EXPRESSION.fullmatch(known) and known != "UNKNOWN" else ""


def first_line(text: str | None) -> str:
    """The first line that is not empty."""
    return next((line.strip() for line in (text or "").splitlines() if line.strip()), "")


def statements(package: Distribution) -> Iterator[str]:
    """What a package says of its licence, the most exact first."""
    metadata = package.metadata
    yield spdx(metadata.get("License-Expression", ""))
    yield spdx(first_line(metadata.get("License")))
    classifiers = [c.rpartition(" :: ")[2] for c in metadata.get_all("Classifier", []) if c.startswith("License :: ")]
    yield " AND ".join(filter(None, map(spdx, classifiers)))
    for name in metadata.get_all("License-File", ["LICENSE"]):
        yield spdx(first_line(package.read_text(f"licenses/{name}") or package.read_text(name)))


def row(name: str, version: str) -> tuple[str, str, str]:
    """A line of the table. ValueError where another version is installed, or none, or it states no known licence."""
    try:
        package = distribution(name)
    except PackageNotFoundError:
        raise ValueError(f"{name} is not installed: run `make bootstrap`") from None
    if package.version.split("+")[0] != version:
        raise ValueError(f"{name} is installed as {package.version}, locked as {version}: run `make bootstrap`")
    licence = next(filter(None, statements(package)), "")
    if not licence:
        raise ValueError(f"{name} {version} states no licence in a known way: look it up and add how to SAID")
    return name, version, licence


def main() -> None:
    """Write the table; its errors end in one sentence."""
    lock = (REQUIREMENTS / "cpu.lock").read_text(encoding="utf-8").splitlines()
    pins = sorted(line.split("==") for line in lock if line and not line.startswith("#"))
    try:
        rows = [row(name, version) for name, version in pins]
    except ValueError as error:
        raise SystemExit(f"ERROR  {error}") from None
    with open(REQUIREMENTS / "licences.csv", "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, lineterminator="\n").writerows([COLUMNS, *rows])
    print(f"{len(rows)} packages: {len({licence for *_, licence in rows})} kinds of licence")


if __name__ == "__main__":
    main()
