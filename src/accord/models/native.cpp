// What one decoding step of a transformer computes between its matrix products, on a CPU: attention of one query row
// per sequence against the sampler's cache, RMS norm, and the gate of an MLP. `accord.models.native` compiles and calls.
//
// Numbers are float or bfloat16 in memory (template T) and float in registers; every row is computed by itself.
// M = sequences, H = query heads, K = key/value heads, R = H / K, D = head size, P = prompt columns, S = own columns.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr int64_t W = 16;  // floats of a vector
typedef float floats __attribute__((vector_size(4 * W)));
typedef int32_t ints __attribute__((vector_size(4 * W)));
typedef uint32_t words __attribute__((vector_size(4 * W)));
typedef uint16_t halves __attribute__((vector_size(2 * W)));

struct bfloat {
    uint16_t bits;
};

inline floats all(float value) { return floats{} + value; }

inline floats load(const float* from) {
    floats values;
    std::memcpy(&values, from, sizeof values);
    return values;
}

inline floats load(const bfloat* from) {
    halves bits;
    std::memcpy(&bits, from, sizeof bits);
    return (floats)(__builtin_convertvector(bits, words) << 16);
}

inline void store(float* to, floats values) { std::memcpy(to, &values, sizeof values); }

inline void store(bfloat* to, floats values) {
    words bits = (words)values;
    bits += 0x7fff + ((bits >> 16) & 1);  // to the nearest, ties to even
    halves upper = __builtin_convertvector(bits >> 16, halves);
    std::memcpy(to, &upper, sizeof upper);
}

inline float value(float number) { return number; }

inline float value(bfloat number) {
    uint32_t bits = uint32_t(number.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

template <class T>
inline T rounded(float number);

template <>
inline float rounded<float>(float number) {
    return number;
}

template <>
inline bfloat rounded<bfloat>(float number) {
    uint32_t bits;
    std::memcpy(&bits, &number, sizeof bits);
    return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

inline float sum(floats values) {
    float total = 0;
    for (int64_t i = 0; i < W; i++) total += values[i];
    return total;
}

inline floats larger(floats one, floats other) {
    const ints more = other > one;
    return (floats)((more & (ints)other) | (~more & (ints)one));
}

inline float largest(floats values) {
    float top = values[0];
    for (int64_t i = 1; i < W; i++) top = std::max(top, values[i]);
    return top;
}

template <class T>
inline float largest(const T* numbers, int64_t size) {
    floats tops = all(-std::numeric_limits<float>::infinity());
    int64_t i = 0;
    for (; i + W <= size; i += W) tops = larger(tops, load(numbers + i));
    float top = largest(tops);
    for (; i < size; i++) top = std::max(top, value(numbers[i]));
    return top;
}

// exp(x) for x <= 0 or small: 2^n times a polynomial in the rest; relative error under 2e-7, and 0 far below.
inline floats exponential(floats x) {
    const floats lowest = all(-87.0f);
    const ints tiny = x < lowest;
    x = (floats)((tiny & (ints)lowest) | (~tiny & (ints)x));
    const floats magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    const floats n = (x * 1.44269504f + magic) - magic;
    const floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    floats p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const ints power = (__builtin_convertvector(n, ints) + 127) << 23;
    return (floats)(~tiny & (ints)(p * (floats)power));
}

// Columns [first, last) of keys [D, stride] and values [stride, D], which stand in `scores` from `offset` on.
template <class T>
struct Piece {
    const T* keys;
    const T* values;
    int64_t stride, first, last, offset;
};

// Scores of N query rows against a piece, B vectors of columns at a time.
template <class T, int N, int B>
inline void score(const Piece<T>& piece, const float* query, int64_t D, float* scores, int64_t width, int64_t column) {
    floats total[N][B] = {};
    for (int64_t d = 0; d < D; d++) {
        const T* keys = piece.keys + d * piece.stride + column;
        for (int b = 0; b < B; b++) {
            const floats key = load(keys + b * W);
            for (int n = 0; n < N; n++) total[n][b] += key * query[n * D + d];
        }
    }
    for (int n = 0; n < N; n++)
        for (int b = 0; b < B; b++) store(scores + n * width + piece.offset + column + b * W, total[n][b]);
}

// Adds the weighted values of a piece to N rows of `out`, B vectors of the head at a time.
template <class T, int N, int B>
inline void gather(const Piece<T>& piece, const float* weights, int64_t width, float* out, int64_t D, int64_t at) {
    floats total[N][B];
    for (int n = 0; n < N; n++)
        for (int b = 0; b < B; b++) total[n][b] = load(out + n * D + at + b * W);
    for (int64_t column = piece.first; column < piece.last; column++) {
        const T* values = piece.values + column * D + at;
        for (int b = 0; b < B; b++) {
            const floats seen = load(values + b * W);
            for (int n = 0; n < N; n++) total[n][b] += seen * weights[n * width + piece.offset + column];
        }
    }
    for (int n = 0; n < N; n++)
        for (int b = 0; b < B; b++) store(out + n * D + at + b * W, total[n][b]);
}

// Softmax attention of N query rows [N, D] that see both pieces. `scores` [N, width] is room to work in.
template <class T, int N>
void attend_rows(const Piece<T> (&pieces)[2], float* query, int64_t D, float* scores, int64_t width, T* out) {
    const float lowest = -std::numeric_limits<float>::infinity();
    floats highest[N];
    for (int n = 0; n < N; n++) highest[n] = all(lowest);
    for (const auto& piece : pieces) {
        if (piece.first >= piece.last) continue;
        // Whole vectors are computed; columns outside are hidden afterwards.
        const int64_t from = piece.first / W * W, to = (piece.last + W - 1) / W * W;
        int64_t column = from;
        for (; column + 4 * W <= to; column += 4 * W) score<T, N, 4>(piece, query, D, scores, width, column);
        for (; column < to; column += W) score<T, N, 1>(piece, query, D, scores, width, column);
        for (int n = 0; n < N; n++) {
            float* row = scores + n * width + piece.offset;
            std::fill(row + from, row + piece.first, lowest);
            std::fill(row + piece.last, row + to, lowest);
            for (column = from; column < to; column += W) highest[n] = larger(highest[n], load(row + column));
        }
    }
    float room[N * 1024];
    std::fill(room, room + N * D, 0.0f);
    float scale[N];
    for (int n = 0; n < N; n++) {
        const float top = largest(highest[n]);
        floats total = {};
        for (const auto& piece : pieces) {
            if (piece.first >= piece.last) continue;
            float* row = scores + n * width + piece.offset;
            for (int64_t column = piece.first / W * W; column < piece.last; column += W) {
                const floats weight = exponential(load(row + column) - top);
                store(row + column, weight);
                total += weight;
            }
        }
        scale[n] = 1.0f / sum(total);
    }
    for (const auto& piece : pieces) {
        int64_t at = 0;
        for (; at + 4 * W <= D; at += 4 * W) gather<T, N, 4>(piece, scores, width, room, D, at);
        for (; at < D; at += W) gather<T, N, 1>(piece, scores, width, room, D, at);
    }
    for (int n = 0; n < N; n++)
        for (int64_t d = 0; d < D; d += W) store(out + n * D + d, load(room + n * D + d) * scale[n]);
}

template <class T>
struct Attention {
    int64_t M, H, K, D, prompt_columns, own_columns, column, window;  // window 0: none
    float scale;
    const T *query, *key, *value;         // [M, H * D], [M, K * D], [M, K * D]
    const float *cos, *sin;               // [M, D] each, or null: positions are applied already
    const T *prompt_keys, *prompt_values;  // [prompts, K, D, P], [prompts, K, P, D]
    T *keys, *values;                     // [slots, K, D, S], [slots, K, S, D]
    const int64_t *order, *prompt, *length, *start, *position;  // [M] each, `length` by prompt
    T* out;                               // [M, H * D]
};

// Rotary positions (Su et al. 2021), halves of the head paired, rounded as the network rounds them.
template <class T>
inline void rotate(const T* head, const float* cos, const float* sin, int64_t D, float* out) {
    for (int64_t d = 0; d < D; d++) {
        const float other = d < D / 2 ? -value(head[d + D / 2]) : value(head[d - D / 2]);
        const float turned = cos ? value(head[d]) * cos[d] + other * sin[d] : value(head[d]);
        out[d] = value(rounded<T>(turned));
    }
}

template <class T>
void attend(const Attention<T>& a, int64_t m, int64_t k, float* scores) {
    const int64_t R = a.H / a.K, D = a.D, S = a.own_columns, P = a.prompt_columns;
    const float *cos = a.cos ? a.cos + m * D : nullptr, *sin = a.cos ? a.sin + m * D : nullptr;
    T *keys = a.keys + (m * a.K + k) * D * S, *values = a.values + (m * a.K + k) * S * D;
    float rows[4 * 1024];
    rotate(a.key + (m * a.K + k) * D, cos, sin, D, rows);
    for (int64_t d = 0; d < D; d++) keys[d * S + a.column] = rounded<T>(rows[d]);
    std::memcpy(values + a.column * D, a.value + (m * a.K + k) * D, D * sizeof(T));

    const int64_t g = a.prompt[m];
    int64_t own = a.start[m], hidden = 0;
    if (a.window) {
        hidden = std::max<int64_t>(hidden, a.position[m] - a.window + 1);
        own = std::max<int64_t>(own, a.column - a.window + 1);
    }
    const Piece<T> pieces[2] = {
        {a.prompt_keys + (g * a.K + k) * D * P, a.prompt_values + (g * a.K + k) * P * D, P, hidden, a.length[g], 0},
        {keys, values, S, own, a.column + 1, P},
    };
    const T* query = a.query + (m * a.H + k * R) * D;
    T* out = a.out + (m * a.H + k * R) * D;
    for (int64_t r = 0; r < R;) {
        const int64_t n = std::min<int64_t>(4, R - r);
        for (int64_t i = 0; i < n; i++) {
            rotate(query + (r + i) * D, cos, sin, D, rows + i * D);
            for (int64_t d = 0; d < D; d++) rows[i * D + d] *= a.scale;
        }
        if (n == 4) attend_rows<T, 4>(pieces, rows, D, scores, P + S, out + r * D);
        if (n == 3) attend_rows<T, 3>(pieces, rows, D, scores, P + S, out + r * D);
        if (n == 2) attend_rows<T, 2>(pieces, rows, D, scores, P + S, out + r * D);
        if (n == 1) attend_rows<T, 1>(pieces, rows, D, scores, P + S, out + r * D);
        r += n;
    }
}

template <class T>
void attend_all(const Attention<T>& a, int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> scores(4 * (a.prompt_columns + a.own_columns));
        // Sequences of one prompt stand side by side in `order`, so its keys stay in the cache.
#pragma omp for schedule(static)
        for (int64_t i = 0; i < a.M * a.K; i++) attend(a, a.order[i / a.K], i % a.K, scores.data());
    }
}

// Adds `delta` to the residual stream where there is one; then x / rms(x) * weight (Zhang and Sennrich 2019).
template <class T>
void norm(float* hidden, const T* delta, const float* weight, T* out, int64_t M, int64_t D, float epsilon, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t m = 0; m < M; m++) {
        float* row = hidden + m * D;
        floats squares = {};
        for (int64_t d = 0; d < D; d += W) {
            floats x = load(row + d);
            if (delta) {
                x += load(delta + m * D + d);
                store(row + d, x);
            }
            squares += x * x;
        }
        const float inverse = 1.0f / std::sqrt(sum(squares) / D + epsilon);
        for (int64_t d = 0; d < D; d += W) store(out + m * D + d, load(row + d) * inverse * load(weight + d));
    }
}

// gate <- silu(gate) * up, in place (Shazeer 2020).
template <class T>
void swiglu(T* gate, const T* up, int64_t size, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < size; i += W) {
        const floats x = load(gate + i);
        const ints negative = x < 0;
        const floats small = exponential((floats)((negative & (ints)x) | (~negative & (ints)-x)));  // exp(-|x|)
        const floats top = (floats)((negative & (ints)small) | (~negative & (ints)all(1.0f)));
        store(gate + i, x * top / (small + 1.0f) * load(up + i));
    }
}

constexpr int64_t BLOCK = 16 * W;  // weights are summed in blocks; only the block that is hit is walked through

// Weights exp((logit - top) * sharpness) of a block of at most BLOCK logits, zero behind its end. Returns their sum.
template <class T>
inline double weigh(const T* logits, int64_t size, float top, float sharpness, float* weights) {
    floats total = {};
    int64_t i = 0;
    for (; i + W <= size; i += W) {
        const floats weight = exponential((load(logits + i) - top) * sharpness);
        store(weights + i, weight);
        total += weight;
    }
    if (i < size) {
        T rest[W] = {};
        std::copy(logits + i, logits + size, rest);
        floats weight = exponential((load(rest) - top) * sharpness);
        for (int64_t j = size - i; j < W; j++) weight[j] = 0;
        store(weights + i, weight);
        total += weight;
    }
    return sum(total);
}

// The first token whose cumulative share exceeds the row's random number; never one of weight 0.
template <class T>
void choose(const T* logits, double uniform, float temperature, int64_t V, int64_t& token, float& shaped, float& raw) {
    const float sharpness = std::min(1 / temperature, 1e30f), top = largest(logits, V);
    std::vector<double> upto((V + BLOCK - 1) / BLOCK);
    float weights[BLOCK];
    double total = 0, plain = 0;
    for (size_t b = 0; b < upto.size(); b++) {
        const int64_t from = b * BLOCK, size = std::min(BLOCK, V - from);
        upto[b] = total += weigh(logits + from, size, top, sharpness, weights);
        if (temperature != 1) plain += weigh(logits + from, size, top, 1, weights);
    }
    if (temperature == 1) plain = total;
    const double target = std::min(uniform * total, std::nextafter(total, 0.0));
    const size_t hit = std::min<size_t>(std::upper_bound(upto.begin(), upto.end(), target) - upto.begin(), upto.size() - 1);
    const int64_t from = hit * BLOCK, size = std::min(BLOCK, V - from);
    weigh(logits + from, size, top, sharpness, weights);
    double sum = hit ? upto[hit - 1] : 0;
    token = from;
    for (int64_t i = 0; i < size && sum <= target; i++) {
        sum += weights[i];
        if (weights[i] > 0) token = from + i;
    }
    const double chosen = value(logits[token]) - top;
    shaped = float(chosen / temperature - std::log(total));
    raw = float(chosen - std::log(plain));
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default"))) void

EXPORT attend_float(const Attention<float>* a, int threads) { attend_all(*a, threads); }
EXPORT attend_bfloat(const Attention<bfloat>* a, int threads) { attend_all(*a, threads); }
EXPORT norm_float(float* x, const float* y, const float* w, float* to, int64_t M, int64_t D, float e, int threads) {
    norm(x, y, w, to, M, D, e, threads);
}
EXPORT norm_bfloat(float* x, const bfloat* y, const float* w, bfloat* to, int64_t M, int64_t D, float e, int threads) {
    norm(x, y, w, to, M, D, e, threads);
}
EXPORT swiglu_float(float* gate, const float* up, int64_t size, int threads) { swiglu(gate, up, size, threads); }
EXPORT swiglu_bfloat(bfloat* gate, const bfloat* up, int64_t size, int threads) { swiglu(gate, up, size, threads); }
#define CHOOSE(name, T)                                                                                              \
    EXPORT name(const T* logits, const double* uniform, const float* temperature, int64_t* tokens, float* shaped,     \
                float* raw, int64_t M, int64_t V, int threads) {                                                      \
        _Pragma("omp parallel for schedule(static) num_threads(threads)")                                             \
        for (int64_t m = 0; m < M; m++)                                                                               \
            choose(logits + m * V, uniform[m], temperature[m], V, tokens[m], shaped[m], raw[m]);                      \
    }
CHOOSE(choose_float, float)
CHOOSE(choose_bfloat, bfloat)
