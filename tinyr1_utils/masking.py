"""Owns taking secrets out of what others may read: the values that this environment's keys, tokens and passwords have.

Everything else keeps a secret out of texts in the first place; this is for what a library or a server repeats of one.
"""

import json
import os
import re

SECRET = re.compile(r"(^|_)(API_?KEY|ACCESS_?KEY|KEY|PASSWORD|PASSWD|SECRET|TOKEN)S?(_|$)", re.IGNORECASE)
SHORTEST = 8  # characters; a shorter value, such as 1, would be found in texts that know nothing of it
MASK = "[masked]"


def secrets() -> list[str]:
    """The values of the environment's variables that are named like a secret, and the lines of longer ones."""
    values = [value for name, value in os.environ.items() if SECRET.search(name)]
    return sorted({line.strip() for value in values for line in (value, *value.splitlines())})


def without(secret: str, text: str) -> str:
    """The text with MASK in the place of a secret, also where it is written as Python or JSON writes it."""
    if len(secret) < SHORTEST:
        return text
    written = {secret, repr(secret)[1:-1]}  # as text, and as a cell that ends with it shows it
    written |= {json.dumps(form, ensure_ascii=ascii_only)[1:-1] for form in written for ascii_only in (True, False)}
    for form in sorted(written, key=len, reverse=True):  # the plain form in a longer one would leave its escapes
        text = text.replace(form, MASK)
    return text


def masked(text: str) -> str:
    """The text with MASK in the place of every secret of this environment, longer ones first."""
    for secret in sorted(secrets(), key=len, reverse=True):
        text = without(secret, text)
    return text
