// What the stand-in's files share: the state of streams, events and captures, and CUDA's rules.

#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <map>
#include <mutex>
#include <set>

#define EXPORT extern "C" __attribute__((visibility("default")))
#define API EXPORT cudaError_t

constexpr size_t MEMORY = size_t(139) << 30;  // bytes of the device's

// A capture, and the graph that comes of it. joined: the streams that take part; work: how much was
// launched on each; waited: how much of that another stream has waited for.
struct Graph {
  unsigned long long id;
  cudaStreamCaptureMode mode;
  void* origin;
  unsigned long thread;
  long nodes = 0;
  bool invalid = false;
  std::set<void*> joined;
  std::map<void*, long> work, waited;
};
struct Stream {
  Graph* capture = nullptr;
  int priority = 0;
};
struct Event {
  Graph* capture = nullptr;
  void* stream = nullptr;
  long at = 0;  // the stream's work when the event was recorded
};

// Held by each function that reads or changes what is below.
struct Locked {
  Locked();
  ~Locked();
};
extern Stream default_stream;
extern std::set<Graph*> capturing;
extern thread_local cudaStreamCaptureMode mode;  // as `cudaThreadExchangeStreamCaptureMode` sets it
extern thread_local cudaError_t last_error;
extern bool is_verbose;                                // STAND_IN_VERBOSE=1
extern long launches, escaped, replays, waits, bytes;  // see `stand_in_counts`

Stream* of(cudaStream_t stream);
unsigned long this_thread();

// Makes it the last error, and returns it.
cudaError_t fail(cudaError_t error, const char* what);

// The capture that a call which is unsafe in captures breaks, null if none: one of any thread's in
// the global mode, of this thread's in the thread's own.
Graph* broken_by_unsafe_calls();

// Ends the capture, if there is one, by what must not be called in it.
cudaError_t unsafe(Graph* capture, const char* what);

// Counts a launch, in the stream's capture if it has one.
cudaError_t launch(cudaStream_t stream);

template <typename T, typename V>
cudaError_t give(T* to, V value) {
  *to = T(value);
  return cudaSuccess;
}
