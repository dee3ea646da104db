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
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from typing import IO
from unittest import mock

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Each process of pytest starts one server, which imports these; what is missing is passed over.
IMPORTED = (
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.run",
    "torch.utils.tensorboard",
    "transformers.models.bert.modeling_bert",
    "transformers.trainer",
    "sklearn.metrics",
    "fastbert.cli",
    "fastbert.embedding.shards",
    "fastbert.finetune.train",
    "fastbert.train.pretrain",
)
OFFLINE = {"HF_HUB_OFFLINE": "1"}  # the hub's library reads it as it is imported
_CONTEXT = multiprocessing.get_context("forkserver")
_SERVER = forkserver.ForkServer()  # another than that of fastbert's own processes
_SERVER.set_forkserver_preload(list(IMPORTED))


@contextlib.contextmanager
def started(work: Callable, *arguments, **environment: str) -> Iterator[tuple[BaseProcess, IO]]:
    """A process that does the work, and what it prints, errors too. It ends with the block.

    work: a function that can be imported
    """
    reads, writes = _CONTEXT.Pipe(duplex=False)
    environment = os.environ | OFFLINE | environment
    process = _CONTEXT.Process(target=_do, args=(writes, environment, work, *arguments))
    with (
        mock.patch.object(forkserver, "connect_to_new_process", _SERVER.connect_to_new_process),
        mock.patch.dict(os.environ, OFFLINE),
        contextlib.chdir(ROOT),  # where the server, which this may start, finds fastbert
    ):
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
    os.environ.clear()
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
