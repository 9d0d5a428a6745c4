/* Causal attention over the stretches of a pack: scores of a few queries at a time.

Items, a piece of a stretch and a head of keys, are taken by all threads that call in, until there
are none. The heads that share keys are queries of one tile. */

#include <stdlib.h>

#include "cpu_tile.h"

/* A tile of floats, of no more vectors than `count` lanes need. */
static void narrow_tile(
    int64_t count, const uint32_t *const rows[ROWS], const float *lanes, int64_t lane_stride,
    int64_t depth, float *out, int64_t out_stride, int accumulate)
{
    const uint32_t *words = (const uint32_t *)lanes;
    switch ((count + WIDTH - 1) / WIDTH) {
    case 1: tile(0, 1, rows, words, lane_stride, depth, out, out_stride, accumulate); break;
    case 2: tile(0, 2, rows, words, lane_stride, depth, out, out_stride, accumulate); break;
    case 3: tile(0, 3, rows, words, lane_stride, depth, out, out_stride, accumulate); break;
    default: tile(0, VECTORS, rows, words, lane_stride, depth, out, out_stride, accumulate);
    }
}

/* Some tokens of a stretch, which continues a parent or nothing; places in the pack. */
struct piece {
    int64_t begin, end;   /* its queries */
    int64_t own;          /* where the stretch begins, and so its keys */
    int64_t parent, past; /* where the keys before those lie, and how many there are */
};

struct attention {
    const float *query; /* (heads, tokens, depth), by its strides */
    const float *key;   /* (shared heads, depth, key_stride), the stride WIDTH past the tokens */
    const float *value; /* (shared heads, tokens, value_depth), and WIDTH more */
    void *output;       /* (tokens, heads, value_depth): bfloat16 if `half`, or float32 */
    const float *sinks; /* (heads), or NULL */
    const struct piece *pieces;
    int64_t query_head, query_token, key_stride;
    int64_t tokens, heads, shared_heads, depth, value_depth, num_pieces, window, half;
    float scale, softcap;
    int64_t next; /* item */
    int64_t failed;
};

/* ROWS queries that meet the same head of keys. The keys that one sees are numbered from the
   parent's first on: `low` up to `high`. */
struct queries {
    const uint32_t *rows[ROWS];
    int64_t token[ROWS], head[ROWS], low[ROWS], high[ROWS];
};

/* From the `first` on, of a piece: the heads of each token, token after token. */
static struct queries take_queries(
    const struct attention *of, const struct piece *piece, int64_t shared, int64_t first)
{
    const int64_t group = of->heads / of->shared_heads;
    const int64_t count = (piece->end - piece->begin) * group;
    int64_t token = piece->begin + first / group, member = first % group;
    struct queries some;
    for (int r = 0; r < ROWS; r++) {
        const int64_t head = shared * group + member;
        const float *at = of->query + head * of->query_head + token * of->query_token;
        some.rows[r] = (const uint32_t *)at;
        some.token[r] = token;
        some.head[r] = head;
        some.high[r] = piece->past + token - piece->own + 1;
        some.low[r] = larger(0, some.high[r] - of->window);
        if (first + r + 1 >= count) continue;  /* the last one again, as there are no more */
        if (++member == group) member = 0, token++;
    }
    return some;
}

/* Turns the scores of keys `low` up to `high` into their exponentials over the highest's, in
   place; returns the sum, the sink's included. */
static float weigh(
    const struct attention *of, float *scores, int64_t low, int64_t high, float sink)
{
    const float scale = of->scale, softcap = of->softcap;
    __m512 highest = _mm512_set1_ps(sink);
    for (int64_t at = low; at < high; at += WIDTH) {
        const __mmask16 seen = first_lanes(high - at);
        const __m512 product = _mm512_maskz_loadu_ps(seen, scores + at);
        const __m512 score = transformed(product, scale, softcap);
        _mm512_mask_storeu_ps(scores + at, seen, score);
        highest = _mm512_mask_max_ps(highest, seen, highest, score);
    }
    const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(highest));
    __m512 total = _mm512_setzero_ps();
    for (int64_t at = low; at < high; at += WIDTH) {
        const __mmask16 seen = first_lanes(high - at);
        const __m512 score = _mm512_maskz_loadu_ps(seen, scores + at);
        const __m512 weight = exponential(_mm512_sub_ps(score, top));
        _mm512_mask_storeu_ps(scores + at, seen, weight);
        total = _mm512_mask_add_ps(total, seen, total, weight);
    }
    const __m512 of_sink = exponential(_mm512_sub_ps(_mm512_set1_ps(sink), top));
    return _mm512_reduce_add_ps(total) + _mm512_cvtss_f32(of_sink);
}

/* Writes the first `count` of LANES outputs from a place on, multiplied. */
static void put(
    const struct attention *of, int64_t place, int64_t count, const float *lanes, float factor)
{
    for (int64_t at = 0; at < smaller(LANES, count); at += WIDTH) {
        const __mmask16 inside = first_lanes(count - at);
        const __m512 x = _mm512_mul_ps(_mm512_loadu_ps(lanes + at), _mm512_set1_ps(factor));
#ifdef __AVX512BF16__
        if (of->half) {
            uint16_t *halves = (uint16_t *)of->output + place + at;
            _mm256_mask_storeu_epi16(halves, inside, (__m256i)_mm512_cvtneps_pbh(x));
            continue;
        }
#endif
        _mm512_mask_storeu_ps((float *)of->output + place + at, inside, x);
    }
}

/* `scores` has room for ROWS times `stride`. */
static void attend(
    const struct attention *of, const struct piece *piece, int64_t shared, int64_t first,
    float *scores, int64_t stride)
{
    const struct queries some = take_queries(of, piece, shared, first);
    /* All keys that any of them sees: the parent's up to `past`, then the stretch's own. */
    const int64_t from = some.low[0], to = some.high[ROWS - 1], past = piece->past;
    const int64_t first_own = larger(from, past);
    const float *key = of->key + shared * of->depth * of->key_stride;
    for (int64_t at = from; at < past; at += LANES)
        narrow_tile(past - at, some.rows, key + piece->parent + at, of->key_stride, of->depth,
                    scores + at, stride, 0);
    for (int64_t at = first_own; at < to; at += LANES)
        narrow_tile(to - at, some.rows, key + piece->own + at - past, of->key_stride, of->depth,
                    scores + at, stride, 0);

    float factor[ROWS];
    const uint32_t *of_parent[ROWS], *of_own[ROWS];  /* weights */
    for (int r = 0; r < ROWS; r++) {
        float *mine = scores + r * stride;
        const float sink = of->sinks ? of->sinks[some.head[r]] : -__builtin_inff();
        factor[r] = 1 / weigh(of, mine, some.low[r], some.high[r], sink);
        for (int64_t at = from; at < some.low[r]; at++) mine[at] = 0;
        for (int64_t at = some.high[r]; at < to; at++) mine[at] = 0;
        of_parent[r] = (const uint32_t *)(mine + from);
        of_own[r] = (const uint32_t *)(mine + first_own);
    }

    const float *value = of->value + shared * of->tokens * of->value_depth;
    const float *parents = value + (piece->parent + from) * of->value_depth;
    const float *owns = value + (piece->own + first_own - past) * of->value_depth;
    for (int64_t lane = 0; lane < of->value_depth; lane += LANES) {
        const int64_t count = of->value_depth - lane;
        float sums[ROWS * LANES];
        narrow_tile(count, of_parent, parents + lane, of->value_depth, larger(0, past - from),
                    sums, LANES, 0);
        narrow_tile(count, of_own, owns + lane, of->value_depth, to - first_own, sums, LANES, 1);
        for (int r = 0; r < ROWS; r++) {
            const int64_t place = (some.token[r] * of->heads + some.head[r]) * of->value_depth;
            put(of, place + lane, count, sums + r * LANES, factor[r]);
        }
    }
}

void cherry_attention(struct attention *of)
{
    int64_t item, longest = 0;
    for (const struct piece *each = of->pieces; each < of->pieces + of->num_pieces; each++)
        longest = larger(longest, each->past + each->end - each->own);
    const int64_t stride = longest + WIDTH;
    float *scores = malloc(sizeof(float) * (size_t)(ROWS * stride));
    if (!scores) {
        of->failed = 1;
        return;
    }
    const int64_t items = of->num_pieces * of->shared_heads;
    while ((item = __atomic_fetch_add(&of->next, 1, __ATOMIC_RELAXED)) < items) {
        const struct piece *piece = of->pieces + item / of->shared_heads;
        const int64_t count = (piece->end - piece->begin) * (of->heads / of->shared_heads);
        for (int64_t first = 0; first < count; first += ROWS)
            attend(of, piece, item % of->shared_heads, first, scores, stride);
    }
    free(scores);
}
