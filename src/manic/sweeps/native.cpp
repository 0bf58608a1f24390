// The sweeps for dense tensors on the CPU: each one pass over memory. native.py builds and calls this.
//
// A table has one row per piece of a tensor: how many elements, then the addresses of their x, g, slot, x_t (x as it was
// before the base's step) and rest (0: none). What is added up in one piece does not depend on the number of threads.
// Plain C types only: nothing here knows of torch, so that one build serves every version of it.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace {

constexpr int64_t LAP = 4096;  // elements that are added up in W before the sum goes to a double
constexpr int LANES = 16;      // sums beside each other: one or two vectors

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

// What a parameter cannot hold of x: nothing, or the low bits of a float.
struct None {};
template <class X>
struct RestOf {
    using type = None;
};
template <>
struct RestOf<bfloat16> {
    using type = int16_t;
};

inline float join(float v, None) { return v; }
inline double join(double v, None) { return v; }
inline float join(bfloat16 v, int16_t rest) {
    int32_t magnitude = (int32_t(v.bits & 0x7fff) << 16) + rest;
    magnitude = magnitude < 0 ? 0 : magnitude;  // an edit has put a 0 beside a negative rest
    const uint32_t bits = uint32_t(magnitude) | uint32_t(v.bits & 0x8000) << 16;
    float f;
    std::memcpy(&f, &bits, sizeof f);
    return f;
}

inline void split(float x, float& stored, None&) { stored = x; }
inline void split(double x, double& stored, None&) { stored = x; }
inline void split(float x, bfloat16& stored, int16_t& rest) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    int32_t magnitude = int32_t(bits & 0x7fffffff);
    magnitude = magnitude > 0x7fc00000 ? 0x7fc00000 : magnitude;  // one NaN for all: others would wrap around
    const int32_t high = (magnitude + 0x8000) >> 16;
    rest = int16_t(magnitude - (high << 16));
    stored.bits = uint16_t(high | (bits >> 16 & 0x8000));
}

template <class X, class W>
struct Piece {
    using Rest = typename RestOf<X>::type;
    int64_t count;
    X* x;
    const X* g;
    W* slot;
    X* before;
    Rest* rest;
};

// `none[k]` is no memory: pieces without a rest have no address for it.
template <class R>
inline R at(const R* rest, int64_t k) { return rest[k]; }
template <>
inline None at<None>(const None*, int64_t) { return {}; }
template <class R>
inline void put(R* rest, int64_t k, R value) { rest[k] = value; }
template <>
inline void put<None>(None*, int64_t, None) {}

// Calls body(k, j) for every element k of a lap, j its lane. Sums are kept by lane, so that their order, and with it
// every bit, does not hang on how a compiler cuts a loop.
template <class Body>
inline void by_lanes(int64_t lap, int64_t end, Body body) {
    int64_t k = lap;
    for (; k + LANES <= end; k += LANES) {
#pragma omp simd
        for (int j = 0; j < LANES; ++j) body(k + j, j);
    }
    for (int j = 0; k + j < end; ++j) body(k + j, j);
}

template <class T, class Sum>
inline void add_up(const T (&lanes)[LANES], Sum& sum) {
    for (int j = 0; j < LANES; ++j) sum += lanes[j];
}

// <d,g>, <d,x>, |g|^2, |x|^2, |d|^2. DIFFERENCE: d = x - slot, else it is the slot.
template <bool DIFFERENCE, class X, class W>
void measure(const Piece<X, W>& p, double* sums) {
    const X *__restrict x = p.x, *__restrict g = p.g;
    const W* __restrict slot = p.slot;
    X* __restrict before = p.before;
    const auto* __restrict rest = p.rest;
    double delta_grad = 0, delta_x = 0, grad_sq = 0, x_sq = 0, delta_sq = 0;
    for (int64_t lap = 0; lap < p.count; lap += LAP) {
        W dg[LANES] = {}, dx[LANES] = {}, gg[LANES] = {}, xx[LANES] = {}, dd[LANES] = {};
        by_lanes(lap, p.count < lap + LAP ? p.count : lap + LAP, [&](int64_t k, int j) {
            const X stored = x[k];  // a copy from memory to memory would keep gcc from vectorising bfloat16
            before[k] = stored;
            const W xk = join(stored, at(rest, k)), gk = wide(g[k]), dk = DIFFERENCE ? xk - slot[k] : slot[k];
            dg[j] += dk * gk;
            dx[j] += dk * xk;
            gg[j] += gk * gk;
            xx[j] += xk * xk;
            dd[j] += dk * dk;
        });
        add_up(dg, delta_grad), add_up(dx, delta_x), add_up(gg, grad_sq), add_up(xx, x_sq), add_up(dd, delta_sq);
    }
    const double found[] = {delta_grad, delta_x, grad_sq, x_sq, delta_sq};
    std::memcpy(sums, found, sizeof found);
}

// u, and 0 where it is not finite.
template <class X>
inline auto update(X after, X before) {
    const auto moved = wide(after) - wide(before);
    using W = decltype(wide(after));
    return std::fabs(moved) <= std::numeric_limits<W>::max() ? moved : W(0);
}

// |u|^2, while x is x_t + u.
template <class X, class W>
double update_sq(const Piece<X, W>& p) {
    const X *__restrict x = p.x, *__restrict before = p.before;
    double sum = 0;
    for (int64_t lap = 0; lap < p.count; lap += LAP) {
        W uu[LANES] = {};
        by_lanes(lap, p.count < lap + LAP ? p.count : lap + LAP, [&](int64_t k, int j) {
            const W u = update(x[k], before[k]);
            uu[j] += u * u;
        });
        add_up(uu, sum);
    }
    return sum;
}

// x += x_delta*d + x_update*u and slot += slot_delta*d + slot_update*u.
template <class W>
struct Motion {
    W x_delta, x_update, slot_delta, slot_update;
};

// Returns |u|^2.
template <bool DIFFERENCE, class X, class W>
double move(const Piece<X, W>& p, const Motion<W> by) {
    X* __restrict x = p.x;
    W* __restrict slot = p.slot;
    const X* __restrict before = p.before;
    auto* __restrict rest = p.rest;
    // y + 1*(x - y) is to be x itself, as torch.lerp has it: the difference may have lost the digits of x.
    const bool from_x = DIFFERENCE && by.slot_delta >= W(0.5);
    const W slot_delta = from_x ? by.slot_delta - 1 : by.slot_delta;
    double sum = 0;
    for (int64_t lap = 0; lap < p.count; lap += LAP) {
        W uu[LANES] = {};
        by_lanes(lap, p.count < lap + LAP ? p.count : lap + LAP, [&](int64_t k, int j) {
            const W u = update(x[k], before[k]), here = join(before[k], at(rest, k));
            const W y = slot[k], d = DIFFERENCE ? here - y : y;
            X stored;
            typename Piece<X, W>::Rest left{};
            split(std::fma(u, by.x_update, std::fma(d, by.x_delta, here)), stored, left);
            x[k] = stored;
            put(rest, k, left);
            slot[k] = std::fma(u, by.slot_update, std::fma(d, slot_delta, from_x ? here : y));
            uu[j] += u * u;
        });
        add_up(uu, sum);
    }
    return sum;
}

template <class X, class W>
Piece<X, W> piece(const int64_t* table, int64_t i) {
    const int64_t* row = table + 6 * i;
    return {row[0],
            reinterpret_cast<X*>(row[1]),
            reinterpret_cast<const X*>(row[2]),
            reinterpret_cast<W*>(row[3]),
            reinterpret_cast<X*>(row[4]),
            reinterpret_cast<typename Piece<X, W>::Rest*>(row[5])};
}

template <class X, class W>
void measure_all(int64_t pieces, const int64_t* table, bool difference, double* sums, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < pieces; ++i) {
        const auto p = piece<X, W>(table, i);
        difference ? measure<true>(p, sums + 5 * i) : measure<false>(p, sums + 5 * i);
    }
}

template <class X, class W>
void update_sq_all(int64_t pieces, const int64_t* table, double* sums, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < pieces; ++i) sums[i] = update_sq(piece<X, W>(table, i));
}

template <class X, class W>
void move_all(int64_t pieces, const int64_t* table, bool difference, const W* by, double* sums, int threads) {
    const Motion<W> motion = {by[0], by[1], by[2], by[3]};
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < pieces; ++i) {
        const auto p = piece<X, W>(table, i);
        sums[i] = difference ? move<true>(p, motion) : move<false>(p, motion);
    }
}

}  // namespace

// The factors by their address: a Python float would have to be read from a tensor first. `moved` becomes 1 in here, so
// that whoever is interrupted between this call and its next line knows that all is done.
#define SWEEPS(NAME, X, W)                                                                                           \
    extern "C" void measure_##NAME(int64_t pieces, const int64_t* table, int difference, double* sums, int threads) {\
        measure_all<X, W>(pieces, table, difference, sums, threads);                                                 \
    }                                                                                                                \
    extern "C" void update_sq_##NAME(int64_t pieces, const int64_t* table, int, double* sums, int threads) {         \
        update_sq_all<X, W>(pieces, table, sums, threads);                                                           \
    }                                                                                                                \
    extern "C" void move_##NAME(int64_t pieces, const int64_t* table, int difference, const W* motion,               \
                                double* sums, int64_t* moved, int threads) {                                         \
        move_all<X, W>(pieces, table, difference, motion, sums, threads);                                            \
        *moved = 1;                                                                                                  \
    }

SWEEPS(float32, float, float)
SWEEPS(float64, double, double)
SWEEPS(bfloat16, bfloat16, float)
