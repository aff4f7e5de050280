"""Owns what a completion's final answer is, and its verdict against the reference.

Does not know when two answers are equal: see `expressions`; and does not run code: see `sandbox`. Deterministic but for
math-verify's time-out.
"""

import re
import unicodedata

from tinyr1_utils.expressions import number_value, same_expression, unwrapped
from tinyr1_utils.math_workers import GraderError
from tinyr1_utils.records import LETTERS, TRUTHS, Problem, Verdict

LAST_NUMBER = re.compile(
    r"(?:(?<![\w)\]}.])-)?\$?(?<![\w.])(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:/\d+)?(?:[eE][+-]?\d+)?"
)
PHRASE = r"(?i:answer|option|choice)[*_\s]*(?i:is|:|=)[*_:\s$]*"
PHRASE_LETTER = re.compile(
    PHRASE + r"(?i:(?:the\s+)?(?:option|choice|letter)[*_\s]+)?(?:\\\(\s*|[`\"“\[])?(?:\\\w+\{)?"
    r"(?P<open>\(?)(?P<letter>[A-Ja-j])(?![\w'’])(?=(?P<rest>.{0,40}))"
)
PHRASE_START = re.compile(PHRASE)
FORMULA = re.compile(r"\$([^$\n]+)\$|\\\(((?:[^\\\n]|\\[^()\[\]\n])+)\\\)|\\\[((?:[^\\]|\\[^()\[\]])+)\\\]")
SENTENCE_END = re.compile(r"\.\s+(?=[A-Z])|(?<!\s),?\s+(?:because|since|as|which)\b")
PHRASE_TRUTH = {kind: re.compile(PHRASE + rf"\(?({yes}|{no})\b", re.IGNORECASE) for kind, (yes, no) in TRUTHS.items()}
# "Answer: A train ..." is no letter, "the answer is A because ..." is one.
SENTENCE = re.compile(r"\s+(?!(?:because|since|as|which|for|in|is|with)\b)[a-z]|\s*(?:or|and|,|/)\s*[A-J]\b")
BETWEEN_BOXES = re.compile(r"[\s$]*(?:,|;|,?\s*(?:and|or)\b)[\s$]*")
FENCE = re.compile(r"[ \t]*```[ \t]*(\w*)[^`]*")


def final_text(text: str) -> str:
    """What stands after the last `</think>`; empty where a think tag was opened and not closed: no final answer."""
    closed, opened = text.rfind("</think>"), text.rfind("<think>")
    if opened > closed:
        return ""
    return text[closed + len("</think>") :] if closed >= 0 else text


def _boxes(text: str) -> list[tuple[int, int, str]]:
    r"""(start, end, start of the content) of every `\boxed{...}` with balanced braces, in the order of their starts.

    Escaped braces do not count. One pass, so that a megabyte of unbalanced boxes costs no more than its length.
    """
    stack, boxes = [], []
    for token in re.finditer(r"\\boxed\s*\{|\\[{}]|[{}]", text) if "\\boxed" in text else ():
        if token.group() in ("\\{", "\\}"):
            continue
        if token.group() != "}":
            stack.append(token)
        elif stack and (opening := stack.pop()).group() != "{":
            boxes.append((opening.start(), token.end(), opening.end()))
    return sorted(boxes)


def last_boxed(text: str) -> str | None:
    r"""Content of the `\boxed{...}` that opens last among those with balanced braces; None without one."""
    boxes = _boxes(text)
    return text[boxes[-1][2] : boxes[-1][1] - 1].strip() if boxes else None


def _boxed_list(text: str) -> str | None:
    r"""As `last_boxed`, with the boxes that only `and`, `or` or a comma separates from it: `\boxed{2}, \boxed{3}`."""
    parts, following = [], None
    for start, end, inside in reversed(_boxes(text)):
        if following is not None and not (0 < following - end < 20 and BETWEEN_BOXES.fullmatch(text, end, following)):
            break
        parts.append(text[inside : end - 1].strip())
        following = start
    return ", ".join(reversed(parts)) if parts else None


def _letter_in_box(box: str) -> str | None:
    match = re.fullmatch(r"(?:(?i:option|answer|choice)\s+)?\(?([A-Ja-j])(?:\W*|[).:].*)", unwrapped(box), re.DOTALL)
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


def extract_truth(text: str, kind: str = "true_false") -> str | None:
    """True or False (Yes or No) from the final answer: a box, "answer is true", or a last line of only that word."""
    final = final_text(text)
    places = [unwrapped(last_boxed(final) or ""), *PHRASE_TRUTH[kind].findall(final)[-1:], _last_line(final)]
    for place in places:
        word = re.sub(r"^\W+|\W+$", "", place).capitalize()
        if word in TRUTHS[kind]:
            return word
    return None


def plain_words(text: str) -> str:
    """A short answer as it is compared: lower case, no articles, punctuation or plural s, one blank between words."""
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).casefold())
    kept = [word for word in words if word not in ("a", "an", "the")]
    return " ".join(word[:-1] if len(word) > 3 and word.endswith("s") else word for word in kept)


def grade_words(completion: str, reference: str) -> Verdict:
    """The verdict on an open answer in words: `plain_words` of a box, or of "answer is ...", equals the reference's.

    A synonym counts as wrong: the measure is one of change between models and forms, no absolute one.
    """
    final = final_text(completion)
    extracted = _boxed_or_marked(final) or _stated(final)
    return _verdict(extracted, extracted is not None and plain_words(unwrapped(extracted)) == plain_words(reference))


def _stated(final: str) -> str | None:
    """What the last "answer is ..." states, up to its reason or the end of its sentence; None without one."""
    phrases = list(PHRASE_START.finditer(final))
    if not phrases:
        return None
    line = final[phrases[-1].end() :].partition("\n")[0].strip()
    return unwrapped(SENTENCE_END.split(line, maxsplit=1)[0]).rstrip(".").strip("$* ") or None


def _boxed_or_marked(final: str) -> str | None:
    """The last box or list of boxes, else what GSM8K's `####` marks; empty for an empty box, None without either."""
    box = _boxed_list(final)
    if box is not None:
        return box
    marked = re.findall(r"^[ \t]*####[ \t]*(\S[^\n]*)", final, re.MULTILINE)
    return marked[-1].strip() if marked else None


def _last_formula(final: str) -> tuple[str, str]:
    r"""The last `$...$`, `\(...\)` or `\[...\]` and what stands behind it; empty without one."""
    formulas = list(FORMULA.finditer(final))
    if not formulas:
        return "", ""
    return next(group for group in formulas[-1].groups() if group).strip(), final[formulas[-1].end() :]


def extract_number(text: str) -> str | None:
    """The final answer of a number problem as written: a box, else `#### n`, else "answer is n", else the last number.

    The box's content is returned even where it is no number: what a model boxed is its answer. An empty box is none.
    """
    final = final_text(text)
    found = _boxed_or_marked(final)
    if found is not None:
        return found or None
    stated = _stated(final) or ""
    if "\\" in stated or number_value(stated) is not None:
        return stated
    formula, behind = _last_formula(final)
    if not stated and "\\" in formula and not re.search(r"\d", behind):
        return formula  # its last number may be a part of `6\pi`
    numbers = LAST_NUMBER.findall(stated) or LAST_NUMBER.findall(final)
    return numbers[-1] if numbers else None


def extract_expression(text: str) -> str | None:
    """The final answer of an expression problem: as `extract_number`, but any "answer is ...", else a formula."""
    final = final_text(text)
    found = _boxed_or_marked(final)
    if found is not None:
        return found or None
    return _stated(final) or _last_formula(final)[0] or extract_number(text)


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


def _verdict(extracted: str | None, correct: bool) -> Verdict:
    if extracted is None:
        return Verdict("no_answer", "the completion states no final answer")
    return Verdict("right" if correct else "wrong", extracted=extracted)


def grade_math(completion: str, reference: str) -> Verdict:
    """The verdict on a completion's number or expression: `right`, `wrong`, `no_answer` or `grader_error`.

    Two plain numbers are compared exactly, all else as `expressions` says. `grader_error`, with the reason in `detail`,
    is no verdict on the answer: math-verify ran out of time or can not read the reference.
    """
    reference = reference.strip()
    if not reference:
        return Verdict("grader_error", "the reference is empty")
    extracted = (extract_expression if number_value(reference) is None else extract_number)(completion)
    try:
        return _verdict(extracted, extracted is not None and same_expression(extracted, reference))
    except GraderError as error:
        return Verdict("grader_error", str(error), extracted)


def grade_text(problem: Problem, text: str) -> Verdict:
    """The verdict on a completion's text by the problem's answer kind: statuses as `grade_math`.

    Raises ValueError, with the problem's id, for a code problem and for a reference that its answer kind can not have.
    """
    kind, reference = problem.answer_kind, problem.reference.strip()
    if kind == "choice":
        letter = extract_letter(text, len(problem.options))
        return _verdict(letter, letter == reference.upper())
    if kind in TRUTHS:
        truth = extract_truth(text, kind)
        return _verdict(truth, truth == reference.capitalize())
    if kind == "text":
        return grade_words(text, reference)
    if kind == "code":
        raise ValueError(f"problem {problem.id}: answer_kind {kind!r} is graded by the sandbox, not as text")
    if kind == "number" and number_value(reference) is None:
        raise ValueError(f"problem {problem.id}: the reference {reference!r} is no plain number")
    return grade_math(text, reference)
