"""Owns what a completion's final answer is and whether it equals the reference. Does not run code: see `sandbox`.

Deterministic but for the time-out of `same_expression`, which keeps one child process of its own for math-verify.
"""

import functools
import json
import os
import re
import select
import subprocess
import sys
import threading
import time
from fractions import Fraction

from tinyr1_utils.records import LETTERS, Problem

# Longer texts are never a plain number, and an exponent of more digits would not fit into memory.
MAX_NUMBER_CHARACTERS = 300
# math-verify needs minutes for longer ones, and no reference of any benchmark comes near.
MAX_EXPRESSION_CHARACTERS = 2000
UNIT_LETTERS = frozenset("mgsLlhNJWVAKCFPT")
NOT_UNITS = frozenset(
    "or and to plus minus times over mod pi e sqrt sin cos tan log ln exp infinity hundred thousand million billion "
    "trillion dozen half halves third thirds quarter quarters score".split()
)
PLAIN = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
NUMBER = re.compile(
    rf"(?P<sign>[+-]?)\s*(?:(?P<whole>\d+)\s+(?=\d+\s*/))?(?P<top>{PLAIN})(?:\s*/\s*(?P<bottom>{PLAIN}))?"
    r"(?:(?:[eE]|\s*(?:\\times|\\cdot|[×*x])\s*10\s*\^)\{?(?P<power>[+-]?\d{1,3})\}?)?"
)
LAST_NUMBER = re.compile(
    r"(?:(?<![\w)\]}.])-)?\$?(?<![\w.])(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:/\d+)?(?:[eE][+-]?\d+)?"
)
WRAPPER = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|boldsymbol)\s*\{([^{}]*)\}")
PHRASE = r"(?i:answer|option|choice)[*_\s]*(?i:is|:|=)[*_:\s$]*"
PHRASE_LETTER = re.compile(PHRASE + r"(?:\\\w+\{)?(?P<open>\(?)(?P<letter>[A-Ja-j])(?![\w'’])(?=(?P<rest>.{0,40}))")
PHRASE_TRUTH = re.compile(PHRASE + r"\(?(true|false)\b", re.IGNORECASE)
# "Answer: A train ..." is no letter, "the answer is A because ..." is one.
SENTENCE = re.compile(r"\s+(?!(?:because|since|as|which|for|in|is|with)\b)[a-z]|\s*(?:or|and|,|/)\s*[A-J]\b")
FENCE = re.compile(r"[ \t]*```[ \t]*(\w*)[^`]*")


class GraderError(RuntimeError):
    """The grader could not decide. Never a verdict on the answer."""


class GraderTimeout(GraderError, TimeoutError):
    """The grader ran past its time limit."""


def final_text(text: str) -> str:
    """What stands after the last `</think>`; empty where a think tag was opened and not closed: no final answer."""
    closed, opened = text.rfind("</think>"), text.rfind("<think>")
    if opened > closed:
        return ""
    return text[closed + len("</think>") :] if closed >= 0 else text


def last_boxed(text: str) -> str | None:
    r"""Content of the `\boxed{...}` that opens last among those with balanced braces; None without one.

    Escaped braces do not count. One pass, so that a megabyte of unbalanced boxes costs no more than its length.
    """
    if "\\boxed" not in text:
        return None
    stack, best = [], None
    for token in re.finditer(r"\\boxed\s*\{|\\[{}]|[{}]", text):
        if token.group() in ("\\{", "\\}"):
            continue
        if token.group() != "}":
            stack.append(token)
        elif stack and (opening := stack.pop()).group() != "{" and (best is None or opening.start() > best[0]):
            best = (opening.start(), text[opening.end() : token.start()].strip())
    return best[1] if best else None


def _unwrapped(text: str) -> str:
    r"""`text` without `\text{...}` and its like around its parts, and without markdown's asterisks at its ends."""
    return WRAPPER.sub(r"\1", text).strip().strip("*_$ \t\n")


def _letter_in_box(box: str) -> str | None:
    match = re.fullmatch(r"(?:(?i:option|answer|choice)\s+)?\(?([A-Ja-j])(?:\W*|[).:].*)", _unwrapped(box), re.DOTALL)
    return match and match[1].upper()


def _letter_in_phrase(final: str) -> str | None:
    """The letter of the last "answer is X". A small letter only where brackets or the line's end set it apart."""
    letter = None
    for match in PHRASE_LETTER.finditer(final):
        small = match["letter"].islower()
        apart = match["rest"].startswith(")") if match["open"] else not match["rest"].strip(" .*_$}")
        if not SENTENCE.match(match["rest"]) and (apart or not small):
            letter = match["letter"].upper()
    return letter


def _last_line(final: str) -> str:
    return final.rstrip().rpartition("\n")[2].strip()


def extract_letter(text: str, n_options: int) -> str | None:
    """The chosen option's letter (A ...) from the final answer: a box, "answer is X", or a last line of only a letter.

    None without one, and where the letter lies beyond `n_options`.
    """
    final = final_text(text)
    box = last_boxed(final)
    letter = (box is not None and _letter_in_box(box)) or _letter_in_phrase(final)
    if not letter:
        line = re.fullmatch(r"\W*([A-Ja-j])\W*", _last_line(final))
        letter = line and line[1].upper()
    return letter if letter and letter in LETTERS[:n_options] else None


def extract_true_false(text: str) -> bool | None:
    """True or False from the final answer: a box, "answer is true", or a last line of only that word; else None."""
    final = final_text(text)
    places = [_unwrapped(last_boxed(final) or ""), *PHRASE_TRUTH.findall(final)[-1:], _last_line(final)]
    for place in places:
        match = re.fullmatch(r"\W*(true|false)\W*", place, re.IGNORECASE)
        if match:
            return match[1].lower() == "true"
    return None


def extract_number(text: str) -> str | None:
    """The final answer of a number problem as written: the last box, else GSM8K's `#### n`, else the last number.

    The box's content is returned even where it is no number: what a model boxed is its answer. An empty box is none.
    """
    final = final_text(text)
    box = last_boxed(final)
    if box is not None:
        return box or None
    marked = re.findall(r"^[ \t]*####[ \t]*(\S[^\n]*)", final, re.MULTILINE)
    if marked:
        return marked[-1].strip()
    numbers = LAST_NUMBER.findall(final)
    return numbers[-1] if numbers else None


def extract_expression(text: str) -> str | None:
    """The final answer of an expression problem: a box, "answer is ...", the last `$...$`, else as `extract_number`."""
    final = final_text(text)
    if last_boxed(final) is None:
        phrases = re.findall(PHRASE + r"([^\n]+)", final) or re.findall(r"\$([^$\n]+)\$", final)
        if phrases:
            return _unwrapped(phrases[-1]).rstrip(".").rstrip("$* ") or None
    return extract_number(text)


def _code_blocks(text: str) -> list[tuple[str, str]]:
    """(name, code) of every closed fenced block. By lines: a regular expression over the text is quadratic."""
    blocks, name, lines = [], None, []
    for line in text.splitlines(keepends=True):
        fence = FENCE.fullmatch(line)
        if not fence:
            lines.append(line)
        elif name is not None and not fence[1]:
            blocks.append((name, "".join(lines)))
            name = None
        else:  # a second opening: the block before it was never closed
            name, lines = fence[1].lower(), []
    return blocks


def extract_code(text: str) -> str | None:
    """The last closed Python block of the final answer, else its last closed block of any name, else None.

    An open block is a truncated program and no answer.
    """
    blocks = _code_blocks(final_text(text))
    python = [code for name, code in blocks if name in ("python", "py", "python3")]
    return (python or [code for _, code in blocks] or [None])[-1]


def _cleaned_number(text: str) -> str:
    """`text` without currency, LaTeX dressing, thousands separators other than commas, and a leading `x =`."""
    text = _unwrapped(text.replace("−", "-").replace("{,}", ","))
    text = re.sub(r"\\[()\[\]]|\\left|\\right|\\?\$|[€£]|\^\{?\\circ\}?|°", "", text)
    text = re.sub(r"(?<=\d)(?:\\[,!;: ]|[~\u00a0\u202f\u2009])(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"\\[,!;: ]|[~\u00a0\u202f\u2009]", " ", text)
    text = re.sub(r"\\[dt]?frac\s*(?:\{([^{}]*)\}\s*\{([^{}]*)\}|(\d)\s*(\d))", r" \1\3/\2\4", text)
    return re.sub(r"^\s*[A-Za-z]\w*\s*=", "", text).strip()


def _is_unit(text: str) -> bool:
    """Whether what follows a number is only a unit: words, few single letters (never x, i, n), powers of them."""
    tokens = [token for token in re.split(r"[\s/·*-]+|\\cdot", text.strip(" .%\\")) if token]
    words = [re.fullmatch(r"([A-Za-zµΩ]+)(?:\^?\{?-?\d\}?|[²³])?", token) for token in tokens]
    return len(words) <= 6 and all(
        word and word[1].lower() not in NOT_UNITS and (len(word[1]) > 1 or word[1] in UNIT_LETTERS or word[1] in "µΩ")
        for word in words
    )


def number_value(text: str) -> Fraction | None:
    r"""The exact value of a plain number, or None where `text` is none.

    Taken off first: thousands commas (in groups of three), currency, `%`, a trailing unit or period, a leading `x =`.
    So 50 % is 50, not 1/2. Read: integers, decimals, `a/b`, `\frac{a}{b}`, mixed numbers, `1.5e3`, `1.5 \times 10^3`.
    """
    if len(text) > MAX_NUMBER_CHARACTERS:
        return None
    cleaned = _cleaned_number(text)
    match = NUMBER.match(cleaned)
    if not match or not _is_unit(cleaned[match.end() :]):
        return None
    top, bottom = (
        Fraction(match[name].replace(",", "").rstrip(".")) if match[name] else None for name in ("top", "bottom")
    )
    if bottom == 0:
        return None
    value = int(match["whole"] or 0) + top / (bottom or 1)
    return (-value if match["sign"] == "-" else value) * Fraction(10) ** int(match["power"] or 0)


def same_number(a: str, b: str) -> bool:
    """Whether two plain numbers are exactly equal (see `number_value`); False where either is no plain number."""
    first, second = number_value(a), number_value(b)
    return first is not None and first == second


def _compact(text: str) -> str:
    """`text` without what never changes its meaning, for comparison as a string."""
    text = re.sub(r"\\left|\\right|\\[,!; ]|\\[()\[\]]|\$|\s+", "", _unwrapped(text))
    return re.sub(r"\\[dt]frac", r"\\frac", text).rstrip(".")


def _math_verify(answer: str, reference: str) -> dict:
    """math-verify's verdict as {"same": bool} or {"error": why}. Runs in the child, so its own alarms are off."""
    from math_verify import parse, verify

    expected, given = (parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (reference, answer))
    if not expected:
        return {"error": "math-verify can not read the reference"}
    return {"same": bool(given) and verify(expected, given, timeout_seconds=None, raise_on_error=True)}


def _serve() -> None:
    """The child's loop: one JSON request a line on stdin, one reply a line on stdout, until stdin ends."""
    import faulthandler
    import logging
    import resource

    import math_verify  # noqa: F401  (3 s, paid once before the first request)

    replies, sys.stdout = sys.stdout, open(os.devnull, "w")  # noqa: SIM115
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))  # 9^9^9^9 fills the memory before the time is up
    print("{}", file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        # Ends this process even where the parent is gone and SymPy never comes back.
        faulthandler.dump_traceback_later(request.pop("limit_s"), exit=True, file=sys.stdout)
        try:
            reply = _math_verify(**request)
        except Exception as error:
            reply = {"error": type(error).__name__}
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(reply), file=replies, flush=True)


def _receive(child: subprocess.Popen, timeout_s: float) -> dict:
    """The child's next reply. Raises TimeoutError without one in time, EOFError where the child ended."""
    deadline, line = time.monotonic() + timeout_s, b""
    while not line.endswith(b"\n"):
        if not select.select([child.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise TimeoutError
        part = os.read(child.stdout.fileno(), 65536)
        if not part:
            raise EOFError
        line += part
    return json.loads(line)


@functools.cache
def _child(owner: int) -> subprocess.Popen:
    """The running child of process `owner` (in the key, since a forked process must not share its parent's pipes)."""
    path = os.pathsep.join(entry or os.curdir for entry in sys.path)
    child = subprocess.Popen(
        [sys.executable, "-c", "from tinyr1_utils.answers import _serve; _serve()"],
        env={**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # an interrupt in a notebook must not end it
    )
    _receive(child, 120.0)
    return child


_lock = threading.Lock()


def _ask(request: dict, timeout_s: float) -> dict:
    """One request to the child, which is killed and forgotten where it does not answer in time."""
    with _lock:
        try:
            child = _child(os.getpid())
        except (TimeoutError, EOFError) as error:
            raise GraderError(
                f"math-verify does not start ({type(error).__name__}); try `import math_verify`"
            ) from None
        try:
            child.stdin.write(json.dumps({**request, "limit_s": timeout_s + 1.0}).encode() + b"\n")
            child.stdin.flush()
            return _receive(child, timeout_s)
        except BaseException:  # also an interrupt: a late reply would answer the next question
            _child.cache_clear()
            child.kill()
            child.wait()
            raise


def same_expression(answer: str, reference: str, timeout_s: float = 5.0) -> bool:
    """Whether `answer` equals `reference`: as text, as plain numbers exactly, else by math-verify.

    Deviation from math-verify: two plain numbers are compared exactly, where it rounds to six digits, and an
    answer beyond 2,000 characters is unequal unless it is the same text.
    Raises GraderTimeout (a TimeoutError) past `timeout_s` seconds, GraderError where math-verify fails on the pair:
    neither says that the answer is wrong. May be called from threads (they take turns).
    """
    if _compact(answer) == _compact(reference):
        return True
    if number_value(answer) is not None and number_value(reference) is not None:
        return same_number(answer, reference)
    if len(answer) > MAX_EXPRESSION_CHARACTERS:
        return False
    pair = f"{answer[:80]!r} against {reference[:80]!r}"
    try:
        reply = _ask({"answer": answer, "reference": reference}, timeout_s)
    except TimeoutError:
        raise GraderTimeout(f"math-verify took more than {timeout_s} s on {pair}") from None
    except (EOFError, BrokenPipeError):
        raise GraderError(f"math-verify's process ended on {pair}") from None
    if "error" in reply:
        raise GraderError(f"{reply['error']} on {pair}")
    return reply["same"]


def grade_text(problem: Problem, text: str) -> tuple[bool, str, str]:
    """(correct, verdict, extracted) of a completion's text; verdict is `right`, `wrong` or `no_answer`.

    Raises ValueError for a code problem and for a reference that its answer kind can not have, GraderError where
    the grader could not decide.
    """
    kind, reference = problem.answer_kind, problem.reference.strip()
    if kind == "choice":
        extracted = extract_letter(text, len(problem.options))
        correct = extracted == reference.upper()
    elif kind == "true_false":
        truth = extract_true_false(text)
        extracted = None if truth is None else str(truth)
        correct = extracted == reference.capitalize()
    elif kind == "number":
        if number_value(reference) is None:
            raise ValueError(f"problem {problem.id}: the reference {reference!r} is no plain number")
        extracted = extract_number(text)
        correct = extracted is not None and same_number(extracted, reference)
    elif kind == "expression":
        extracted = extract_expression(text)
        correct = extracted is not None and same_expression(extracted, reference)
    else:
        raise ValueError(f"problem {problem.id}: answer_kind {kind!r} is graded by the sandbox, not as text")
    if extracted is None:
        return False, "no_answer", ""
    return correct, "right" if correct else "wrong", extracted
