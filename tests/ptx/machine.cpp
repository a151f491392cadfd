// A machine that executes PTX: see README.md for what it checks. Written from NVIDIA's PTX ISA manual.
//
// program.py turns a kernel into a program: instructions with a handler, a guard and operands. An operand is the place of a register, 32
// lanes side by side, in the frame of the warp, or, where its highest bit is set, of a constant. Values of up to 32 bits take 32 bits a
// lane, wider ones 64; a predicate is a mask of 32 lanes. Handlers work on all lanes and keep the results of those in the mask.
//
// Every warp has a vector clock, which barriers join; an epoch is an interval of one warp between two of its barriers. Each byte of memory
// knows the epoch of its last write and those of the reads after it, so an access knows whether it is ordered after them. Blocks are never
// ordered.

#include <algorithm>
#include <bit>
#include <cfenv>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <vector>

namespace {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;

constexpr int kLanes = 32;
constexpr u32 kAll = ~0u;
constexpr int kNever = std::numeric_limits<int>::max();

// Windows of the generic address space, far from every address of this process (those have 47 bits).
constexpr u64 kSharedWindow = u64(1) << 50, kLocalWindow = u64(1) << 51, kParamWindow = u64(1) << 52, kWindow = u64(1) << 40;
// The first kilobyte of shared memory belongs to the system, as on sm_80 and later: a pointer of 0 is no shared variable.
constexpr u64 kSharedBase = 1024;

#define EACH_LANE(m) for (u32 rest_ = (m), l = 0; rest_ && (l = u32(std::countr_zero(rest_)), true); rest_ &= rest_ - 1)

// ---- numbers -----------------------------------------------------------------------------------------------------------------------

template <class To, class From> To bits(From x) { return std::bit_cast<To>(x); }

// Nearest even is 0, so that 0 is also the flags of an instruction without any.
constexpr s64 kRn = 0, kRz = 1, kRm = 2, kRp = 3, kRna = 4, kRounding = 7;
constexpr s64 kInteger = 8, kFtz = 16, kSat = 32, kRelu = 64, kNaN = 128, kSatFinite = 256, kXorSign = 512;

// Hardware rounds as `flags` say while this lives.
struct RoundingScope {
  explicit RoundingScope(s64 flags) {
    constexpr int kModes[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD, FE_TONEAREST, 0, 0, 0};
    std::fesetround(kModes[flags & kRounding]);
  }
  ~RoundingScope() { std::fesetround(FE_TONEAREST); }
};

struct f16 { u16 raw; };
struct bf16 { u16 raw; };
// Two numbers in one register, the first in the lower half.
template <class T> struct Pair {};

// `x` rounded to float so that a second rounding, to half as many bits or fewer, gives what one rounding would: inexact results are odd.
inline float odd_float(double x) {
  const float f = float(x);
  if (double(f) == x || x != x || std::isinf(f) || (bits<u32>(f) & 1))
    return std::isinf(f) && !std::isinf(x) ? std::copysign(3.4028235e38f, f) : f;
  return std::nextafterf(f, x > double(f) ? INFINITY : -INFINITY);
}
inline double odd_fma(double a, double b, double c) {
  const double p = a * b, s = p + c;  // halves: the product is exact
  if (!std::isfinite(s)) return s;
  const double t = s - p, e = (p - (s - t)) + (c - t);
  return e == 0 || (bits<u64>(s) & 1) ? s : std::nextafter(s, e > 0 ? INFINITY : -INFINITY);
}
inline float wide(f16 x) { return float(bits<_Float16>(x.raw)); }
inline float wide(bf16 x) { return bits<float>(u32(x.raw) << 16); }
inline float wide(float x) { return x; }
inline double wide(double x) { return x; }
inline u16 narrow_f16(float x) { return x != x ? 0x7fff : bits<u16>(_Float16(x)); }
inline u16 narrow_bf16(float x) {
  const u32 b = bits<u32>(x);
  return x != x ? 0x7fff : u16((b + 0x7fff + (b >> 16 & 1)) >> 16);
}

// How a type lies in its slot, and what its arithmetic is done in.
template <class T> struct Number {
  using Slot = std::conditional_t<sizeof(T) == 8, u64, u32>;
  using Value = T;
  static T get(Slot s) { return T(s); }
  static Slot put(T x) { return Slot(std::make_unsigned_t<T>(x)); }
};
template <> struct Number<float> {
  using Slot = u32;
  using Value = float;
  static float get(u32 s) { return bits<float>(s); }
  static u32 put(float x) { return x == x ? bits<u32>(x) : 0x7fffffffu; }
  static float flush(float x) { return (bits<u32>(x) & 0x7f800000u) ? x : bits<float>(bits<u32>(x) & 0x80000000u); }
};
template <> struct Number<double> {
  using Slot = u64;
  using Value = double;
  static double get(u64 s) { return bits<double>(s); }
  static u64 put(double x) { return bits<u64>(x); }
  static double flush(double x) { return x; }
};
template <> struct Number<f16> {
  using Slot = u32;
  using Value = double;
  static double get(u32 s) { return wide(f16{u16(s)}); }
  static u32 put(double x) { return narrow_f16(odd_float(x)); }
  static double flush(double x) { return std::abs(x) < 0x1p-14 ? std::copysign(0.0, x) : x; }
};
template <> struct Number<bf16> {
  using Slot = u32;
  using Value = double;
  static double get(u32 s) { return wide(bf16{u16(s)}); }
  static u32 put(double x) { return narrow_bf16(odd_float(x)); }
  static double flush(double x) { return x; }
};
template <class T> using Slot = typename Number<T>::Slot;
template <class T> using Value = typename Number<T>::Value;
template <class T>
constexpr bool is_float = std::is_same_v<T, float> || std::is_same_v<T, double> || std::is_same_v<T, f16> || std::is_same_v<T, bf16>;

struct Format {
  int precision, least;  // bits of a number, the first one included; its smallest exponent
  double largest;
};
constexpr Format kTf32{11, -126, 0x1.ffcp127};
template <class T> constexpr Format kHalf{11, -14, 65504.0};
template <> inline constexpr Format kHalf<bf16>{8, -126, 0x1.fep127};

// `x` in a format: one rounding, as `flags` say.
double round_to(double x, const Format& format, s64 flags) {
  const double largest = format.largest;
  if (x == 0 || !std::isfinite(x)) return (flags & kSatFinite) && std::isinf(x) ? std::copysign(largest, x) : x;
  const double quantum = std::ldexp(1.0, std::max(std::ilogb(x), format.least) - format.precision + 1), y = x / quantum;
  double r;
  switch (flags & kRounding) {
    case kRz: r = std::trunc(y); break;
    case kRm: r = std::floor(y); break;
    case kRp: r = std::ceil(y); break;
    case kRna: r = std::round(y); break;
    default: r = std::nearbyint(y);
  }
  r *= quantum;
  if (std::abs(r) <= largest) return r == 0 ? std::copysign(0.0, x) : r;
  const s64 mode = flags & kRounding;
  const bool stays = (flags & kSatFinite) || mode == kRz || (mode == kRm && x > 0) || (mode == kRp && x < 0);
  return stays ? std::copysign(largest, x) : std::copysign(INFINITY, x);
}

// ---- the program -------------------------------------------------------------------------------------------------------------------

struct Warp;
struct Instruction;
using Handler = void (*)(Warp&, const Instruction&, u32);

enum Control : int { kPlain, kBranch, kTable, kExit, kWarpSync, kAligned, kBarrier, kTrap };

struct Instruction {
  Handler run;
  int control, guard;
  u32 negate;
  const u32* x;   // operands
  s64 a, b;       // offset of an address, immediate, target; flags
};

struct Program {
  std::vector<Instruction> code;
  std::vector<u32> operands;
  std::vector<char> constants;
  std::vector<int> specials;  // pairs: which special register, its place in the frame
  std::vector<int> targets;   // of brx.idx
  u64 frame, predicates, local;
};

struct Finding {
  std::string kind, detail;
  int lane;
};

[[noreturn]] void fail(const char* kind, int lane, const char* format, ...) __attribute__((format(printf, 3, 4)));
void fail(const char* kind, int lane, const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  throw Finding{kind, text, lane};
}

// ---- memory ------------------------------------------------------------------------------------------------------------------------

enum Space : int { kGlobal, kShared, kLocal, kConst, kParam, kGeneric };
enum Access : int { kRead = 1, kWrite = 2, kAtomic = 4, kStrong = 8 };
enum ByteState : u8 { kInitialised = 1, kWritable = 2, kMember = 4 };

struct Traffic {
  u64 read, written, sectors_read, sectors_written, ideal_read, ideal_written, requests_read, requests_written;
  u64 unique_read, unique_written, unique_sectors_read, unique_sectors_written;
};

// States of a byte: an epoch; or, with the highest bit, a set of epochs. 0: untouched. 1: touched, and of no account. Last: read by several
// blocks.
constexpr u32 kTouched = 1, kFirstEpoch = 2, kSet = 0x80000000u, kManyBlocks = ~0u;

struct Buffer {
  u64 base, size;
  u8* state;  // ByteState of each byte
  u64 name;   // its number on the Python side
  u32 *writes, *reads, *atomics;
  u64 first, last;  // touched, as offsets
  Traffic traffic;
};

template <class T> T* zeros(u64 n) {
  T* p = static_cast<T*>(std::calloc(std::max<u64>(n, 1), sizeof(T)));
  if (!p) throw std::bad_alloc();
  return p;
}

struct Copy {  // an asynchronous copy on its way
  int lane;
  u64 to, from;
  int bytes, present;
  u64 group;
};

struct Barrier {
  u32 arrived[kLanes] = {}, waiting[kLanes] = {};
  u32 clock[kLanes] = {};
  u64 count = 0;
  u32 members = 0, yes = 0;  // of bar.red
  bool used = false;
};

struct Counters {
  u64 shared_requests, shared_transactions, shared_ideal, redundant_writes, shared_read, shared_written, local_read, local_written,
      barriers, steps, clock;
};

struct Block;

struct Warp {
  Block* block;
  const Program* program;
  char* bases[2];  // frame, constants
  u32* predicates;
  int index;
  u32 exists, live, active, parked, barred;
  int pc, limit;
  int lane_pc[kLanes];
  u32 carry;
  u32 clock[kLanes];
  u32 epoch;
  std::vector<u8> local, local_state;
  std::vector<Copy> copies;
  u64 groups[kLanes];
  // The last answers, which are mostly the next ones too.
  u32 ordered_id, from_state, to_state;
  Buffer* last_buffer;

  template <class T> const T* in(u32 x) const { return reinterpret_cast<const T*>(bases[x >> 31] + (x & 0x7fffffffu)); }
  template <class T> T* out(u32 x) { return reinterpret_cast<T*>(bases[0] + x); }
  u32 predicate(u32 x) const { return predicates[x]; }
  void set_predicate(u32 x, u32 value, u32 m) { predicates[x] = (predicates[x] & ~m) | (value & m); }

  bool runnable() const { return (active | (live & ~parked & ~barred)) != 0; }
  bool regroup();
  void run(u64 burst);
  void sync_lanes(const Instruction& i, u32 m);
  void arrive(const Instruction& i, u32 m);
  void leave(u32 m);
  void tick();
  bool ordered(u32 id, Space space);
  bool all_ordered(u32 state, Space space);
  u32 with_reader(u32 state, Space space);
};

struct Launch {
  const Program* program;
  std::vector<Buffer> buffers;  // by address
  u32 grid[3], block[3];
  const u8* parameters;
  u64 parameter_bytes, shared_bytes, seed, step_limit;
  u64 *lanes, *warps;  // executed, of each instruction
  u64 dynamic_shared;
  int running, stuck_warp;  // the warp that runs; the one that waits for ever
  Counters counters;
  u32 next_epoch = kFirstEpoch, next_set = kSet;
  std::mt19937_64 random;

  Buffer* find(u64 address) {
    auto after = std::upper_bound(buffers.begin(), buffers.end(), address, [](u64 a, const Buffer& b) { return a < b.base; });
    if (after == buffers.begin()) return nullptr;
    Buffer* b = &*(after - 1);
    return address - b->base < b->size ? b : nullptr;
  }
};

struct Block {
  Launch* launch;
  u32 id[3];
  u64 number;
  std::vector<Warp> warps;
  std::vector<u8> shared, pending;  // pending: bytes that an asynchronous copy is yet to write
  std::vector<u32> writes, reads, atomics;
  u64 pending_bytes;
  Barrier barriers[16];
  struct Epoch { u32 warp, clock; };
  u32 first_epoch, first_set;
  std::vector<Epoch> epochs;
  std::vector<std::vector<u32>> sets;
  std::unordered_map<u64, u32> transitions;

  void start(u64 index);
  void run();
  void complete(int id);
  bool try_complete(int id);
  [[noreturn]] void stuck();
};

// ---- who is ordered after whom -----------------------------------------------------------------------------------------------------

void Warp::tick() {
  ++clock[index];
  epoch = block->launch->next_epoch++;
  block->epochs.push_back({u32(index), clock[index]});
  from_state = to_state = 0;
}

inline bool Warp::ordered(u32 id, Space space) {
  if (id <= kTouched || id == ordered_id) return true;
  if (id < block->first_epoch) return space == kShared;  // of an earlier block, which had a shared memory of its own
  const Block::Epoch& e = block->epochs[id - block->first_epoch];
  if (clock[e.warp] < e.clock) return false;
  ordered_id = id;
  return true;
}

bool Warp::all_ordered(u32 state, Space space) {
  if (!(state & kSet)) return ordered(state, space);
  if (state == kManyBlocks) return false;
  if (state < block->first_set) return space == kShared;
  for (u32 id : block->sets[state - block->first_set])
    if (!ordered(id, space)) return false;
  return true;
}

// The state of a byte in `state` after this warp joined those that read it.
u32 Warp::with_reader(u32 state, Space space) {
  if (state <= kTouched || state == epoch) return epoch;
  if (state == kManyBlocks) return state;
  const bool set = state & kSet;
  if (set ? state < block->first_set : state < block->first_epoch) return space == kShared ? epoch : kManyBlocks;
  if (state == from_state) return to_state;
  u32& to = block->transitions[u64(state) << 32 | epoch];
  if (!to) {
    std::vector<u32> members;
    if (set) {
      for (u32 id : block->sets[state - block->first_set])
        if (id == epoch || !ordered(id, space)) members.push_back(id);
    } else if (!ordered(state, space)) {
      members.push_back(state);
    }
    if (std::find(members.begin(), members.end(), epoch) == members.end()) members.push_back(epoch);
    if (members.size() == 1) to = epoch;
    else if (set && members.size() == block->sets[state - block->first_set].size() && members == block->sets[state - block->first_set])
      to = state;
    else block->sets.push_back(members), to = block->launch->next_set++;
  }
  from_state = state, to_state = to;
  return to;
}

inline bool uniform(const u32* p, u64 n) {
  if (n == 4) {  // a word, the commonest
    u64 low, high;
    std::memcpy(&low, p, 8), std::memcpy(&high, p + 2, 8);
    return low == high && u32(low) == u32(low >> 32);
  }
  u32 difference = 0;
  for (u64 j = 1; j < n; ++j) difference |= p[j] ^ p[0];
  return !difference;
}

// The bytes of one access that lie together, in a memory that other warps see too.
struct Span {
  u32 *writes, *reads;
  u32* atomics;  // may be null
  u64 n;
};
constexpr u64 kFine = ~u64(0);

template <class F> inline u64 first_failing(const u32* p, u64 n, F holds) {
  if (uniform(p, n)) return holds(p[0]) ? kFine : 0;
  u32 good = p[0] ^ 1;
  for (u64 j = 0; j < n; ++j)
    if (p[j] != good) {
      if (!holds(p[j])) return j;
      good = p[j];
    }
  return kFine;
}

inline void join_readers(Warp& w, u32* p, u64 n, Space space) {
  if (uniform(p, n)) {
    if (p[0] != w.epoch) std::fill_n(p, n, w.with_reader(p[0], space));
  } else {
    for (u64 j = 0; j < n; ++j) p[j] = w.with_reader(p[j], space);
  }
}

// The first byte whose access races with an earlier one, or kFine.
u64 find_race(Warp& w, const Span& s, int mode, Space space) {
  u64 at = first_failing(s.writes, s.n, [&](u32 id) { return w.ordered(id, space); });
  if (at == kFine && mode != kRead && !(mode == (kRead | kStrong)))
    at = first_failing(s.reads, s.n, [&](u32 state) { return w.all_ordered(state, space); });
  if (at == kFine && s.atomics && !(mode & (kAtomic | kStrong)))
    at = first_failing(s.atomics, s.n, [&](u32 state) { return w.all_ordered(state, space); });
  return at;
}

void record(Warp& w, const Span& s, int mode, Space space) {
  auto touch = [&](u32* p) {
    for (u64 j = 0; j < s.n; ++j) p[j] = p[j] ? p[j] : kTouched;
  };
  if (mode == kRead) {
    join_readers(w, s.reads, s.n, space);
  } else if (mode == kWrite) {
    std::fill_n(s.writes, s.n, w.epoch);
    for (u64 j = 0; j < s.n; ++j) s.reads[j] = s.reads[j] != 0;  // whoever is ordered after this write is ordered after those reads
  } else {
    if (mode & (kRead | kAtomic)) touch(s.reads);
    if (mode & (kWrite | kAtomic)) {
      join_readers(w, s.atomics, s.n, space);
      // To every warp of the block the byte is now written, and by nobody.
      if (space == kShared) std::fill_n(s.writes, s.n, w.block->first_epoch);
      else touch(s.writes);
    }
  }
}

// ---- accesses to memory ------------------------------------------------------------------------------------------------------------

const char* verb(int mode) { return mode & kAtomic ? "atomic operation" : mode & kWrite ? "write" : "read"; }

int lane_at(const u64* address, u32 m, int bytes, u64 byte) {
  EACH_LANE(m) if (byte - address[l] < u64(bytes)) return int(l);
  return -1;
}

struct Range { u64 begin, end; };

// Joins the ranges of lanes whose addresses follow each other, or are the same, and drops those of half and quarter warps that repeat.
int join_ranges(const u64* address, u32 m, int bytes, Range* ranges) {
  int n = 0;
  EACH_LANE(m) {
    if (n && address[l] == ranges[n - 1].end) ranges[n - 1].end += bytes;
    else if (n && address[l] >= ranges[n - 1].begin && address[l] + bytes <= ranges[n - 1].end) continue;
    else if ((l >= 16 && (m >> (l - 16) & 1) && address[l] == address[l - 16]) ||
             (l >= 8 && (m >> (l - 8) & 1) && address[l] == address[l - 8]))
      continue;
    else ranges[n++] = {address[l], address[l] + bytes};
  }
  return n;
}

void count_sectors(Range* ranges, int n, u64& sectors, u64& ideal) {
  if (!std::is_sorted(ranges, ranges + n, [](const Range& a, const Range& b) { return a.begin < b.begin; }))
    std::sort(ranges, ranges + n, [](const Range& a, const Range& b) { return a.begin < b.begin; });
  u64 end = 0, next = 0, distinct = 0;
  for (int k = 0; k < n; ++k) {
    distinct += ranges[k].end - std::min(std::max(ranges[k].begin, end), ranges[k].end);
    end = std::max(end, ranges[k].end);
    const u64 first = std::max(ranges[k].begin / 32, next), last = (ranges[k].end + 31) / 32;
    if (last > first) sectors += last - first, next = last;
  }
  ideal += (distinct + 31) / 32;
}

// 32 banks of 4 bytes. Lanes that ask for 8 bytes are served half a warp at a time, for 16 bytes a quarter.
void count_transactions(Counters& c, const u64* address, u32 m, int bytes) {
  const int together = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
  for (int from = 0; from < kLanes; from += together) {
    const u32 part = m & (together == 32 ? kAll : ((1u << together) - 1) << from);
    if (!part) continue;
    // The word of each bank; only where a bank has two of them are they counted.
    u64 word_of[32], seen = 0;
    bool conflict = false;
    EACH_LANE(part)
      for (u64 word = address[l] / 4; word < (address[l] + bytes + 3) / 4; ++word) {
        const u64 bank = word % 32;
        conflict |= (seen >> bank & 1) && word_of[bank] != word;
        seen |= u64(1) << bank, word_of[bank] = word;
      }
    int most = 1;
    if (conflict) {
      u64 words[32][kLanes];
      int count[32] = {};
      EACH_LANE(part)
        for (u64 word = address[l] / 4; word < (address[l] + bytes + 3) / 4; ++word) {
          const int bank = word % 32;
          int k = 0;
          while (k < count[bank] && words[bank][k] != word) ++k;
          if (k == count[bank]) words[bank][k] = word, most = std::max(most, ++count[bank]);
        }
    }
    c.shared_transactions += most;
    ++c.shared_ideal;
  }
}

[[noreturn]] void fail_race(const char* kind, int lane, int mode, const char* where, u64 offset) {
  fail(kind, lane, "%s of byte %llu of %s is not ordered after an earlier access of another %s", verb(mode), (unsigned long long)offset,
       where, std::strcmp(kind, "shared-race") ? "warp or block" : "warp");
}

[[noreturn]] void fail_outside(const Launch& launch, u64 at, int bytes, int mode, int lane) {
  const Buffer* nearest = nullptr;
  u64 distance = 1 << 20;
  bool past = false;
  for (const Buffer& b : launch.buffers) {
    const u64 after = at - (b.base + b.size), before = b.base - at;  // the wrong one of the two is huge
    if (std::min(after, before) < distance) nearest = &b, distance = std::min(after, before), past = after < before;
  }
  if (nearest)
    fail("out-of-bounds", lane, "%s of %d bytes %llu bytes %s of buffer #%llu", verb(mode), bytes, (unsigned long long)distance,
         past ? "past the end" : "before the beginning", (unsigned long long)nearest->name);
  fail("out-of-bounds", lane, "%s of %d bytes at 0x%llx, near no buffer", verb(mode), bytes, (unsigned long long)at);
}

void access_global(Warp& w, u32 m, Space space, const u64* address, int bytes, int mode) {
  Launch& launch = *w.block->launch;
  Range ranges[kLanes];
  const int n = join_ranges(address, m, bytes, ranges);
  for (int k = 0; k < n; ++k) {
    const auto [begin, end] = ranges[k];
    Buffer* b = w.last_buffer;
    if (!b || begin - b->base >= b->size) b = launch.find(begin);
    if (!b) fail_outside(launch, begin, bytes, mode, lane_at(address, m, bytes, begin));
    w.last_buffer = b;
    const u64 offset = begin - b->base, size = end - begin;
    if (offset + size > b->size) {
      // Lanes side by side may cross from one buffer into its neighbour only if each lane stays in one of them.
      const int lane = lane_at(address, m, bytes, b->base + b->size);
      fail("out-of-bounds", lane, "%s of %d bytes at byte %llu of buffer #%llu, which has %llu", verb(mode), bytes,
           (unsigned long long)(address[lane] - b->base), (unsigned long long)b->name, (unsigned long long)b->size);
    }
    u8* state = b->state + offset;
    const u8 needed = mode & kAtomic ? kInitialised | kWritable : mode & kWrite ? kWritable : kInitialised;
    u8 all = needed;
    for (u64 j = 0; j < size; ++j) all &= state[j];
    if (all != needed) {
      u64 j = 0;
      while ((state[j] & needed) == needed) ++j;
      const int lane = lane_at(address, m, bytes, begin + j);
      const char *kind = "uninitialised", *why = "which nobody wrote";
      if ((needed & kWritable) && !(state[j] & kWritable)) {
        if (state[j] & kMember) kind = "read-only", why = "which is read-only";
        else kind = "out-of-bounds", why = "which is no element of the tensor";
      }
      fail(kind, lane, "%s of byte %llu of buffer #%llu, %s", verb(mode), (unsigned long long)(offset + j), (unsigned long long)b->name,
           why);
    }
    if (space == kConst) continue;
    if (!b->writes) b->writes = zeros<u32>(b->size), b->reads = zeros<u32>(b->size), b->first = b->size, b->last = 0;
    b->first = std::min(b->first, offset), b->last = std::max(b->last, offset + size);
    if ((mode & kAtomic) || mode == (kWrite | kStrong))
      if (!b->atomics) b->atomics = zeros<u32>(b->size);
    const Span span{b->writes + offset, b->reads + offset, b->atomics ? b->atomics + offset : nullptr, size};
    const u64 race = find_race(w, span, mode, kGlobal);
    if (race != kFine) {
      char name[64];
      snprintf(name, sizeof name, "buffer #%llu", (unsigned long long)b->name);
      fail_race("global-race", lane_at(address, m, bytes, begin + race), mode, name, offset + race);
    }
    record(w, span, mode, kGlobal);
    if (mode & kWrite) for (u64 j = 0; j < size; ++j) state[j] |= kInitialised;
  }
  if (space == kConst) return;
  Traffic& t = w.last_buffer->traffic;
  u64 sectors = 0, ideal = 0;
  count_sectors(ranges, n, sectors, ideal);
  const u64 asked = u64(bytes) * std::popcount(m);
  if (mode & (kRead | kAtomic)) t.read += asked, t.sectors_read += sectors, t.ideal_read += ideal, ++t.requests_read;
  if (mode & (kWrite | kAtomic)) t.written += asked, t.sectors_written += sectors, t.ideal_written += ideal, ++t.requests_written;
}

// Two warps may write the same value to a byte, in any order: Triton's warps do where they hold copies of one element. Whoever touches it
// then must be ordered after both, so they become members of the set of atomic operations. The first byte that is no such case and races,
// or kFine.
u64 find_different_write(Warp& w, const Span& s, const u8* present, const u8* const* value) {
  u32 from = 0, last = 0, to = 0;
  for (u64 j = 0; j < s.n; ++j) {
    const u32 id = s.writes[j];
    const bool ordered = w.ordered(id, kShared);
    if (!w.all_ordered(s.reads[j], kShared)) return j;
    if (ordered && w.all_ordered(s.atomics[j], kShared)) continue;
    if (!value[j] || *value[j] != present[j]) return j;
    if (ordered) continue;  // this warp wrote the same before
    if (!to || s.atomics[j] != from || id != last) {
      from = s.atomics[j], last = id;
      std::vector<u32> members{id, w.epoch};
      auto add = [&](u32 other) {
        if (other != id && other != w.epoch && !w.ordered(other, kShared)) members.push_back(other);
      };
      if (!(from & kSet)) add(from);
      else if (from >= w.block->first_set) for (u32 other : w.block->sets[from - w.block->first_set]) add(other);
      w.block->sets.push_back(members), to = w.block->launch->next_set++;
    }
    s.atomics[j] = to;
    ++w.block->launch->counters.redundant_writes;
  }
  return kFine;
}

// Addresses are offsets. `values` are what the lanes write, `bytes` each; `later`: a copy that is to write only when it is waited for.
void access_shared(Warp& w, u32 m, const u64* address, int bytes, int mode, const u8* values = nullptr, bool later = false) {
  Block& block = *w.block;
  Counters& c = block.launch->counters;
  Range ranges[kLanes];
  const int n = join_ranges(address, m, bytes, ranges);
  for (int k = 0; k < n; ++k) {
    const auto [begin, end] = ranges[k];
    const u64 size = block.shared.size();
    if (begin < kSharedBase || end - kSharedBase > size) {
      int lane = -1;
      EACH_LANE(m) if (lane < 0 && (address[l] < kSharedBase || address[l] + bytes - kSharedBase > size)) lane = int(l);
      fail("out-of-bounds", lane, "%s of %d bytes at byte %lld of shared memory, which has %llu", verb(mode), bytes,
           (long long)(address[lane] - kSharedBase), (unsigned long long)size);
    }
    const u64 offset = begin - kSharedBase, count = end - begin;
    u32 *writes = block.writes.data() + offset, *reads = block.reads.data() + offset;
    // Nothing special about these bytes, as nearly always.
    if ((mode == kRead || mode == kWrite) && !later && !block.pending_bytes && block.atomics.empty() && uniform(writes, count) &&
        uniform(reads, count) && w.ordered(writes[0], kShared)) {
      if (mode == kRead && writes[0] >= block.first_epoch) {
        if (reads[0] != w.epoch) std::fill_n(reads, count, w.with_reader(reads[0], kShared));
        continue;
      }
      if (mode == kWrite && w.all_ordered(reads[0], kShared)) {
        std::fill_n(writes, count, w.epoch), std::fill_n(reads, count, u32(reads[0] != 0));
        continue;
      }
    }
    auto at = [&](u64 j) { return lane_at(address, m, bytes, begin + j); };
    if (block.pending_bytes)
      for (u64 j = 0; j < count; ++j)
        if (block.pending[offset + j])
          fail("async-copy-unwaited", at(j), "%s of byte %llu of shared memory, which an asynchronous copy is yet to write", verb(mode),
               (unsigned long long)(offset + j));
    if (mode & (kRead | kAtomic)) {
      const u64 j = first_failing(writes, count, [&](u32 id) { return id >= block.first_epoch; });
      if (j != kFine)
        fail("uninitialised", at(j), "%s of byte %llu of shared memory, which nobody wrote", verb(mode), (unsigned long long)(offset + j));
    }
    if ((mode & kAtomic) || mode == (kWrite | kStrong))
      if (block.atomics.empty()) block.atomics.resize(size);
    const Span span{writes, reads, block.atomics.empty() ? nullptr : block.atomics.data() + offset, count};
    u64 race = find_race(w, span, mode, kShared);
    if (race != kFine && values && mode == kWrite) {
      if (block.atomics.empty()) block.atomics.resize(size);
      std::vector<const u8*> value(count);
      EACH_LANE(m)
        for (int j = 0; j < bytes; ++j)
          if (address[l] + j - begin < count) value[address[l] + j - begin] = values + l * bytes + j;
      const Span all{span.writes, span.reads, block.atomics.data() + offset, count};
      race = find_different_write(w, all, &block.shared[offset], value.data());
    }
    if (race != kFine) fail_race("shared-race", at(race), mode, "shared memory", offset + race);
    if (!later) record(w, span, mode, kShared);
  }
  ++c.shared_requests;
  if (mode & (kRead | kAtomic)) c.shared_read += u64(bytes) * std::popcount(m);
  if (mode & (kWrite | kAtomic)) c.shared_written += u64(bytes) * std::popcount(m);
  if (n == 1 && bytes <= 4) ++c.shared_transactions, ++c.shared_ideal;  // 128 bytes or fewer, side by side
  else count_transactions(c, address, m, bytes);
}

void access_local(Warp& w, u32 m, const u64* address, int bytes, int mode) {
  const u64 size = w.program->local;
  Counters& c = w.block->launch->counters;
  EACH_LANE(m) {
    if (address[l] + bytes > size || address[l] > size)
      fail("out-of-bounds", int(l), "%s of %d bytes at byte %llu of local memory, which has %llu", verb(mode), bytes,
           (unsigned long long)address[l], (unsigned long long)size);
    u8* state = &w.local_state[l * size + address[l]];
    for (int j = 0; j < bytes; ++j)
      if (mode & kWrite) state[j] = 1;
      else if (!state[j])
        fail("uninitialised", int(l), "%s of byte %llu of local memory, which nobody wrote", verb(mode),
             (unsigned long long)(address[l] + j));
  }
  (mode & kWrite ? c.local_written : c.local_read) += u64(bytes) * std::popcount(m);
}

// Checks and counts an access of `bytes` bytes by each lane in `m`; `host` gets where they lie on this machine. `values`: see
// access_shared.
void access(Warp& w, u32 m, Space space, u64* address, int bytes, int mode, u8** host, const u8* values = nullptr) {
  if (space == kGeneric) {
    u32 shared = 0, local = 0, parameter = 0;
    EACH_LANE(m) {
      if (address[l] - kSharedWindow < kWindow) shared |= 1u << l, address[l] -= kSharedWindow;
      else if (address[l] - kLocalWindow < kWindow) local |= 1u << l, address[l] -= kLocalWindow;
      else if (address[l] - kParamWindow < kWindow) parameter |= 1u << l, address[l] -= kParamWindow;
    }
    if (shared) access(w, shared, kShared, address, bytes, mode, host, values);
    if (local) access(w, local, kLocal, address, bytes, mode, host);
    if (parameter) access(w, parameter, kParam, address, bytes, mode, host);
    m &= ~(shared | local | parameter);
    if (!m) return;
    space = kGlobal;
  }
  EACH_LANE(m)
    if (address[l] & (bytes - 1))
      fail("misaligned", int(l), "%s of %d bytes at address 0x%llx", verb(mode), bytes, (unsigned long long)address[l]);
  switch (space) {
    case kShared:
      access_shared(w, m, address, bytes, mode, values);
      EACH_LANE(m) host[l] = &w.block->shared[address[l] - kSharedBase];
      break;
    case kLocal:
      access_local(w, m, address, bytes, mode);
      EACH_LANE(m) host[l] = &w.local[l * w.program->local + address[l]];
      break;
    case kParam: {
      Launch& launch = *w.block->launch;
      EACH_LANE(m) {
        if ((mode & kWrite) || address[l] + bytes > launch.parameter_bytes)
          fail("out-of-bounds", int(l), "%s of %d bytes at byte %llu of the parameters, which have %llu", verb(mode), bytes,
               (unsigned long long)address[l], (unsigned long long)launch.parameter_bytes);
        host[l] = const_cast<u8*>(launch.parameters) + address[l];
      }
      break;
    }
    default:
      access_global(w, m, space, address, bytes, mode);
      EACH_LANE(m) host[l] = reinterpret_cast<u8*>(address[l]);
  }
}

// What `b` says of an instruction that accesses memory.
struct Layout {
  int width, count, space;
  bool wide, is_signed, strong, wide_address;
  explicit Layout(s64 b)
      : width(b & 255),
        count(b >> 8 & 255),
        space(int(b >> 20 & 15)),
        wide(b >> 16 & 1),
        is_signed(b >> 17 & 1),
        strong(b >> 18 & 1),
        wide_address(b >> 19 & 1) {}
};

void addresses(const Warp& w, u32 operand, s64 offset, bool is_wide, u64* to) {
  if (is_wide) {
    const u64* from = w.in<u64>(operand);
    for (int l = 0; l < kLanes; ++l) to[l] = from[l] + u64(offset);
  } else {
    const u32* from = w.in<u32>(operand);
    for (int l = 0; l < kLanes; ++l) to[l] = u32(from[l] + u32(offset));
  }
}

template <class T, class S> void load_lanes(u8* const* host, int at, S* to, u32 m) {
  EACH_LANE(m) {
    T x;
    std::memcpy(&x, host[l] + at, sizeof x);
    to[l] = S(std::conditional_t<std::is_signed_v<T>, s64, u64>(x));
  }
}
template <class S> void load_element(u8* const* host, const Layout& y, int at, S* to, u32 m) {
  switch (y.width | y.is_signed << 8) {
    case 1: return load_lanes<u8>(host, at, to, m);
    case 2: return load_lanes<u16>(host, at, to, m);
    case 4: return load_lanes<u32>(host, at, to, m);
    case 8: return load_lanes<u64>(host, at, to, m);
    case 1 | 256: return load_lanes<s8>(host, at, to, m);
    case 2 | 256: return load_lanes<s16>(host, at, to, m);
    case 4 | 256: return load_lanes<s32>(host, at, to, m);
    default: return load_lanes<s64>(host, at, to, m);
  }
}

// x: `count` registers, the address.
void load(Warp& w, const Instruction& i, u32 m) {
  const Layout y(i.b);
  u64 address[kLanes];
  u8* host[kLanes];
  addresses(w, i.x[y.count], i.a, y.wide_address, address);
  access(w, m, Space(y.space), address, y.width * y.count, kRead | (y.strong ? kStrong : 0), host);
  for (int e = 0; e < y.count; ++e) {
    if (y.wide) load_element(host, y, e * y.width, w.out<u64>(i.x[e]), m);
    else load_element(host, y, e * y.width, w.out<u32>(i.x[e]), m);
  }
}

// x: the address, `count` values.
void store(Warp& w, const Instruction& i, u32 m) {
  const Layout y(i.b);
  u64 address[kLanes];
  u8* host[kLanes];
  addresses(w, i.x[0], i.a, y.wide_address, address);
  const int bytes = y.width * y.count, stride = y.wide ? 8 : 4;
  u8 values[kLanes * 32];
  for (int e = 0; e < y.count; ++e) {
    const char* from = w.in<char>(i.x[1 + e]);
    EACH_LANE(m) std::memcpy(values + l * bytes + e * y.width, from + l * stride, y.width);
  }
  access(w, m, Space(y.space), address, bytes, kWrite | (y.strong ? kStrong : 0), host, values);
  EACH_LANE(m) std::memcpy(host[l], values + l * bytes, bytes);
}

enum Operation : int { kAdd, kMin, kMax, kInc, kDec, kAnd, kOr, kXor, kExch, kCas };

template <class T> T modify(int operation, T old, T b, T c) {
  if constexpr (std::is_floating_point_v<T>) {
    switch (operation) {
      case kAdd: return old + b;
      case kMin: return std::fmin(old, b);
      default: return std::fmax(old, b);
    }
  } else {
    switch (operation) {
      case kAdd: return old + b;
      case kMin: return std::min(old, b);
      case kMax: return std::max(old, b);
      case kInc: return old >= b ? 0 : old + 1;
      case kDec: return old == 0 || old > b ? b : old - 1;
      case kAnd: return old & b;
      case kOr: return old | b;
      case kXor: return old ^ b;
      case kExch: return b;
      default: return old == b ? c : old;
    }
  }
}
template <class T> u32 modify_half(int operation, u32 old, u32 b) {
  using N = Number<T>;
  return N::put(modify<double>(operation, N::get(old), N::get(b), 0));
}

enum AtomicType : int { kU32, kS32, kU64, kS64, kF32, kF64, kF16, kBF16, kF16x2, kBF16x2, kB16 };

u64 modify_as(int type, int operation, u64 old, u64 b, u64 c) {
  switch (type) {
    case kU32: return modify<u32>(operation, u32(old), u32(b), u32(c));
    case kS32: return u32(modify<s32>(operation, s32(old), s32(b), s32(c)));
    case kU64: return modify<u64>(operation, old, b, c);
    case kS64: return u64(modify<s64>(operation, s64(old), s64(b), s64(c)));
    case kF32: return Number<float>::put(modify<float>(operation, bits<float>(u32(old)), bits<float>(u32(b)), 0));
    case kF64: return bits<u64>(modify<double>(operation, bits<double>(old), bits<double>(b), 0));
    case kF16: return modify_half<f16>(operation, u32(old), u32(b));
    case kBF16: return modify_half<bf16>(operation, u32(old), u32(b));
    case kF16x2: return modify_half<f16>(operation, u32(old), u32(b)) | modify_half<f16>(operation, u32(old) >> 16, u32(b) >> 16) << 16;
    case kBF16x2: return modify_half<bf16>(operation, u32(old), u32(b)) | modify_half<bf16>(operation, u32(old) >> 16, u32(b) >> 16) << 16;
    default: return modify<u16>(operation, u16(old), u16(b), u16(c));
  }
}

// x: the old value or nothing (bit 24 of b), the address, one or two operands. Bits 28.. of b: operation, type.
void atomic(Warp& w, const Instruction& i, u32 m) {
  const Layout y(i.b);
  const bool result = i.b >> 24 & 1;
  const int operation = int(i.b >> 28 & 15), type = int(i.b >> 32 & 15);
  u64 address[kLanes];
  u8* host[kLanes];
  addresses(w, i.x[1], i.a, y.wide_address, address);
  access(w, m, Space(y.space), address, y.width, kAtomic, host);
  auto value = [&](u32 x, u32 l) { return y.width == 8 ? w.in<u64>(x)[l] : u64(w.in<u32>(x)[l]); };
  EACH_LANE(m) {
    u64 old = 0;
    std::memcpy(&old, host[l], y.width);
    const u64 now = modify_as(type, operation, old, value(i.x[2], l), operation == kCas ? value(i.x[3], l) : 0);
    std::memcpy(host[l], &now, y.width);
    if (!result) continue;
    if (y.width == 8) w.out<u64>(i.x[0])[l] = old;
    else w.out<u32>(i.x[0])[l] = u32(old);
  }
}

// ---- asynchronous copies -----------------------------------------------------------------------------------------------------------

// x: destination, source, offset of the source, and bytes of the source or the predicate that ignores it. b: layout of the destination's
// address; bit 24: the source's address has 64 bits; 25: bytes are given; 26: a predicate is.
void copy_async(Warp& w, const Instruction& i, u32 m) {
  const Layout y(i.b);
  Block& block = *w.block;
  u64 to[kLanes], from[kLanes];
  addresses(w, i.x[0], i.a, y.wide_address, to);
  addresses(w, i.x[1], s64(w.in<u64>(i.x[2])[0]), i.b >> 24 & 1, from);
  int present[kLanes];
  u32 left = 0;
  EACH_LANE(m) {
    present[l] = y.width;
    if (i.b >> 25 & 1) present[l] = int(w.in<u32>(i.x[3])[l]);
    if ((i.b >> 26 & 1) && (w.predicate(i.x[3]) >> l & 1)) present[l] = 0;
    if (present[l] < 0 || present[l] > y.width)
      fail("async-copy-size", int(l), "a copy of %d bytes from a source of %d", y.width, present[l]);
    if (present[l]) left |= 1u << l;
    if (to[l] & (y.width - 1))
      fail("misaligned", int(l), "copy of %d bytes to byte %llu of shared memory", y.width, (unsigned long long)to[l]);
    if (present[l] && (from[l] & (y.width - 1)))
      fail("misaligned", int(l), "copy of %d bytes from address 0x%llx", y.width, (unsigned long long)from[l]);
  }
  while (left) {
    const int size = present[std::countr_zero(left)];
    u32 same = 0;
    EACH_LANE(left) if (present[l] == size) same |= 1u << l;
    access_global(w, same, kGlobal, from, size, kRead);
    left &= ~same;
  }
  access_shared(w, m, to, y.width, kWrite, nullptr, true);
  EACH_LANE(m) {
    w.copies.push_back({int(l), to[l] - kSharedBase, from[l], y.width, present[l], w.groups[l]});
    for (int j = 0; j < y.width; ++j) block.pending[to[l] - kSharedBase + j] = 1;
    block.pending_bytes += y.width;
  }
}

void copy_commit(Warp& w, const Instruction&, u32 m) { EACH_LANE(m) ++w.groups[l]; }

// a: how many of the youngest groups may still be on their way; -1: nothing may.
void copy_wait(Warp& w, const Instruction& i, u32 m) {
  if (i.a < 0) EACH_LANE(m) ++w.groups[l];
  const u64 allowed = i.a < 0 ? 0 : u64(i.a);
  Block& block = *w.block;
  std::erase_if(w.copies, [&](const Copy& c) {
    if (!(m >> c.lane & 1) || c.group + allowed >= w.groups[c.lane]) return false;
    std::memcpy(&block.shared[c.to], reinterpret_cast<const u8*>(c.from), c.present);
    std::memset(&block.shared[c.to + c.present], 0, c.bytes - c.present);
    std::memset(&block.pending[c.to], 0, c.bytes);
    block.pending_bytes -= c.bytes;
    record(w, {&block.writes[c.to], &block.reads[c.to], nullptr, u64(c.bytes)}, kWrite, kShared);
    return true;
  });
}

// ---- warps and barriers ------------------------------------------------------------------------------------------------------------

// Lets the lanes at the smallest place run, together; false where none can.
bool Warp::regroup() {
  EACH_LANE(active) lane_pc[l] = pc;
  active = 0;
  const u32 can = live & ~parked & ~barred;
  if (!can) {
    // Lanes that wait at an aligned barrier for lanes that have left meanwhile.
    if (parked && parked == live) {
      const int at = lane_pc[std::countr_zero(parked)];
      bool together = program->code[at].control == kAligned;
      EACH_LANE(parked) together &= lane_pc[l] == at;
      if (together) {
        active = parked, parked = 0, pc = at, limit = kNever;
        return true;
      }
    }
    return false;
  }
  pc = kNever, limit = kNever;
  EACH_LANE(can) pc = std::min(pc, lane_pc[l]);
  EACH_LANE(can) {
    if (lane_pc[l] == pc) active |= 1u << l;
    else limit = std::min(limit, lane_pc[l]);
  }
  return true;
}

void Warp::leave(u32 m) {
  live &= ~m, active &= ~m;
  for (int id = 0; id < 16; ++id)
    if (block->barriers[id].used) block->try_complete(id);
}

// An instruction that waits for all lanes of its member mask, its first operand.
void Warp::sync_lanes(const Instruction& i, u32 m) {
  const u32* members = in<u32>(i.x[0]);
  const int here = pc;
  EACH_LANE(active & ~m) lane_pc[l] = here + 1;
  u32 arrived = m;
  EACH_LANE(parked) if (lane_pc[l] == here) arrived |= 1u << l;
  EACH_LANE(m) lane_pc[l] = here;
  parked |= m, active = 0;
  const char* kind = i.b & (s64(1) << 40) ? "shuffle-absent-lane" : "absent-lane";
  for (u32 left = arrived; left;) {
    const u32 mask = members[std::countr_zero(left)];
    u32 same = 0;
    EACH_LANE(arrived) if (members[l] == mask) same |= 1u << l;
    left &= ~same;
    if (same & ~mask) fail(kind, std::countr_zero(same & ~mask), "member mask 0x%08x does not name the lane itself", mask);
    if (mask & ~live) {
      const int lane = std::countr_zero(mask & ~live);
      fail(kind, std::countr_zero(same), "member mask 0x%08x names lane %d, which %s", mask, lane,
           exists >> lane & 1 ? "has exited" : "does not exist");
    }
    if (same != mask) continue;
    if (i.run) i.run(*this, i, same);
    EACH_LANE(same) lane_pc[l] = here + 1;
    parked &= ~same;
  }
}

// x: the barrier, how many threads (0: all), and for a reduction the result and the predicate. b: bit 0: does not wait; from 8: 1 popc, 2
// and, 3 or.
void Warp::arrive(const Instruction& i, u32 m) {
  const int lane = std::countr_zero(m);
  const u32 id = in<u32>(i.x[0])[lane], count = in<u32>(i.x[1])[lane];
  if (id >= 16) fail("barrier", lane, "barrier %u, expected 0 to 15", id);
  if (count % 32) fail("barrier", lane, "barrier for %u threads, expected a multiple of 32", count);
  EACH_LANE(m)
  if (in<u32>(i.x[0])[l] != id || in<u32>(i.x[1])[l] != count) fail("divergent-barrier", int(l), "lanes name different barriers");
  Barrier& b = block->barriers[id];
  if (b.used && b.count != count)
    fail("barrier", lane, "barrier %u for %u threads, but others came to it for %llu", id, count, (unsigned long long)b.count);
  b.used = true, b.count = count;
  b.arrived[index] |= m;
  for (int k = 0; k < kLanes; ++k) b.clock[k] = std::max(b.clock[k], clock[k]);
  tick();
  ++block->launch->counters.barriers;
  const int here = pc;
  EACH_LANE(active & ~m) lane_pc[l] = here + 1;
  EACH_LANE(m) lane_pc[l] = here + (i.b & 1);
  active = 0;
  if (!(i.b & 1)) b.waiting[index] |= m, barred |= m;
  if (i.b >> 8) b.members += std::popcount(m), b.yes += std::popcount((predicate(i.x[3]) ^ (i.b >> 16 & 1 ? kAll : 0)) & m);
  block->try_complete(int(id));
}

bool Block::try_complete(int id) {
  Barrier& b = barriers[id];
  u64 arrived = 0, expected = 0;
  for (const Warp& w : warps) {
    const u32 here = b.arrived[w.index];
    // A warp counts as whole, lanes that have left or never were included.
    if (here) arrived += (w.live & ~here) ? std::popcount(here) : kLanes;
    if (w.live || here) expected += kLanes;
  }
  if (arrived < (b.count ? b.count : expected)) return false;
  complete(id);
  return true;
}

void Block::complete(int id) {
  Barrier b = barriers[id];
  barriers[id] = Barrier();
  for (Warp& w : warps) {
    const u32 waiting = b.waiting[w.index];
    if (!waiting) continue;
    for (int k = 0; k < kLanes; ++k) w.clock[k] = std::max(w.clock[k], b.clock[k]);
    w.barred &= ~waiting, w.limit = -1;  // so that the warp groups its lanes anew
    EACH_LANE(waiting) {
      const Instruction& i = w.program->code[w.lane_pc[l]++];
      switch (i.b >> 8 & 3) {
        case 1: w.out<u32>(i.x[2])[l] = b.yes; break;
        case 2: w.set_predicate(i.x[2], b.yes == b.members ? kAll : 0, 1u << l); break;
        case 3: w.set_predicate(i.x[2], b.yes ? kAll : 0, 1u << l); break;
      }
    }
  }
}

void Warp::run(u64 burst) {
  const Instruction* code = program->code.data();
  Launch& launch = *block->launch;
  u64 *lanes = launch.lanes, *issued = launch.warps, steps = 0;
  auto count_steps = [&] {
    if ((launch.counters.steps += steps) > launch.step_limit)
      fail("step-limit", active ? std::countr_zero(active) : -1, "more than %llu instructions of threads",
           (unsigned long long)launch.step_limit);
    steps = 0;
  };
  for (; burst; --burst) {
    if (pc >= limit || !active) {
      if (!regroup()) break;
    }
    const Instruction& i = code[pc];
    const u32 m = active & (predicates[i.guard] ^ i.negate);
    const u32 n = u32(std::popcount(m));
    ++issued[pc], lanes[pc] += n, steps += n + 1;
    switch (i.control) {
      case kPlain:
        if (m) i.run(*this, i, m);
        ++pc;
        break;
      case kBranch: {
        const u32 rest = active & ~m;
        if (!rest) pc = int(i.a);
        else if (!m) ++pc;
        else {
          EACH_LANE(m) lane_pc[l] = int(i.a);
          EACH_LANE(rest) lane_pc[l] = pc + 1;
          active = 0;
        }
        if (steps > (1 << 20)) count_steps();
        break;
      }
      case kTable: {
        if (steps > (1 << 20)) count_steps();
        const u32* index = in<u32>(i.x[0]);
        EACH_LANE(active & ~m) lane_pc[l] = pc + 1;
        EACH_LANE(m) {
          if (index[l] >= u32(i.b)) fail("out-of-bounds", int(l), "branch %u of a table of %lld", index[l], (long long)i.b);
          lane_pc[l] = program->targets[i.a + index[l]];
        }
        active = 0;
        break;
      }
      case kExit: {
        const u32 rest = active & ~m;
        leave(m);
        if (rest) ++pc;
        break;
      }
      case kWarpSync:
        if (m == active && m && !parked) {
          // All lanes at once, as nearly always.
          const u32* members = in<u32>(i.x[0]);
          u32 difference = 0;
          EACH_LANE(m) difference |= members[l] ^ m;
          if (!difference) {
            if (i.run) i.run(*this, i, m);
            ++pc;
            break;
          }
        }
        if (m) sync_lanes(i, m);
        else ++pc;
        break;
      case kAligned: {
        if (!m) {
          ++pc;
          break;
        }
        u32 here = m;
        EACH_LANE(parked) if (lane_pc[l] == pc) here |= 1u << l;
        if (here == live) {
          parked = 0;
          active |= here;
          arrive(i, here);
        } else {
          EACH_LANE(active & ~m) lane_pc[l] = pc + 1;
          EACH_LANE(m) lane_pc[l] = pc;
          parked |= m, active = 0;
        }
        break;
      }
      case kBarrier:
        if (m) arrive(i, m);
        else ++pc;
        break;
      case kTrap:
        if (m)
          fail(i.a ? "assert" : "trap", std::countr_zero(m), "%s", i.a ? "an assertion of the kernel failed" : "the kernel stopped itself");
        ++pc;
        break;
    }
  }
  count_steps();
}

[[noreturn]] void Block::stuck() {
  for (Warp& w : warps) {
    if (!w.parked) continue;
    const int lane = std::countr_zero(w.parked);
    w.pc = w.lane_pc[lane];
    const Instruction& i = w.program->code[w.pc];
    launch->stuck_warp = w.index;
    if (i.control == kAligned)
      fail("divergent-barrier", lane, "lanes 0x%08x of the warp are here, 0x%08x are elsewhere", w.parked, w.live & ~w.parked);
    const u32 mask = w.in<u32>(i.x[0])[lane], absent = mask & ~w.parked;
    fail(i.b & (s64(1) << 40) ? "shuffle-absent-lane" : "absent-lane", lane, "member mask 0x%08x names lane %d, which does not arrive",
         mask, std::countr_zero(absent ? absent : mask));
  }
  for (Warp& w : warps) {
    if (!w.barred) continue;
    const int lane = std::countr_zero(w.barred);
    w.pc = w.lane_pc[lane];
    launch->stuck_warp = w.index;
    fail("deadlock", lane, "waits at barrier %u for threads that do not come", w.in<u32>(w.program->code[w.pc].x[0])[lane]);
  }
  fail("deadlock", -1, "no warp can run");
}

void Block::start(u64 index) {
  number = index;
  id[0] = u32(index % launch->grid[0]), id[1] = u32(index / launch->grid[0] % launch->grid[1]),
  id[2] = u32(index / launch->grid[0] / launch->grid[1]);
  first_epoch = launch->next_epoch++, first_set = launch->next_set;
  epochs.assign(1, {0, 0});
  sets.clear(), transitions.clear();
  if (pending_bytes) std::fill(pending.begin(), pending.end(), 0), pending_bytes = 0;
  for (Barrier& b : barriers)
    if (b.used) b = Barrier();
  const u32* size = launch->block;
  const u32 threads = size[0] * size[1] * size[2];
  for (Warp& w : warps) {
    const u32 first = u32(w.index) * kLanes, count = std::min<u32>(threads - first, kLanes);
    w.exists = w.live = w.active = count == 32 ? kAll : (1u << count) - 1;
    w.parked = w.barred = 0, w.pc = 0, w.limit = kNever, w.carry = 0;
    std::fill_n(w.clock, kLanes, 0);
    w.tick();
    w.ordered_id = 0;
    std::fill(w.local_state.begin(), w.local_state.end(), 0);
    w.copies.clear();
    std::fill_n(w.groups, kLanes, 0);
    const std::vector<int>& specials = w.program->specials;
    for (size_t k = 0; k < specials.size(); k += 2) {
      u32* to = w.out<u32>(u32(specials[k + 1]));
      const int which = specials[k], axis = which % 4;
      for (u32 l = 0; l < kLanes; ++l) {
        const u32 t = first + l, below = (1u << l) - 1;
        switch (which / 4) {
          case 0: to[l] = axis == 0 ? t % size[0] : axis == 1 ? t / size[0] % size[1] : axis == 2 ? t / size[0] / size[1] : 0; break;
          case 1: to[l] = axis == 3 ? 1 : size[axis]; break;
          case 2: to[l] = axis == 3 ? 0 : id[axis]; break;
          case 3: to[l] = axis == 3 ? 1 : launch->grid[axis]; break;
          case 4: to[l] = axis == 0 ? l : axis == 1 ? u32(w.index) : axis == 2 ? u32(warps.size()) : u32(index % 132); break;
          case 5: to[l] = axis == 0 ? 1u << l : axis == 1 ? below : axis == 2 ? below << 1 | 1 : ~(below << 1 | 1); break;
          case 6: to[l] = axis == 0 ? ~below : axis == 1 ? 132 : axis == 2 ? u32(launch->dynamic_shared) : u32(launch->shared_bytes); break;
        }
      }
    }
  }
}

// Instructions that a warp runs before the next one does even if nothing stops it: it may be waiting for another warp to write something.
constexpr u64 kLongBurst = 1 << 20;

void Block::run() {
  const u64 seed = launch->seed;
  if (seed == 0) {
    for (bool moved = true; moved;) {
      moved = false;
      for (Warp& w : warps)
        if (w.runnable()) moved = true, launch->running = w.index, w.run(kLongBurst);
    }
  } else {
    for (std::vector<int> can;;) {
      can.clear();
      for (Warp& w : warps)
        if (w.runnable()) can.push_back(w.index);
      if (can.empty()) break;
      const int which = can[launch->random() % can.size()];
      launch->running = which;
      warps[which].run(u64(1) << launch->random() % 9);
    }
  }
  for (Warp& w : warps)
    if (w.live) stuck();
}
// ---- arithmetic --------------------------------------------------------------------------------------------------------------------

template <class S> inline void keep(S* to, u32 m, u32 l, S value) {
  const S mask = S(0) - S(m >> l & 1);
  to[l] = (to[l] & ~mask) | (value & mask);
}

// d = f(a, b, c) on whole numbers; f may also take fewer, or D differ from T.
template <class D, class T, int N, auto F> void integer(Warp& w, const Instruction& i, u32 m) {
  using Nt = Number<T>;
  Slot<D>* d = w.out<Slot<D>>(i.x[0]);
  const Slot<T>* a = w.in<Slot<T>>(i.x[1]);
  const Slot<T>* b = N > 1 ? w.in<Slot<T>>(i.x[2]) : a;
  if constexpr (N < 3) {
#pragma GCC ivdep
    for (u32 l = 0; l < kLanes; ++l) {
      D r;
      if constexpr (N == 1) r = D(F(Nt::get(a[l])));
      else r = D(F(Nt::get(a[l]), Nt::get(b[l])));
      keep(d, m, l, Number<D>::put(r));
    }
  } else {
    const Slot<D>* c = w.in<Slot<D>>(i.x[3]);
#pragma GCC ivdep
    for (u32 l = 0; l < kLanes; ++l) keep(d, m, l, Number<D>::put(D(F(Nt::get(a[l]), Nt::get(b[l]), Number<D>::get(c[l])))));
  }
}

// a shifted by b, which has 32 bits.
template <class T, auto F> void shift(Warp& w, const Instruction& i, u32 m) {
  Slot<T>* d = w.out<Slot<T>>(i.x[0]);
  const Slot<T>* a = w.in<Slot<T>>(i.x[1]);
  const u32* b = w.in<u32>(i.x[2]);
#pragma GCC ivdep
  for (u32 l = 0; l < kLanes; ++l) keep(d, m, l, Number<T>::put(T(F(Number<T>::get(a[l]), b[l]))));
}

// Anything of up to four 32-bit (or D wide) sources and the immediate.
template <class D, class T, int N, auto F> void general(Warp& w, const Instruction& i, u32 m) {
  Slot<D>* d = w.out<Slot<D>>(i.x[0]);
  const Slot<T>* a = w.in<Slot<T>>(i.x[1]);
  const u32 *b = N > 1 ? w.in<u32>(i.x[2]) : nullptr, *c = N > 2 ? w.in<u32>(i.x[3]) : nullptr;
  for (u32 l = 0; l < kLanes; ++l) keep(d, m, l, Slot<D>(F(Number<T>::get(a[l]), N > 1 ? b[l] : 0u, N > 2 ? c[l] : 0u, i.a)));
}

template <class T> Value<T> finish(Value<T> r, s64 flags) {
  using V = Value<T>;
  if (flags & kFtz) r = Number<T>::flush(std::is_same_v<T, float> || std::is_same_v<T, double> ? r : V(Number<T>::get(Number<T>::put(r))));
  if (flags & kSat) r = r > 0 ? std::min(r, V(1)) : V(0);
  if ((flags & kRelu) && r <= 0) r = 0;
  return r;
}

// One result of an operation on numbers of type T.
template <class T, int N, auto F, bool Plain> inline Slot<T> compute(Slot<T> a, Slot<T> b, Slot<T> c, s64 flags) {
  auto value = [&](Slot<T> s) {
    const Value<T> x = Number<T>::get(s);
    return !Plain && (flags & kFtz) ? Number<T>::flush(x) : x;
  };
  Value<T> r;
  if constexpr (N == 1) r = F(value(a), flags);
  else if constexpr (N == 2) r = F(value(a), value(b), flags);
  else r = F(value(a), value(b), value(c), flags);
  return Number<T>::put(Plain ? r : finish<T>(r, flags));
}

template <class T, int N, auto F> struct Floating {
  using S = Slot<T>;
  template <bool Plain> static void loop(Warp& w, const Instruction& i, u32 m) {
    S* d = w.out<S>(i.x[0]);
    const S *a = w.in<S>(i.x[1]), *b = N > 1 ? w.in<S>(i.x[2]) : a, *c = N > 2 ? w.in<S>(i.x[3]) : a;
    const s64 flags = Plain ? 0 : i.b;
#pragma GCC ivdep
    for (u32 l = 0; l < kLanes; ++l) keep(d, m, l, compute<T, N, F, Plain>(a[l], b[l], c[l], flags));
  }
};
template <class T, int N, auto F> struct Floating<Pair<T>, N, F> {
  using S = std::conditional_t<std::is_same_v<T, float>, u64, u32>;
  template <bool Plain> static void loop(Warp& w, const Instruction& i, u32 m) {
    constexpr int half = sizeof(S) * 4;
    constexpr S low = (S(1) << half) - 1;
    S* d = w.out<S>(i.x[0]);
    const S *a = w.in<S>(i.x[1]), *b = N > 1 ? w.in<S>(i.x[2]) : a, *c = N > 2 ? w.in<S>(i.x[3]) : a;
    const s64 flags = Plain ? 0 : i.b;
    for (u32 l = 0; l < kLanes; ++l) {
      auto part = [&](int k) {
        return S(compute<T, N, F, Plain>(Slot<T>(a[l] >> k & low), Slot<T>(b[l] >> k & low), Slot<T>(c[l] >> k & low), flags));
      };
      keep(d, m, l, S(part(0) | part(half) << half));
    }
  }
};
template <class T, int N, auto F> void floating(Warp& w, const Instruction& i, u32 m) {
  if (i.b == 0) return Floating<T, N, F>::template loop<true>(w, i, m);
  if (!(i.b & kRounding)) return Floating<T, N, F>::template loop<false>(w, i, m);
  RoundingScope rounding(i.b);
  Floating<T, N, F>::template loop<false>(w, i, m);
}

template <class V> inline V least(V a, V b, s64 flags, bool greatest) {
  V sign = 0;
  if (flags & kXorSign) sign = std::signbit(a) != std::signbit(b) ? V(-1) : V(1), a = std::abs(a), b = std::abs(b);
  const bool first = greatest ? (a > b || (a == b && !std::signbit(a))) : (a < b || (a == b && std::signbit(a)));
  V r = first ? a : b;
  if (flags & kNaN) r = a != a ? a : b != b ? b : r;
  else r = b != b ? a : a != a ? b : r;
  return flags & kXorSign ? std::copysign(r, sign) : r;
}

inline float fused(float a, float b, float c, s64) { return std::fma(a, b, c); }
inline double fused(double a, double b, double c, s64) { return std::fma(a, b, c); }

// The quotient of div.approx.f32: zero by a divisor above 2^126.
inline float divide_approximately(float a, float b) {
  if (std::abs(b) > 0x1p126f && std::isfinite(b)) return std::isinf(a) ? NAN : std::copysign(0.0f, a * std::copysign(1.0f, b));
  return float(double(a) / double(b));
}
// rcp.approx.ftz.f64 and rsqrt.approx.ftz.f64 see and give the upper 32 bits.
inline double upper(double x) { return bits<double>(bits<u64>(x) & 0xffffffff00000000u); }
inline double flushed(double x) { return std::abs(x) < 0x1p-1022 ? std::copysign(0.0, x) : x; }

template <class T> constexpr T shl(T a, u32 n) { return n >= sizeof(T) * 8 ? T(0) : T(std::make_unsigned_t<T>(a) << n); }
template <class T> constexpr T shr(T a, u32 n) {
  constexpr u32 size = sizeof(T) * 8;
  if constexpr (std::is_signed_v<T>) return T(a >> (n >= size ? size - 1 : n));
  else return n >= size ? T(0) : T(a >> n);
}
template <class T> constexpr T mul_hi(T a, T b) {
  if constexpr (sizeof(T) == 8) return T((std::is_signed_v<T> ? __int128(a) * b : __int128((unsigned __int128)(a) * b)) >> 64);
  else return T((std::conditional_t<std::is_signed_v<T>, s64, u64>(a) * b) >> (sizeof(T) * 8));
}
// What hardware gives for a division by zero; the ISA leaves it open.
template <class T> constexpr T quotient(T a, T b) { return b == 0 ? T(-1) : std::is_signed_v<T> && b == T(-1) ? T(-a) : T(a / b); }
template <class T> constexpr T remainder(T a, T b) { return b == 0 ? a : std::is_signed_v<T> && b == T(-1) ? T(0) : T(a % b); }
template <class T> constexpr T mul24(T a, T b, bool high) {
  auto low = [](T x) { return std::is_signed_v<T> ? s64(s32(u32(x) << 8) >> 8) : s64(u32(x) & 0xffffff); };
  return T(low(a) * low(b) >> (high ? 16 : 0));
}
inline u32 sign_extended(u32 a, u32 length) { return length ? u32(s32(a << (32 - length)) >> (32 - length)) : 0; }
inline u32 lop3(u32 a, u32 b, u32 c, s64 table) {
  u32 r = 0;
  for (int k = 0; k < 8; ++k)
    if (table >> k & 1) r |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
  return r;
}
u32 permute(u32 a, u32 b, u32 c, s64 mode) {
  const u64 both = u64(b) << 32 | a;
  auto byte = [&](u32 k) { return u32(both >> (k & 7) * 8) & 255; };
  u32 r = 0;
  for (u32 k = 0; k < 4; ++k) {
    u32 v;
    const u32 s = c & 3;
    switch (mode) {
      case 1: v = byte(s + k); break;                            // f4e
      case 2: v = byte(s - k); break;                            // b4e
      case 3: v = byte(s); break;                                // rc8
      case 4: v = byte(std::max(k, s)); break;                   // ecl
      case 5: v = byte(std::min(k, s)); break;                   // ecr
      case 6: v = byte((s & 1) * 2 + (k & 1)); break;            // rc16
      default: {
        const u32 nibble = c >> 4 * k & 15;
        v = byte(nibble);
        if (nibble & 8) v = v & 128 ? 255 : 0;
      }
    }
    r |= v << 8 * k;
  }
  return r;
}
template <class T> T extract(T a, u32 position, u32 length) {
  constexpr u32 size = sizeof(T) * 8;
  position &= 255, length &= 255;
  using U = std::make_unsigned_t<T>;
  if (!length) return 0;
  const bool sign = std::is_signed_v<T> && (U(a) >> std::min(position + length - 1, size - 1) & 1);
  U r = position >= size ? U(0) : U(a) >> position;
  const u32 valid = position >= size ? 0 : std::min(length, size - position);
  if (valid < size) {
    r &= (U(1) << valid) - 1;
    if (sign) r |= ~((U(1) << valid) - 1);
  }
  return T(r);
}
template <class U> U insert(U a, U b, u32 position, u32 length) {
  constexpr u32 size = sizeof(U) * 8;
  position &= 255, length &= 255;
  for (u32 k = 0; k < length && position + k < size; ++k) {
    const U bit = U(1) << (position + k);
    b = (b & ~bit) | ((a >> k & 1) ? bit : 0);
  }
  return b;
}
template <class T> u32 find_leading(T a, bool distance) {
  using U = std::make_unsigned_t<T>;
  const U x = std::is_signed_v<T> && a < 0 ? U(~a) : U(a);
  if (!x) return kAll;
  const u32 zeros = u32(std::countl_zero(x));
  return distance ? zeros : u32(sizeof(T) * 8 - 1) - zeros;
}
u32 find_nth_set(u32 mask, u32 base, u32 offset, s64) {
  const s32 n = s32(offset);
  if (n == 0) return base < 32 && (mask >> base & 1) ? base : kAll;
  s32 left = std::abs(n);
  for (s32 k = s32(base); k >= 0 && k < 32; k += n > 0 ? 1 : -1)
    if ((mask >> k & 1) && --left == 0) return u32(k);
  return kAll;
}
template <class A, class B> u32 dot4(u32 a, u32 b, u32 c, s64) {
  for (int k = 0; k < 4; ++k) c += u32(s32(A(a >> 8 * k)) * s32(B(b >> 8 * k)));
  return c;
}
template <class A, class B> u32 dot2(u32 a, u32 b, u32 c, s64 high) {
  for (int k = 0; k < 2; ++k) c += u32(s32(A(a >> 16 * k)) * s32(B(b >> 8 * (k + (high ? 2 : 0)))));
  return c;
}

// ---- comparisons -------------------------------------------------------------------------------------------------------------------

enum Comparison { kEq, kNe, kLt, kLe, kGt, kGe, kEqu, kNeu, kLtu, kLeu, kGtu, kGeu, kNum, kNan };
template <int C, class V> inline bool holds(V a, V b) {
  const bool unordered = std::is_floating_point_v<V> && (a != a || b != b);
  switch (C) {
    case kEq: return a == b;
    case kNe: return a != b && !unordered;
    case kLt: return a < b;
    case kLe: return a <= b;
    case kGt: return a > b;
    case kGe: return a >= b;
    case kEqu: return a == b || unordered;
    case kNeu: return a != b || unordered;
    case kLtu: return a < b || unordered;
    case kLeu: return a <= b || unordered;
    case kGtu: return a > b || unordered;
    case kGeu: return a >= b || unordered;
    case kNum: return !unordered;
    default: return unordered;
  }
}
template <class T, int C> u32 compare(Warp& w, const Instruction& i, int shift = 0) {
  const Slot<T>*a = w.in<Slot<T>>(i.x[2]), *b = w.in<Slot<T>>(i.x[3]);
  u8 yes[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    auto x = Number<T>::get(Slot<T>(a[l] >> shift)), y = Number<T>::get(Slot<T>(b[l] >> shift));
    if constexpr (std::is_same_v<T, float>)
      if (i.b & kFtz) x = Number<T>::flush(x), y = Number<T>::flush(y);
    yes[l] = holds<C>(x, y);
  }
  u32 r = 0;
  for (int k = 0; k < 4; ++k) {  // eight bytes of 0 or 1 to eight bits
    u64 eight;
    std::memcpy(&eight, yes + 8 * k, 8);
    r |= u32(eight * 0x0102040810204080u >> 56) << 8 * k;
  }
  return r;
}
// `a` of an instruction: 1 and, 2 or, 3 xor with a predicate, + 4 if it is negated.
inline u32 combined(Warp& w, const Instruction& i, u32 r) {
  if (!(i.a & 3)) return r;
  const u32 c = w.predicate(i.x[4]) ^ (i.a & 4 ? kAll : 0);
  return (i.a & 3) == 1 ? r & c : (i.a & 3) == 2 ? r | c : r ^ c;
}
// x: p, q, a, b, c.
template <class T, int C> void setp(Warp& w, const Instruction& i, u32 m) {
  const u32 r = compare<T, C>(w, i), p = combined(w, i, r), q = combined(w, i, ~r);
  w.set_predicate(i.x[1], q, m), w.set_predicate(i.x[0], p, m);
}
template <class T, int C> void setp_pair(Warp& w, const Instruction& i, u32 m) {
  const u32 p = combined(w, i, compare<T, C>(w, i)), q = combined(w, i, compare<T, C>(w, i, 16));
  w.set_predicate(i.x[1], q, m), w.set_predicate(i.x[0], p, m);
}
// x: d, none, a, b, c. a >> 8: what true is.
template <class T, int C> void set(Warp& w, const Instruction& i, u32 m) {
  const u32 r = combined(w, i, compare<T, C>(w, i));
  u32* d = w.out<u32>(i.x[0]);
  for (u32 l = 0; l < kLanes; ++l) keep(d, m, l, r >> l & 1 ? u32(i.a >> 8) : 0u);
}
template <class T, int C> void set_pair(Warp& w, const Instruction& i, u32 m) {
  const u32 p = combined(w, i, compare<T, C>(w, i)), q = combined(w, i, compare<T, C>(w, i, 16));
  u32* d = w.out<u32>(i.x[0]);
  for (u32 l = 0; l < kLanes; ++l) keep(d, m, l, (p >> l & 1 ? u32(i.a >> 8) : 0u) | (q >> l & 1 ? u32(i.a >> 8) << 16 : 0u));
}
// a: 0 finite, 1 infinite, 2 number, 3 notanumber, 4 normal, 5 subnormal.
template <class T> void testp(Warp& w, const Instruction& i, u32 m) {
  u32 r = 0;
  for (int l = 0; l < kLanes; ++l) {
    const auto x = Number<T>::get(w.in<Slot<T>>(i.x[1])[l]);
    const bool is[] = {bool(std::isfinite(x)),
                       bool(std::isinf(x)),
                       x == x,
                       x != x,
                       bool(std::isnormal(x)),
                       x != 0 && std::isfinite(x) && !std::isnormal(x)};
    r |= u32(is[i.a]) << l;
  }
  w.set_predicate(i.x[0], r, m);
}

// ---- conversions -------------------------------------------------------------------------------------------------------------------

template <class V> V to_integer(V x, s64 flags) {
  switch (flags & kRounding) {
    case kRz: return std::trunc(x);
    case kRm: return std::floor(x);
    case kRp: return std::ceil(x);
    default: return std::nearbyint(x);
  }
}
template <class D, class S> Slot<D> convert(Slot<S> s, s64 flags) {
  if constexpr (!is_float<S>) {
    const S v = S(s);
    if constexpr (!is_float<D>) {
      D r = D(v);
      if (flags & kSat) r = D(std::clamp<__int128>(v, std::numeric_limits<D>::min(), std::numeric_limits<D>::max()));
      return Slot<D>(std::conditional_t<std::is_signed_v<D>, s64, u64>(r));
    } else if constexpr (std::is_same_v<D, float> || std::is_same_v<D, double>) {
      return Number<D>::put(finish<D>(D(v), flags));
    } else {
      double x = double(v);
      if (sizeof(S) == 8 && std::abs(x) >= 0x1p53) {  // keep what double would drop as a sticky bit
        const u64 magnitude = v < 0 ? 0 - u64(v) : u64(v);
        x = std::copysign(double(magnitude >> 12 | u64((magnitude & 4095) != 0)) * 4096.0, x);
      }
      return Number<D>::put(finish<D>(round_to(x, kHalf<D>, flags), flags));
    }
  } else {
    Value<S> x = Number<S>::get(s);
    if (flags & kFtz) x = Number<S>::flush(x);
    if constexpr (!is_float<D>) {
      constexpr bool wide = sizeof(D) == 8 || std::is_same_v<S, double>;
      using U = std::make_unsigned_t<D>;
      if (x != x) return wide ? Slot<D>(U(1) << (sizeof(D) * 8 - 1)) : Slot<D>(0);
      const double r = to_integer(double(x), flags);
      const double low = double(std::numeric_limits<D>::min()), beyond = std::ldexp(1.0, std::numeric_limits<D>::digits);
      const D v = r <= low ? std::numeric_limits<D>::min() : r >= beyond ? std::numeric_limits<D>::max() : D(r);
      return Slot<D>(std::conditional_t<std::is_signed_v<D>, s64, u64>(v));
    } else {
      if (flags & kInteger) x = to_integer(x, flags);
      if constexpr (std::is_same_v<D, float> || std::is_same_v<D, double>) {
        return Number<D>::put(finish<D>(D(x), flags));
      } else {
        const bool plain = !(flags & (kRounding | kSatFinite)) || std::is_same_v<D, S>;
        return Number<D>::put(finish<D>(plain ? double(x) : round_to(x, kHalf<D>, flags), flags));
      }
    }
  }
}
template <class D, class S> void cvt(Warp& w, const Instruction& i, u32 m) {
  Slot<D>* d = w.out<Slot<D>>(i.x[0]);
  const Slot<S>* s = w.in<Slot<S>>(i.x[1]);
  if (i.b == 0) {
    for (u32 l = 0; l < kLanes; ++l) keep(d, m, l, convert<D, S>(s[l], 0));
  } else {
    // Hardware rounds only where the result is one of its types; an integer is rounded by hand, and its mode must not leak into that.
    RoundingScope rounding(is_float<D> && !(i.b & kInteger) ? i.b : 0);
    for (u32 l = 0; l < kLanes; ++l) keep(d, m, l, convert<D, S>(s[l], i.b));
  }
}
// x: d, upper, lower.
template <class D> void cvt_pair(Warp& w, const Instruction& i, u32 m) {
  for (u32 l = 0; l < kLanes; ++l)
    keep(w.out<u32>(i.x[0]), m, l, convert<D, float>(w.in<u32>(i.x[2])[l], i.b) | convert<D, float>(w.in<u32>(i.x[1])[l], i.b) << 16);
}
u32 round_tf32(u32 s, s64 flags) {
  const float x = bits<float>(s);
  if (x != x) return 0x7fffffff;
  if (flags == kRna) return std::isinf(x) ? s : (s + 0x1000) & ~0x1fffu;
  return bits<u32>(finish<float>(float(round_to(x, kTf32, flags)), flags & ~kFtz));
}

// ---- moves -------------------------------------------------------------------------------------------------------------------------

template <class S> void mov(Warp& w, const Instruction& i, u32 m) {
  S* d = w.out<S>(i.x[0]);
  const S* a = w.in<S>(i.x[1]);
#pragma GCC ivdep
  for (u32 l = 0; l < kLanes; ++l) keep(d, m, l, a[l]);
}
// a: n parts of `size` bits.
void pack(Warp& w, const Instruction& i, u32 m) {
  const int n = int(i.a & 255), size = int(i.a >> 8);
  EACH_LANE(m) {
    u64 r = 0;
    for (int k = 0; k < n; ++k) r |= (size == 64 ? 0 : u64(w.in<u32>(i.x[1 + k])[l]) & ((u64(1) << size) - 1)) << k * size;
    if (n * size == 64) w.out<u64>(i.x[0])[l] = r;
    else w.out<u32>(i.x[0])[l] = u32(r);
  }
}
void unpack(Warp& w, const Instruction& i, u32 m) {
  const int n = int(i.a & 255), size = int(i.a >> 8);
  EACH_LANE(m) {
    const u64 s = n * size == 64 ? w.in<u64>(i.x[n])[l] : w.in<u32>(i.x[n])[l];
    for (int k = 0; k < n; ++k) w.out<u32>(i.x[k])[l] = u32(s >> k * size & ((u64(1) << size) - 1));
  }
}
template <class S> void selp(Warp& w, const Instruction& i, u32 m) {
  const u32 p = w.predicate(i.x[3]) ^ (i.a & 1 ? kAll : 0);
  S* d = w.out<S>(i.x[0]);
  const S *a = w.in<S>(i.x[1]), *b = w.in<S>(i.x[2]);
#pragma GCC ivdep
  for (u32 l = 0; l < kLanes; ++l) keep(d, m, l, p >> l & 1 ? a[l] : b[l]);
}
template <class S, class C> void slct(Warp& w, const Instruction& i, u32 m) {
  const u32* c = w.in<u32>(i.x[3]);
  for (u32 l = 0; l < kLanes; ++l) {
    auto x = Number<C>::get(c[l]);
    if constexpr (std::is_same_v<C, float>) if (i.b & kFtz) x = Number<C>::flush(x);
    keep(w.out<S>(i.x[0]), m, l, x >= 0 ? w.in<S>(i.x[1])[l] : w.in<S>(i.x[2])[l]);
  }
}
// a: 0 mov, 1 not, 2 and, 3 or, 4 xor; + 8, + 16 for a negated operand.
void logic(Warp& w, const Instruction& i, u32 m) {
  const u32 a = w.predicate(i.x[1]) ^ (i.a & 8 ? kAll : 0), b = (i.a & 7) > 1 ? w.predicate(i.x[2]) ^ (i.a & 16 ? kAll : 0) : 0;
  const u32 r[] = {a, ~a, a & b, a | b, a ^ b};
  w.set_predicate(i.x[0], r[i.a & 7], m);
}
// a: 0 add, 1 sub, 2 mad.lo, 3 mad.hi; 8: a carry comes in; 16: one goes out.
template <class T> void carrying(Warp& w, const Instruction& i, u32 m) {
  EACH_LANE(m) {
    T a = w.in<T>(i.x[1])[l], b = w.in<T>(i.x[2])[l];
    const int operation = int(i.a & 7);
    if (operation > 1) {
      a = operation == 2 ? T(a * b) : i.a & 32 ? T(mul_hi<std::make_signed_t<T>>(a, b)) : mul_hi<T>(a, b);
      b = w.in<T>(i.x[3])[l];
    }
    const T in = i.a & 8 ? w.carry >> l & 1 : 0;
    const unsigned __int128 r = operation == 1 ? (unsigned __int128)(a) - b - in : (unsigned __int128)(a) + b + in;
    w.out<T>(i.x[0])[l] = T(r);
    if (i.a & 16) w.carry = (w.carry & ~(1u << l)) | u32(r >> sizeof(T) * 8 & 1) << l;
  }
}
void is_space(Warp& w, const Instruction& i, u32 m) {
  u32 r = 0;
  EACH_LANE(m) {
    const u64 a = w.in<u64>(i.x[1])[l];
    const Space space = a - kSharedWindow < kWindow  ? kShared
                        : a - kLocalWindow < kWindow ? kLocal
                        : a - kParamWindow < kWindow ? kParam
                                                     : kGlobal;
    r |= u32(space == i.a) << l;
  }
  w.set_predicate(i.x[0], r, m);
}
// a: what is added to an address, for cvta.
void offset64(Warp& w, const Instruction& i, u32 m) {
  EACH_LANE(m) w.out<u64>(i.x[0])[l] = w.in<u64>(i.x[1])[l] + u64(i.a);
}
void read_clock(Warp& w, const Instruction& i, u32 m) {
  const u64 now = ++w.block->launch->counters.clock;
  EACH_LANE(m) {
    if (i.a) w.out<u64>(i.x[0])[l] = now;
    else w.out<u32>(i.x[0])[l] = u32(now);
  }
}
void nothing(Warp&, const Instruction&, u32) {}

// ---- across the lanes of a warp; x[0] is the member mask ---------------------------------------------------------------------------

// x: mask, d, p, a, b, c. a: 0 up, 1 down, 2 bfly, 3 idx.
void shfl(Warp& w, const Instruction& i, u32 m) {
  u32 from[kLanes];
  std::memcpy(from, w.in<u32>(i.x[3]), sizeof from);
  const u32 *b = w.in<u32>(i.x[4]), *c = w.in<u32>(i.x[5]);
  u32* d = w.out<u32>(i.x[1]);
  u32 p = 0, to[kLanes];
  EACH_LANE(m) {
    const u32 by = b[l] & 31, clamp = c[l] & 31, segment = c[l] >> 8 & 31, last = (l & segment) | (clamp & ~segment), first = l & segment;
    s32 j;
    bool in;
    switch (i.a) {
      case 0: j = s32(l) - s32(by), in = j >= s32(last); break;
      case 1: j = s32(l + by), in = j <= s32(last); break;
      case 2: j = s32(l ^ by), in = j <= s32(last); break;
      default: j = s32(first | (by & ~segment)), in = j <= s32(last);
    }
    if (!in) j = s32(l);
    if (!(m >> j & 1)) fail("shuffle-absent-lane", int(l), "reads lane %d, which the member mask 0x%08x does not name", j, m);
    p |= u32(in) << l, to[l] = from[j];
  }
  EACH_LANE(m) d[l] = to[l];
  w.set_predicate(i.x[2], p, m);
}
// x: mask, d, p. a: 0 all, 1 any, 2 uni, 3 ballot; + 4 negated.
void vote(Warp& w, const Instruction& i, u32 m) {
  const u32 p = (w.predicate(i.x[2]) ^ (i.a & 4 ? kAll : 0)) & m;
  switch (i.a & 3) {
    case 0: w.set_predicate(i.x[1], p == m ? kAll : 0, m); break;
    case 1: w.set_predicate(i.x[1], p ? kAll : 0, m); break;
    case 2: w.set_predicate(i.x[1], p == 0 || p == m ? kAll : 0, m); break;
    default: EACH_LANE(m) w.out<u32>(i.x[1])[l] = p;
  }
}
// x: mask, d, p, a. a: 1 all.
template <class T> void match(Warp& w, const Instruction& i, u32 m) {
  const T* a = w.in<T>(i.x[3]);
  u32 same[kLanes];
  EACH_LANE(m) {
    same[l] = 0;
    for (u32 k = 0; k < kLanes; ++k)
      if ((m >> k & 1) && a[k] == a[l]) same[l] |= 1u << k;
  }
  EACH_LANE(m) w.out<u32>(i.x[1])[l] = !i.a ? same[l] : same[l] == m ? m : 0;
  w.set_predicate(i.x[2], same[std::countr_zero(m)] == m ? kAll : 0, m);
}
// x: mask, d, a.
template <class T, auto F> void redux(Warp& w, const Instruction& i, u32 m) {
  const u32* a = w.in<u32>(i.x[2]);
  T r = T(a[std::countr_zero(m)]);
  EACH_LANE(m & (m - 1)) r = T(F(r, T(a[l])));
  EACH_LANE(m) w.out<u32>(i.x[1])[l] = u32(r);
}
void elect(Warp& w, const Instruction& i, u32 m) {
  const u32 leader = u32(std::countr_zero(m));
  EACH_LANE(m) w.out<u32>(i.x[1])[l] = leader;
  w.set_predicate(i.x[2], 1u << leader, m);
}
void active_mask(Warp& w, const Instruction& i, u32 m) { EACH_LANE(m) w.out<u32>(i.x[0])[l] = m; }

// Up to four 8 x 8 matrices of 16-bit numbers, of which lane 8 k + r has the address of row r of the k-th. x: mask, address, registers. a:
// offset; b: layout, with the count of matrices; bit 24: transposed.
constexpr u32 first_lanes(int n) { return n == kLanes ? kAll : (1u << n) - 1; }
struct Place { u32 row, column; };
inline Place matrix_place(const Instruction& i, u32 lane, u32 element) {
  const Place p{lane / 4, 2 * (lane % 4) + element};
  return i.b >> 24 & 1 ? Place{p.column, p.row} : p;
}
void ldmatrix(Warp& w, const Instruction& i, u32) {
  const Layout y(i.b);
  u64 address[kLanes];
  u8* host[kLanes];
  addresses(w, i.x[1], i.a, y.wide_address, address);
  access(w, first_lanes(8 * y.count), Space(y.space), address, 16, kRead, host);
  for (int k = 0; k < y.count; ++k)
    for (u32 l = 0; l < kLanes; ++l) {
      u16 pair[2];
      for (u32 e = 0; e < 2; ++e) {
        const auto [row, column] = matrix_place(i, l, e);
        std::memcpy(&pair[e], host[8 * k + row] + 2 * column, 2);
      }
      w.out<u32>(i.x[2 + k])[l] = pair[0] | u32(pair[1]) << 16;
    }
}
void stmatrix(Warp& w, const Instruction& i, u32) {
  const Layout y(i.b);
  u64 address[kLanes];
  u8* host[kLanes];
  u16 rows[kLanes][8] = {};
  addresses(w, i.x[1], i.a, y.wide_address, address);
  for (int k = 0; k < y.count; ++k)
    for (u32 l = 0; l < kLanes; ++l)
      for (u32 e = 0; e < 2; ++e) {
        const auto [row, column] = matrix_place(i, l, e);
        rows[8 * k + row][column] = u16(w.in<u32>(i.x[2 + k])[l] >> 16 * e);
      }
  const u32 m = first_lanes(8 * y.count);
  access(w, m, Space(y.space), address, 16, kWrite, host, reinterpret_cast<const u8*>(rows));
  EACH_LANE(m) std::memcpy(host[l], rows[l], 16);
}

// ---- matrix products ---------------------------------------------------------------------------------------------------------------

enum MatrixType : int { kMmaF16, kMmaBF16, kMmaTF32, kMmaS8, kMmaU8, kMmaF64 };

// How numbers of a type lie in a register: this many, the e-th of register value `s`.
inline float element(int type, u32 s, int e) {
  switch (type) {
    case kMmaF16: return wide(f16{u16(s >> 16 * e)});
    case kMmaBF16: return wide(bf16{u16(s >> 16 * e)});
    case kMmaTF32: return bits<float>(s & 0xffffe000u);
    case kMmaS8: return float(s8(s >> 8 * e));
    default: return float(u8(s >> 8 * e));
  }
}
inline int elements(int type) { return type <= kMmaBF16 ? 2 : type <= kMmaTF32 ? 1 : 4; }

// Products are exact and added one after the other in float32, each sum rounded toward zero: no better than hardware, which adds several at
// a time.
void multiply_accumulate(const float (*a)[32], const float (*b)[8], float (*acc)[8], int k_size) {
  RoundingScope rounding(kRz);
  for (int r = 0; r < 16; ++r)
    for (int k = 0; k < k_size; ++k) {
      const float x = a[r][k];
      for (int c = 0; c < 8; ++c) acc[r][c] = __builtin_fmaf(x, b[k][c], acc[r][c]);
    }
}

// m16n8k*: x: mask, d, a, b, c. a: type of a | of b << 4 | k << 8 | half accumulators << 16 | integer accumulators << 17.
void mma(Warp& w, const Instruction& i, u32) {
  const int type_a = int(i.a & 15), type_b = int(i.a >> 4 & 15), k_size = int(i.a >> 8 & 255);
  const bool half = i.a >> 16 & 1, integer = i.a >> 17 & 1;
  const int per = elements(type_a), registers_a = k_size / per / 2, registers_b = k_size / per / 4, registers_c = half ? 2 : 4;
  const u32 *xd = i.x + 1, *xa = xd + registers_c, *xb = xa + registers_a, *xc = xb + registers_b;
  alignas(32) float a[16][32], b[32][8], acc[16][8];
  for (u32 l = 0; l < kLanes; ++l) {
    const u32 g = l / 4, t = l % 4;
    for (int r = 0; r < registers_a; ++r) {
      const u32 s = w.in<u32>(xa[r])[l];
      for (int e = 0; e < per; ++e) a[g + 8 * (r & 1)][t * per + e + 4 * per * (r >> 1)] = element(type_a, s, e);
    }
    for (int r = 0; r < registers_b; ++r) {
      const u32 s = w.in<u32>(xb[r])[l];
      for (int e = 0; e < per; ++e) b[t * per + e + 4 * per * r][g] = element(type_b, s, e);
    }
  }
  if (integer) {
    s32 sums[16][8];
    for (u32 l = 0; l < kLanes; ++l)
      for (int e = 0; e < 4; ++e) sums[l / 4 + 8 * (e >> 1)][l % 4 * 2 + (e & 1)] = s32(w.in<u32>(xc[e])[l]);
    for (int r = 0; r < 16; ++r)
      for (int c = 0; c < 8; ++c) {
        s64 sum = sums[r][c];
        for (int k = 0; k < k_size; ++k) sum += s32(a[r][k]) * s32(b[k][c]);
        sums[r][c] = i.a >> 18 & 1 ? s32(std::clamp<s64>(sum, INT32_MIN, INT32_MAX)) : s32(u32(sum));
      }
    for (u32 l = 0; l < kLanes; ++l)
      for (int e = 0; e < 4; ++e) w.out<u32>(xd[e])[l] = u32(sums[l / 4 + 8 * (e >> 1)][l % 4 * 2 + (e & 1)]);
    return;
  }
  for (u32 l = 0; l < kLanes; ++l)
    for (int e = 0; e < 4; ++e)
      acc[l / 4 + 8 * (e >> 1)][l % 4 * 2 + (e & 1)] =
          half ? wide(f16{u16(w.in<u32>(xc[e >> 1])[l] >> 16 * (e & 1))}) : bits<float>(w.in<u32>(xc[e])[l]);
  multiply_accumulate(a, b, acc, k_size);
  for (u32 l = 0; l < kLanes; ++l) {
    auto at = [&](int e) { return acc[l / 4 + 8 * (e >> 1)][l % 4 * 2 + (e & 1)]; };
    if (half)
      for (int r = 0; r < 2; ++r) w.out<u32>(xd[r])[l] = narrow_f16(at(2 * r)) | u32(narrow_f16(at(2 * r + 1))) << 16;
    else
      for (int e = 0; e < 4; ++e) w.out<u32>(xd[e])[l] = Number<float>::put(at(e));
  }
}

// f64, m8n8k4 and m16n8k4, k8, k16. a: m | k << 8.
void mma_f64(Warp& w, const Instruction& i, u32) {
  const int rows = int(i.a & 255), k_size = int(i.a >> 8), blocks = rows / 8, registers_a = blocks * k_size / 4, registers_b = k_size / 4,
            registers_c = 2 * blocks;
  const u32 *xd = i.x + 1, *xa = xd + registers_c, *xb = xa + registers_a, *xc = xb + registers_b;
  double a[16][16], b[16][8], acc[16][8];
  for (u32 l = 0; l < kLanes; ++l) {
    const u32 g = l / 4, t = l % 4;
    for (int r = 0; r < registers_a; ++r) a[g + 8 * (r % blocks)][t + 4 * (r / blocks)] = bits<double>(w.in<u64>(xa[r])[l]);
    for (int r = 0; r < registers_b; ++r) b[t + 4 * r][g] = bits<double>(w.in<u64>(xb[r])[l]);
    for (int e = 0; e < registers_c; ++e) acc[g + 8 * (e >> 1)][2 * t + (e & 1)] = bits<double>(w.in<u64>(xc[e])[l]);
  }
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < 8; ++c)
      for (int k = 0; k < k_size; ++k) acc[r][c] = std::fma(a[r][k], b[k][c], acc[r][c]);
  for (u32 l = 0; l < kLanes; ++l)
    for (int e = 0; e < registers_c; ++e) w.out<u64>(xd[e])[l] = bits<u64>(acc[l / 4 + 8 * (e >> 1)][l % 4 * 2 + (e & 1)]);
}

// Fragments of wmma have no prescribed layout. Here the elements of a tile, in the order of memory for a and b and by rows for c and d, are
// dealt out to the lanes in pieces of equal length. x: mask, address, stride, registers. a: rows | columns << 8 | type << 16 | by columns
// << 20 | fragment of c << 21; b: layout.
void wmma_memory(Warp& w, const Instruction& i, u32 m, bool reads) {
  const Layout y(i.b);
  const int rows = int(i.a & 255), columns = int(i.a >> 8 & 255), bytes = y.width, per = rows * columns / kLanes;
  const bool by_columns = i.a >> 20 & 1, of_c = i.a >> 21 & 1;
  u64 base[kLanes], address[kLanes];
  u8* host[kLanes];
  addresses(w, i.x[1], i.b >> 32, y.wide_address, base);
  const u64 stride = w.in<u32>(i.x[2])[0];
  const int minor = by_columns ? rows : columns;
  // Lanes whose elements lie together take them in one access.
  const int piece = (of_c && by_columns) ? 1 : std::min({per, minor, 16 / bytes});
  for (int first = 0; first < per; first += piece) {
    for (u32 l = 0; l < kLanes; ++l) {
      const int e = int(l) * per + first;
      const int major_index = of_c && by_columns ? e % columns : e / minor, minor_index = of_c && by_columns ? e / columns : e % minor;
      address[l] = base[l] + (u64(major_index) * stride + u64(minor_index)) * u64(bytes);
    }
    access(w, m, Space(y.space), address, piece * bytes, reads ? kRead : kWrite, host);
    for (int k = 0; k < piece; ++k)
      for (u32 l = 0; l < kLanes; ++l) {
        const int e = first + k;
        u8* at = host[l] + k * bytes;
        u32* r = bytes == 2 ? w.out<u32>(i.x[3 + e / 2]) : bytes == 4 ? w.out<u32>(i.x[3 + e]) : nullptr;
        if (bytes == 2) {
          u16 v;
          if (reads) std::memcpy(&v, at, 2), r[l] = e & 1 ? (r[l] & 0xffff) | u32(v) << 16 : v;
          else v = u16(r[l] >> 16 * (e & 1)), std::memcpy(at, &v, 2);
        } else if (reads) std::memcpy(&r[l], at, 4);
        else std::memcpy(at, &r[l], 4);
      }
  }
  // Some fragments have more registers than elements.
  if (reads)
    for (int r = per * bytes / 4; r < y.count; ++r) std::memset(w.out<u32>(i.x[3 + r]), 0, kLanes * 4);
}
void wmma_load(Warp& w, const Instruction& i, u32 m) { wmma_memory(w, i, m, true); }
void wmma_store(Warp& w, const Instruction& i, u32 m) { wmma_memory(w, i, m, false); }

// x: mask, d, a, b, c. a: m | n << 8 | k << 16 | type << 24 | a by columns << 28 | b by columns << 29 | d is half << 30 | c is half << 31;
// b: registers of d, a, b, a byte each.
void wmma_mma(Warp& w, const Instruction& i, u32) {
  const int rows = int(i.a & 255), columns = int(i.a >> 8 & 255), k_size = int(i.a >> 16 & 255), type = int(i.a >> 24 & 15);
  const u32 *xd = i.x + 1, *xa = xd + (i.b & 255), *xb = xa + (i.b >> 8 & 255), *xc = xb + (i.b >> 16 & 255);
  std::vector<float> a(size_t(rows * k_size)), b(size_t(k_size * columns)), acc(size_t(rows * columns));
  auto gather = [&](const u32* x, int of, int major, int minor, bool swap, std::vector<float>& to) {
    const int each = major * minor / kLanes;
    for (int e = 0; e < major * minor; ++e) {
      const int lane = e / each, k = e % each;
      const float v = element(of, w.in<u32>(x[k / elements(of)])[lane], k % elements(of));
      to[size_t(swap ? e % minor * major + e / minor : e)] = v;
    }
  };
  if (i.a >> 28 & 1) gather(xa, type, k_size, rows, true, a);
  else gather(xa, type, rows, k_size, false, a);
  if (i.a >> 29 & 1) gather(xb, type, columns, k_size, true, b);
  else gather(xb, type, k_size, columns, false, b);
  const bool half_d = i.a >> 30 & 1, half_c = i.a >> 31 & 1;
  const int each = rows * columns / kLanes;
  for (int e = 0; e < rows * columns; ++e) {
    const int lane = e / each, k = e % each;
    acc[size_t(e)] = half_c ? wide(f16{u16(w.in<u32>(xc[k / 2])[lane] >> 16 * (k % 2))}) : bits<float>(w.in<u32>(xc[k])[lane]);
  }
  {
    RoundingScope rounding(kRz);
    for (int r = 0; r < rows; ++r)
      for (int k = 0; k < k_size; ++k)
        for (int c = 0; c < columns; ++c)
          acc[size_t(r * columns + c)] =
              __builtin_fmaf(a[size_t(r * k_size + k)], b[size_t(k * columns + c)], acc[size_t(r * columns + c)]);
  }
  for (int e = 0; e < rows * columns; ++e) {
    const int lane = e / each, k = e % each;
    const float v = acc[size_t(e)];
    if (!half_d) w.out<u32>(xd[k])[lane] = Number<float>::put(v);
    else if (k % 2 == 0) w.out<u32>(xd[k / 2])[lane] = narrow_f16(v);
    else w.out<u32>(xd[k / 2])[lane] |= u32(narrow_f16(v)) << 16;
  }
}

// ---- the names of the handlers, by which program.py asks for them ------------------------------------------------------------------

struct Entry {
  Handler run;
  int control;
};
using Table = std::unordered_map<std::string, Entry>;

template <class T> void add_integers(Table& t, const std::string& n) {
  auto put = [&](const char* name, Handler f) { t[name + n] = {f, kPlain}; };
  put("add.", integer<T, T, 2, [](T a, T b) { return T(a + b); }>);
  put("sub.", integer<T, T, 2, [](T a, T b) { return T(a - b); }>);
  put("mul.lo.", integer<T, T, 2, [](T a, T b) { return T(u64(a) * u64(b)); }>);
  put("mul.hi.", integer<T, T, 2, [](T a, T b) { return mul_hi<T>(a, b); }>);
  put("mad.lo.", integer<T, T, 3, [](T a, T b, T c) { return T(u64(a) * u64(b) + u64(c)); }>);
  put("mad.hi.", integer<T, T, 3, [](T a, T b, T c) { return T(mul_hi<T>(a, b) + c); }>);
  put("div.", integer<T, T, 2, [](T a, T b) { return quotient<T>(a, b); }>);
  put("rem.", integer<T, T, 2, [](T a, T b) { return remainder<T>(a, b); }>);
  put("min.", integer<T, T, 2, [](T a, T b) { return std::min(a, b); }>);
  put("max.", integer<T, T, 2, [](T a, T b) { return std::max(a, b); }>);
  put("abs.", integer<T, T, 1, [](T a) { return T(a < 0 ? -a : a); }>);
  put("neg.", integer<T, T, 1, [](T a) { return T(-a); }>);
  put("sad.", integer<T, T, 3, [](T a, T b, T c) { return T(c + (a < b ? b - a : a - b)); }>);
  put("and.", integer<T, T, 2, [](T a, T b) { return T(a & b); }>);
  put("or.", integer<T, T, 2, [](T a, T b) { return T(a | b); }>);
  put("xor.", integer<T, T, 2, [](T a, T b) { return T(a ^ b); }>);
  put("not.", integer<T, T, 1, [](T a) { return T(~a); }>);
  put("cnot.", integer<T, T, 1, [](T a) { return T(a == 0); }>);
  put("shl.", shift<T, [](T a, u32 b) { return shl<T>(a, b); }>);
  put("shr.", shift<T, [](T a, u32 b) { return shr<T>(a, b); }>);
  put("setp.eq.", setp<T, kEq>), put("setp.ne.", setp<T, kNe>), put("setp.lt.", setp<T, kLt>);
  put("setp.le.", setp<T, kLe>), put("setp.gt.", setp<T, kGt>), put("setp.ge.", setp<T, kGe>);
  put("set.eq.", set<T, kEq>), put("set.ne.", set<T, kNe>), put("set.lt.", set<T, kLt>);
  put("set.le.", set<T, kLe>), put("set.gt.", set<T, kGt>), put("set.ge.", set<T, kGe>);
  if constexpr (sizeof(T) < 8) {
    using W =
        std::conditional_t<std::is_signed_v<T>, std::conditional_t<sizeof(T) == 2, s32, s64>, std::conditional_t<sizeof(T) == 2, u32, u64>>;
    put("mul.wide.", integer<W, T, 2, [](T a, T b) { return W(W(a) * W(b)); }>);
    put("mad.wide.", integer<W, T, 3, [](T a, T b, W c) { return W(W(a) * W(b) + c); }>);
  }
  if constexpr (sizeof(T) == 4) {
    put("mul24.lo.", integer<T, T, 2, [](T a, T b) { return mul24<T>(a, b, false); }>);
    put("mul24.hi.", integer<T, T, 2, [](T a, T b) { return mul24<T>(a, b, true); }>);
    put("mad24.lo.", integer<T, T, 3, [](T a, T b, T c) { return T(mul24<T>(a, b, false) + c); }>);
    put("mad24.hi.", integer<T, T, 3, [](T a, T b, T c) { return T(mul24<T>(a, b, true) + c); }>);
    put("bfind.", general<u32, T, 1, [](T a, u32, u32, s64) { return find_leading<T>(a, false); }>);
    put("bfind.shiftamt.", general<u32, T, 1, [](T a, u32, u32, s64) { return find_leading<T>(a, true); }>);
  }
  if constexpr (sizeof(T) == 8) {
    put("bfind.", general<u32, T, 1, [](T a, u32, u32, s64) { return find_leading<T>(a, false); }>);
    put("bfind.shiftamt.", general<u32, T, 1, [](T a, u32, u32, s64) { return find_leading<T>(a, true); }>);
  }
  if constexpr (sizeof(T) >= 4) put("bfe.", general<T, T, 3, [](T a, u32 b, u32 c, s64) { return Slot<T>(extract<T>(a, b, c)); }>);
}

template <class T> void add_bit_operations(Table& t, const std::string& n) {
  t["popc." + n] = {general<u32, T, 1, [](T a, u32, u32, s64) { return u32(std::popcount(a)); }>, kPlain};
  t["clz." + n] = {general<u32, T, 1, [](T a, u32, u32, s64) { return u32(std::countl_zero(a)); }>, kPlain};
  t["brev." + n] = {integer<T, T, 1, [](T a) {
    T r = 0;
    for (u32 k = 0; k < sizeof(T) * 8; ++k) r = T(r << 1 | (a >> k & 1));
    return r;
  }>, kPlain};
  t["bfi." + n] = {[](Warp& w, const Instruction& i, u32 m) {
    EACH_LANE(m) w.out<T>(i.x[0])[l] = insert<T>(w.in<T>(i.x[1])[l], w.in<T>(i.x[2])[l], w.in<u32>(i.x[3])[l], w.in<u32>(i.x[4])[l]);
  }, kPlain};
}

template <class T> struct Scalar { using type = T; };
template <class T> struct Scalar<Pair<T>> { using type = T; };

template <class T> void add_floats(Table& t, const std::string& n) {
  using V = Value<typename Scalar<T>::type>;
  constexpr bool half = std::is_same_v<typename Scalar<T>::type, f16> || std::is_same_v<typename Scalar<T>::type, bf16>;
  auto put = [&](const char* name, Handler f) { t[name + n] = {f, kPlain}; };
  put("add.", floating<T, 2, [](V a, V b, s64) { return a + b; }>);
  put("sub.", floating<T, 2, [](V a, V b, s64) { return a - b; }>);
  put("mul.", floating<T, 2, [](V a, V b, s64) { return a * b; }>);
  if constexpr (half) put("fma.", floating<T, 3, [](V a, V b, V c, s64) { return odd_fma(a, b, c); }>);
  else put("fma.", floating<T, 3, [](V a, V b, V c, s64 flags) { return fused(a, b, c, flags); }>);
  put("min.", floating<T, 2, [](V a, V b, s64 flags) { return least(a, b, flags, false); }>);
  put("max.", floating<T, 2, [](V a, V b, s64 flags) { return least(a, b, flags, true); }>);
  if constexpr (std::is_same_v<T, float>) {
    put("min3.", floating<T, 3, [](V a, V b, V c, s64 flags) { return least(least(a, b, flags, false), c, flags, false); }>);
    put("max3.", floating<T, 3, [](V a, V b, V c, s64 flags) { return least(least(a, b, flags, true), c, flags, true); }>);
  }
  put("ex2.", floating<T, 1, [](V a, s64) { return V(std::exp2(double(a))); }>);
  put("tanh.", floating<T, 1, [](V a, s64) { return V(std::tanh(double(a))); }>);
}
// The sign bit of a number, whatever else it is.
template <class S, S Sign> void add_signs(Table& t, const std::string& n) {
  t["abs." + n] = {general<S, S, 1, [](S a, u32, u32, s64) { return S(a & ~Sign); }>, kPlain};
  t["neg." + n] = {general<S, S, 1, [](S a, u32, u32, s64) { return S(a ^ Sign); }>, kPlain};
}

template <class T> void add_float_comparisons(Table& t, const std::string& n) {
  auto each = [&]<int... C>(std::integer_sequence<int, C...>) {
    static const char* names[] = {"eq.", "ne.", "lt.", "le.", "gt.", "ge.", "equ.", "neu.", "ltu.", "leu.", "gtu.", "geu.", "num.", "nan."};
    ((t["setp." + (names[C] + n)] = {setp<T, C>, kPlain}, t["set." + (names[C] + n)] = {set<T, C>, kPlain}), ...);
    if constexpr (std::is_same_v<T, f16> || std::is_same_v<T, bf16>)
      ((t["setp." + (names[C] + n) + "x2"] = {setp_pair<T, C>, kPlain}, t["set." + (names[C] + n) + "x2"] = {set_pair<T, C>, kPlain}), ...);
  };
  each(std::make_integer_sequence<int, 14>());
}

template <class F> void for_all_types(F f) {
  f.template operator()<u8>("u8"), f.template operator()<s8>("s8"), f.template operator()<u16>("u16"), f.template operator()<s16>("s16");
  f.template operator()<u32>("u32"), f.template operator()<s32>("s32"), f.template operator()<u64>("u64"),
      f.template operator()<s64>("s64");
  f.template operator()<f16>("f16"), f.template operator()<bf16>("bf16"), f.template operator()<float>("f32"),
      f.template operator()<double>("f64");
}

template <class T, int N, int Sign> void mixed(Warp& w, const Instruction& i, u32 m) {
  RoundingScope rounding(i.b);
  for (u32 l = 0; l < kLanes; ++l) {
    const float a = wide(T{u16(w.in<u32>(i.x[1])[l])}), last = bits<float>(w.in<u32>(i.x[N])[l]);
    const float r = N == 2 ? (Sign > 0 ? a + last : a - last) : std::fma(a, wide(T{u16(w.in<u32>(i.x[2])[l])}), last);
    keep(w.out<u32>(i.x[0]), m, l, Number<float>::put(finish<float>(r, i.b)));
  }
}

// Two or four whole numbers in a register.
template <class T, auto F> void packed(Warp& w, const Instruction& i, u32 m) {
  constexpr int size = sizeof(T) * 8;
  for (u32 l = 0; l < kLanes; ++l) {
    u32 r = 0;
    for (int k = 0; k < 32; k += size)
      r |= u32(std::make_unsigned_t<T>(F(T(w.in<u32>(i.x[1])[l] >> k), T(w.in<u32>(i.x[2])[l] >> k)))) << k;
    keep(w.out<u32>(i.x[0]), m, l, r);
  }
}

const Table& table() {
  static const Table built = [] {
    Table t;
    auto put = [&](const char* name, Handler f, int control = kPlain) { t[name] = {f, control}; };
    add_integers<u16>(t, "u16"), add_integers<s16>(t, "s16"), add_integers<u32>(t, "u32");
    add_integers<s32>(t, "s32"), add_integers<u64>(t, "u64"), add_integers<s64>(t, "s64");
    add_bit_operations<u32>(t, "b32"), add_bit_operations<u64>(t, "b64");
    put("add.sat.s32", integer<s32, s32, 2, [](s32 a, s32 b) { return s32(std::clamp<s64>(s64(a) + b, INT32_MIN, INT32_MAX)); }>);
    put("sub.sat.s32", integer<s32, s32, 2, [](s32 a, s32 b) { return s32(std::clamp<s64>(s64(a) - b, INT32_MIN, INT32_MAX)); }>);
    put("mad.hi.sat.s32",
        integer<s32, s32, 3, [](s32 a, s32 b, s32 c) { return s32(std::clamp<s64>(s64(mul_hi<s32>(a, b)) + c, INT32_MIN, INT32_MAX)); }>);
    put("add.u16x2", packed<u16, [](u16 a, u16 b) { return u16(a + b); }>);
    put("min.u16x2", packed<u16, [](u16 a, u16 b) { return std::min(a, b); }>),
        put("max.u16x2", packed<u16, [](u16 a, u16 b) { return std::max(a, b); }>);
    put("min.s16x2", packed<s16, [](s16 a, s16 b) { return std::min(a, b); }>),
        put("max.s16x2", packed<s16, [](s16 a, s16 b) { return std::max(a, b); }>);
    put("lop3.b32", general<u32, u32, 3, [](u32 a, u32 b, u32 c, s64 lut) { return lop3(a, b, c, lut); }>);
    put("prmt.b32", general<u32, u32, 3, [](u32 a, u32 b, u32 c, s64 mode) { return permute(a, b, c, mode); }>);
    put("fns.b32", general<u32, u32, 3, [](u32 a, u32 b, u32 c, s64 x) { return find_nth_set(a, b, c, x); }>);
    put("shf.l.wrap.b32", general<u32, u32, 3, [](u32 a, u32 b, u32 c, s64) { return shl<u32>(b, c & 31) | shr<u32>(a, 32 - (c & 31)); }>);
    put("shf.r.wrap.b32", general<u32, u32, 3, [](u32 a, u32 b, u32 c, s64) { return shl<u32>(b, 32 - (c & 31)) | shr<u32>(a, c & 31); }>);
    put("shf.l.clamp.b32",
        general<u32, u32, 3, [](u32 a, u32 b, u32 c, s64) { return shl<u32>(b, std::min(c, 32u)) | shr<u32>(a, 32 - std::min(c, 32u)); }>);
    put("shf.r.clamp.b32",
        general<u32, u32, 3, [](u32 a, u32 b, u32 c, s64) { return shl<u32>(b, 32 - std::min(c, 32u)) | shr<u32>(a, std::min(c, 32u)); }>);
    put("szext.wrap.s32", general<u32, u32, 2, [](u32 a, u32 b, u32, s64) { return sign_extended(a, b & 31); }>);
    put("szext.wrap.u32", general<u32, u32, 2, [](u32 a, u32 b, u32, s64) { return a & ~shl<u32>(kAll, b & 31); }>);
    put("szext.clamp.s32", general<u32, u32, 2, [](u32 a, u32 b, u32, s64) { return sign_extended(a, std::min(b, 32u)); }>);
    put("szext.clamp.u32", general<u32, u32, 2, [](u32 a, u32 b, u32, s64) { return a & ~shl<u32>(kAll, b); }>);
    put("bmsk.wrap.b32", general<u32, u32, 2, [](u32 a, u32 b, u32, s64) { return shl<u32>(~shl<u32>(kAll, b & 31), a & 31); }>);
    put("bmsk.clamp.b32", general<u32, u32, 2, [](u32 a, u32 b, u32, s64) { return shl<u32>(~shl<u32>(kAll, b), a); }>);
    put("dp4a.u32.u32", general<u32, u32, 3, [](u32 a, u32 b, u32 c, s64 x) { return dot4<u8, u8>(a, b, c, x); }>);
    put("dp4a.u32.s32", general<u32, u32, 3, [](u32 a, u32 b, u32 c, s64 x) { return dot4<u8, s8>(a, b, c, x); }>);
    put("dp4a.s32.u32", general<u32, u32, 3, [](u32 a, u32 b, u32 c, s64 x) { return dot4<s8, u8>(a, b, c, x); }>);
    put("dp4a.s32.s32", general<u32, u32, 3, [](u32 a, u32 b, u32 c, s64 x) { return dot4<s8, s8>(a, b, c, x); }>);
    put("dp2a.u32.u32", general<u32, u32, 3, [](u32 a, u32 b, u32 c, s64 x) { return dot2<u16, u8>(a, b, c, x); }>);
    put("dp2a.u32.s32", general<u32, u32, 3, [](u32 a, u32 b, u32 c, s64 x) { return dot2<u16, s8>(a, b, c, x); }>);
    put("dp2a.s32.u32", general<u32, u32, 3, [](u32 a, u32 b, u32 c, s64 x) { return dot2<s16, u8>(a, b, c, x); }>);
    put("dp2a.s32.s32", general<u32, u32, 3, [](u32 a, u32 b, u32 c, s64 x) { return dot2<s16, s8>(a, b, c, x); }>);
    put("carrying.u32", carrying<u32>), put("carrying.u64", carrying<u64>);

    add_floats<float>(t, "f32"), add_floats<double>(t, "f64"), add_floats<f16>(t, "f16"), add_floats<bf16>(t, "bf16");
    add_floats<Pair<f16>>(t, "f16x2"), add_floats<Pair<bf16>>(t, "bf16x2"), add_floats<Pair<float>>(t, "f32x2");
    add_signs<u32, 0x8000u>(t, "f16"), add_signs<u32, 0x8000u>(t, "bf16"), add_signs<u32, 0x80008000u>(t, "f16x2"),
        add_signs<u32, 0x80008000u>(t, "bf16x2");
    add_signs<u64, u64(1) << 63>(t, "f64");
    put("abs.f32", floating<float, 1, [](float a, s64) { return std::abs(a); }>),
        put("neg.f32", floating<float, 1, [](float a, s64) { return -a; }>);
    put("copysign.f32", general<u32, u32, 2, [](u32 a, u32 b, u32, s64) { return (a & 0x80000000u) | (b & 0x7fffffffu); }>);
    put("copysign.f64", integer<u64, u64, 2, [](u64 a, u64 b) { return (a & u64(1) << 63) | (b & ~(u64(1) << 63)); }>);
    put("div.f32", floating<float, 2, [](float a, float b, s64) { return a / b; }>),
        put("div.f64", floating<double, 2, [](double a, double b, s64) { return a / b; }>);
    put("div.full.f32", floating<float, 2, [](float a, float b, s64) { return float(double(a) / double(b)); }>);
    put("div.approx.f32", floating<float, 2, [](float a, float b, s64) { return divide_approximately(a, b); }>);
    put("rcp.f32", floating<float, 1, [](float a, s64) { return 1.0f / a; }>),
        put("rcp.f64", floating<double, 1, [](double a, s64) { return 1.0 / a; }>);
    put("sqrt.f32", floating<float, 1, [](float a, s64) { return std::sqrt(a); }>),
        put("sqrt.f64", floating<double, 1, [](double a, s64) { return std::sqrt(a); }>);
    put("rcp.approx.f32", floating<float, 1, [](float a, s64) { return float(1.0 / double(a)); }>);
    put("sqrt.approx.f32", floating<float, 1, [](float a, s64) { return float(std::sqrt(double(a))); }>);
    put("rsqrt.approx.f32", floating<float, 1, [](float a, s64) { return float(1.0 / std::sqrt(double(a))); }>);
    put("rsqrt.approx.f64", floating<double, 1, [](double a, s64) { return 1.0 / std::sqrt(a); }>);
    put("rcp.approx.ftz.f64", floating<double, 1, [](double a, s64) { return upper(flushed(1.0 / upper(flushed(a)))); }>);
    put("rsqrt.approx.ftz.f64", floating<double, 1, [](double a, s64) { return upper(flushed(1.0 / std::sqrt(upper(flushed(a))))); }>);
    put("sin.approx.f32", floating<float, 1, [](float a, s64) { return float(std::sin(double(a))); }>);
    put("cos.approx.f32", floating<float, 1, [](float a, s64) { return float(std::cos(double(a))); }>);
    put("lg2.approx.f32", floating<float, 1, [](float a, s64) { return float(std::log2(double(a))); }>);
    put("add.f32.f16", mixed<f16, 2, 1>), put("sub.f32.f16", mixed<f16, 2, -1>), put("fma.f32.f16", mixed<f16, 3, 1>);
    put("add.f32.bf16", mixed<bf16, 2, 1>), put("sub.f32.bf16", mixed<bf16, 2, -1>), put("fma.f32.bf16", mixed<bf16, 3, 1>);
    add_float_comparisons<float>(t, "f32"), add_float_comparisons<double>(t, "f64"), add_float_comparisons<f16>(t, "f16"),
        add_float_comparisons<bf16>(t, "bf16");
    put("testp.f32", testp<float>), put("testp.f64", testp<double>);

    for_all_types([&]<class D>(const char* d) {
      for_all_types([&]<class S>(const char* s) { t[std::string("cvt.") + d + "." + s] = {cvt<D, S>, kPlain}; });
    });
    put("cvt.f16x2.f32", cvt_pair<f16>), put("cvt.bf16x2.f32", cvt_pair<bf16>);
    put("cvt.tf32.f32", [](Warp& w, const Instruction& i, u32 m) {
      EACH_LANE(m) w.out<u32>(i.x[0])[l] = round_tf32(w.in<u32>(i.x[1])[l], i.b);
    });

    put("mov.b32", mov<u32>), put("mov.b64", mov<u64>), put("pack", pack), put("unpack", unpack);
    put("selp.b32", selp<u32>), put("selp.b64", selp<u64>), put("logic", logic);
    put("slct.b32.s32", slct<u32, s32>), put("slct.b64.s32", slct<u64, s32>), put("slct.b32.f32", slct<u32, float>),
        put("slct.b64.f32", slct<u64, float>);
    put("isspacep", is_space), put("offset64", offset64), put("clock", read_clock), put("nothing", nothing), put("activemask", active_mask);

    put("ld", load), put("st", store), put("atom", atomic), put("cp.async", copy_async), put("cp.async.commit_group", copy_commit),
        put("cp.async.wait_group", copy_wait);

    put("bra", nullptr, kBranch), put("brx.idx", nullptr, kTable), put("exit", nullptr, kExit), put("trap", nullptr, kTrap);
    put("bar", nullptr, kAligned), put("barrier", nullptr, kBarrier), put("bar.warp.sync", nullptr, kWarpSync);
    put("shfl.sync", shfl, kWarpSync), put("vote.sync", vote, kWarpSync), put("elect.sync", elect, kWarpSync);
    put("match.sync.b32", match<u32>, kWarpSync), put("match.sync.b64", match<u64>, kWarpSync);
    put("redux.sync.add", redux<u32, [](u32 a, u32 b) { return a + b; }>, kWarpSync);
    put("redux.sync.min.u32", redux<u32, [](u32 a, u32 b) { return std::min(a, b); }>, kWarpSync);
    put("redux.sync.max.u32", redux<u32, [](u32 a, u32 b) { return std::max(a, b); }>, kWarpSync);
    put("redux.sync.min.s32", redux<s32, [](s32 a, s32 b) { return std::min(a, b); }>, kWarpSync);
    put("redux.sync.max.s32", redux<s32, [](s32 a, s32 b) { return std::max(a, b); }>, kWarpSync);
    put("redux.sync.and", redux<u32, [](u32 a, u32 b) { return a & b; }>, kWarpSync);
    put("redux.sync.or", redux<u32, [](u32 a, u32 b) { return a | b; }>, kWarpSync);
    put("redux.sync.xor", redux<u32, [](u32 a, u32 b) { return a ^ b; }>, kWarpSync);
    put("ldmatrix", ldmatrix, kWarpSync), put("stmatrix", stmatrix, kWarpSync);
    put("mma", mma, kWarpSync), put("mma.f64", mma_f64, kWarpSync);
    put("wmma.load", wmma_load, kWarpSync), put("wmma.store", wmma_store, kWarpSync), put("wmma.mma", wmma_mma, kWarpSync);
    return t;
  }();
  return built;
}

}  // namespace

// ---- what Python calls -------------------------------------------------------------------------------------------------------------

extern "C" {

// A handle of a handler, or 0: the machine does not know it.
s64 ptx_handler(const char* name) {
  const auto found = table().find(name);
  return found == table().end() ? 0 : s64(reinterpret_cast<intptr_t>(&found->second));
}

struct Row {
  s64 handler, a, b;
  s32 guard, negate, first, count;
};

void* ptx_program(const Row* rows, s64 n, const u32* operands, s64 operand_count, const u64* constants, const u8* constant_wide,
                  s64 constant_count, const s32* specials, s64 special_count, const s32* targets, s64 target_count, u64 frame,
                  u64 predicates, u64 local) {
  auto p = std::make_unique<Program>();
  p->operands.assign(operands, operands + operand_count);
  for (s64 k = 0; k < n; ++k) {
    const Row& r = rows[k];
    const Entry& e = *reinterpret_cast<const Entry*>(intptr_t(r.handler));
    p->code.push_back({e.run, e.control, r.guard, r.negate ? kAll : 0u, p->operands.data() + r.first, r.a, r.b});
  }
  for (s64 k = 0; k < constant_count; ++k)
    for (int l = 0; l < kLanes; ++l) {
      const char* from = reinterpret_cast<const char*>(&constants[k]);
      p->constants.insert(p->constants.end(), from, from + (constant_wide[k] ? 8 : 4));
    }
  p->specials.assign(specials, specials + 2 * special_count);
  p->targets.assign(targets, targets + target_count);
  p->frame = frame, p->predicates = predicates, p->local = local;
  return p.release();
}
void ptx_free(void* program) { delete static_cast<Program*>(program); }

struct BufferRow {
  u64 base, size;
  u8* state;
  Traffic traffic;
};

struct LaunchRow {
  u32 grid[3], block[3];
  const u8* parameters;
  u64 parameter_bytes, static_shared, dynamic_shared, seed, step_limit;
  BufferRow* buffers;
  u64 buffer_count;
  u64 *lanes, *warps;
  Counters counters;
  // The finding, if any: `pc` is then not negative.
  s64 pc, finding_block, finding_warp, finding_lane;
  char kind[32], detail[512];
};

void ptx_launch(void* program, LaunchRow* row) {
  Launch launch{};
  launch.program = static_cast<const Program*>(program);
  const Program& p = *launch.program;
  std::copy_n(row->grid, 3, launch.grid), std::copy_n(row->block, 3, launch.block);
  launch.parameters = row->parameters, launch.parameter_bytes = row->parameter_bytes;
  launch.dynamic_shared = row->dynamic_shared, launch.shared_bytes = row->static_shared + row->dynamic_shared;
  launch.seed = row->seed, launch.step_limit = row->step_limit, launch.lanes = row->lanes, launch.warps = row->warps;
  launch.next_epoch = kFirstEpoch, launch.next_set = kSet, launch.stuck_warp = -1;
  launch.random.seed(row->seed);
  for (u64 k = 0; k < row->buffer_count; ++k) {
    const BufferRow& b = row->buffers[k];
    launch.buffers.push_back({b.base, b.size, b.state, k, nullptr, nullptr, nullptr, 0, 0, {}});
  }

  Block block{};
  block.launch = &launch;
  const u64 threads = u64(launch.block[0]) * launch.block[1] * launch.block[2], warps = (threads + kLanes - 1) / kLanes;
  block.shared.resize(launch.shared_bytes), block.pending.resize(launch.shared_bytes);
  block.writes.resize(launch.shared_bytes), block.reads.resize(launch.shared_bytes);
  // What a register or a byte holds before it is written is nobody's guess.
  std::memset(block.shared.data(), 0xA5, block.shared.size());
  const u64 frame = (p.frame + 63) / 64 * 64;
  std::vector<u64> frames(frame * warps / 8, 0xA5A5A5A5A5A5A5A5u);
  std::vector<u32> predicates(p.predicates * warps, 0xA5A5A5A5u);
  block.warps.resize(warps);
  for (u64 k = 0; k < warps; ++k) {
    Warp& w = block.warps[k];
    w.block = &block, w.program = &p, w.index = int(k);
    w.bases[0] = reinterpret_cast<char*>(frames.data()) + k * frame, w.bases[1] = const_cast<char*>(p.constants.data());
    w.predicates = predicates.data() + k * p.predicates;
    w.predicates[0] = kAll;
    w.local.resize(p.local * kLanes, 0xA5), w.local_state.resize(p.local * kLanes);
    w.last_buffer = nullptr;
  }

  row->pc = -1;
  const u64 blocks = u64(launch.grid[0]) * launch.grid[1] * launch.grid[2];
  std::vector<u64> order;
  if (launch.seed) {
    for (u64 k = 0; k < blocks; ++k) order.push_back(k);
    std::shuffle(order.begin(), order.end(), launch.random);
  }
  try {
    for (u64 k = 0; k < blocks; ++k) {
      block.start(launch.seed ? order[k] : k);
      block.run();
    }
  } catch (const Finding& f) {
    const Warp& w = block.warps[u64(launch.stuck_warp >= 0 ? launch.stuck_warp : launch.running)];
    row->pc = w.pc, row->finding_block = s64(block.number), row->finding_warp = w.index, row->finding_lane = f.lane;
    snprintf(row->kind, sizeof row->kind, "%s", f.kind.c_str()), snprintf(row->detail, sizeof row->detail, "%s", f.detail.c_str());
  }
  row->counters = launch.counters;
  for (Buffer& b : launch.buffers) {
    Traffic& t = b.traffic;
    if (b.writes) {
      u64 read_sector = ~u64(0), write_sector = ~u64(0);
      for (u64 j = b.first; j < b.last; ++j) {
        const u64 sector = (b.base + j) / 32;
        if (b.reads[j]) t.unique_read += 1, t.unique_sectors_read += sector != read_sector, read_sector = sector;
        if (b.writes[j]) t.unique_written += 1, t.unique_sectors_written += sector != write_sector, write_sector = sector;
      }
      std::free(b.writes), std::free(b.reads), std::free(b.atomics);
    }
    row->buffers[b.name].traffic = t;
  }
}

}  // extern "C"
