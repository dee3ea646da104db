"""Processes of their own, without the seconds that their imports take: forks of one that has done.

For what is killed, or runs beside another, or under another environment. Where it matters how
Python starts, or what Triton finds as it is imported, a process is subprocess's to start.
"""

import contextlib
import multiprocessing
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from typing import IO

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Each process of pytest starts one server, which imports these; what is missing is passed over.
IMPORTED = (
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.run",
    "torch.utils.tensorboard",
    "transformers.models.bert.modeling_bert",
    "sklearn.metrics",
    "fastbert.cli",
    "fastbert.embedding.shards",
    "fastbert.finetune.train",
    "fastbert.train.pretrain",
)
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(list(IMPORTED))


@contextlib.contextmanager
def started(work: Callable, *arguments, **environment: str) -> Iterator[tuple[BaseProcess, IO]]:
    """A process that does the work, and what it prints, errors too. It ends with the block.

    work: a function that can be imported
    """
    reads, writes = _SERVER.Pipe(duplex=False)
    process = _SERVER.Process(target=_do, args=(writes, environment, work, *arguments))
    with contextlib.chdir(ROOT):  # where the server finds fastbert, should this start it
        process.start()
    writes.close()
    with os.fdopen(os.dup(reads.fileno())) as said:
        reads.close()
        try:
            yield process, said
        finally:
            process.kill()
            process.join()


def run(work: Callable, *arguments, **environment: str) -> tuple[int, str]:
    """(exit status, what it printed) of a process that does the work; see `started`."""
    with started(work, *arguments, **environment) as (process, said):
        text = said.read()
        process.join()
    return process.exitcode, text


def _do(output, environment, work, *arguments):
    for descriptor, name in enumerate(("stdout", "stderr"), 1):
        os.dup2(output.fileno(), descriptor)
        # anew: the server's may be of a file, which can be sought in
        setattr(sys, name, open(descriptor, "w", buffering=1, closefd=False))  # noqa: SIM115
    output.close()
    os.environ.update(environment)
    work(*arguments)


def torchrun(restarts: int, work: Callable, *arguments) -> None:
    """Does the work in two processes, as torchrun starts them, and again after a failure.

    They are forks of this one, where the command torchrun starts Python for each.
    """
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        max_restarts=restarts,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="fork",
    )
    elastic_launch(config, work)(*arguments)
