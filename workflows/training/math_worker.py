"""The process that asks math-verify: it reads pairs of expressions, a JSON list a line, and answers true or false.

SymPy can compute for hours, or take all memory, on an answer such as 9^{9^{9}}, and math-verify's limit is a signal,
which only a process's main thread gets. Here both have a process of their own, which the one that trains can kill. It
is run as a file (`python -P math_worker.py`), so that nothing else is imported.
"""

import json
import os
import sys
from typing import Any

MAX_BYTES = 2 << 30
"""Memory that it may take."""
SECONDS = 2
"""Time for reading an expression, and for comparing two."""


def main() -> None:
    """Serve until the input ends."""
    if os.name == "posix":
        import resource

        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES if hard < 0 else min(MAX_BYTES, hard), hard))
    from math_verify import LatexExtractionConfig, parse, verify

    limit = SECONDS if os.name == "posix" else None  # elsewhere math-verify would start a process for each

    def read(text: str) -> list[Any]:
        config = [LatexExtractionConfig()]
        found = parse(f"${text}$", config, fallback_mode="no_fallback", parsing_timeout=limit)
        return list(found)

    print("ready", flush=True)
    for line in sys.stdin:
        wanted, said = json.loads(line)
        try:
            equal = bool(verify(read(wanted), read(said), timeout_seconds=limit))
        except (Exception, MemoryError, RecursionError):  # whatever SymPy raises: it could not show that they are equal
            equal = False
        print(json.dumps(equal), flush=True)


if __name__ == "__main__":
    main()
