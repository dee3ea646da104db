"""Records work as a CUDA graph: one launch replays all of its kernels, on the same addresses."""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

WARM_UP = 3  # runs before a recording, which compile kernels and set up libraries

Result = TypeVar("Result")
Work = Callable[[], Result]


class Recorder(Protocol):
    """The interface of recorders; tests have one that needs no GPU."""

    def warm_up(self, work: Work[Result]) -> Result:
        """Does the work once, on the stream that recordings use, and returns its result."""

    def record(self, work: Work[Result]) -> Work[Result]:
        """Records the work without doing it; returns a replay. Raises RuntimeError on failure."""

    def follow(self) -> None:
        """Makes the caller's stream wait for replays that were launched on another stream."""

    def refusal(self) -> str:
        """Why nothing can be recorded or replayed now, "" if it can."""

    def memory(self) -> int:
        """Bytes of device memory that the recordings hold, if they share memory."""

    def begin_anew(self) -> None:
        """Starts a new shared memory pool; the caller has dropped all recordings."""


@dataclasses.dataclass(frozen=True, eq=False)
class Replay(Generic[Result]):
    """A recorded graph, whose kernels read and write the addresses of the work's tensors.

    It keeps the work alive, with the models, batches and optimizers that the work refers to: a
    graph that outlived them would read freed memory.
    """

    graph: Any
    work: Work[Result]
    result: Result

    def __call__(self) -> Result:
        self.graph.replay()
        return self.result


class CudaGraphs:
    """Recordings on one stream of the current device; libraries have one workspace per stream.

    shares_memory: whether a recording may reuse memory that earlier recordings have freed. Then a
    replay overwrites what other recordings left in memory, except their results.
    """

    def __init__(self, *, shares_memory: bool = False) -> None:
        self.stream = torch.cuda.Stream()
        self.shares_memory = shares_memory
        self.last: torch.cuda.Stream | None = None
        self.begin_anew()

    def begin_anew(self) -> None:
        self.pools = [torch.cuda.graph_pool_handle()]  # the last is the one that recordings share

    def refusal(self) -> str:
        if torch.cuda.is_current_stream_capturing():
            return "a recording of the caller's own"
        allocator = torch.cuda.get_allocator_backend()  # another does not tell what a pool holds
        return (
            "" if allocator == "native" else f"{allocator}, an allocator that is not PyTorch's own"
        )

    def memory(self) -> int:
        segments = torch.cuda.memory_snapshot()
        mine = (one for one in segments if tuple(one["segment_pool_id"]) in self.pools)
        return sum(one["total_size"] for one in mine)

    def follow(self) -> None:
        present = torch.cuda.current_stream()
        if self.last is not None and self.last != present:
            present.wait_stream(self.last)
        self.last = present

    def warm_up(self, work: Work[Result]) -> Result:
        present = torch.cuda.current_stream()
        self.stream.wait_stream(present)
        with torch.cuda.stream(self.stream), _without_warning():
            result = work()
        present.wait_stream(self.stream)
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                tensor.record_stream(present)
        return result

    def record(self, work: Work[Result]) -> Work[Result]:
        graph = torch.cuda.CUDAGraph()
        pool = self.pools[-1] if self.shares_memory else torch.cuda.graph_pool_handle()
        try:
            with (
                _without_warning(),
                torch.cuda.stream(torch.cuda.current_stream()),  # restored even if this fails
                # thread_local, so that the thread that pins memory for the next batches may go on
                torch.cuda.graph(
                    graph, pool=pool, stream=self.stream, capture_error_mode="thread_local"
                ),
            ):
                result = work()
        except RuntimeError:
            self._end(pool)
            raise
        return Replay(graph, work, result)

    def _end(self, pool: Any) -> None:
        """Ends a recording that CUDA has given up but PyTorch has not.

        Its allocator would keep all memory that streams share, and its generator refuse to draw
        outside of a recording; the end of another recording ends that too. Its allocator of pinned
        memory cannot be told, and refuses a second recording in the pool: later ones have another.
        """
        device = torch.cuda.current_device()
        try:
            torch._C._cuda_endAllocateToPool(device, pool)
        except RuntimeError:  # PyTorch has ended the recording itself
            return
        torch._C._cuda_releasePool(device, pool)  # as the graph that was not made would
        self.pools.append(torch.cuda.graph_pool_handle())
        present = torch.cuda.stream(torch.cuda.current_stream())
        other = torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self.stream)
        with contextlib.suppress(RuntimeError), present, other:
            torch.zeros(1, device=torch.device("cuda"))  # as PyTorch warns of an empty one


@contextlib.contextmanager
def _without_warning() -> Iterator[None]:
    """Without PyTorch's warning that parameters have gradient nodes of another stream.

    They have where an output of before is still alive, as a loop's last loss is. Nothing waits for
    that stream, as a recording's gradients are returned, or added up on its own stream.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The AccumulateGrad node's stream does not match")
        yield
