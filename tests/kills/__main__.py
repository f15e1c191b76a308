"""`make soak`: kill the steps a hundred times and print what became of that.

python -m tests.kills --kills 100 --seed 7 --steps lora export
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.kills.engine import Bench, Tally
from tests.kills.server import Server
from tests.kills.steps import STEPS, make_steps


def main() -> int:
    """Kill, and print the tally.

    Returns:
        1 if anything was not as it should be, else 0.
    """
    parser = argparse.ArgumentParser(prog="python -m tests.kills", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="kills in all (100)")
    parser.add_argument("--seed", type=int, default=None, help="decides where they fall; by default another each time")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS, help="which steps to kill; by default all")
    chosen = parser.parse_args()
    seed = random.randrange(10**6) if chosen.seed is None else chosen.seed
    began = time.monotonic()
    work = Path(tempfile.mkdtemp(prefix="kills-"))
    print(f"{chosen.kills} kills, seed {seed}, in {work}", flush=True)
    tallies: dict[str, Tally] = {}
    steps = make_steps(work)
    with Server(work / "log.txt") as server:
        for number, name in enumerate(chosen.steps):
            share = (chosen.kills + number) // len(chosen.steps)
            tallies[name] = Bench(server, steps[name], work).kill(share, seed)
            for problem in tallies[name].problems:
                print(f"PROBLEM in {problem}", flush=True)
            print(f"{name}: {tallies[name].kills} kills", flush=True)
    print(table(tallies))
    problems = sum(len(tally.problems) for tally in tallies.values())
    short = sum(tally.kills for tally in tallies.values()) < chosen.kills
    print(f"seed {seed}, {time.monotonic() - began:.0f} s, {problems} problems" + (", too few kills" if short else ""))
    if problems:
        print(f"What the steps said is in {work}/log.txt; repeat with --seed {seed}")
        return 1
    shutil.rmtree(work)
    return int(short)


def table(tallies: dict[str, Tally]) -> str:
    """The tally as text, a line for each step."""
    lines = [("step", "kills", "during a save", "resumed", "ended", "identical")]
    counts = [(t.kills, t.in_save, t.resumed, t.ended, t.identical) for t in tallies.values()]
    rows = [*zip(tallies, counts, strict=True), ("all", tuple(map(sum, zip(*counts, strict=True))))]
    lines += [(name, *map(str, numbers)) for name, numbers in rows]
    return "\n".join(f"{line[0]:<10}" + "".join(f"{cell:>15}" for cell in line[1:]) for line in lines)


if __name__ == "__main__":
    sys.exit(main())
