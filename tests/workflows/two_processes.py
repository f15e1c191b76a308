"""Two processes of one run that stay, as `torchrun --nproc_per_node 2` starts them: importing the libraries for every
test anew would take longer than the tests."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

from tests.children import Outcome, _outcome


class TwoProcesses:
    """The processes, which run the same functions side by side."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._connections: list[Any] = []
        self._processes: list[Any] = []
        for rank in range(2):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, port, there), daemon=True)
            process.start()
            there.close()
            self._connections.append(here)
            self._processes.append(process)
        for connection in self._connections:
            connection.recv()  # it is ready: libraries imported

    def run(self, function: Callable[..., Any], *args: Any, seconds: float = 300) -> list[Outcome]:
        """Run a function of a module in both; how it ended in each."""
        for connection in self._connections:
            connection.send((function, args))
        outcomes = []
        for connection in self._connections:
            try:
                outcomes.append(connection.recv() if connection.poll(seconds) else Outcome("hung"))
            except EOFError:
                outcomes.append(Outcome("died"))
        return outcomes

    def stop(self) -> None:
        """End them."""
        for process in self._processes:
            process.kill()
            process.join()


def _serve(rank: int, port: int, connection: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "tests"}
    os.environ |= {"GROUP_RANK": "0", "OMP_NUM_THREADS": "1"}
    import workflows.grpo
    import workflows.lora  # noqa: F401

    connection.send("ready")
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            return
        connection.send(_outcome(function, args, 1 << 40, -1))
