"""`make report`: what a run did, on one page that opens from the disk and asks nothing of the network.

The page holds everything it needs, the plotting library too: the same plotly.js that the package of that name carries.
A policy in its head forbids it to load anything else, and what models wrote is put in as text only.
"""

import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from workflows.errors import UserError
from workflows.files import write_text
from workflows.reporting import tables
from workflows.reporting.charts import charts, score_charts
from workflows.reporting.gather import Run, read_run


def setup(runs: list[str], out_dir: Path = Path("out"), out_file: Path | None = None) -> None:
    """Write a page about one run, or about several side by side.

    Args:
        runs: The runs' names, e.g. [demo] or [demo,again]; [a/x,b/x], of one last name, are called by their paths.
        out_dir: The folder of all runs.
        out_file: The page; by default OUT_DIR/RUN/report.html, of several runs OUT_DIR/report-RUN-RUN.html.

    Raises:
        UserError: If there is no such run, it has left nothing yet, or one of its files is damaged.
    """
    folders = list({(out_dir / name).resolve(): out_dir / name for name in runs}.values())
    if not folders:
        raise UserError("--runs names no run, e.g. --runs '[demo]'.")
    found = [read_run(folder) for folder in folders]
    alike = Counter(run.name for run in found)
    found = [  # one name means one run, to the charts as to the reader
        replace(run, name=os.path.relpath(folder, out_dir)) if alike[run.name] > 1 else run
        for run, folder in zip(found, folders, strict=True)
    ]
    several = out_dir / f"report-{'-'.join(run.name for run in found).replace(os.sep, '-')}.html"
    page = out_file or (folders[0] / "report.html" if len(folders) == 1 else several)
    write_text(page, render(found))
    print(f"report: {page.resolve().as_uri()}")


def render(runs: list[Run]) -> str:
    """The page as HTML."""
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=PackageLoader("workflows", "reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    groups = charts(runs)
    scores = score_charts(runs)
    drawn: dict[str, Any] = {"runs": [run.name for run in runs], "groups": groups, "scores": scores}
    source = environment.loader.get_source  # type: ignore[union-attr]
    return environment.get_template("page.html").render(
        runs=runs,
        tables=tables,
        groups=groups,
        scores=scores,
        gained=[run for run in runs if tables.gains_table(run) or tables.own_tests(run)],
        settled=[run for run in runs if any(step.provenance for step in run.steps)],
        panel=tables.panel(runs),
        answers=tables.answers(runs),
        data=_as_script(drawn),
        css=Markup(source(environment, "page.css")[0]),
        js=Markup(source(environment, "page.js")[0]),
        plotly=Markup(get_plotlyjs()),
    )


def _as_script(value: Any) -> Markup:
    """JSON that can stand in a script element, whatever the names in it are."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
