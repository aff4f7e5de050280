"""Owns executed.html: an executed notebook as one page that needs no network, the time of each cell beside it.

Executes nothing. A copy may come from elsewhere and show what a model wrote, so its markup is cleaned, and the page
refuses scripts and whatever is not inside it.
"""

import contextlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tinyr1_utils.artifacts import EXECUTED, PROVENANCE, read_json
from tinyr1_utils.masking import masked
from tinyr1_utils.records import atomic_path

PAGE = "executed.html"
TEMPLATE = "executed_page.html.j2"
# What tables, Markdown and highlighted code are made of; bleach's own list lacks headings, paragraphs and table heads.
TAGS = """a abbr b blockquote br caption code dd del details div dl dt em h1 h2 h3 h4 h5 h6 hr i li ol p pre s span
strong sub summary sup table tbody td tfoot th thead tr ul""".split()
# What the results explorer lays its columns out with; none of these can load anything.
PROPERTIES = """border border-top color display gap grid-template-columns margin margin-left max-height min-width
overflow overflow-wrap padding white-space""".split()
ATTRIBUTES = {
    "*": ["class", "id", "style"],
    "details": ["class", "id", "style", "open"],
    "a": ["href", "title"],
    "td": ["colspan", "rowspan"],
    "th": ["colspan", "rowspan"],
}
STYLE = re.compile(r"<style\b.*?</style\s*>", re.DOTALL | re.IGNORECASE)


def cleaned(markup: str) -> str:
    """HTML of which only harmless tags and styles are left: other tags are shown as text, style sheets not at all."""
    import bleach
    from bleach.css_sanitizer import CSSSanitizer

    styles = CSSSanitizer(allowed_css_properties=PROPERTIES)
    return bleach.clean(STYLE.sub("", str(markup)), tags=TAGS, attributes=ATTRIBUTES, css_sanitizer=styles)


def duration(seconds: float | None) -> str:
    """`0.3 s`, `95 s`, `12 min`; empty where it is not known."""
    if seconds is None:
        return ""
    return f"{seconds / 60:.0f} min" if seconds >= 600 else f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def page(notebook: Any, name: str, run: str) -> str:
    """The page of an executed notebook (a NotebookNode, which this changes), called `name`, of the run `run`.

    Without papermill's metadata (run in the lab, or published) it tells no times.
    """
    from nbconvert.exporters import HTMLExporter

    facts = notebook.metadata.get("papermill", {})
    for cell in notebook.cells:
        cell.metadata["alt"] = f"figure of cell {cell.get('execution_count') or ''}".strip()
        cell.metadata["took"] = duration(cell.metadata.get("papermill", {}).get("duration"))
    shown = {
        "name": name,
        "run": run,
        "started": (facts.get("start_time") or "")[:16].replace("T", " "),
        "took": duration(facts.get("duration")),
        "failed": any(o.output_type == "error" for cell in notebook.cells for o in cell.get("outputs", [])),
    }
    exporter = HTMLExporter(
        template_file=str(Path(__file__).with_name(TEMPLATE)), sanitize_html=True, filters={"clean_html": cleaned}
    )
    return exporter.from_notebook_node(notebook, resources={"page": shown})[0]


def mask(executed: Path) -> None:
    """Take the environment's secrets out of an executed copy, which holds what libraries said when they failed."""
    text = executed.read_text(encoding="utf-8", errors="surrogateescape")
    if (without := masked(text)) != text:
        with atomic_path(executed) as temporary:
            temporary.write_text(without, encoding="utf-8", errors="surrogateescape")


def mask_while_executed(executed: Path) -> None:
    """Have papermill mask this copy whenever it saves it: a stage that is killed never comes to its page."""
    from papermill.iorw import LocalHandler, papermill_io

    class Masking(LocalHandler):
        def write(self, buf: str, path: str) -> None:
            super().write(masked(buf), path)

    papermill_io.register(str(executed), Masking())


def write_page(executed: Path) -> Path:
    """Write the page of <run>/<stage>/<variant>/executed.ipynb beside it, the environment's secrets masked in both.

    Raises ValueError for what is no notebook.
    """
    import nbformat

    folder = executed.absolute().parent
    mask(executed)
    try:
        notebook = nbformat.read(executed, as_version=4)
    except (ValueError, KeyError, AttributeError, nbformat.ValidationError) as error:
        raise ValueError(f"{executed} is no notebook ({error}); delete it and run its stage again") from None
    with atomic_path(folder / PAGE) as temporary:
        temporary.write_text(page(notebook, f"{folder.parent.name}/{folder.name}", folder.parents[1].name), "utf-8")
    return folder / PAGE


def is_current(folder: Path, running: bool = False) -> bool:
    """Whether the executed copy in a stage's folder shows the run that its provenance tells of.

    Not where papermill ran the stage once and JupyterLab ran it since, or where papermill was killed: a copy without an
    end is that of the stage which is `running`.
    """
    try:
        facts = read_json(folder / EXECUTED)["metadata"].get("papermill", {})
        finished = read_json(folder / PROVENANCE).get("finished", "")
    except (FileNotFoundError, ValueError, KeyError):
        return False
    if not facts.get("end_time"):
        return running and bool(facts)
    return facts["end_time"][:19] >= finished[:19]  # both UTC, to the second


def write_missing_pages(folders: Iterable[Path]) -> None:
    """Write the pages of stages whose executed copy has none, or an older one: executed elsewhere, or before.

    A copy that is no notebook gets none, nor one in a folder that can not be written.
    """
    for folder in folders:
        made = (folder / PAGE).stat().st_mtime if (folder / PAGE).is_file() else 0.0
        if is_current(folder) and made < (folder / EXECUTED).stat().st_mtime:
            with contextlib.suppress(ValueError, OSError):
                write_page(folder / EXECUTED)
