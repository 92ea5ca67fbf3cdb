// Attention over lists of blocks on a CPU, in fp32. A row of blocks is cut into tiles of at most QUERIES queries, and each
// tile meets its keys in tiles of KEYS, with a running maximum and sum (online softmax, arXiv:1805.02867). Scores are
// kept with the queries side by side: (keys, queries), so that maxima, sums and exponentials need no shuffles, keys are
// read as they lie, and only the tile of queries is transposed. Tiles are shared out to threads one at a time, and each
// is computed by one thread in one order: the result does not depend on how many there are.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
constexpr int WIDTH = 16, ROWS = 8;  // numbers in a register; rows of a product that stay in registers
#elif defined(__AVX__)
constexpr int WIDTH = 8, ROWS = 6;
#else
constexpr int WIDTH = 4, ROWS = 6;
#endif
constexpr int64_t QUERIES = 64, KEYS = 64;
constexpr float NEVER = -std::numeric_limits<float>::infinity();

typedef float Vector __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef int32_t Whole __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

static inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
static inline void store(float* to, Vector value) { *reinterpret_cast<Vector*>(to) = value; }
static inline Vector all(float value) { return Vector{} + value; }

// e^x for x <= 0: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]; 0 where it would be below the normal numbers.
static inline Vector exponential(Vector x) {
    Vector shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: n ends in the lowest bits
    Vector n = shifted - 12582912.0f;
    Vector r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Vector p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    Vector power = (Vector)((Whole)p + ((Whole)shifted << 23));
    return x < -87.0f ? Vector{} : power;
}

// c (M, N * WIDTH) = a b, or c times a factor a row, plus a b. a(i, k) is a[i * row + k * step].
template <int M, int N>
static inline void block_product(int64_t depth, const float* a, int64_t row, int64_t step, const float* b, int64_t ldb,
                                 float* c, int64_t ldc, const float* factor) {
    Vector sum[M][N];
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) sum[i][j] = factor ? load(c + i * ldc + j * WIDTH) * factor[i] : Vector{};
    for (int64_t k = 0; k < depth; ++k) {
        Vector right[N];
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) right[j] = load(b + k * ldb + j * WIDTH);
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
            const float left = a[i * row + k * step];
#pragma GCC unroll 4
            for (int j = 0; j < N; ++j) sum[i][j] += left * right[j];
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) store(c + i * ldc + j * WIDTH, sum[i][j]);
}

template <int M, int N>
static void rest_of_rows(int64_t m, int64_t depth, const float* a, int64_t row, int64_t step, const float* b,
                         int64_t ldb, float* c, int64_t ldc, const float* factor) {
    if constexpr (M > 0) {
        if (m == M) block_product<M, N>(depth, a, row, step, b, ldb, c, ldc, factor);
        else rest_of_rows<M - 1, N>(m, depth, a, row, step, b, ldb, c, ldc, factor);
    }
}

template <int N>
static void strip_product(int64_t m, int64_t depth, const float* a, int64_t row, int64_t step, const float* b,
                          int64_t ldb, float* c, int64_t ldc, const float* factor) {
    int64_t i = 0;
    for (; i + ROWS <= m; i += ROWS)
        block_product<ROWS, N>(depth, a + i * row, row, step, b, ldb, c + i * ldc, ldc, factor ? factor + i : nullptr);
    rest_of_rows<ROWS - 1, N>(m - i, depth, a + i * row, row, step, b, ldb, c + i * ldc, ldc,
                              factor ? factor + i : nullptr);
}

// c (m, n) as above; n is a multiple of WIDTH.
static void product(int64_t m, int64_t n, int64_t depth, const float* a, int64_t row, int64_t step, const float* b,
                    int64_t ldb, float* c, int64_t ldc, const float* factor) {
    int64_t j = 0;
    for (; j + 2 * WIDTH <= n; j += 2 * WIDTH)
        strip_product<2>(m, depth, a, row, step, b + j, ldb, c + j, ldc, factor);
    if (j < n) strip_product<1>(m, depth, a, row, step, b + j, ldb, c + j, ldc, factor);
}

static int64_t padded(int64_t n) { return (n + WIDTH - 1) / WIDTH * WIDTH; }

struct Problem {
    const float *query, *key, *value;
    float* out;
    const int64_t *query_strides, *key_strides, *value_strides;  // of batch, head, token
    int64_t batch, heads, key_heads, queries, keys, size, block, offset, causal;
    const int32_t *starts, *blocks;
    int64_t list_heads, rows;
    const uint8_t* key_keep;  // (batch, keys), or null
    float scale;
};

struct Scratch {
    float *query, *scores, *value, *out;         // (size, queries) (keys, queries) (keys, size) (queries, size), padded
    float maximum[QUERIES + 16], sum[QUERIES + 16], factor[QUERIES + 16];

    static int64_t numbers(int64_t size) {
        return padded(QUERIES) * (padded(size) * 2 + KEYS) + KEYS * padded(size) + WIDTH;
    }
    Scratch(float* at, int64_t size) {
        query = at;
        scores = query + padded(QUERIES) * padded(size);
        value = scores + padded(QUERIES) * KEYS;
        out = value + KEYS * padded(size);
    }
};

// Queries [first, last), counted from the first one given, of one head.
static void tile(const Problem& p, Scratch& s, int64_t b, int64_t h, int64_t row, int64_t first, int64_t last) {
    const int64_t m = last - first, wide = padded(m), size = p.size, deep = padded(size);
    const int64_t of_keys = h / (p.heads / p.key_heads);
    const float* q = p.query + b * p.query_strides[0] + h * p.query_strides[1] + first * p.query_strides[2];
    const float* k = p.key + b * p.key_strides[0] + of_keys * p.key_strides[1];
    const float* v = p.value + b * p.value_strides[0] + of_keys * p.value_strides[1];
    const uint8_t* real = p.key_keep ? p.key_keep + b * p.keys : nullptr;
    for (int64_t i = 0; i < wide; ++i)
        for (int64_t d = 0; d < size; ++d)
            s.query[d * wide + i] = i < m ? q[i * p.query_strides[2] + d] * p.scale : 0;
    std::fill_n(s.maximum, wide, NEVER);
    std::fill_n(s.sum, wide, 0.0f);
    bool begun = false;
    const int64_t line = (p.list_heads == 1 ? 0 : h * p.rows) + row;
    for (int64_t at = p.starts[line]; at < p.starts[line + 1];) {
        int64_t begin = p.blocks[at] * p.block;
        int64_t run = 1;  // blocks side by side are one
        while (at + run < p.starts[line + 1] && p.blocks[at + run] == p.blocks[at] + run) ++run;
        at += run;
        int64_t end = std::min(begin + run * p.block, p.keys);
        if (p.causal) end = std::min(end, p.offset + last);
        for (; begin < end; begin += KEYS) {
            const int64_t n = std::min(KEYS, end - begin);
            const float* keys = k + begin * p.key_strides[2];
            product(n, wide, size, keys, p.key_strides[2], 1, s.query, wide, s.scores, wide, nullptr);
            for (int64_t j = 0; j < n; ++j) {
                int64_t hidden = p.causal ? std::clamp<int64_t>(begin + j - p.offset - first, 0, m) : 0;
                if (real && !real[begin + j]) hidden = m;
                std::fill_n(s.scores + j * wide, hidden, NEVER);
            }
            for (int64_t i = 0; i < wide; i += WIDTH) {
                const Vector before = load(s.maximum + i);
                Vector most = before, total = {};
                for (int64_t j = 0; j < n; ++j) {
                    const Vector score = load(s.scores + j * wide + i);
                    most = score > most ? score : most;
                }
                const Vector safe = most == NEVER ? Vector{} : most;
                for (int64_t j = 0; j < n; ++j) {
                    const Vector weight = exponential(load(s.scores + j * wide + i) - safe);
                    store(s.scores + j * wide + i, weight);
                    total += weight;
                }
                const Vector factor = exponential(before - safe);
                store(s.maximum + i, most);
                store(s.factor + i, factor);
                store(s.sum + i, load(s.sum + i) * factor + total);
            }
            const float* values = v + begin * p.value_strides[2];
            int64_t step = p.value_strides[2];
            if (deep != size) {
                for (int64_t j = 0; j < n; ++j) {
                    std::copy_n(values + j * step, size, s.value + j * deep);
                    std::fill_n(s.value + j * deep + size, deep - size, 0.0f);
                }
                values = s.value;
                step = deep;
            }
            product(m, deep, n, s.scores, 1, wide, values, step, s.out, deep, begun ? s.factor : nullptr);
            begun = true;
        }
    }
    float* out = p.out + ((b * p.heads + h) * p.queries + first) * size;
    for (int64_t i = 0; i < m; ++i)
        for (int64_t d = 0; d < size; ++d)
            out[i * size + d] = s.sum[i] == 0 ? 0 : s.out[i * deep + d] / s.sum[i];
}

// 0, or 1 if there is no memory. The strides are of batch, head and token; numbers of one head lie side by side.
extern "C" int secateur_block_attention(
    const float* query, const float* key, const float* value, float* out, const int64_t* query_strides,
    const int64_t* key_strides, const int64_t* value_strides, int64_t batch, int64_t heads, int64_t key_heads,
    int64_t queries, int64_t keys, int64_t size, int64_t block, int64_t offset, int64_t causal, const int32_t* starts,
    const int32_t* blocks, int64_t list_heads, int64_t rows, const uint8_t* key_keep, float scale, int64_t threads) {
    const Problem p{query, key, value, out, query_strides, key_strides, value_strides, batch, heads, key_heads,
                    queries, keys, size, block, offset, causal, starts, blocks, list_heads, rows, key_keep, scale};
    struct Tile { int64_t row, first, last; };
    try {
        std::vector<Tile> tiles;  // of a head; the last queries, which in causal attention see most, come first
        for (int64_t row = rows - 1; row >= 0; --row) {
            const int64_t begin = std::max<int64_t>((offset / block + row) * block - offset, 0);
            const int64_t end = std::min((offset / block + row + 1) * block - offset, queries);
            for (int64_t first = begin; first < end; first += QUERIES)
                tiles.push_back({row, first, std::min(first + QUERIES, end)});
        }
        const int64_t each = tiles.size(), count = batch * heads * each;
        threads = std::max<int64_t>(1, std::min(threads, count));
        std::vector<float> memory(threads * Scratch::numbers(size));
        std::atomic<int64_t> next{0};
        auto work = [&](int64_t number) {
            Scratch scratch(memory.data() + number * Scratch::numbers(size), size);
            for (int64_t t; (t = next++) < count;) {
                const Tile& one = tiles[t % each];
                tile(p, scratch, t / each / heads, t / each % heads, one.row, one.first, one.last);
            }
        };
        std::vector<std::thread> others;
        try {
            for (int64_t i = 1; i < threads; ++i) others.emplace_back(work, i);
        } catch (const std::system_error&) {  // fewer will do
        }
        work(0);
        for (auto& other : others) other.join();
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}
