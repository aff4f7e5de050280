"""Owns how a problem becomes a conversation, per protocol. Does not tokenise: a model brings its own template."""

import dataclasses
import random

from tinyr1_utils.records import LETTERS, Problem

# The same words for every model and every size, in training and in evaluation: a template that differs
# between the two is one of the differences that the public TinyR1 scripts carry silently.
INSTRUCTIONS = {
    "number": "Reason step by step and put the final answer in \\boxed{}.",
    "expression": "Reason step by step and put the final answer in \\boxed{}.",
    "choice": "Reason step by step and put the letter of the right option in \\boxed{}.",
    "true_false": "Reason step by step and put True or False in \\boxed{}.",
    "yes_no": "Reason step by step and put Yes or No in \\boxed{}.",
    "text": "Reason step by step and put the answer, in as few words as it takes, in \\boxed{}.",
    "code": "Reason step by step and put the final program in one Python code block.",
}

# What the public scripts send (github.com/Qihoo360/TinyR1-32B-Preview), word for word: their scores hang on it.
TINYR1_MATH_SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
TINYR1_CHOICE_SYSTEM = "You are a helpful and harmless assistant. You should think step-by-step."
TINYR1_CHOICE = (
    "Return your final response within \\boxed{{}} and only include the letter choice (A, B, C, or D) as your final "
    "response. "
)
TINYR1_CODE = (
    "You will be given a question (problem specification) and will generate a correct Python program that matches the "
    "specification and passes all tests.\n\nQuestion: "
)
TINYR1_STARTER = (
    "You will use the following starter code to write the solution to the problem and enclose your code within "
    "delimiters.\n```python\n{starter}\n```\n\n"
)
TINYR1_STDIN = (
    "Read the inputs from stdin solve the problem and write the answer to stdout (do not directly test on the sample "
    "inputs). Enclose your code within delimiters as follows.\n```python\n# YOUR CODE HERE\n```\n\n"
)


def shown(problem: Problem, seed: int, sample_index: int) -> Problem:
    """The problem as one sample sees it: options of a benchmark that is `shuffled` (GPQA) in the sample's own order.

    Deterministic in (seed, problem, sample), so that grading finds the letter again. What is returned is no longer
    `shuffled`: shown once more, it stays. The public scripts shuffle without a seed.
    """
    if not problem.metadata.get("shuffled"):
        return problem
    metadata = {name: value for name, value in problem.metadata.items() if name != "shuffled"}
    order = list(range(len(problem.options)))
    random.Random(f"options|{seed}|{problem.metadata['shuffled']}|{sample_index}").shuffle(order)
    options = tuple(problem.options[place] for place in order)
    right = order.index(LETTERS.index(problem.reference))
    return dataclasses.replace(problem, options=options, reference=LETTERS[right], metadata=metadata)


def options_block(options: tuple[str, ...]) -> str:
    """Options one a line as `A) text`."""
    return "\n".join(f"{letter}) {option}" for letter, option in zip(LETTERS, options, strict=False))


def user_turn(problem: Problem) -> str:
    """The text of the user's turn: question, options if any, tests that the code must pass if any, instruction.

    A code problem shows its first test, as MBPP's prompt does, since only that fixes the function's name and types.
    """
    parts = [problem.question]
    if problem.options:
        parts.append(options_block(problem.options))
    if problem.answer_kind == "code" and problem.tests and problem.tests[0].startswith("assert"):
        parts.append(f"It must pass: {problem.tests[0]}")
    parts.append(INSTRUCTIONS[problem.answer_kind])
    return "\n".join(parts)


def _tinyr1(problem: Problem) -> list[dict[str, str]]:
    """The messages of the public scripts for AIME, GPQA and LiveCodeBench. ValueError for another kind of problem."""
    if problem.answer_kind in ("number", "expression"):
        return _messages(TINYR1_MATH_SYSTEM, problem.question)
    if problem.answer_kind == "choice":
        options = ", ".join(f"{letter}) {option}" for letter, option in zip(LETTERS, problem.options, strict=False))
        return _messages(TINYR1_CHOICE_SYSTEM, f"{TINYR1_CHOICE}{problem.question}\n{options}")
    if problem.source == "livecodebench":
        starter = problem.metadata.get("starter_code", "")
        form = TINYR1_STARTER.format(starter=starter) if starter else TINYR1_STDIN
        return _messages("", f"{TINYR1_CODE}{problem.metadata['specification']}\n\n{form}")
    raise ValueError(
        f"problem {problem.id} ({problem.source}): the public scripts have no prompt for it; use protocol 'default'"
    )


def _messages(system: str, user: str) -> list[dict[str, str]]:
    turns = [{"role": "system", "content": system}] if system else []
    return [*turns, {"role": "user", "content": user}]


def chat(problem: Problem, protocol: str = "default") -> list[dict[str, str]]:
    """The conversation up to the model's turn, for `tokenizer.apply_chat_template(..., add_generation_prompt=True)`."""
    return _tinyr1(problem) if protocol == "tinyr1" else _messages("", user_turn(problem))
