// The sweeps of sweeps.py for dense tensors on the CPU: each one pass over memory. kernels.py builds and calls this.
//
// A table has one row per piece of a tensor: how many elements, then the addresses of their x, g, x_ref and Δ. What is
// added up in one piece does not depend on the number of threads. Plain C types only: nothing here knows of torch, so
// that one build serves every version of it.

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

template <class X, class W>
inline X narrow(W v) { return v; }
template <>
inline bfloat16 narrow<bfloat16, float>(float v) {  // round to nearest, ties to even, as torch does
    uint32_t bits;
    std::memcpy(&bits, &v, sizeof bits);
    return {uint16_t(v != v ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

inline uint32_t bits_of(bfloat16 v) { return v.bits; }
inline uint32_t bits_of(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, sizeof bits);
    return bits;
}
inline uint64_t bits_of(double v) {
    uint64_t bits;
    std::memcpy(&bits, &v, sizeof bits);
    return bits;
}

// x as it is stored where it stands at x_ref + S·Δ; rounded once, as torch.addcmul does.
template <class X, class W>
inline X at(W ref, W delta, W scale) {
    return narrow<X>(std::fma(delta, scale, ref));
}

template <class X, class W>
struct Piece {
    int64_t count;
    X* x;
    const X* g;
    W* ref;
    W* delta;
};

// The bits of x, an odd number of times that depends on the place: so a change in any one is seen in their sum, and an
// exchange of two as well. The upper half, with the sign, goes into the lower one, or an even number would lose it.
template <class X>
inline auto mark_of(X x, int64_t k) {
    const auto bits = bits_of(x);
    return (bits ^ bits >> 4 * sizeof bits) * ((uint32_t(k) * 0x9E3779B1u) >> 8 | 1);
}

// By it an edit of x is told: what move left, and what measure finds.
struct Mark {
    double delta_x;
    uint64_t bits;
};

// Calls body(k, j) for every element k of a lap, j its lane. Sums are kept by lane, so that their order, and with it
// every bit, does not hang on how a compiler cuts a loop: measure must find what move has left.
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

template <class X, class W>
Mark measure(const Piece<X, W>& p, double* sums) {
    const X *x = p.x, *g = p.g;
    const W* delta = p.delta;
    double delta_grad = 0, delta_x = 0, grad_sq = 0, x_sq = 0, delta_sq = 0;
    uint64_t bits = 0;
    for (int64_t lap = 0; lap < p.count; lap += LAP) {
        W dg[LANES] = {}, dx[LANES] = {}, gg[LANES] = {}, xx[LANES] = {}, dd[LANES] = {};
        decltype(bits_of(X())) b[LANES] = {};
        by_lanes(lap, p.count < lap + LAP ? p.count : lap + LAP, [&](int64_t k, int j) {
            const W xk = wide(x[k]), gk = wide(g[k]), dk = delta[k];
            dg[j] += dk * gk;
            dx[j] += dk * xk;
            gg[j] += gk * gk;
            xx[j] += xk * xk;
            dd[j] += dk * dk;
            b[j] += mark_of(x[k], k);
        });
        add_up(dg, delta_grad), add_up(dx, delta_x), add_up(gg, grad_sq), add_up(xx, x_sq), add_up(dd, delta_sq);
        add_up(b, bits);
    }
    const double found[] = {delta_grad, delta_x, grad_sq, x_sq, delta_sq};
    std::memcpy(sums, found, sizeof found);
    return {delta_x, bits};
}

template <class X, class W>
void anchor(const Piece<X, W>& p, W scale) {
    const X* __restrict x = p.x;
    W* __restrict ref = p.ref;
    const W* __restrict delta = p.delta;
    for (int64_t k = 0; k < p.count; ++k) {
        const W xk = wide(x[k]);
        ref[k] = xk != wide(at<X>(ref[k], delta[k], scale)) ? xk - delta[k] * scale : ref[k];
    }
}

// S_t, S_{t+1}, and what is kept of Δ before u is added, and after.
template <class W>
struct Motion {
    W before, after, keep, fade;
};

template <class X, class W>
Mark move(const Piece<X, W>& p, const Motion<W> by, bool counts) {
    X* __restrict x = p.x;
    W* __restrict ref = p.ref;
    W* __restrict delta = p.delta;
    const W largest = counts ? std::numeric_limits<W>::max() : W(-1);  // an update beyond it does not count
    const W follow = by.after * (1 - by.fade);
    double delta_x = 0;
    uint64_t bits = 0;
    for (int64_t lap = 0; lap < p.count; lap += LAP) {
        W dx[LANES] = {};
        decltype(bits_of(X())) b[LANES] = {};
        by_lanes(lap, p.count < lap + LAP ? p.count : lap + LAP, [&](int64_t k, int j) {
            const W u = wide(x[k]) - wide(at<X>(ref[k], delta[k], by.before));
            const W whole = delta[k] * by.keep + (std::fabs(u) <= largest ? u : W(0));
            const W r = std::fma(whole, follow, ref[k]), d = whole * by.fade;
            const X moved = at<X>(r, d, by.after);
            ref[k] = r;
            delta[k] = d;
            x[k] = moved;
            dx[j] += d * wide(moved);
            b[j] += mark_of(moved, k);
        });
        add_up(dx, delta_x), add_up(b, bits);
    }
    return {delta_x, bits};
}

template <class X, class W>
Piece<X, W> piece(const int64_t* table, int64_t i) {
    const int64_t* row = table + 5 * i;
    return {row[0], reinterpret_cast<X*>(row[1]), reinterpret_cast<const X*>(row[2]), reinterpret_cast<W*>(row[3]),
            reinterpret_cast<W*>(row[4])};
}

template <class X, class W>
void measure_all(int64_t pieces, const int64_t* table, W scale, const Mark* left, double* sums, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < pieces; ++i) {
        const auto p = piece<X, W>(table, i);
        const Mark found = measure(p, sums + 5 * i);
        if (left == nullptr || std::memcmp(&left[i], &found, sizeof found) != 0) anchor(p, scale);
    }
}

template <class X, class W>
void move_all(int64_t pieces, const int64_t* table, const W* by, const bool* ok, Mark* left, int threads) {
    const Motion<W> motion = {by[0], by[1], by[2], by[3]};
    const bool counts = ok == nullptr || *ok;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < pieces; ++i) left[i] = move(piece<X, W>(table, i), motion, counts);
}

}  // namespace

// Scales by their address: a Python float would have to be read from a tensor first.
#define SWEEPS(NAME, X, W)                                                                                     \
    extern "C" void measure_##NAME(int64_t pieces, const int64_t* table, const W* scale, const void* left,         \
                                   double* sums, int threads) {                                                    \
        measure_all<X, W>(pieces, table, *scale, static_cast<const Mark*>(left), sums, threads);                   \
    }                                                                                                              \
    extern "C" void move_##NAME(int64_t pieces, const int64_t* table, const W* motion, const bool* ok, void* left, \
                                int threads) {                                                                     \
        move_all<X, W>(pieces, table, motion, ok, static_cast<Mark*>(left), threads);                              \
    }

SWEEPS(float32, float, float)
SWEEPS(float64, double, double)
SWEEPS(bfloat16, bfloat16, float)
