"""Owns the view of single problems of a run: the prompt, the models' completions and verdicts side by side, as HTML.

Writes nothing; what is shown is chosen in `problem_answers`. The page has neither script nor style sheet, and folds by
`<details>` alone: it works in JupyterLab, in an executed copy and in an exported page. Every text of a problem or a
model is escaped and stands in `pre` or `code`, where no formula is set either.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from tinyr1_utils import looks, problem_answers
from tinyr1_utils.answers import final_text
from tinyr1_utils.artifacts import completed
from tinyr1_utils.config import names
from tinyr1_utils.problem_answers import WANTED, Answers
from tinyr1_utils.prompts import chat, shown
from tinyr1_utils.records import LETTERS, Problem, Score
from tinyr1_utils.sources import source_named

if TYPE_CHECKING:
    from IPython.display import HTML

LAST_LINES = 8  # of a text without think tags that are not folded
LONGEST = 20_000  # characters of one text in a list of problems; a single problem is shown whole
OWN_MARKS = 8  # samples up to which each has its own mark
GRID = "display:grid;grid-template-columns:repeat(auto-fit,minmax(14em,1fr));gap:0.6em"
CARD = "border:1px solid #888888;padding:0.3em 0.6em;min-width:0"
ROW = "border-top:1px solid #888888;padding:0.3em 0"
MODEL = "display:inline-block;margin-left:1.2em"
TEXT = "white-space:pre-wrap;overflow-wrap:anywhere;max-height:26em;overflow:auto;margin:0.3em 0"
RIGHT, WRONG = '<span style="color:#029E73">✓</span>', '<span style="color:#C23B00">✗</span>'


@dataclass(frozen=True)
class View:
    """How much is shown: completions of a model (0: all), characters of a text (0: all), any text at all, unfolded."""

    samples: int
    longest: int
    private: bool
    unfolded: bool


def problems(
    run_dir: Path,
    benchmark: str = "",
    *,
    models: Sequence[str] | str = (),
    wanted: str = "disagree",
    problem: str = "",
    limit: int = 10,
    samples: int = 1,
) -> "HTML":
    """Problems of one benchmark, each folded, with what the models made of it; the widest disagreement comes first.

    `benchmark`: empty for the run's first. `models`: names as in the tables (`backbone`, `sft/math`), at best two to
    four, or see `problem_answers.choose_models`. `wanted`: one of `problem_answers.WANTED`. `problem`: the id of a
    single one, shown whole and with every sample, whatever is wanted. `limit`: how many problems, `samples`: how many
    completions of each model, wrong ones first (0: all). Where nothing can be shown, a sentence says why.
    """
    from IPython.display import HTML

    try:
        run = completed(Path(run_dir))
        benchmark, known = problem_answers.evaluated(run, benchmark)
        named = names(models) if isinstance(models, str) else models
        variants = problem_answers.choose_models(run, benchmark, known, named)
        answers = problem_answers.load_answers(Path(run_dir), run, benchmark, variants)
        shared = problem_answers.shared_problems(answers)
        chosen = problem_answers.choose_problems(shared, wanted, problem)
    except (ValueError, FileNotFoundError) as error:
        return HTML(f"<p>{escape(str(error))}</p>")
    private = problem_answers.why_private(benchmark)
    view = View(0 if problem else samples, 0 if problem else LONGEST, bool(private), bool(problem))
    said = "one problem" if problem else f"problems that {WANTED[wanted][0]}: {len(chosen)}"
    cut = f"; the first {limit} are shown" if 0 < limit < len(chosen) else ""
    lines = [f"{benchmark}, {said} of {len(shared)}{cut}. A model solves a problem if half of its samples are right."]
    lines += [private] if private else [*dict.fromkeys(a.why for a in answers if a.why), _source(benchmark)]
    head = "".join(f"<p>{escape(line)}</p>" for line in lines)
    return HTML(head + "".join(_row(identifier, answers, view) for identifier in chosen[: limit or None]))


def _source(benchmark: str) -> str:
    source = source_named(benchmark)
    return f"Problems: {source.url} ({source.licence})."


def _row(identifier: str, answers: Sequence[Answers], view: View) -> str:
    """One problem: its id and every model's marks, and folded behind them the prompt and the completions."""
    chosen = {a.model: sorted(a.scores[identifier], key=lambda s: s.correct)[: view.samples or None] for a in answers}
    strip = "".join(f'<span style="{MODEL}">{_label(a)} {_marks(a.scores[identifier])}</span>' for a in answers)
    cards = "".join(_card(answer, chosen[answer.model], view) for answer in answers)
    prompt = "" if view.private else _prompts(identifier, answers, chosen, view)
    opened = " open" if view.unfolded else ""
    summary = f"<summary><code>{escape(identifier)}</code>{strip}</summary>"
    return f'<details style="{ROW}"{opened}>{summary}{prompt}<div style="{GRID}">{cards}</div></details>'


def _label(answer: Answers) -> str:
    return f"<b>{escape(looks.look(answer.model).label)}</b>"


def _marks(scores: Sequence[Score]) -> str:
    if len(scores) > OWN_MARKS:
        return f"{sum(score.correct for score in scores)} of {len(scores)} {RIGHT}"
    return "".join(RIGHT if score.correct else WRONG for score in scores)


def _card(answer: Answers, scores: Sequence[Score], view: View) -> str:
    """One model's column: its first completion, and the others folded."""
    (verdict, text), *others = (_completion(answer, score, view) for score in scores)
    folded = "".join(_folded(said, more) for said, more in others)
    return f'<div style="{CARD}">{_label(answer)}<div>{verdict}</div>{text}{folded}</div>'


def _completion(answer: Answers, score: Score, view: View) -> tuple[str, str]:
    """The verdict as one line, and the text with its reasoning folded."""
    verdict = escape(score.verdict.replace("_", " "))
    said = [f"sample {score.sample_index}: {RIGHT if score.correct else WRONG} {verdict}"]
    if view.private:
        return said[0], ""
    said += [f"answer <code>{escape(score.extracted)}</code>"] if score.extracted else []
    said += [f"{score.output_tokens} tokens", *(["cut off at the token limit"] if score.truncated else [])]
    completion = answer.completions.get((score.problem_id, score.sample_index))
    if completion is None:
        return ", ".join(said), "<p>Its text is not kept.</p>"
    reasoning, final = split(completion.text)
    folded = _folded(f"reasoning: {_lines(reasoning)}", _pre(reasoning, view)) if reasoning else ""
    return ", ".join(said), folded + _pre(final, view)


def _folded(summary: str, page: str) -> str:
    return f"<details><summary>{summary}</summary>{page}</details>"


def _lines(text: str) -> str:
    count = len(text.splitlines())
    return f"{count} lines" if count > 1 else "1 line"


def split(text: str) -> tuple[str, str]:
    """What is folded and what is not: reasoning and final answer, or all but the last lines and these."""
    final = final_text(text).strip()
    if "</think>" in text and final:
        return text[: text.rindex("</think>")].removeprefix("<think>").strip(), final
    lines = text.strip().splitlines()
    return "\n".join(lines[:-LAST_LINES]), "\n".join(lines[-LAST_LINES:])


def _pre(text: str, view: View) -> str:
    """A text as it is; the middle is left out of one that is too long for the view."""
    if view.longest and len(text) > view.longest:
        half, left_out = view.longest // 2, len(text) - 2 * (view.longest // 2)
        text = f"{text[:half]}\n[... {left_out:,} characters; name the problem to see them ...]\n{text[-half:]}"
    return f'<pre style="{TEXT}">{escape(text)}</pre>'


def _prompts(identifier: str, answers: Sequence[Answers], chosen: Mapping[str, Sequence[Score]], view: View) -> str:
    """Every prompt that a completion below it answers: one, unless models or samples were asked in different words."""
    whose: dict[str, list[str]] = {}
    for answer in answers:
        for score in chosen[answer.model] if identifier in answer.problems else ():
            problem = shown(answer.problems[identifier], answer.parameters["seed"], score.sample_index)
            page = _prompt(problem, answer.parameters.get("protocol", "default"), view)
            whose.setdefault(page, []).append(f"{looks.look(answer.model).label}, sample {score.sample_index}")
    if len(whose) < 2:
        return "".join(whose)
    return "".join(f"<p>{escape('; '.join(who))}:</p>{page}" for page, who in whose.items())


def _prompt(problem: Problem, protocol: str, view: View) -> str:
    """The turns that a model was given, the reference answer, and a program's tests, folded."""
    turns = chat(problem, protocol)
    roles = [f"{turn['role']}:" if len(turns) > 1 else "" for turn in turns]
    parts = [role + _pre(turn["content"], view) for role, turn in zip(roles, turns, strict=True)]
    reference = problem.reference
    if problem.answer_kind == "choice":
        reference += f") {problem.options[LETTERS.index(reference)]}"
    if "\n" in reference:
        parts.append(_folded("reference answer", _pre(reference, view)))
    elif reference:
        parts.append(f"<p>reference answer: <code>{escape(reference)}</code></p>")
    parts += [_folded("tests", _pre("\n".join(problem.tests), view))] if problem.tests else []
    return "".join(parts)
