"""Documentation of installed scientific packages: what a function does, told at length, and in its first line.

Python's own convention (PEP 257) makes every such text a document with a summary. Sources are parsed and never run.
"""

import ast
import importlib.metadata
import importlib.util
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

from data_prep.dataset import DataSet, Source
from data_prep.summaries import Document, with_random_splits
from workflows.errors import UserError

PACKAGES = ("numpy", "scipy", "scikit-learn", "pandas", "sympy", "networkx", "matplotlib", "nltk")
_MODULES = {"scikit-learn": "sklearn"}
_SECTION = re.compile(
    r"^[A-Z][\w ]*:?$\n^[-=~]{3,}$|^(Parameters|Args|Arguments|Returns|Raises|Examples?|References)\b.*$", re.M
)
_MARKUP = re.compile(r":\w+(?::\w+)*:`~?([^`<]+)(?: <[^>]*>)?`|`{1,2}([^`]+)`{1,2}_?|\[\d+\]_")
_SHORTEST, _LONGEST = 5, 40
"""Words of a first line: fewer are a title, more are none."""
_LEAST_SENTENCES = 3
"""Full stops of a body; below it there is hardly anything to choose."""


def prepare(raw_dir: Path | None, validation_size: int | None, test_size: int | None, seed: int) -> DataSet:
    """Make the data set; the docstrings of a file stay in one split.

    Args:
        raw_dir: A folder of Python files, or None for the packages of `PACKAGES`.
        validation_size: Number of docstrings held out for validation; a tenth by default.
        test_size: Number of docstrings held out for the test; a tenth by default.
        seed: Seed of the split.

    Raises:
        UserError: If there are no such docstrings.
    """
    folders = {str(raw_dir): raw_dir} if raw_dir is not None else _installed()
    documents = [
        document
        for folder in folders.values()
        for file in sorted(folder.rglob("*.py"))
        if "tests" not in file.relative_to(folder).parts and file.is_file()
        for document in documents_of(file, str(file.relative_to(folder.parent)))
    ]
    if not documents:
        raise UserError(f"{', '.join(folders)}: no docstring with a first line and a body in any .py file.")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in folders if raw_dir is None]
    source = Source(
        title="Docstrings of scientific Python packages: their bodies and their first lines",
        origin="packages installed here" if raw_dir is None else str(raw_dir),
        revision=", ".join(versions) or "raw files",
        licence="each package's own (BSD-3-Clause and kin; nltk: Apache-2.0)" if raw_dir is None else "not stated",
        attribution="The developers of " + ", ".join(folders),
    )
    return with_random_splits("docstrings", documents, source, validation_size, test_size, seed)


def _installed() -> dict[str, Path]:
    """The folders of the packages that are installed, found without importing any."""
    found = {}
    for name in PACKAGES:
        spec = importlib.util.find_spec(_MODULES.get(name, name))
        if spec is not None and spec.submodule_search_locations:
            found[name] = Path(next(iter(spec.submodule_search_locations)))
    if not found:
        raise UserError(f"None of {', '.join(PACKAGES)} is installed. Install one, or name Python files by --raw_dir.")
    return found


def documents_of(file: Path, name: str) -> Iterator[Document]:
    """The docstrings of a Python file that have a first line and a body of several sentences.

    Args:
        file: The file; one that is no Python has none.
        name: What keeps its docstrings in one split.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old escapes in others' sources
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, RecursionError):  # the last of expressions of thousands of terms
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found = parts_of(ast.get_docstring(node) or "")
            if found is not None:
                summary, body = found
                yield Document(body, [summary], frozenset({f"file:{name}"}))


def parts_of(docstring: str) -> tuple[str, str] | None:
    """The first line of a docstring and the prose after it, without sections, code and markup; None if either lacks."""
    first, _, rest = docstring.strip().partition("\n\n")
    summary = _plain(first)
    if not _SHORTEST <= len(summary.split()) <= _LONGEST or summary[-1] != ".":
        return None
    section = _SECTION.search(rest)
    prose = [part for part in rest[: section.start() if section else None].split("\n\n") if _is_prose(part)]
    body = "\n\n".join(_plain(part.removesuffix("::") + "." * part.endswith("::")) for part in prose)
    return (summary, body) if len(re.findall(r"[.?!](\s|$)", body)) >= _LEAST_SENTENCES else None


def _is_prose(paragraph: str) -> bool:
    """Whether a paragraph is sentences: neither indented (code, formulas, lists) nor a directive or an example."""
    return bool(paragraph.strip()) and not re.match(r"\s|\.\.|>>>|[-*+] |\||=|\$", paragraph)


def _plain(text: str) -> str:
    """A paragraph on one line, without reStructuredText's marks."""
    return " ".join(_MARKUP.sub(lambda found: found[1] or found[2] or "", text).split())
