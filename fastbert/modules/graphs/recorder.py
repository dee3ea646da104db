"""Records work as a CUDA graph: one launch replays all of its kernels, on the same addresses."""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

WARM_UP = 3  # runs before a recording, which compile kernels and set up libraries

Result = TypeVar("Result")
Work = Callable[[], Result]


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
    """Records on one stream of the current device, because libraries have a workspace per stream.

    Tests replace it with a class that has these methods and needs no GPU.

    shares_memory: whether a recording may reuse memory that earlier recordings have freed. Then a
    replay overwrites what other recordings left in memory, except their results.
    """

    def __init__(self, *, shares_memory: bool = False) -> None:
        self.stream = torch.cuda.Stream()
        self.shares_memory = shares_memory
        self.last: torch.cuda.Stream | None = None
        self.begin_anew()

    def begin_anew(self) -> None:
        """Starts a new shared memory pool; the caller has dropped all recordings."""
        self.pools: list[Any] = []  # the last is the one that recordings share
        self.keeper: torch.cuda.CUDAGraph | None = None  # see `_begin_pool`

    def refusal(self) -> str:
        """The reason why nothing can be recorded or replayed now; "" if there is none."""
        if torch.cuda.is_current_stream_capturing():
            return "a recording of the caller's own"
        allocator = torch.cuda.get_allocator_backend()  # others do not report what a pool holds
        return (
            "" if allocator == "native" else f"{allocator}, an allocator that is not PyTorch's own"
        )

    def memory(self) -> int:
        """Bytes of device memory that the recordings hold, if they share memory."""
        segments = torch.cuda.memory_snapshot()
        mine = (one for one in segments if tuple(one["segment_pool_id"]) in self.pools)
        return sum(one["total_size"] for one in mine)

    def follow(self) -> None:
        """Makes the caller's stream wait for replays that were launched on another stream."""
        # compares handles, because making the stream's object takes microseconds
        number = torch._C._cuda_getCurrentRawStream(torch.cuda.current_device())
        if self.last is not None and self.last.cuda_stream == number:
            return
        present = torch.cuda.current_stream()
        if self.last is not None:
            present.wait_stream(self.last)
        self.last = present

    def warm_up(self, work: Work[Result]) -> Result:
        """Runs the work once, on the stream that recordings use, and returns its result."""
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
        """Records the work without running it and returns the replay; may raise RuntimeError."""
        if self.shares_memory and self.keeper is None:
            self._begin_pool()
        graph = torch.cuda.CUDAGraph()
        pool = self.pools[-1] if self.shares_memory else torch.cuda.graph_pool_handle()
        try:
            with _without_warning(), self._capture(graph, pool):
                result = work()
        except RuntimeError:
            self._end(pool)
            raise
        return Replay(graph, work, result)

    @contextlib.contextmanager
    def _capture(self, graph: torch.cuda.CUDAGraph, pool: Any) -> Iterator[None]:
        with (
            torch.cuda.stream(torch.cuda.current_stream()),  # restored even if capturing fails
            # thread_local, so that the thread that pins memory for the next batches can go on
            torch.cuda.graph(
                graph, pool=pool, stream=self.stream, capture_error_mode="thread_local"
            ),
        ):
            yield

    def _begin_pool(self) -> None:
        """Begins a shared memory pool, with a graph that keeps it alive.

        PyTorch frees a pool with the last of its graphs, and refuses to use it again.
        """
        pool, graph = torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph()
        with self._capture(graph, pool):
            torch.zeros(1, device=torch.device("cuda"))  # PyTorch warns about an empty graph
        self.pools.append(pool)
        self.keeper = graph

    def _end(self, pool: Any) -> None:
        """Ends a recording that CUDA has given up but PyTorch has not.

        PyTorch's allocator would otherwise keep all memory that streams share, and its generator
        would refuse to draw until another recording ends. Its allocator of pinned memory cannot be
        told, and refuses a second recording in the pool, so later recordings use a new pool.
        """
        try:
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        except RuntimeError:  # PyTorch has ended the recording itself
            return
        # the graph would release its pool, but it was not made
        torch._C._cuda_releasePool(torch.cuda.current_device(), pool)
        self.keeper = None
        with contextlib.suppress(RuntimeError):
            self._begin_pool()


@contextlib.contextmanager
def _without_warning() -> Iterator[None]:
    """Silences PyTorch's warning that the gradient nodes of parameters are of another stream.

    They are while an earlier output is alive, such as a loop's last loss. No harm is done, because
    a recording's gradients are returned or added up on its own stream: nothing waits for the other.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The AccumulateGrad node's stream does not match")
        yield
