"""Work recorded as a CUDA graph: one launch replays all of its kernels, on the same addresses."""

import dataclasses
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

WARM_UP = 3  # runs before the recording, in which kernels are compiled and libraries set up

Result = TypeVar("Result")
Work = Callable[[], Result]


class Recorder(Protocol):
    def warm_up(self, work: Work[Result]) -> Result:
        """Does the work, as it would be recorded."""

    def record(self, work: Work[Result]) -> Work[Result]:
        """What does the work again; this call does none. Raises RuntimeError where it cannot."""

    def follow(self) -> None:
        """Lets what the caller launches next wait for the replays of another stream."""

    def is_inside(self) -> bool:
        """Whether the caller is making a recording, of this recorder or of another."""

    def memory(self) -> int:
        """Bytes that recordings keep of the device's memory, where they share it."""

    def begin_anew(self) -> None:
        """Gives up the memory that recordings share; the caller has dropped all of them."""


@dataclasses.dataclass(frozen=True, eq=False)
class Replay(Generic[Result]):
    """A recorded graph. Its kernels read and write the addresses that the work's tensors had.

    So it keeps the work alive, with the models, batches and optimizers that the work refers to: a
    graph that outlived them would read freed memory.
    """

    graph: Any
    work: Work[Result]
    result: Result

    def __call__(self) -> Result:
        self.graph.replay()
        return self.result


class CudaGraphs:
    """Recordings on one stream of the present device, as libraries have their workspaces by stream.

    shares_memory: whether a recording may use the memory of those before it that theirs no longer
    use. Then a replay spoils what the others left behind, but for their results.
    """

    def __init__(self, *, shares_memory: bool = False) -> None:
        self.stream = torch.cuda.Stream()
        self.shares_memory = shares_memory
        self.last: torch.cuda.Stream | None = None
        self.begin_anew()

    def begin_anew(self) -> None:
        self.pool = torch.cuda.graph_pool_handle() if self.shares_memory else None

    def is_inside(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def memory(self) -> int:
        segments = torch.cuda.memory_snapshot()
        mine = (one for one in segments if tuple(one["segment_pool_id"]) == self.pool)
        return sum(one["total_size"] for one in mine)

    def follow(self) -> None:
        present = torch.cuda.current_stream()
        if self.last is not None and self.last != present:
            present.wait_stream(self.last)
        self.last = present

    def warm_up(self, work: Work[Result]) -> Result:
        present = torch.cuda.current_stream()
        self.stream.wait_stream(present)
        with torch.cuda.stream(self.stream):
            result = work()
        present.wait_stream(self.stream)
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                tensor.record_stream(present)
        return result

    def record(self, work: Work[Result]) -> Work[Result]:
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.stream(torch.cuda.current_stream()),  # a failed capture does not restore it
            # the thread that pins the next batches' memory may go on meanwhile
            torch.cuda.graph(
                graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
            ),
        ):
            result = work()
        return Replay(graph, work, result)
