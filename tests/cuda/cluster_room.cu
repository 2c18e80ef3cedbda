// How much room a cluster of eight blocks needs on a card that another process holds SMs of: backends.limits_of_ranks
// counts on it. Two processes, as ranks are, under MPS where there is a daemon.
//
//   cluster_room HELD...    each time 20 draws of so many SMs that the other process holds, wherever they lie, and as
//                           many of one SM of each pair (a TPC); prints "HELD pattern stuck", where `stuck` of the 20
//                           clusters found no room
#include <cuda_runtime.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

constexpr int kShared = 200 << 10, kMostSms = 256, kDraws = 20;  // so much that an SM has one block

struct Meeting {
  volatile int placed, released, asked, state;  // of the blocks; by the parent; of the child's steps
  unsigned char held[kMostSms];
};
enum State { kNothing, kReady, kHolding, kOver, kEnd };

#define CHECK(call)                                                                 \
  if (const cudaError_t error = (call); error != cudaSuccess) {                     \
    std::printf("%s: %s\n", #call, cudaGetErrorString(error)), std::fflush(stdout); \
    _exit(2);                                                                       \
  }

__device__ int sm_number() {
  int number;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(number));
  return number;
}

// A block on every SM; those that shall be held stay.
__global__ void hold(Meeting* meeting) {
  extern __shared__ char all_of_it[];
  if (threadIdx.x != 0) return;
  atomicAdd_system(const_cast<int*>(&meeting->placed), 1);
  while (meeting->placed < static_cast<int>(gridDim.x)) __nanosleep(100);
  if (!meeting->held[sm_number()]) return;
  const long long begin = clock64();
  while (meeting->released == 0 && clock64() - begin < 4000000000LL) __nanosleep(500);
}

__global__ void cluster() { extern __shared__ char all_of_it[]; }

Meeting* mapped(Meeting* meeting) {
  void* device = nullptr;
  CHECK(cudaHostRegister(meeting, sizeof(Meeting), cudaHostRegisterMapped));
  CHECK(cudaHostGetDevicePointer(&device, meeting, 0));
  return static_cast<Meeting*>(device);
}

int sm_count() {
  int count = 0;
  CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, 0));
  return count;
}

void holder(Meeting* meeting) {
  Meeting* const device = mapped(meeting);
  const int sms = sm_count();
  CHECK(cudaFuncSetAttribute(hold, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
  for (meeting->state = kReady; meeting->asked != kEnd;) {
    if (meeting->asked != kHolding) continue;
    meeting->asked = kNothing;
    hold<<<sms, 384, kShared>>>(device);
    while (meeting->placed < sms && cudaStreamQuery(nullptr) == cudaErrorNotReady) {
    }
    usleep(300);
    meeting->state = kHolding;
    CHECK(cudaDeviceSynchronize());
    meeting->state = kOver;
  }
  _exit(0);
}

void launch_cluster(cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(8), config.blockDim = dim3(384);
  config.dynamicSmemBytes = kShared, config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {8, 1, 1};
  config.attrs = &attribute, config.numAttrs = 1;
  CHECK(cudaLaunchKernelEx(&config, cluster));
}

int main(int count, char** arguments) {
  auto* meeting =
      static_cast<Meeting*>(mmap(nullptr, sizeof(Meeting), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  const pid_t child = fork();  // before either uses CUDA
  if (child == 0) holder(meeting);
  const int sms = sm_count();
  cudaStream_t stream;
  CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  CHECK(cudaFuncSetAttribute(cluster, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
  launch_cluster(stream);
  CHECK(cudaDeviceSynchronize());
  while (meeting->state != kReady && waitpid(child, nullptr, WNOHANG) == 0) {
  }
  std::mt19937 random(1);
  for (int argument = 1; argument < count; ++argument) {
    const int held = std::atoi(arguments[argument]);
    for (const bool in_pairs : {false, true}) {
      if (in_pairs && held > sms / 2) continue;
      int stuck = 0;
      for (int draw = 0; draw < kDraws; ++draw) {
        std::vector<int> places(in_pairs ? sms / 2 : sms);
        std::iota(places.begin(), places.end(), 0);
        std::shuffle(places.begin(), places.end(), random);
        std::memset(meeting->held, 0, kMostSms);
        for (int i = 0; i < held; ++i) meeting->held[in_pairs ? 2 * places[i] + random() % 2 : places[i]] = 1;
        meeting->placed = 0;
        meeting->released = 0;
        meeting->state = kNothing;
        meeting->asked = kHolding;
        while (meeting->state != kHolding && waitpid(child, nullptr, WNOHANG) == 0) {
        }
        launch_cluster(stream);
        const auto begin = std::chrono::steady_clock::now();
        bool done = false;
        while (!done && std::chrono::steady_clock::now() - begin < std::chrono::milliseconds(5)) {
          done = cudaStreamQuery(stream) == cudaSuccess;
        }
        stuck += !done;
        meeting->released = 1;
        CHECK(cudaStreamSynchronize(stream));
        while (meeting->state != kOver && waitpid(child, nullptr, WNOHANG) == 0) {
        }
      }
      std::printf("%d %s %d\n", held, in_pairs ? "pairs" : "anywhere", stuck), std::fflush(stdout);
    }
  }
  meeting->asked = kEnd;
  waitpid(child, nullptr, 0);
}
