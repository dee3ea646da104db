#include "rules.h"

#include <pthread.h>

#include <cstdio>
#include <cstdlib>

static std::recursive_mutex lock;
Locked::Locked() { lock.lock(); }
Locked::~Locked() { lock.unlock(); }

Stream default_stream;
std::set<Graph*> capturing;
thread_local cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
thread_local cudaError_t last_error = cudaSuccess;
bool is_verbose = getenv("STAND_IN_VERBOSE");
long launches, escaped, replays, waits, bytes;

// Launches, those of them beside a capture of the same thread, replays, waits of the host, and
// bytes of device memory.
EXPORT void stand_in_counts(long* counts) {
  Locked _;
  for (long one : {launches, escaped, replays, waits, bytes}) *counts++ = one;
}

Stream* of(cudaStream_t stream) {
  bool is_default =
      stream == nullptr || stream == cudaStreamLegacy || stream == cudaStreamPerThread;
  return is_default ? &default_stream : (Stream*)stream;
}

unsigned long this_thread() { return (unsigned long)pthread_self(); }

cudaError_t fail(cudaError_t error, const char* what) {
  if (is_verbose) fprintf(stderr, "stand-in: %s -> %d\n", what, int(error));
  return last_error = error;
}

Graph* broken_by_unsafe_calls() {
  if (mode == cudaStreamCaptureModeRelaxed) return nullptr;
  for (auto* graph : capturing) {
    bool is_global = graph->mode == cudaStreamCaptureModeGlobal;
    if (is_global && mode == cudaStreamCaptureModeGlobal) return graph;
    if (graph->mode != cudaStreamCaptureModeRelaxed && graph->thread == this_thread()) return graph;
  }
  return nullptr;
}

cudaError_t unsafe(Graph* capture, const char* what) {
  if (!capture) return cudaSuccess;
  capture->invalid = true;
  return fail(cudaErrorStreamCaptureUnsupported, what);
}

cudaError_t launch(cudaStream_t handle) {
  Locked _;
  auto* stream = of(handle);
  if (stream->capture) {
    stream->capture->nodes++;
    stream->capture->work[stream]++;
    return cudaSuccess;
  }
  launches++;
  for (auto* graph : capturing)
    if (graph->thread == this_thread()) {
      escaped++;
      if (is_verbose) fprintf(stderr, "stand-in: a launch beside this thread's capture\n");
    }
  return cudaSuccess;
}
EXPORT void stand_in_launch(void* stream) { launch((cudaStream_t)stream); }
