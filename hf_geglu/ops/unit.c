/* The unit, activation(gate) * (value + offset), and its gradients: one pass each, for rows of float32 or bfloat16.
 *
 * Compiled on the machine that runs it, by `hf_geglu.ops.c_kernels`, once for each activation:
 *     cc -DACTIVATION=gelu ...
 * Plain loops, which the compiler turns into vector instructions; so nothing in them branches or calls a library.
 */

#include <stdint.h>

typedef uint16_t bfloat16;

static inline float from_bits(uint32_t bits) {
    union { uint32_t bits; float number; } both = {.bits = bits};
    return both.number;
}

static inline uint32_t to_bits(float number) {
    union { float number; uint32_t bits; } both = {.number = number};
    return both.bits;
}

static inline float wide_float32(float number) { return number; }
static inline float narrow_float32(float number) { return number; }
static inline float wide_bfloat16(bfloat16 number) { return from_bits((uint32_t)number << 16); }

/* To the nearest, ties to even. A NaN stays one: those that come of numbers in 16 bits have nothing in the lower half. */
static inline bfloat16 narrow_bfloat16(float number) {
    uint32_t bits = to_bits(number);
    return (bfloat16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

/* 2^t for t <= 0, 0 below 2^-126: 2^(whole part) by shifting it into the exponent, 2^(rest) by the polynomial of least
 * relative error (7.5e-8) over -1/2..1/2. Adding 1.5 * 2^23 rounds to a whole number, which stands in the lowest bits. */
static inline float exp2_negative(float t) {
    float shifted = t + 12582912.0f;
    float rest = t - (shifted - 12582912.0f);
    float power = from_bits((to_bits(shifted) << 23) + 0x3f800000u);
    float sum = 0.0013276472454890609f;
    sum = sum * rest + 0.009675540961325169f;
    sum = sum * rest + 0.05550713092088699f;
    sum = sum * rest + 0.24022120237350464f;
    sum = sum * rest + 0.6931469440460205f;
    sum = sum * rest + 1.0000001192092896f;
    return t < -126.0f ? 0.0f : sum * power;
}

/* 1 / (1 + 2^-t), without an exponential that overflows. */
static inline float logistic2(float t) {
    float power = exp2_negative(-__builtin_fabsf(t));
    float upper = 1.0f / (1.0f + power);
    return t < 0.0f ? power * upper : upper;
}

#define LOG2_E 1.4426950408889634f

/* Each activation's value, and its slope into *slope; as in hf_geglu/ops/formulas.py. */

/* Phi(-a) = erfc(a / sqrt 2) / 2 by Abramowitz and Stegun 7.1.26 (1.5e-7), whose exponential is the density's too. */
static inline float gelu(float z, float *slope) {
    float a = __builtin_fabsf(z);
    float t = 1.0f / (1.0f + 0.23164189f * a);
    float density = exp2_negative(-0.5f * LOG2_E * a * a);
    float sum = 0.5307027145f;
    sum = sum * t - 0.7265760135f;
    sum = sum * t + 0.7107068705f;
    sum = sum * t - 0.142248368f;
    sum = sum * t + 0.127414796f;
    float tail = sum * t * density;
    float phi = z < 0.0f ? tail : 1.0f - tail;
    *slope = phi + z * density * 0.3989422804014327f;
    return z * phi;
}

static inline float swish(float z, float linear, float cubic, float *slope) {
    float square = z * z;
    float s = logistic2(z * (LOG2_E * linear + LOG2_E * cubic * square));
    float value = z * s;
    *slope = s + value * (1.0f - s) * (linear + 3.0f * cubic * square);
    return value;
}

static inline float gelu_pytorch_tanh(float z, float *slope) {
    return swish(z, 1.5957691216057308f, 0.07135481282052264f, slope);
}

static inline float quick_gelu(float z, float *slope) { return swish(z, 1.702f, 0.0f, slope); }

static inline float silu(float z, float *slope) { return swish(z, 1.0f, 0.0f, slope); }

static inline float relu(float z, float *slope) {
    *slope = z > 0.0f ? 1.0f : 0.0f;
    return z < 0.0f ? 0.0f : z;
}

static inline float relu2(float z, float *slope) {
    float positive = z < 0.0f ? 0.0f : z;
    *slope = 2.0f * positive;
    return positive * positive;
}

static inline float sigmoid(float z, float *slope) {
    float s = logistic2(z * LOG2_E);
    *slope = s * (1.0f - s);
    return s;
}

static inline float linear(float z, float *slope) {
    *slope = 1.0f;
    return z;
}

/* Threads share out pieces of rows: of many rows, or of one long one. */
enum { PIECE = 4096 };

#define FOR_PIECES                                                                                                     \
    int64_t pieces = (width + PIECE - 1) / PIECE;                                                                      \
    _Pragma("omp parallel for schedule(static) num_threads(threads) if (threads > 1)")                                 \
    for (int64_t number = 0; number < rows * pieces; number++) {                                                       \
        int64_t row = number / pieces, start = number % pieces * PIECE;                                                \
        int64_t count = width - start < PIECE ? width - start : PIECE;

#define AT(name) (name + row * name##_row + start)

#define KERNELS(TYPE)                                                                                                  \
    static void forward_piece_##TYPE(                                                                                  \
        const TYPE *gate, const TYPE *value, TYPE *restrict hidden, int64_t count, float offset                        \
    ) {                                                                                                                \
        for (int64_t at = 0; at < count; at++) {                                                                       \
            float slope;                                                                                               \
            float activated = ACTIVATION(wide_##TYPE(gate[at]), &slope);                                               \
            hidden[at] = narrow_##TYPE(activated * (wide_##TYPE(value[at]) + offset));                                 \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    void forward_##TYPE(                                                                                               \
        const TYPE *gate, const TYPE *value, TYPE *hidden, int64_t gate_row, int64_t value_row, int64_t hidden_row,    \
        int64_t rows, int64_t width, float offset, int threads                                                         \
    ) {                                                                                                                \
        FOR_PIECES                                                                                                     \
            forward_piece_##TYPE(AT(gate), AT(value), AT(hidden), count, offset);                                      \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    static void backward_piece_##TYPE(                                                                                 \
        const TYPE *gate, const TYPE *value, const TYPE *grad, TYPE *restrict d_gate, TYPE *restrict d_value,          \
        int64_t count, float offset                                                                                    \
    ) {                                                                                                                \
        for (int64_t at = 0; at < count; at++) {                                                                       \
            float slope, gradient = wide_##TYPE(grad[at]), shifted = wide_##TYPE(value[at]) + offset;                  \
            float activated = ACTIVATION(wide_##TYPE(gate[at]), &slope);                                               \
            d_gate[at] = narrow_##TYPE(gradient * shifted * slope);                                                    \
            d_value[at] = narrow_##TYPE(gradient * activated);                                                         \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    void backward_##TYPE(                                                                                              \
        const TYPE *gate, const TYPE *value, const TYPE *grad, TYPE *d_gate, TYPE *d_value, int64_t gate_row,          \
        int64_t value_row, int64_t grad_row, int64_t d_gate_row, int64_t d_value_row, int64_t rows, int64_t width,     \
        float offset, int threads                                                                                      \
    ) {                                                                                                                \
        FOR_PIECES                                                                                                     \
            backward_piece_##TYPE(AT(gate), AT(value), AT(grad), AT(d_gate), AT(d_value), count, offset);              \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    static void backward_in_place_piece_##TYPE(                                                                        \
        TYPE *restrict gate, TYPE *restrict value, TYPE *restrict hidden, int64_t count, float offset                  \
    ) {                                                                                                                \
        for (int64_t at = 0; at < count; at++) {                                                                       \
            float slope, gradient = wide_##TYPE(hidden[at]), shifted = wide_##TYPE(value[at]) + offset;                \
            float activated = ACTIVATION(wide_##TYPE(gate[at]), &slope);                                               \
            gate[at] = narrow_##TYPE(gradient * shifted * slope);                                                      \
            value[at] = narrow_##TYPE(gradient * activated);                                                           \
            hidden[at] = narrow_##TYPE(activated * shifted);                                                           \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    void backward_in_place_##TYPE(                                                                                     \
        TYPE *gate, TYPE *value, TYPE *hidden, int64_t gate_row, int64_t value_row, int64_t hidden_row, int64_t rows,  \
        int64_t width, float offset, int threads                                                                       \
    ) {                                                                                                                \
        FOR_PIECES                                                                                                     \
            backward_in_place_piece_##TYPE(AT(gate), AT(value), AT(hidden), count, offset);                            \
        }                                                                                                              \
    }

typedef float float32;
KERNELS(float32)
KERNELS(bfloat16)
