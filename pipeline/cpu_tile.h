/* A tile of products for CPUs with AVX-512, and the functions that go with it: see cpu_kernels.py.

A tile is all that multiplies here, ROWS by LANES, and it adds up in float32. The values of its rows
are broadcast, those of its lanes lie side by side:

    losses      rows: vocabulary entries    lanes: scored tokens    depth: hidden size
    scores      rows: queries               lanes: keys             depth: head dimension
    outputs     rows: weights of queries    lanes: head dimension   depth: keys

Source: the tile, Goto and van de Geijn, Anatomy of high-performance matrix multiplication, 2008. */

#include <immintrin.h>
#include <stdint.h>

enum { WIDTH = 16, VECTORS = 4, LANES = WIDTH * VECTORS, ROWS = 6 };
/* 24 of the 32 registers hold sums. */

/* Sums of products of `depth` words: floats, or pairs of bfloat16. `out` is (ROWS, out_stride). */
static inline __attribute__((always_inline)) void tile(
    const int pairs, const int vectors, const uint32_t *const rows[ROWS], const uint32_t *lanes,
    int64_t lane_stride, int64_t depth, float *out, int64_t out_stride, int accumulate)
{
    __m512 sum[ROWS][VECTORS];
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < vectors; v++)
            sum[r][v] = accumulate ? _mm512_loadu_ps(out + r * out_stride + WIDTH * v)
                                   : _mm512_setzero_ps();
    for (int64_t k = 0; k < depth; k++) {
        __m512i many[VECTORS];
        for (int v = 0; v < vectors; v++)
            many[v] = _mm512_loadu_si512(lanes + k * lane_stride + WIDTH * v);
        for (int r = 0; r < ROWS; r++) {
            const __m512i one = _mm512_set1_epi32((int)rows[r][k]);
            for (int v = 0; v < vectors; v++) {
#ifdef __AVX512BF16__
                if (pairs) {
                    sum[r][v] = _mm512_dpbf16_ps(sum[r][v], (__m512bh)many[v], (__m512bh)one);
                    continue;
                }
#endif
                sum[r][v] = _mm512_fmadd_ps(
                    _mm512_castsi512_ps(many[v]), _mm512_castsi512_ps(one), sum[r][v]);
            }
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < vectors; v++)
            _mm512_storeu_ps(out + r * out_stride + WIDTH * v, sum[r][v]);
}

/* e^x for x <= 0; NaN stays. Coefficients: Cephes, expf. */
static inline __m512 exponential(__m512 x)
{
    const __m512 n = _mm512_roundscale_ps(
        _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    __m512 rest = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    rest = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), rest);
    const float coefficients[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f,
                                  1.6666665459e-1f, 5.0000001201e-1f};
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    for (int i = 0; i < 5; i++) p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(coefficients[i]));
    p = _mm512_fmadd_ps(p, _mm512_mul_ps(rest, rest), _mm512_add_ps(rest, _mm512_set1_ps(1.0f)));
    const __mmask16 none = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-104.0f), _CMP_LT_OQ);
    return _mm512_mask_mov_ps(_mm512_scalef_ps(p, n), none, _mm512_setzero_ps());  /* -inf too */
}

/* tanh x; NaN stays. Coefficients: Cephes, tanhf. */
static inline __m512 tangent(__m512 x)
{
    const __m512 one = _mm512_set1_ps(1.0f), size = _mm512_abs_ps(x);
    const __m512 e = exponential(_mm512_mul_ps(size, _mm512_set1_ps(-2.0f)));
    __m512 far = _mm512_div_ps(_mm512_sub_ps(one, e), _mm512_add_ps(one, e));
    far = _mm512_mask_sub_ps(
        far, _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ), _mm512_setzero_ps(), far);
    const __m512 square = _mm512_mul_ps(x, x);
    const float coefficients[] = {2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f,
                                  -3.33332819422e-1f};
    __m512 p = _mm512_set1_ps(-5.70498872745e-3f);
    for (int i = 0; i < 4; i++) p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(coefficients[i]));
    const __m512 near = _mm512_fmadd_ps(_mm512_mul_ps(p, square), x, x);
    return _mm512_mask_mov_ps(
        far, _mm512_cmp_ps_mask(size, _mm512_set1_ps(0.625f), _CMP_LT_OQ), near);
}

/* What an architecture does to logits or scores; a softcap of 0 is none. */
static inline __m512 transformed(__m512 x, float scale, float softcap)
{
    x = _mm512_mul_ps(x, _mm512_set1_ps(scale));
    if (!softcap) return x;
    const __m512 ratio = tangent(_mm512_mul_ps(x, _mm512_set1_ps(1 / softcap)));
    return _mm512_mul_ps(_mm512_set1_ps(softcap), ratio);
}

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* The first lanes of a vector: `count`, or all. */
static inline __mmask16 first_lanes(int64_t count)
{
    return (__mmask16)((1u << smaller(WIDTH, count)) - 1);
}
