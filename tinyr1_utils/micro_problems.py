"""Owns the generated problems of the micro world and its scripted teacher. Reads and writes no file.

Three domains with answers that a program can check: word problems (math), functions over lists of integers (code),
and four-way choices on true facts (science: unit conversions, two-factor formulas of physics, molar masses).
A problem belongs to `train`, `validation` or `test` by a hash of what it asks, not of its wording, so no two splits
can share a problem whatever the seeds.
"""

import functools
import hashlib
import random
from collections.abc import Callable
from fractions import Fraction

from tinyr1_utils.records import LETTERS, Problem, Trace

SPLITS = ("train", "validation", "test")
PEOPLE = ("Ana", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivo", "Jan", "Kim", "Leo", "Mia", "Noa", "Otto")
OBJECTS = ("apples", "books", "cards", "coins", "eggs", "keys", "pens", "shells", "stamps", "toys")
PLACES = ("Bern", "Cairo", "Lima", "Oslo", "Paris", "Quito", "Rome", "Seoul", "Tunis", "Vienna")
TEACHER = "micro-script"
# A domain is a common part, which the backbone was pretrained on, and a harder rest that branches have to learn.
COMMON_SHARE = 0.4


def split_of(content: str) -> str:
    """The split that a problem's content belongs to: 80 % train, 10 % validation, 10 % test, by its SHA-256."""
    bucket = hashlib.sha256(content.encode()).digest()[0] * 10 // 256
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"


def _problem(domain: str, content: str, question: str, answer_kind: str, reference: str, **fields) -> Problem:
    digest = hashlib.sha256(f"{content}|{question}".encode()).hexdigest()[:10]
    metadata = {"content": content, **fields.pop("metadata", {})}
    return Problem(
        id=f"micro-{domain}-{digest}",
        domain=domain,
        source=f"micro-{domain}",
        question=question,
        answer_kind=answer_kind,
        reference=reference,
        metadata=metadata,
        **fields,
    )


# --- math: one quantity, one to four changes ---------------------------------------------------------------------

MATH_SENTENCES = {
    "+": ("{name} buys {n} more.", "A friend gives {name} {n} more.", "Then {name} finds {n} more."),
    "-": ("{name} gives away {n}.", "Then {name} loses {n}.", "{name} sells {n}."),
    "*": ("Then the number of {object} grows {n}-fold.",),
    "/": ("{name} shares them equally among {n} people and keeps one share.",),
}
MATH_OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda value, n: value + n,
    "-": lambda value, n: value - n,
    "*": lambda value, n: value * n,
    "/": lambda value, n: value // n,
}


LARGEST_VALUE = (
    30  # keeps every step a fact that a small model can learn: the difficulty is in how many steps there are
)


def _math_choices(value: int, common: bool) -> list[tuple[str, int]]:
    """Every change that keeps the quantity between 1 and LARGEST_VALUE."""
    choices = [("+", n) for n in range(1, 10) if value + n <= LARGEST_VALUE]
    choices += [("-", n) for n in range(1, 10) if value - n >= 1]
    if not common:
        choices += [("*", n) for n in (2, 3, 4) if value * n <= LARGEST_VALUE] * 4
        choices += [("/", n) for n in (2, 3, 4, 5) if value % n == 0 and value > n] * 4
    return choices


def _math(rng: random.Random, common: bool) -> Problem:
    start = value = rng.randint(2, 20)
    steps = []
    for _ in range(rng.randint(1, 2) if common else rng.randint(2, 4)):
        operation, n = rng.choice(_math_choices(value, common))
        steps.append([operation, n])
        value = MATH_OPERATIONS[operation](value, n)
    name, thing = rng.choice(PEOPLE), rng.choice(OBJECTS)
    sentences = [f"{name} has {start} {thing}."]
    sentences += [rng.choice(MATH_SENTENCES[op]).format(name=name, n=n, object=thing) for op, n in steps]
    question = " ".join([*sentences, f"How many {thing} does {name} have now?"])
    content = f"{start}" + "".join(f"{op}{n}" for op, n in steps)
    return _problem("math", content, question, "number", str(value), metadata={"start": start, "steps": steps})


def _math_trace(problem: Problem, rng: random.Random | None) -> tuple[str, str]:
    value, lines = problem.metadata["start"], []
    steps = problem.metadata["steps"]
    slip_at = rng.randrange(len(steps)) if rng else None
    for index, (operation, n) in enumerate(steps):
        result = MATH_OPERATIONS[operation](value, n)
        if index == slip_at:
            result += rng.choice((1, 2, 10))
        lines.append(f"{value} {operation} {n} = {result}")
        value = result
    return "\n".join(lines), f"The answer is \\boxed{{{value}}}."


# --- code: a pipeline over a list of integers --------------------------------------------------------------------

# name -> (words, source line, Python function); `{n}` is the step's constant.
CODE_STEPS: dict[str, tuple[str, str, Callable[[list[int], int], list[int]]]] = {
    "even": ("keeps the even numbers", "[x for x in xs if x % 2 == 0]", lambda xs, n: [x for x in xs if x % 2 == 0]),
    "square": ("squares each number", "[x * x for x in xs]", lambda xs, n: [x * x for x in xs]),
    "add": ("adds {n} to each number", "[x + {n} for x in xs]", lambda xs, n: [x + n for x in xs]),
    "sort": ("sorts the numbers in rising order", "sorted(xs)", lambda xs, n: sorted(xs)),
    "first": ("takes the first {n} numbers", "xs[:{n}]", lambda xs, n: xs[:n]),
    "above": ("keeps the numbers above {n}", "[x for x in xs if x > {n}]", lambda xs, n: [x for x in xs if x > n]),
    "odd": ("keeps the odd numbers", "[x for x in xs if x % 2 == 1]", lambda xs, n: [x for x in xs if x % 2 == 1]),
    "times": ("multiplies each number by {n}", "[x * {n} for x in xs]", lambda xs, n: [x * n for x in xs]),
    "reverse": ("reverses the list", "xs[::-1]", lambda xs, n: xs[::-1]),
    "down": ("sorts the numbers in falling order", "sorted(xs, reverse=True)", lambda xs, n: sorted(xs, reverse=True)),
    "skip": ("drops the first {n} numbers", "xs[{n}:]", lambda xs, n: xs[n:]),
    "below": ("keeps the numbers below {n}", "[x for x in xs if x < {n}]", lambda xs, n: [x for x in xs if x < n]),
    "unique": ("removes repeated numbers", "list(dict.fromkeys(xs))", lambda xs, n: list(dict.fromkeys(xs))),
    "negate": ("negates each number", "[-x for x in xs]", lambda xs, n: [-x for x in xs]),
    "divisible": (
        "keeps the multiples of {n}",
        "[x for x in xs if x % {n} == 0]",
        lambda xs, n: [x for x in xs if x % n == 0],
    ),
    "remainder": ("takes each number modulo {n}", "[x % {n} for x in xs]", lambda xs, n: [x % n for x in xs]),
}
CODE_RESULTS: dict[str, tuple[str, str, Callable[[list[int]], object]]] = {
    "list": ("returns the list", "xs", lambda xs: xs),
    "sum": ("returns the sum", "sum(xs)", sum),
    "count": ("returns how many there are", "len(xs)", len),
    "largest": ("returns the largest, or 0 if there is none", "max(xs, default=0)", lambda xs: max(xs, default=0)),
    "smallest": ("returns the smallest, or 0 if there is none", "min(xs, default=0)", lambda xs: min(xs, default=0)),
    "set": ("returns how many different numbers there are", "len(set(xs))", lambda xs: len(set(xs))),
}
COMMON_STEPS, COMMON_RESULTS = tuple(CODE_STEPS)[:8], tuple(CODE_RESULTS)[:4]


def _code_expected(steps: list[list], result: str, numbers: list[int]) -> object:
    for name, n in steps:
        numbers = CODE_STEPS[name][2](numbers, n)
    return CODE_RESULTS[result][2](numbers)


def _code_tests(steps: list[list], result: str, content: str) -> tuple[str, ...]:
    """Six asserts on lists drawn from the content alone, so that equal content has equal tests.

    The long lists tell apart what short ones do not: a step left out, a multiple that no short list holds.
    """
    rng = random.Random(content)
    inputs = [[rng.randint(1, 20) for _ in range(length)] for length in (5, 8, 6)] + [[]]
    inputs += [[rng.randint(1, 60) for _ in range(length)] for length in (12, 24)]
    return tuple(f"assert solve({xs}) == {_code_expected(steps, result, list(xs))}" for xs in inputs)


def _code(rng: random.Random, common: bool) -> Problem:
    known = COMMON_STEPS if common else tuple(CODE_STEPS)
    steps = [[name, rng.randint(2, 9)] for name in rng.sample(known, rng.randint(1, 2 if common else 3))]
    result = rng.choice(COMMON_RESULTS if common else tuple(CODE_RESULTS))
    words = [CODE_STEPS[name][0].format(n=n) for name, n in steps] + [CODE_RESULTS[result][0]]
    question = "Write a Python function solve(xs) that " + ", then ".join(words) + "."
    content = "|".join([*(CODE_STEPS[name][1].format(n=n) for name, n in steps), result])
    tests = _code_tests(steps, result, content)
    metadata = {"steps": steps, "result": result}
    return _problem("code", content, question, "code", "", tests=tests, metadata=metadata)


def _code_trace(problem: Problem, rng: random.Random | None) -> tuple[str, str]:
    steps, result = [list(step) for step in problem.metadata["steps"]], problem.metadata["result"]
    if rng:
        slip = rng.randrange(len(steps))
        steps[slip][0] = rng.choice([name for name in CODE_STEPS if name != steps[slip][0]])
    lines = [CODE_STEPS[name][1].format(n=n) for name, n in steps]
    words = [CODE_STEPS[name][0].format(n=n) for name, n in problem.metadata["steps"]]
    reasoning = "\n".join(f"{word}: {line}" for word, line in zip(words, lines, strict=True))
    body = "\n".join(f"    xs = {line}" for line in lines)
    return reasoning, f"```python\ndef solve(xs):\n{body}\n    return {CODE_RESULTS[result][1]}\n```"


# --- science: a quantity from a formula, four options ------------------------------------------------------------

# name -> (what is noted, formula, unit of the answer); the two numbers follow the formula's order.
FORMULAS: dict[str, tuple[str, str, str]] = {
    "speed": ("a cart covers {a} m in {b} s at constant speed. What is its speed", "v = d / t", "m/s"),
    "distance": ("a cart moves at {a} m/s for {b} s. How far does it go", "d = v * t", "m"),
    "force": ("a mass of {a} kg accelerates at {b} m/s^2. What force acts on it", "F = m * a", "N"),
    "density": ("a body of {a} g has a volume of {b} cm^3. What is its density", "rho = m / V", "g/cm^3"),
    "voltage": ("a current of {a} A flows through {b} ohm. What is the voltage", "U = I * R", "V"),
    "current": ("a voltage of {a} V lies across {b} ohm. What current flows", "I = U / R", "A"),
    "acceleration": ("a cart goes from rest to {a} m/s in {b} s. What is its acceleration", "a = v / t", "m/s^2"),
    "momentum": ("a body of {a} kg moves at {b} m/s. What is its momentum", "p = m * v", "kg m/s"),
    "duration": ("a cart covers {a} m at {b} m/s. How long does it take", "t = d / v", "s"),
    "work": ("a force of {a} N pushes a cart {b} m ahead. What work does it do", "W = F * d", "J"),
    "pressure": ("a force of {a} N presses on {b} m^2. What is the pressure", "p = F / A", "Pa"),
    "charge": ("a current of {a} A flows for {b} s. What charge passes", "Q = I * t", "C"),
    "resistance": ("a voltage of {a} V gives a current of {b} A. What is the resistance", "R = U / I", "ohm"),
    "energy": ("a motor of {a} W runs for {b} s. What energy does it take", "E = P * t", "J"),
    "power": ("a motor does {a} J of work in {b} s. What is its power", "P = W / t", "W"),
    "electric power": ("a lamp takes {a} A at {b} V. What is its power", "P = I * U", "W"),
    "inertia": ("a force of {a} N accelerates a body at {b} m/s^2. What is its mass", "m = F / a", "kg"),
    "wave speed": ("a wave of {a} Hz has a wavelength of {b} m. How fast is it", "c = f * l", "m/s"),
    "mass": ("a liquid of {a} g/cm^3 fills {b} cm^3. What is its mass", "m = rho * V", "g"),
}
COMMON_FORMULAS = tuple(FORMULAS)[:6]
CONVERSIONS = (("km", "m"), ("m", "cm"), ("kg", "g"), ("hour", "minute"), ("minute", "s"), ("L", "mL"), ("day", "hour"))
COMMON_CONVERSIONS = CONVERSIONS[:3]


@functools.cache
def conversion_factor(source: str, target: str) -> int:
    """How many `target` one `source` is, by pint. Every pair of CONVERSIONS has an integer factor."""
    import pint

    factor = Fraction(pint.UnitRegistry().Quantity(1, source).to(target).magnitude).limit_denominator(10**6)
    if factor.denominator != 1:
        raise ValueError(f"{source} -> {target}: the factor {factor} is no integer")
    return factor.numerator


@functools.cache
def _atomic_mass(symbol: str) -> int:
    import periodictable

    return round(periodictable.elements.symbol(symbol).mass)


@functools.cache
def compounds() -> tuple[tuple[tuple[str, int], ...], ...]:
    """Alkanes, alkenes, alcohols, acids and oxides whose rounded molar mass is the sum of rounded atomic masses."""
    import periodictable

    rows = [(("C", n), ("H", 2 * n + 2)) for n in range(1, 8)] + [(("C", n), ("H", 2 * n)) for n in range(2, 8)]
    rows += [(("C", n), ("H", 2 * n + 2), ("O", 1)) for n in range(1, 7)]
    rows += [(("C", n), ("H", 2 * n), ("O", 2)) for n in range(1, 7)]
    rows += [((metal, count), ("O", oxygens)) for metal, count, oxygens in _OXIDES]
    formulas = {row: periodictable.formula("".join(f"{symbol}{count}" for symbol, count in row)).mass for row in rows}
    return tuple(row for row, mass in formulas.items() if round(mass) == sum(_atomic_mass(s) * n for s, n in row))


_OXIDES = (("C", 1, 1), ("C", 1, 2), ("N", 1, 1), ("N", 1, 2), ("N", 2, 1), ("N", 2, 3), ("N", 2, 5), ("S", 1, 2))
_OXIDES += (("S", 1, 3), ("Mg", 1, 1), ("Ca", 1, 1), ("Na", 2, 1), ("Al", 2, 3), ("Si", 1, 2), ("P", 4, 6), ("K", 2, 1))


def _formula_text(compound) -> str:
    return "".join(symbol + (str(count) if count > 1 else "") for symbol, count in compound)


def _science_item(rng: random.Random, common: bool) -> tuple[str, str, list[str], int, str, list[int]]:
    """(content, question, worked lines, answer, unit, plausible wrong values)."""
    family = rng.choice(("formula", "formula", "conversion") + (() if common else ("molar_mass",)))
    if family == "formula":
        name = rng.choice(COMMON_FORMULAS if common else tuple(FORMULAS))
        question, formula, unit = FORMULAS[name]
        n, second = rng.randint(2, 9), rng.randint(2, 9)
        if "/" in formula:
            first, sign, answer = n * second, "/", n
            wrong = [first, second, first + second, first - second, n + 1]
        else:
            first, sign, answer = n, "*", n * second
            wrong = [first, first + second, answer + first, answer - second, answer + 10]
        lines = [f"{formula}", f"{first} {sign} {second} = {answer}"]
        return f"{name}|{first}|{second}", question.format(a=first, b=second), lines, answer, unit, wrong
    if family == "conversion":
        source, target = rng.choice(COMMON_CONVERSIONS if common else CONVERSIONS)
        factor, amount = conversion_factor(source, target), rng.randint(2, 9)
        answer = amount * factor
        lines = [f"1 {source} = {factor} {target}", f"{amount} * {factor} = {answer}"]
        question = f"a length of time, space or mass reads {amount} {source}. How much is it in {target}"
        # The amount times another pair's factor: the mistake that people make.
        wrong = [amount * other for other in (10, 24, 60, 100, 1000)]
        return f"{source}|{target}|{amount}", question, lines, answer, target, wrong
    compound = rng.choice(compounds())
    parts = [_atomic_mass(symbol) * count for symbol, count in compound]
    lines = [
        f"{symbol}: {count} * {_atomic_mass(symbol)} = {part}"
        for (symbol, count), part in zip(compound, parts, strict=True)
    ]
    total = parts[0]
    for part in parts[1:]:
        lines.append(f"{total} + {part} = {total + part}")
        total += part
    text = _formula_text(compound)
    wrong = [sum(_atomic_mass(symbol) for symbol, _ in compound), total + 1, total - 2, total + 12, total + 16]
    return f"molar|{text}", f"a sample of {text} is weighed. What is its molar mass", lines, total, "g/mol", wrong


def _science(rng: random.Random, common: bool) -> Problem:
    content, body, lines, answer, unit, wrong = _science_item(rng, common)
    wrong = sorted({value for value in wrong if value > 0 and value != answer})
    while len(wrong) < 3:
        wrong.append(answer + len(wrong) + 2)
    values = [answer, *rng.sample(wrong, 3)]
    rng.shuffle(values)
    question = f"In {rng.choice(PLACES)}, {rng.choice(PEOPLE)} notes that {body}?"
    letter = LETTERS[values.index(answer)]
    options = tuple(f"{value} {unit}" for value in values)
    metadata = {"lines": lines, "values": values, "answer": answer}
    # The split must not depend on names or on the order of options: content alone decides.
    return _problem("science", content, question, "choice", letter, options=options, metadata=metadata)


def option_checks(values: list[int], result: int) -> list[str]:
    """Each option held against the result, up to the one that equals it: the letter to answer is then the last one.

    Two numbers side by side are what a small model can compare; finding a letter by its number is not.
    """
    compared = zip(LETTERS, values[: values.index(result) + 1], strict=False)
    return [f"{letter}) {value} against {result}: {'yes' if value == result else 'no'}" for letter, value in compared]


def _science_trace(problem: Problem, rng: random.Random | None) -> tuple[str, str]:
    lines, values = list(problem.metadata["lines"]), problem.metadata["values"]
    believed = problem.metadata["answer"]
    if rng:
        believed = rng.choice([value for value in values if value != believed])
        lines[-1] = f"{lines[-1].split(' = ')[0]} = {believed}"
    lines += option_checks(values, believed)
    letter = LETTERS[values.index(believed)]
    return "\n".join(lines), f"The answer is \\boxed{{{letter}}}."


def teach_statement(problem: Problem, option: str, truth: bool) -> Trace:
    """The scripted teacher's trace for a science problem turned into a true/false statement about one option."""
    lines = list(problem.metadata["lines"])
    lines.append(f"{option.split()[0]}: {'yes' if truth else 'no'}")
    return Trace(problem.id, TEACHER, "\n".join(lines), f"The answer is \\boxed{{{truth}}}.")


GENERATORS = {"math": _math, "code": _code, "science": _science}
TRACERS = {"math": _math_trace, "code": _code_trace, "science": _science_trace}


def generate(domain: str, split: str, n_problems: int, seed: int, *, common_only: bool = False) -> list[Problem]:
    """`n_problems` different problems of one domain and split, in an order that the seed fixes.

    In the held-out splits no two problems have the same content, so that errors clustered by problem are honest; in
    train the same content may come in other words, with other names or options.

    COMMON_SHARE of them come from the domain's common part (fewer steps, smaller numbers, half of the operations
    and formulas); `common_only` draws that part alone. Raises ValueError when the split holds fewer problems.
    """
    rng = random.Random(f"{domain}|{split}|{seed}|{common_only}")
    problems: dict[str, Problem] = {}
    for _ in range(200 * n_problems + 1000):
        if len(problems) == n_problems:
            return list(problems.values())
        problem = GENERATORS[domain](rng, common_only or rng.random() < COMMON_SHARE)
        if split_of(problem.metadata["content"]) == split:
            problems.setdefault(problem.id if split == "train" else problem.metadata["content"], problem)
    raise ValueError(f"micro-{domain} {split}: only {len(problems)} different problems, {n_problems} asked for")


def teach(problem: Problem, *, seed: int, wrong_share: float = 0.0, unfinished_share: float = 0.0) -> Trace:
    """The scripted teacher's trace. It slips in `wrong_share` of the problems and is cut off in `unfinished_share`.

    Which problems those are is fixed by (seed, problem id). A slip changes one step and is carried through to the
    answer, as a real teacher's slip is; a wrong function may still pass the tests by luck.
    """
    rng = random.Random(f"{seed}|{problem.id}")
    draw = rng.random()
    slip = rng if draw < wrong_share else None
    reasoning, answer = TRACERS[problem.domain](problem, slip)
    if wrong_share <= draw < wrong_share + unfinished_share:
        return Trace(problem.id, TEACHER, reasoning[: max(1, len(reasoning) // 2)], "", finished=False)
    return Trace(problem.id, TEACHER, reasoning, answer)
