// The sweeps for dense tensors on the CPU: each one pass over memory. CMakeLists.txt builds this, native.py calls it.
//
// A table has one row per piece of a tensor: how many elements, then the addresses of their x, g, slot, x_t (x as it was
// before the base's step) and rest (0: none). What is added up in one piece does not depend on the number of threads.
// Plain C types only: nothing here knows of torch, so that one build serves every version of it.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace {

constexpr int LANES = 32;  // sums beside each other: some vectors, so that one need not wait for the other
constexpr int64_t SHARE = 64 * 1024;  // elements that are worth another thread

struct bfloat16 {
    uint16_t bits;
};

inline float wide(bfloat16 v) {
    const uint32_t bits = uint32_t(v.bits) << 16;
    float f;
    std::memcpy(&f, &bits, sizeof f);
    return f;
}
inline float wide(float v) { return v; }
inline double wide(double v) { return v; }

// x from the parameter and, where that is bfloat16, its rest: the low bits of a float. Others have none to look at.
inline float join(float v, const int16_t*, int64_t) { return v; }
inline double join(double v, const int16_t*, int64_t) { return v; }
inline float join(bfloat16 v, const int16_t* rest, int64_t k) {
    int32_t magnitude = (int32_t(v.bits & 0x7fff) << 16) + rest[k];
    magnitude = magnitude < 0 ? 0 : magnitude;  // an edit has put a 0 beside a negative rest
    const uint32_t bits = uint32_t(magnitude) | uint32_t(v.bits & 0x8000) << 16;
    float f;
    std::memcpy(&f, &bits, sizeof f);
    return f;
}

// The inverse: stores x, and its rest.
inline void put(float x, float* stored, int16_t*, int64_t k) { stored[k] = x; }
inline void put(double x, double* stored, int16_t*, int64_t k) { stored[k] = x; }
inline void put(float x, bfloat16* stored, int16_t* rest, int64_t k) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    int32_t magnitude = int32_t(bits & 0x7fffffff);
    magnitude = magnitude > 0x7fc00000 ? 0x7fc00000 : magnitude;  // one NaN for all: others would wrap around
    const int32_t high = (magnitude + 0x8000) >> 16;
    rest[k] = int16_t(magnitude - (high << 16));
    stored[k].bits = uint16_t(high | (bits >> 16 & 0x8000));
}

// Sums by lane, so that their order, and with it every bit, does not hang on how a compiler cuts a loop. In double: what
// a float holds of a sum would depend on how the tensor is cut into pieces, and so on the number of processes. What a W
// cannot hold is infinite all the same: then the base's state, which is in W, could not hold it either.
template <class W>
struct Sum {
    double lanes[LANES] = {};
    void add(int j, double a, double b) { lanes[j] += a * b; }
    double total() const {
        double sum = 0;
        for (double lane : lanes) sum += lane;
        return std::fabs(sum) > std::numeric_limits<W>::max() ? std::numeric_limits<double>::infinity() : sum;
    }
};

// Calls body(k, j) for every element k, j its lane, and before that first(k, n) for every n of them.
template <class First, class Body>
inline void by_lanes(int64_t count, First first, Body body) {
    int64_t k = 0;
    for (; k + LANES <= count; k += LANES) {
        first(k, LANES);
#pragma omp simd
        for (int j = 0; j < LANES; ++j) body(k + j, j);
    }
    first(k, count - k);
    for (int j = 0; k + j < count; ++j) body(k + j, j);
}

// Copies elements of x to x_t, past the caches: the base steps before they are read again, and a line that is written
// whole need not be read first. The caller ends with flush().
template <class X>
inline void put_aside(const X* x, X* before, int64_t count) {
    const int64_t size = count * int64_t(sizeof(X));
    const char* from = reinterpret_cast<const char*>(x);
    char* to = reinterpret_cast<char*>(before);
    int64_t k = 0;
#ifdef __SSE2__
    for (; k + 16 <= size; k += 16) {  // torch aligns the buffer; tensors and pieces begin at whole lines of it
        const __m128i some = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + k));
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + k), some);
    }
#endif
    std::memcpy(to + k, from + k, size_t(size - k));
}

inline void flush() {
#ifdef __SSE2__
    _mm_sfence();
#endif
}

// <d,g>, <d,x>, |g|^2, |x|^2, |d|^2 of a piece. DIFFERENCE: d = x - slot, else it is the slot.
template <bool DIFFERENCE, class X, class W>
void measure(const int64_t* row, double* sums) {
    const X *__restrict x = reinterpret_cast<X*>(row[1]), *__restrict g = reinterpret_cast<X*>(row[2]);
    const W* __restrict slot = reinterpret_cast<W*>(row[3]);
    X* __restrict before = reinterpret_cast<X*>(row[4]);
    const int16_t* __restrict rest = reinterpret_cast<int16_t*>(row[5]);
    Sum<W> delta_grad, delta_x, grad_sq, x_sq, delta_sq;
    const auto aside = [=](int64_t k, int64_t n) { put_aside(x + k, before + k, n); };
    by_lanes(row[0], aside, [&](int64_t k, int j) {
        const W xk = join(x[k], rest, k), gk = wide(g[k]), dk = DIFFERENCE ? xk - slot[k] : slot[k];
        delta_grad.add(j, dk, gk);
        delta_x.add(j, dk, xk);
        grad_sq.add(j, gk, gk);
        x_sq.add(j, xk, xk);
        delta_sq.add(j, dk, dk);
    });
    flush();
    const double found[] = {delta_grad.total(), delta_x.total(), grad_sq.total(), x_sq.total(), delta_sq.total()};
    std::memcpy(sums, found, sizeof found);
}

// x += by[0]*d + by[1]*u and slot += by[2]*d + by[3]*u in a piece. u is 0 where it is not finite. |u|^2, and |d|^2 of
// where x is left.
template <bool DIFFERENCE, class X, class W>
void move(const int64_t* row, const W* by, double* sums) {
    X* __restrict x = reinterpret_cast<X*>(row[1]);
    W* __restrict slot = reinterpret_cast<W*>(row[3]);
    const X* __restrict before = reinterpret_cast<X*>(row[4]);
    int16_t* __restrict rest = reinterpret_cast<int16_t*>(row[5]);
    // y + 1*(x - y) is to be x itself, as torch.lerp has it: the difference may have lost the digits of x.
    const bool from_x = DIFFERENCE && by[2] >= W(0.5);
    const W x_delta = by[0], x_update = by[1], slot_delta = from_x ? by[2] - 1 : by[2], slot_update = by[3];
    Sum<W> update_sq, left_sq;
    by_lanes(row[0], [](int64_t, int64_t) {}, [&](int64_t k, int j) {
        const W moved = wide(x[k]) - wide(before[k]), here = join(before[k], rest, k);
        const W u = std::fabs(moved) <= std::numeric_limits<W>::max() ? moved : W(0);
        const W y = slot[k], d = DIFFERENCE ? here - y : y;
        const W there = std::fma(u, x_update, std::fma(d, x_delta, here));
        const W kept = std::fma(u, slot_update, std::fma(d, slot_delta, from_x ? here : y));
        put(there, x, rest, k);
        slot[k] = kept;
        const W left = DIFFERENCE ? there - kept : kept;
        update_sq.add(j, u, u);
        left_sq.add(j, left, left);
    });
    sums[0] = update_sq.total(), sums[1] = left_sq.total();
}

// Calls body(i) for every piece. Each thread takes about the same number of elements, in pieces beside each other; the
// caller takes the last ones. The threads end with the call: a fork never finds any, and torch's are not touched.
template <class Body>
void each(int64_t pieces, int threads, const int64_t* table, Body body) {
    int64_t count = 0;
    for (int64_t i = 0; i < pieces; ++i) count += table[6 * i];
    const int64_t enough = 1 + count / SHARE, parts = enough < threads ? enough : threads;
    const auto range = [=](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) body(i);
    };
    std::vector<std::thread> others;
    int64_t begin = 0, seen = 0;
    for (int64_t part = 1; part < parts; ++part) {
        int64_t end = begin;
        while (seen < count / parts * part) seen += table[6 * end++];
        try {
            others.emplace_back(range, begin, end);
        } catch (...) {  // the system gives no more threads
            range(begin, end);
        }
        begin = end;
    }
    range(begin, pieces);
    for (auto& other : others) other.join();
}

}  // namespace

// The factors by their address: a Python float would have to be read from a tensor first. `moved` becomes 1 in here, so
// that a caller that is interrupted before its next line can tell that all is done.
#define SWEEPS(NAME, X, W)                                                                                           \
    extern "C" void measure_##NAME(int64_t pieces, int difference, int threads, const int64_t* table, double* sums) {\
        const auto piece = difference ? measure<true, X, W> : measure<false, X, W>;                                  \
        each(pieces, threads, table, [=](int64_t i) { piece(table + 6 * i, sums + 5 * i); });                        \
    }                                                                                                                \
    extern "C" void move_##NAME(int64_t pieces, int difference, int threads, const int64_t* table, const W* motion,  \
                                double* sums, int64_t* moved) {                                                      \
        const auto piece = difference ? move<true, X, W> : move<false, X, W>;                                        \
        each(pieces, threads, table, [=](int64_t i) { piece(table + 6 * i, motion, sums + 2 * i); });                \
        *moved = 1;                                                                                                  \
    }

SWEEPS(float32, float, float)
SWEEPS(float64, double, double)
SWEEPS(bfloat16, bfloat16, float)
