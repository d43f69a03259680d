// Activation functions of MLPs.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace nvtripy_portable::ISA {

// x / (1 + e^-z): sigmoid linear units, and GELU's tanh approximation with z = sqrt(8 / pi) * (x + 0.044715 x^3).
inline F gated(F x, F z) { return div(x, add(set1(1), exp(sub(zero(), z)))); }

// x * P(a normal variable < x), of which P(> |x|) = erfc(|x| / sqrt(2)) / 2 is by formula 7.1.26 of Abramowitz and Stegun,
// Handbook of Mathematical Functions: off by 1e-7 at most. Beyond 30 it is 0.
inline F gelu(F x) {
    const F size = min(max(x, sub(zero(), x)), set1(30));
    const F z = mul(size, set1(0.70710678f));
    const F t = div(set1(1), fma(z, set1(0.3275911f), set1(1)));
    F p = set1(1.061405429f);
    p = fma(p, t, set1(-1.453152027f));
    p = fma(p, t, set1(1.421413741f));
    p = fma(p, t, set1(-0.284496736f));
    p = fma(p, t, set1(0.254829592f));
    const F beyond = mul(mul(mul(p, t), set1(0.5f)), exp(sub(zero(), mul(z, z))));
    return sub(max(x, zero()), mul(size, beyond));
}

inline F activate(F x, Activation activation) {
    switch (activation) {
        case Activation::gelu_tanh: {
            const F cubic = fma(mul(x, x), set1(0.044715f), set1(1));
            return gated(x, mul(mul(x, cubic), set1(1.5957691216057308f)));
        }
        case Activation::gelu_erf: return gelu(x);
        case Activation::relu: return max(x, zero());
        case Activation::relu2: {
            const F positive = max(x, zero());
            return mul(positive, positive);
        }
        case Activation::silu: return gated(x, x);
        default: return x;
    }
}

// y = gate(first half of x) * second half, of (2 * width,) numbers; x and y are not the same.
inline void apply_gate(const float* x, Activation gate, int64_t width, float* y) {
    int64_t i = 0;
    for (; i + W <= width; i += W) store(y + i, mul(activate(load(x + i), gate), load(x + width + i)));
    if (i < width)
        store_part(y + i, mul(activate(load_part<F32>(x + i, width - i), gate), load_part<F32>(x + width + i, width - i)),
                   width - i);
}

}  // namespace nvtripy_portable::ISA
