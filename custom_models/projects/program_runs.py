"""Programs that a model wrote, run: does the JavaScript give what the Python gives?

Each program runs in a process of its own with limits of time and memory, Python without the environment's settings,
JavaScript in an empty context of Node.js (16 or newer) that has no files, no network and no `require`. That holds
mistakes in check; it is no prison for programs that are meant to do harm. Give it what your own model wrote, nothing
else.
"""

import json
import shutil
import subprocess
import sys
from typing import Any, Literal

from data_prep.programs import name_of

Language = Literal["python", "javascript"]
SECONDS = 5.0
"""What a program may take for all of its inputs, the start of its process included."""
_PYTHON = """
import json, sys
if sys.platform == "linux":
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29))
given = json.load(sys.stdin)
scope = {}
exec(given["program"], scope)
print(json.dumps([scope[given["name"]](*arguments) for arguments in given["inputs"]]))
"""
_JAVASCRIPT = """
const vm = require("vm");
const given = JSON.parse(require("fs").readFileSync(0, "utf8"));
const call = `JSON.stringify(${JSON.stringify(given.inputs)}.map((given) => ${given.name}(...given)))`;
const context = vm.createContext(Object.create(null), { codeGeneration: { strings: false, wasm: false } });
process.stdout.write(String(vm.runInContext(`${given.program}\\n;${call}`, context, { timeout: 2000 })));
"""


def find_node() -> str | None:
    """Node.js, if it is installed."""
    return shutil.which("node") or shutil.which("nodejs")


def results(program: str, name: str, inputs: list[list[Any]], language: Language) -> list[Any] | None:
    """What a program's function gives for each input; None if it is no program, breaks off or takes too long.

    Args:
        program: The text.
        name: Of its function.
        inputs: Arguments of each call.
        language: What it is written in. For JavaScript Node.js must be there.
    """
    if language == "python":
        command = [sys.executable, "-I", "-c", _PYTHON]
    else:
        command = [find_node() or "node", "--max-old-space-size=256", "-e", _JAVASCRIPT]
    given = json.dumps({"program": program, "name": name, "inputs": inputs})
    try:
        done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=SECONDS, check=True)
        found = json.loads(done.stdout)
    except (subprocess.SubprocessError, ValueError):  # ValueError: what it printed is no JSON
        return None
    return found if isinstance(found, list) else None


def do_the_same(python: str, javascript: str, inputs: list[list[Any]]) -> bool:
    """Whether both programs give equal results for all inputs.

    Raises:
        ValueError: If the Python program does not give any, so that there is nothing to compare with.
    """
    name = name_of(python)
    expected = results(python, name, inputs, "python")
    if expected is None:
        raise ValueError("the Python program does not run")
    # Equal as JSON: to Python true is 1, to JSON it is not.
    return json.dumps(results(javascript, name, inputs, "javascript")) == json.dumps(expected)
