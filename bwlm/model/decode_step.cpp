// Decode step on a CPU: reads one further id of each row and writes its logits, before their cap.
//
// The numbers are those of `decoder.py`, in float32 with weights of any WEIGHT. The sizes of the model are macros that
// `compiled_decoder.py` defines: DEPTH, WIDTH, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, VOCABULARY, NORM_EPS, WEIGHT.
//
// A step reads every weight once, so it is bound by memory. Matrices are stored as panels of PANEL outputs, [N / PANEL,
// K, PANEL], which are read from their first to their last byte; the sums of a panel stay in registers.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int PANEL = 32, LANES = 16;
#ifdef __AVX512F__
constexpr int TILE = 8;  // rows whose sums fit into the registers
#else
constexpr int TILE = 2;
#endif
constexpr int QUERY = HEADS * HEAD_DIM, KEY = KV_HEADS * HEAD_DIM, QKV = QUERY + 2 * KEY, GROUP = HEADS / KV_HEADS;

using Weight = WEIGHT;
typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t HalfBits __attribute__((vector_size(2 * LANES), aligned(2)));

inline Floats load(const float* from) { return *reinterpret_cast<const Floats*>(from); }

// bfloat16 is the upper half of a float32
inline Floats load(const uint16_t* from) {
    return (Floats)(__builtin_convertvector(*reinterpret_cast<const HalfBits*>(from), Bits) << 16);
}

inline float as_float(float weight) { return weight; }

inline float as_float(uint16_t weight) {
    const uint32_t bits = uint32_t(weight) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// y[ROWS, PANEL] = x[ROWS, inputs] panel[inputs, PANEL]
template <int ROWS>
void multiply_panel(const float* x, const Weight* panel, int inputs, float* y) {
    Floats sums[ROWS][2] = {};
    for (int k = 0; k < inputs; ++k, panel += PANEL) {
        // the processor's own prefetching ends with a panel, and begins late in the next one
        __builtin_prefetch(panel + 32 * PANEL);
        __builtin_prefetch(panel + 32 * PANEL + 64 / sizeof(Weight));
        const Floats first = load(panel), second = load(panel + LANES);
        for (int row = 0; row < ROWS; ++row) {
            sums[row][0] += x[row * inputs + k] * first;
            sums[row][1] += x[row * inputs + k] * second;
        }
    }
    std::memcpy(y, sums, sizeof sums);
}

template <int ROWS>
void multiply_rows(int rows, const float* x, const Weight* panel, int inputs, float* y) {
    if (rows >= ROWS) return multiply_panel<ROWS>(x, panel, inputs, y);
    if constexpr (ROWS > 1) multiply_rows<ROWS - 1>(rows, x, panel, inputs, y);
}

// Calls put(y[row, output], sum) for each of the products of x[rows, inputs] with the columns of a matrix.
template <class Put>
void multiply(int rows, const float* x, const Weight* matrix, int inputs, int outputs, float* y, Put put) {
#pragma omp for
    for (int panel = 0; panel < (outputs + PANEL - 1) / PANEL; ++panel) {
        const int begin = panel * PANEL, width = std::min(PANEL, outputs - begin);
        for (int row = 0; row < rows; row += TILE) {
            const int count = std::min(TILE, rows - row);
            float sums[TILE * PANEL];
            multiply_rows<TILE>(count, x + row * inputs, matrix + int64_t(begin) * inputs, inputs, sums);
            for (int n = 0; n < count; ++n) {
                float* const to = y + int64_t(row + n) * outputs + begin;
                for (int at = 0; at < width; ++at) put(to[at], sums[n * PANEL + at]);
            }
        }
    }
}

void norm(const float* x, int size, float* y) {
    float squares = 0;
    for (int at = 0; at < size; ++at) squares += x[at] * x[at];
    const float scale = 1 / std::sqrt(squares / size + NORM_EPS);
    for (int at = 0; at < size; ++at) y[at] = x[at] * scale;
}

void norm_rows(int rows, const float* x, float* y) {
#pragma omp for
    for (int row = 0; row < rows; ++row) norm(x + row * WIDTH, WIDTH, y + row * WIDTH);
}

// RoPE and norm of a query or key, whose pairs stand side by side; y may be x.
void turn(const float* x, const float* turns, float* y) {
    for (int at = 0; at < HEAD_DIM; at += 2) {
        const float a = x[at], b = x[at + 1], cosine = turns[at], sine = turns[at + 1];
        y[at] = a * cosine - b * sine;
        y[at + 1] = a * sine + b * cosine;
    }
    norm(y, HEAD_DIM, y);
}

// e^x of x <= 0, to 2e-7 near 0 and 4e-6 at -80: 2^whole times the series of e^rest
inline float exponential(float x) {
    const float power = std::max(x * 1.44269504f, -126.0f);
    const int whole = int(power - 0.5f), bits = (whole + 127) << 23;
    const float rest = (power - float(whole)) * 0.69314718f;
    float series = 1 + rest * (1 / 6.0f);
    for (int n = 5; n > 0; --n) series = 1 + rest * (1.0f / n) * series;
    float scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return series * scale;
}

// y = softmax(q keys / sqrt(HEAD_DIM)) values, over the first `seen` places
void attend(const float* q, const float* keys, const float* values, int seen, float* scores, float* y) {
    float best = -INFINITY, total = 0, sums[HEAD_DIM] = {};
    for (int place = 0; place < seen; ++place) {
        float score = 0;
        for (int at = 0; at < HEAD_DIM; ++at) score += q[at] * keys[place * HEAD_DIM + at];
        scores[place] = score;
    }
    const float scale = 1 / std::sqrt(float(HEAD_DIM));
    for (int place = 0; place < seen; ++place) best = scores[place] > best ? scores[place] : best;
    for (int place = 0; place < seen; ++place) {
        scores[place] = exponential((scores[place] - best) * scale);
        total += scores[place];
    }
    for (int place = 0; place < seen; ++place)
        for (int at = 0; at < HEAD_DIM; ++at) sums[at] += scores[place] * values[place * HEAD_DIM + at];
    for (int at = 0; at < HEAD_DIM; ++at) y[at] = sums[at] / total;
}

// Turns the queries and the key of a row and a kv head, stores its key and value, and attends for each query.
void attend_head(float* queries, const float* key, const float* turns, int place, float* keys, float* values,
                 float* scores, float* y) {
    turn(key, turns, keys + place * HEAD_DIM);
    std::memcpy(values + place * HEAD_DIM, key + KEY, HEAD_DIM * sizeof(float));
    for (int at = 0; at < GROUP * HEAD_DIM; at += HEAD_DIM) {
        turn(queries + at, turns, queries + at);
        attend(queries + at, keys, values, place + 1, scores, y + at);
    }
}

}  // namespace

// Reads `ids` [rows] at their `places` of the first rows of a cache and writes `logits` [rows, VOCABULARY].
//
// `weights` has the addresses of the normed embedding, of qkv, output, up and down of each layer, and of the head;
// `turns` is [T, HEAD_DIM], `cache` [DEPTH, 2, all_rows, KV_HEADS, room, HEAD_DIM].
extern "C" void decode_step(int threads, int rows, const int32_t* ids, const int32_t* places,
                            const void* const* weights, const float* turns, float* cache, int all_rows, int room,
                            float* logits) {
    std::vector<float> x(rows * WIDTH), normed(rows * WIDTH), qkv(rows * QKV), y(rows * QUERY), hidden(rows * HIDDEN);
    const int64_t head_size = int64_t(room) * HEAD_DIM, kind_size = all_rows * KV_HEADS * head_size;
    const auto matrix = [&](int number) { return static_cast<const Weight*>(weights[number]); };
    const auto set = [](float& to, float sum) { to = sum; };
    const auto add = [](float& to, float sum) { to += sum; };
    const auto set_squared_relu = [](float& to, float sum) { to = sum > 0 ? sum * sum : 0; };
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> scores(room);
#pragma omp for
        for (int row = 0; row < rows; ++row)
            for (int at = 0; at < WIDTH; ++at)
                x[row * WIDTH + at] = as_float(matrix(0)[int64_t(ids[row]) * WIDTH + at]);
        for (int layer = 0; layer < DEPTH; ++layer) {
            norm_rows(rows, x.data(), normed.data());
            multiply(rows, normed.data(), matrix(4 * layer + 1), WIDTH, QKV, qkv.data(), set);
#pragma omp for collapse(2)
            for (int row = 0; row < rows; ++row)
                for (int head = 0; head < KV_HEADS; ++head) {
                    float* const queries = &qkv[row * QKV + head * GROUP * HEAD_DIM];
                    const float* const key = &qkv[row * QKV + QUERY + head * HEAD_DIM];
                    float* const keys = cache + 2 * layer * kind_size + (row * KV_HEADS + head) * head_size;
                    attend_head(queries, key, turns + places[row] * HEAD_DIM, places[row], keys, keys + kind_size,
                                scores.data(), &y[row * QUERY + head * GROUP * HEAD_DIM]);
                }
            multiply(rows, y.data(), matrix(4 * layer + 2), QUERY, WIDTH, x.data(), add);
            norm_rows(rows, x.data(), normed.data());
            multiply(rows, normed.data(), matrix(4 * layer + 3), WIDTH, HIDDEN, hidden.data(), set_squared_relu);
            multiply(rows, hidden.data(), matrix(4 * layer + 4), HIDDEN, WIDTH, x.data(), add);
        }
        norm_rows(rows, x.data(), normed.data());
        multiply(rows, normed.data(), matrix(4 * DEPTH + 1), WIDTH, VOCABULARY, logits, set);
    }
}
