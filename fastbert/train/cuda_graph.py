"""Work recorded as a CUDA graph: one launch replays all of its kernels, on the same addresses."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

WARM_UP = 3  # runs before the recording, in which kernels are compiled and libraries set up

Work = Callable[[], Tensor]


class Recorder(Protocol):
    def warm_up(self, work: Work) -> Tensor:
        """Does the work, as it would be recorded."""

    def record(self, work: Work) -> Work:
        """What does the work again; this call does none. Raises RuntimeError where it cannot."""


@dataclasses.dataclass(frozen=True, eq=False)
class Replay:
    """A recorded graph. Its kernels read and write the addresses that the work's tensors had.

    So it keeps the work alive, with the models, batches and optimizers that the work refers to: a
    graph that outlived them would read freed memory.
    """

    graph: Any
    work: Work
    result: Tensor

    def __call__(self) -> Tensor:
        self.graph.replay()
        return self.result


class CudaGraphs:
    """Both on one stream of its own, as libraries have their workspaces by stream."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()

    def warm_up(self, work: Work) -> Tensor:
        present = torch.cuda.current_stream()
        self.stream.wait_stream(present)
        with torch.cuda.stream(self.stream):
            result = work()
        present.wait_stream(self.stream)
        result.record_stream(present)
        return result

    def record(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.stream(torch.cuda.current_stream()),  # a failed capture does not restore it
            # the thread that pins the next batches' memory may go on meanwhile
            torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"),
        ):
            result = work()
        return Replay(graph, work, result)
