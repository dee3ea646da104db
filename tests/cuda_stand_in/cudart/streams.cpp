// Streams, events, captures, graphs, and launches, which do nothing.

#include <cstdio>
#include <utility>

#include "rules.h"

API cudaStreamCreateWithPriority(cudaStream_t* s, unsigned, int p) {
  auto* n = new Stream;
  n->priority = p;
  *s = (cudaStream_t)n;
  return cudaSuccess;
}
API cudaStreamCreate(cudaStream_t* s) { return cudaStreamCreateWithPriority(s, 0, 0); }
API cudaStreamGetPriority(cudaStream_t s, int* p) { return give(p, of(s)->priority); }
API cudaStreamQuery(cudaStream_t s) {
  Locked _;
  if (auto e = unsafe(of(s)->capture, "cudaStreamQuery")) return e;
  return cudaSuccess;
}
API cudaStreamSynchronize(cudaStream_t s) {
  Locked _;
  waits++;
  if (auto e = unsafe(of(s)->capture, "cudaStreamSynchronize")) return e;
  if (s == nullptr)
    if (auto e = unsafe(broken_by_unsafe_calls(), "cudaStreamSynchronize of the default stream"))
      return e;
  return cudaSuccess;
}
API cudaDeviceSynchronize() {
  Locked _;
  waits++;
  if (auto e = unsafe(broken_by_unsafe_calls(), "cudaDeviceSynchronize")) return e;
  return cudaSuccess;
}
API cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) { return give(e, (cudaEvent_t) new Event); }
API cudaEventCreate(cudaEvent_t* e) { return cudaEventCreateWithFlags(e, 0); }
API cudaEventDestroy(cudaEvent_t e) {
  delete (Event*)e;
  return cudaSuccess;
}
API cudaEventElapsedTime(float* t, cudaEvent_t, cudaEvent_t) { return give(t, 1); }
API cudaEventQuery(cudaEvent_t e) {
  Locked _;
  auto* g = ((Event*)e)->capture;
  if (auto refusal = unsafe(capturing.count(g) ? g : nullptr, "cudaEventQuery of a captured event"))
    return refusal;
  return cudaSuccess;
}
API cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned) {
  Locked _;
  auto* event = (Event*)e;
  auto* stream = of(s);
  event->capture = stream->capture;
  event->stream = stream;
  event->at = stream->capture ? stream->capture->work[stream] : 0;
  return cudaSuccess;
}
API cudaEventRecord(cudaEvent_t e, cudaStream_t s) { return cudaEventRecordWithFlags(e, s, 0); }
API cudaEventSynchronize(cudaEvent_t e) {
  Locked _;
  waits++;
  auto* g = ((Event*)e)->capture;
  if (auto refusal = unsafe(capturing.count(g) ? g : nullptr, "cudaEventSynchronize in a capture"))
    return refusal;
  return cudaSuccess;
}
API cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned) {
  Locked _;
  auto* stream = of(s);
  auto* event = (Event*)e;
  if (event->capture && capturing.count(event->capture)) {
    auto* g = event->capture;
    if (stream->capture && stream->capture != g)
      return fail(cudaErrorStreamCaptureMerge, "two captures meet");
    if (!stream->capture) {
      if (stream == &default_stream) {
        g->invalid = true;
        return fail(cudaErrorStreamCaptureImplicit, "the default stream waits for a capture");
      }
      stream->capture = g;
      g->joined.insert(stream);
    }
    auto& seen = g->waited[event->stream];
    if (event->at > seen) seen = event->at;
  } else if (stream->capture && event->stream && !event->capture) {
    // work before the capture, on another stream: CUDA refuses to wait for it
    stream->capture->invalid = true;
    return fail(cudaErrorStreamCaptureIsolation, "a capture waits for work outside of it");
  }
  return cudaSuccess;
}
API cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t, void*, unsigned) {
  return launch(s);
}
API cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t f, void* d) {
  launch(s);
  if (!of(s)->capture) f(d);
  return cudaSuccess;
}
API cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode m) {
  Locked _;
  auto* stream = of(s);
  if (stream == &default_stream)
    return fail(cudaErrorStreamCaptureUnsupported, "a capture of the default stream");
  if (stream->capture) return fail(cudaErrorIllegalState, "a stream that is captured already");
  static unsigned long long id = 1;
  auto* g = new Graph{id++, m, stream, this_thread()};
  g->joined.insert(stream);
  stream->capture = g;
  capturing.insert(g);
  return cudaSuccess;
}
API cudaStreamEndCapture(cudaStream_t s, cudaGraph_t* out) {
  Locked _;
  auto* stream = of(s);
  auto* g = stream->capture;
  if (!g) return fail(cudaErrorIllegalState, "the end of no capture");
  if (g->mode != cudaStreamCaptureModeRelaxed && g->thread != this_thread())
    return fail(cudaErrorStreamCaptureWrongThread, "the end of another thread's capture");
  bool unjoined = false;
  for (auto* one : g->joined) {
    ((Stream*)one)->capture = nullptr;
    if (one != g->origin && g->work[one] > g->waited[one]) unjoined = true;
  }
  capturing.erase(g);
  *out = nullptr;
  if (g->invalid) return fail(cudaErrorStreamCaptureInvalidated, "the end of an invalid capture");
  if (unjoined) return fail(cudaErrorStreamCaptureUnjoined, "a stream that was not joined");
  *out = (cudaGraph_t)g;
  if (is_verbose) fprintf(stderr, "stand-in: captured %ld launches\n", g->nodes);
  return cudaSuccess;
}
API cudaStreamIsCapturing(cudaStream_t s, cudaStreamCaptureStatus* v) {
  Locked _;
  auto* g = of(s)->capture;
  *v = !g           ? cudaStreamCaptureStatusNone
       : g->invalid ? cudaStreamCaptureStatusInvalidated
                    : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}
API cudaStreamGetCaptureInfo(cudaStream_t s, cudaStreamCaptureStatus* v, unsigned long long* id,
                             cudaGraph_t* graph, const cudaGraphNode_t** deps,
                             const cudaGraphEdgeData** edges, size_t* n) {
  Locked _;
  cudaStreamIsCapturing(s, v);
  auto* g = of(s)->capture;
  if (id) *id = g ? g->id : 0;
  if (graph) *graph = (cudaGraph_t)g;
  if (deps) *deps = nullptr;
  if (edges) *edges = nullptr;
  if (n) *n = 0;
  return cudaSuccess;
}
API cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* m) {
  std::swap(*m, mode);
  return cudaSuccess;
}
API cudaGraphGetNodes(cudaGraph_t g, cudaGraphNode_t*, size_t* n) {
  return give(n, ((Graph*)g)->nodes);
}
API cudaGraphNodeGetDependencies(cudaGraphNode_t, cudaGraphNode_t*, cudaGraphEdgeData*, size_t* n) {
  return give(n, 0);
}
API cudaGraphInstantiateWithFlags(cudaGraphExec_t* e, cudaGraph_t g, unsigned long long) {
  return give(e, (cudaGraphExec_t)g);
}
API cudaGraphLaunch(cudaGraphExec_t, cudaStream_t s) {
  Locked _;
  replays++;
  return launch(s);
}
API cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t s) { return launch(s); }
API cudaLaunchCooperativeKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t s) {
  return launch(s);
}
API cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void*, void**) {
  return launch(c->stream);
}
API __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t s) {
  return launch(s);
}
