"""Owns taking secrets out of what others may read: the values that this environment's keys, tokens and passwords have.

Everything else keeps a secret out of texts in the first place; this is for what a library or a server repeats of one.
"""

import json
import os
import re

SECRET = re.compile(r"(^|_)(API_?KEY|KEY|PASSWORD|PASSWD|SECRET|TOKEN)(_|$)", re.IGNORECASE)
SHORTEST = 8  # characters; a shorter value, such as 1, would be found in texts that know nothing of it
MASK = "[masked]"


def secrets() -> list[str]:
    """The values of the environment's variables that are named like a secret, longer ones first."""
    values = {value.strip() for name, value in os.environ.items() if SECRET.search(name)}
    return sorted((value for value in values if len(value) >= SHORTEST), key=lambda value: (-len(value), value))


def masked(text: str) -> str:
    """The text with MASK in the place of every secret, also where it is written as JSON."""
    for secret in secrets():
        for written in (secret, json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1]):
            text = text.replace(written, MASK)
    return text
