/* The vocabulary projection up to its losses: logits are made, used up and forgotten in the cache.

Items, some tokens and a slice of the vocabulary, are taken by all threads that call in, until there
are none.

Source: a running log-sum-exp, Milakov and Gimelshein, arXiv:1805.02867. */

#include "cpu_tile.h"

enum { ENTRIES = 48 };  /* of the vocabulary whose logits are held at once: 12 KB */
enum { BLOCK = 384 };   /* of the vocabulary that stay in the cache for all tokens of an item */
enum { PANELS = 4 };    /* of LANES tokens, an item; they and slices depend on no thread */

struct losses {
    const uint32_t *states; /* (panels, depth, LANES): words of the hidden states */
    const uint32_t *weight; /* (vocabulary, depth) */
    const float *bias;      /* (vocabulary), or NULL */
    const int64_t *targets; /* (panels * LANES) */
    float *highest;         /* (slices, panels * LANES) logit of all in a slice but the target's;
                               starts as the lowest number */
    float *total;           /* likewise, of their exponentials over the highest's; starts as 0 */
    float *picked;          /* (panels * LANES) the target's logit */
    int64_t slices, panels, vocabulary, depth, pairs;
    float scale, softcap;
    int64_t next; /* item */
};

/* Logits of some entries for a panel of tokens: (ENTRIES, LANES). */
static void make_logits(
    const struct losses *of, const uint32_t *states, int64_t first, int64_t count, float *logits)
{
    for (int64_t at = 0; at < count; at += ROWS) {
        const uint32_t *rows[ROWS];
        for (int r = 0; r < ROWS; r++)  /* what lies past the end is not looked at */
            rows[r] = of->weight + smaller(first + at + r, of->vocabulary - 1) * of->depth;
        float *here = logits + at * LANES;
        if (of->pairs)
            tile(1, VECTORS, rows, states, LANES, of->depth, here, LANES, 0);
        else
            tile(0, VECTORS, rows, states, LANES, of->depth, here, LANES, 0);
    }
    if (!of->bias && of->scale == 1 && !of->softcap) return;
    for (int64_t at = 0; at < count; at++) {
        const __m512 bias = _mm512_set1_ps(of->bias ? of->bias[first + at] : 0);
        for (int v = 0; v < VECTORS; v++) {
            float *here = logits + at * LANES + WIDTH * v;
            const __m512 logit = _mm512_add_ps(_mm512_loadu_ps(here), bias);
            _mm512_storeu_ps(here, transformed(logit, of->scale, of->softcap));
        }
    }
}

/* Takes the targets of WIDTH tokens out of their logits, and adds up the others of a slice. */
static void add_up(
    const struct losses *of, int64_t slice, int64_t token, int64_t first, int64_t count,
    float *logits)
{
    float *highest_so_far = of->highest + slice * of->panels * LANES + token;
    float *total_so_far = of->total + slice * of->panels * LANES + token;
    for (int lane = 0; lane < WIDTH; lane++) {
        const int64_t target = of->targets[token + lane] - first;
        if (target < 0 || target >= count) continue;
        of->picked[token + lane] = logits[target * LANES + lane];
        logits[target * LANES + lane] = -__builtin_inff();
    }
    const __m512 before = _mm512_loadu_ps(highest_so_far);
    __m512 highest = before;
    for (int64_t at = 0; at < count; at++)
        highest = _mm512_max_ps(highest, _mm512_loadu_ps(logits + at * LANES));
    __m512 more = _mm512_setzero_ps();  /* apart: one sum of them all would round more */
    for (int64_t at = 0; at < count; at++) {
        const __m512 logit = _mm512_loadu_ps(logits + at * LANES);
        more = _mm512_add_ps(more, exponential(_mm512_sub_ps(logit, highest)));
    }
    const __m512 scaled = exponential(_mm512_sub_ps(before, highest));
    const __m512 total = _mm512_fmadd_ps(_mm512_loadu_ps(total_so_far), scaled, more);
    _mm512_storeu_ps(highest_so_far, highest);
    _mm512_storeu_ps(total_so_far, total);
}

void cherry_losses(struct losses *of)
{
    float logits[ENTRIES * LANES];
    const int64_t items = (of->panels + PANELS - 1) / PANELS * of->slices;
    int64_t item;
    while ((item = __atomic_fetch_add(&of->next, 1, __ATOMIC_RELAXED)) < items) {
        const int64_t slice = item % of->slices, begin = item / of->slices * PANELS;
        const int64_t end = of->vocabulary * (slice + 1) / of->slices;
        for (int64_t block = of->vocabulary * slice / of->slices; block < end; block += BLOCK)
            for (int64_t panel = begin; panel < smaller(begin + PANELS, of->panels); panel++)
                for (int64_t first = block; first < smaller(block + BLOCK, end); first += ENTRIES) {
                    const int64_t count = smaller(ENTRIES, end - first);
                    make_logits(of, of->states + panel * of->depth * LANES, first, count, logits);
                    for (int v = 0; v < VECTORS; v++)
                        add_up(of, slice, panel * LANES + WIDTH * v, first, count,
                               logits + WIDTH * v);
                }
    }
}
