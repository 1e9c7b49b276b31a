/* torch's CPU random numbers, faster: mt19937 and the fills that torch makes of its words.

   `native.py` loads this file's library with ctypes and compares it with torch before it uses it; nothing here needs Python or
   torch. What is computed:

   - The generator's state is a block of 624 words and `next`, how many of them are consumed (1 to 624; 624: a twist comes
     first). A twist replaces the block with the next one; a word that is drawn goes through tempering, the block keeps it raw.
   - uniform_: the low 24 bits of a word times 2^-24 are in [0, 1); one FMA maps that to [from, to); values that rounding took to
     `to` become `from`. Half-precision values are computed in float32 and rounded before that comparison.
   - normal_ (contiguous, at least 16 elements): groups of 16 words; words j and j + 8 of a group give elements j and j + 8
     (Box-Muller), with the approximations of log, sin and cos below. Half-precision values are the rounded float32 values.

   The fills need AVX2, FMA and F16C: without AVX2, torch's own kernels give other bits than these. All else is portable. The bits
   depend on every multiplication and addition staying what it is written as: compile with -ffp-contract=off. No function keeps
   anything between calls; all may run in several threads at once. */

#include <stdint.h>
#include <string.h>

#if !defined(__GNUC__)
#error "the accelerator needs gcc or clang"
#endif
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the accelerator needs a little-endian machine"
#endif

#if defined(__x86_64__) && !defined(PORTABLE)
#define X86 1
#include <cpuid.h>
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define PCLMUL __attribute__((target("pclmul,sse4.1")))
#else
#define X86 0
#endif

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

enum {
    WORDS = 624,       /* of a block */
    MIDDLE = 397,      /* how far ahead the word lies that a twist combines with two neighbors */
    DEGREE = 19937,    /* of the characteristic polynomial */
    LIMBS = 312,       /* 64-bit words of a polynomial modulo it */
    GROUP = 16,        /* elements that normal_ makes at once */
    CHUNK = 4 * WORDS, /* elements that a fill makes at once: a multiple of 16 that stays in the L1 cache */
    SPARE = 8          /* what vector loads may read, and stores write, behind the last element */
};

/* -- what the machine can do ------------------------------------------------------------------------------------------------ */

#if X86

static int has_avx2, has_pclmul;

static int all_of(unsigned flags, unsigned wanted) { return (flags & wanted) == wanted; }

/* Whether the operating system keeps the 256-bit registers of a thread that it interrupts. */
static int keeps_registers(void) {
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return all_of(low, 6);
}

/* Asked once, when the library is loaded: in a virtual machine the instruction that tells is slower than a twist. (Compilers'
   __builtin_cpu_supports is not used, as some do not know F16C, and some always say no.) */
__attribute__((constructor)) static void look(void) {
    unsigned a, b = 0, c = 0, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return;
    has_pclmul = all_of(c, bit_PCLMUL | bit_SSE4_1);
    if (!all_of(c, bit_OSXSAVE | bit_FMA | bit_F16C) || !keeps_registers()) return;
    has_avx2 = __get_cpuid_count(7, 0, &a, &b, &c, &d) && all_of(b, bit_AVX2);
}

#endif

/* Counted up when a function here changes its arguments: `native.py` does not call what an older source was built to. */
EXPORT int gp_version(void) { return 2; }

/* -- the generator ---------------------------------------------------------------------------------------------------------- */

/* What two neighboring words contribute to the word that replaces the first of them. */
INLINE uint32_t mixed(uint32_t one, uint32_t following) {
    return (((one & 0x80000000u) | (following & 0x7fffffffu)) >> 1) ^ ((0u - (following & 1u)) & 0x9908b0dfu);
}

/* Both loops have at least 227 words between what they write and the earlier results they read, so compilers vectorize them. */
INLINE void twist_inline(uint32_t *s) {
    for (int j = 0; j < WORDS - MIDDLE; j++) s[j] = s[j + MIDDLE] ^ mixed(s[j], s[j + 1]);
    for (int j = WORDS - MIDDLE; j < WORDS - 1; j++) s[j] = s[j + MIDDLE - WORDS] ^ mixed(s[j], s[j + 1]);
    s[WORDS - 1] = s[MIDDLE - 1] ^ mixed(s[WORDS - 1], s[0]);
}

static void twist_portable(uint32_t *block, int64_t count) {
    for (; count > 0; count--) twist_inline(block);
}

#if X86
AVX2 static void twist_avx2(uint32_t *block, int64_t count) {
    for (; count > 0; count--) twist_inline(block);
}
#endif

/* `count` twists of `block`, in place. */
EXPORT void gp_twist(uint32_t *block, int64_t count) {
#if X86
    if (has_avx2) {
        twist_avx2(block, count);
        return;
    }
#endif
    twist_portable(block, count);
}

/* Consume `count` words without looking at them. */
EXPORT void gp_skip(uint32_t *block, int64_t *next, int64_t count) {
    if (count <= 0) return;
    int64_t target = *next + count; /* counted from the start of this block; a block that is all consumed is not left */
    int64_t twists = (target - 1) / WORDS;
    gp_twist(block, twists);
    *next = target - twists * WORDS;
}

/* -- jumps ------------------------------------------------------------------------------------------------------------------

   The state n words ahead is a sum (XOR) of windows of 624 words of the stream: those that start at t for every term x^t of
   x^n modulo the characteristic polynomial. About half of the 19937 terms are there, so sums of windows that start within 4
   words of one another are made once: `sums[v / 2]` is, for odd v, the stream plus itself shifted by the bits of v. The
   polynomial is then cut at runs of zeros into pieces of 4 bits, each starting with a one: some 4000 windows, added up in
   registers one strip of 104 words after the other. */

enum { SPAN = 2 * WORDS, REACH = SPAN + WORDS, STRIP = 104, PIECE = 4, SUMS = 1 << (PIECE - 1), MOST = SPAN / PIECE + 1 };

typedef struct {
    uint32_t stream[REACH + SPARE]; /* what the windows that start in the first SPAN words hold */
    uint32_t sums[SUMS][REACH];
    uint32_t terms[MOST]; /* places in `sums` where a window starts */
    int count;
} jump_t;

/* At least 24 bits of `bits`, from `bit` on. */
INLINE uint32_t bits_from(const uint8_t *bits, int bit) {
    uint32_t found;
    memcpy(&found, bits + (bit >> 3), sizeof found);
    return found >> (bit & 7);
}

/* Cut bits `start` to `end` into pieces; a piece ends with the span at the latest, as its windows reach no further. */
static void find_terms(jump_t *jump, const uint8_t *bits, int start, int end) {
    int count = 0;
    for (int bit = start;;) {
        int zeros = __builtin_ctz(bits_from(bits, bit) | 1u << 24);
        bit += zeros;
        if (bit >= end) break;
        if (zeros == 24) continue;
        uint32_t size = end - bit < PIECE ? (uint32_t)(end - bit) : PIECE, piece = bits_from(bits, bit) & ((1u << size) - 1);
        jump->terms[count++] = (piece >> 1) * REACH + (uint32_t)(bit - start);
        bit += PIECE;
    }
    jump->count = count;
}

/* Row v / 2 of `sums` for every odd v: the row without v's highest bit, and the stream shifted by that bit. */
INLINE void find_sums(jump_t *jump) {
    memcpy(jump->sums[0], jump->stream, sizeof jump->sums[0]);
    for (int bit = 1; bit < PIECE; bit++) {
        const uint32_t *shifted = jump->stream + bit;
        for (int half = 0; half < 1 << (bit - 1); half++) {
            const uint32_t *without = jump->sums[half];
            uint32_t *with = jump->sums[half + (1 << (bit - 1))];
            for (int j = 0; j < REACH; j++) with[j] = without[j] ^ shifted[j];
        }
    }
}

static void add_windows_portable(jump_t *jump, uint32_t *out) {
    find_sums(jump);
    for (int term = 0; term < jump->count; term++) {
        const uint32_t *window = jump->sums[0] + jump->terms[term];
        for (int j = 0; j < WORDS; j++) out[j] ^= window[j];
    }
}

#if X86
AVX2 static void add_strip_avx2(const jump_t *jump, int place, uint32_t *out) {
    __m256i sum[STRIP / 8];
    for (int j = 0; j < STRIP / 8; j++) sum[j] = _mm256_loadu_si256((const __m256i *)(out + place) + j);
    for (int term = 0; term < jump->count; term++) {
        const __m256i *window = (const __m256i *)(jump->sums[0] + jump->terms[term] + place);
        for (int j = 0; j < STRIP / 8; j++) sum[j] = _mm256_xor_si256(sum[j], _mm256_loadu_si256(window + j));
    }
    for (int j = 0; j < STRIP / 8; j++) _mm256_storeu_si256((__m256i *)(out + place) + j, sum[j]);
}

AVX2 static void add_windows_avx2(jump_t *jump, uint32_t *out) {
    find_sums(jump);
    for (int place = 0; place < WORDS; place += STRIP) add_strip_avx2(jump, place, out);
}
#endif

static void add_windows(jump_t *jump, uint32_t *out) {
#if X86
    if (has_avx2) {
        add_windows_avx2(jump, out);
        return;
    }
#endif
    add_windows_portable(jump, out);
}

/* Fill the stream from its first block on. */
static void extend(jump_t *jump) {
    for (uint32_t *block = jump->stream; block < jump->stream + SPAN; block += WORDS) {
        memcpy(block + WORDS, block, WORDS * sizeof(uint32_t));
        gp_twist(block + WORDS, 1);
    }
}

/* The sum of the windows of the stream that starts with `block`, one for every bit t of `polynomial` (DEGREE packed bits, the
   lowest first), the one that starts at word t. */
EXPORT void gp_jump(const uint32_t *block, const uint8_t *polynomial, uint32_t *out) {
    jump_t jump;
    uint8_t bits[(DEGREE + 7) / 8 + SPARE] = {0};
    uint32_t sum[WORDS] = {0};
    memcpy(bits, polynomial, (DEGREE + 7) / 8);
    memset(jump.stream + REACH, 0, SPARE * sizeof(uint32_t));
    memcpy(jump.stream, block, WORDS * sizeof(uint32_t));
    for (int start = 0; start < DEGREE; start += SPAN) {
        extend(&jump);
        find_terms(&jump, bits, start, start + SPAN < DEGREE ? start + SPAN : DEGREE);
        add_windows(&jump, sum);
        memcpy(jump.stream, jump.stream + SPAN, WORDS * sizeof(uint32_t));
    }
    memcpy(out, sum, sizeof sum);
}

/* -- polynomials over GF(2) -------------------------------------------------------------------------------------------------

   312 limbs of 64 bits, the lowest power first. `terms` are the exponents of the characteristic polynomial, the highest first;
   its second one is 623 less than the first, so eight limbs at a time can be reduced: none of them depends on another. */

enum { BATCH = 8, LEAST = 39 }; /* 312 = 8 * 39: Karatsuba's method down to products of 39 limbs */

typedef void product_t(const uint64_t *a, const uint64_t *b, uint64_t *out);

/* out (2 * LEAST limbs) = a * b, from a's highest bits to its lowest. */
static void product_portable(const uint64_t *a, const uint64_t *b, uint64_t *out) {
    memset(out, 0, 2 * LEAST * sizeof(uint64_t));
    for (int bit = 63; bit >= 0; bit--) {
        for (int j = 2 * LEAST - 1; j > 0; j--) out[j] = out[j] << 1 | out[j - 1] >> 63;
        out[0] <<= 1;
        for (int i = 0; i < LEAST; i++) {
            const uint64_t mask = 0 - (a[i] >> bit & 1);
            for (int j = 0; j < LEAST; j++) out[i + j] ^= b[j] & mask;
        }
    }
}

#if X86
/* Limb by limb of the result, so that each is written once. */
PCLMUL static void product_pclmul(const uint64_t *a, const uint64_t *b, uint64_t *out) {
    uint64_t carry = 0;
    for (int k = 0; k < 2 * LEAST - 1; k++) {
        __m128i sum = _mm_set_epi64x(0, (long long)carry);
        int first = k < LEAST ? 0 : k - LEAST + 1, last = k < LEAST ? k : LEAST - 1;
        for (int i = first; i <= last; i++) {
            __m128i one = _mm_loadl_epi64((const __m128i *)(a + i)), other = _mm_loadl_epi64((const __m128i *)(b + k - i));
            sum = _mm_xor_si128(sum, _mm_clmulepi64_si128(one, other, 0));
        }
        out[k] = (uint64_t)_mm_cvtsi128_si64(sum);
        carry = (uint64_t)_mm_extract_epi64(sum, 1);
    }
    out[2 * LEAST - 1] = carry;
}
#endif

/* out (2n limbs) = a * b (n limbs each), by three products of half the size. */
static void product(product_t *least, const uint64_t *a, const uint64_t *b, uint64_t *out, int n) {
    if (n == LEAST) {
        least(a, b, out);
        return;
    }
    int half = n / 2;
    uint64_t left[LIMBS / 2], right[LIMBS / 2], middle[LIMBS];
    for (int j = 0; j < half; j++) left[j] = a[j] ^ a[j + half];
    for (int j = 0; j < half; j++) right[j] = b[j] ^ b[j + half];
    product(least, a, b, out, half);
    product(least, a + half, b + half, out + n, half);
    product(least, left, right, middle, half);
    for (int j = 0; j < n; j++) middle[j] ^= out[j] ^ out[j + n];
    for (int j = 0; j < n; j++) out[j + half] ^= middle[j];
}

typedef uint64_t four_t __attribute__((vector_size(32), aligned(8), may_alias)); /* as compilers do not vectorize this */

/* to ^= the sum, over terms `first` to `last`, of the 8 limbs that start at bit `place` - term of `q`. */
INLINE void add_multiples(uint64_t *to, const uint64_t *q, int place, const int32_t *terms, int first, int last) {
    four_t sum[BATCH / 4] = {{0}};
    for (int term = first; term <= last; term++) {
        const uint64_t *limb = q + ((place - terms[term]) >> 6);
        const four_t *here = (const four_t *)limb, *above = (const four_t *)(limb + 1);
        const int shift = (place - terms[term]) & 63;
        for (int j = 0; j < BATCH / 4; j++) sum[j] ^= here[j] >> shift | above[j] << 1 << (63 - shift);
    }
    for (int j = 0; j < BATCH / 4; j++) ((four_t *)to)[j] ^= sum[j];
}

/* out = `wide` (2 * LIMBS + 1 limbs) modulo the characteristic polynomial p. With `wide` = high * x^DEGREE + low: first, from the
   top down, the q whose product with p takes all of the high part away: high plus what the lower terms of p bring back up there.
   Then out = low + q * lower terms. q has zeros around it, for the bits that it does not have. */
INLINE void reduce_inline(const uint64_t *wide, uint64_t *out, const int32_t *terms, int32_t count) {
    enum { CUT = DEGREE % 64 };
    uint64_t padded[LIMBS + 2 * BATCH] = {0}, *q = padded + BATCH;
    int last = 0, first = count;
    for (int j = 0; j < LIMBS; j++) q[j] = wide[j + LIMBS - 1] >> CUT | wide[j + LIMBS] << (64 - CUT);
    for (int limb = LIMBS - BATCH; limb >= 0; limb -= BATCH) {
        while (last + 1 < count && 64 * limb + DEGREE - terms[last + 1] < 64 * LIMBS) last++;
        add_multiples(q + limb, q, 64 * limb + DEGREE, terms, 1, last);
    }
    memcpy(out, wide, LIMBS * sizeof(uint64_t));
    for (int limb = 0; limb < LIMBS; limb += BATCH) {
        while (first > 1 && terms[first - 1] < 64 * (limb + BATCH)) first--;
        add_multiples(out + limb, q, 64 * limb, terms, first, count - 1);
    }
    out[LIMBS - 1] &= ((uint64_t)1 << CUT) - 1;
}

static void reduce_portable(const uint64_t *wide, uint64_t *out, const int32_t *terms, int32_t count) {
    reduce_inline(wide, out, terms, count);
}

#if X86
AVX2 static void reduce_avx2(const uint64_t *wide, uint64_t *out, const int32_t *terms, int32_t count) {
    reduce_inline(wide, out, terms, count);
}
#endif

static void reduce(const uint64_t *wide, uint64_t *out, const int32_t *terms, int32_t count) {
#if X86
    if (has_avx2) {
        reduce_avx2(wide, out, terms, count);
        return;
    }
#endif
    reduce_portable(wide, out, terms, count);
}

/* out = a * b modulo the characteristic polynomial. */
EXPORT void gp_multiply(const uint64_t *a, const uint64_t *b, uint64_t *out, const int32_t *terms, int32_t count) {
    uint64_t wide[2 * LIMBS + 1];
    product_t *least = product_portable;
#if X86
    if (has_pclmul) least = product_pclmul;
#endif
    product(least, a, b, wide, LIMBS);
    wide[2 * LIMBS] = 0;
    reduce(wide, out, terms, count);
}

/* A zero behind each of 32 bits. */
INLINE uint64_t spread(uint64_t bits) {
    bits = (bits | bits << 16) & 0x0000ffff0000ffffu;
    bits = (bits | bits << 8) & 0x00ff00ff00ff00ffu;
    bits = (bits | bits << 4) & 0x0f0f0f0f0f0f0f0fu;
    bits = (bits | bits << 2) & 0x3333333333333333u;
    return (bits | bits << 1) & 0x5555555555555555u;
}

/* out = a * a modulo the characteristic polynomial. */
EXPORT void gp_square(const uint64_t *a, uint64_t *out, const int32_t *terms, int32_t count) {
    uint64_t wide[2 * LIMBS + 1];
    for (int j = 0; j < LIMBS; j++) {
        wide[2 * j] = spread(a[j] & 0xffffffffu);
        wide[2 * j + 1] = spread(a[j] >> 32);
    }
    wide[2 * LIMBS] = 0;
    reduce(wide, out, terms, count);
}

/* -- log, sin and cos -------------------------------------------------------------------------------------------------------

   This section is an altered version of "avx_mathfun.h", for the arguments that Box-Muller has, given as integers: the operations
   on exponents and octants are other ones, products and sums are fused as compilers fuse the original's, and what comes out is
   the same. Its notice:

   AVX implementation of sin, cos, sincos, exp and log

   Based on "sse_mathfun.h", by Julien Pommier
   http://gruntthepeon.free.fr/ssemath/

   Copyright (C) 2012 Giovanni Garberoglio
   Interdisciplinary Laboratory for Computational Science (LISC)
   Fondazione Bruno Kessler and University of Trento
   via Sommarive, 18
   I-38123 Trento (Italy)

   This software is provided 'as-is', without any express or implied
   warranty.  In no event will the authors be held liable for any damages
   arising from the use of this software.

   Permission is granted to anyone to use this software for any purpose,
   including commercial applications, and to alter it and redistribute it
   freely, subject to the following restrictions:

   1. The origin of this software must not be misrepresented; you must not
      claim that you wrote the original software. If you use this software
      in a product, an acknowledgment in the product documentation would be
      appreciated but is not required.
   2. Altered source versions must be plainly marked as such, and must not be
      misrepresented as being the original software.
   3. This notice may not be removed or altered from any source distribution.

   (this is the zlib license) */

#if X86

typedef __m256 floats; /* 8 of each */
typedef __m256i ints;

AVX2 INLINE floats all(float value) { return _mm256_set1_ps(value); }
AVX2 INLINE ints all_ints(uint32_t value) { return _mm256_set1_epi32((int)value); }
AVX2 INLINE floats as_floats(ints bits) { return _mm256_castsi256_ps(bits); }
AVX2 INLINE ints as_ints(floats bits) { return _mm256_castps_si256(bits); }
AVX2 INLINE floats plus(floats a, floats b) { return _mm256_add_ps(a, b); }
AVX2 INLINE floats minus(floats a, floats b) { return _mm256_sub_ps(a, b); }
AVX2 INLINE floats times(floats a, floats b) { return _mm256_mul_ps(a, b); }

/* a * b + c, a * b - c and c - a * b, rounded once: what torch's compiler made of most of the original's products and sums. */
AVX2 INLINE floats fused(floats a, floats b, floats c) { return _mm256_fmadd_ps(a, b, c); }
AVX2 INLINE floats fused_minus(floats a, floats b, floats c) { return _mm256_fmsub_ps(a, b, c); }
AVX2 INLINE floats minus_fused(floats c, floats a, floats b) { return _mm256_fnmadd_ps(a, b, c); }

/* log(u), of u in [2^-24, 1], for u * 2^24 as an integer. u = 2^e * (1 + x), with 1 + x in [sqrt(1/2), sqrt(2)); subtracting the
   bits of sqrt(1/2) from those of a float leaves e above its 23 bits of fraction. */
AVX2 INLINE floats log8(ints scaled) {
    const uint32_t root = 0x3f3504f3;
    ints bits = _mm256_sub_epi32(as_ints(_mm256_cvtepi32_ps(scaled)), all_ints(root + (24u << 23)));
    floats e = _mm256_cvtepi32_ps(_mm256_srai_epi32(bits, 23));
    floats x = as_floats(_mm256_add_epi32(_mm256_and_si256(bits, all_ints(0x7fffff)), all_ints(root)));
    x = minus(x, all(1.0f));
    floats z = times(x, x), y = all(7.0376836292E-2f);
    y = fused(y, x, all(-1.1514610310E-1f));
    y = fused(y, x, all(1.1676998740E-1f));
    y = fused(y, x, all(-1.2420140846E-1f));
    y = fused(y, x, all(1.4249322787E-1f));
    y = fused(y, x, all(-1.6668057665E-1f));
    y = fused(y, x, all(2.0000714765E-1f));
    y = fused(y, x, all(-2.4999993993E-1f));
    y = fused(y, x, all(3.3333331174E-1f));
    y = fused(times(y, x), z, times(e, all(-2.12194440e-4f)));
    y = minus_fused(y, z, all(0.5f));
    return fused(e, all(0.693359375f), plus(x, y));
}

/* The sines and cosines of 2 pi u, of u in [0, 1), for u * 2^24 as an integer: from the nearest multiple q of a right angle, and
   the rest x in [-pi/4, pi/4]. q stands in the integer's bits from 22 on, once half a right angle is added. */
AVX2 INLINE void sincos8(ints scaled, floats *sine, floats *cosine) {
    ints turned = _mm256_add_epi32(scaled, all_ints(1u << 21)), sign = all_ints(0x80000000u);
    floats q = _mm256_cvtepi32_ps(_mm256_srli_epi32(turned, 22));
    floats odd = as_floats(_mm256_slli_epi32(turned, 9)); /* in the sign bits, as for the next two */
    floats sine_sign = as_floats(_mm256_and_si256(_mm256_slli_epi32(turned, 8), sign));
    ints further = _mm256_add_epi32(turned, all_ints(1u << 22));
    floats cosine_sign = as_floats(_mm256_and_si256(_mm256_slli_epi32(further, 8), sign));
    floats x = times(_mm256_cvtepi32_ps(scaled), all((float)(2 * 3.14159265358979323846) * 0x1p-24f));
    x = fused(q, all(2 * -0.78515625f), x);
    x = fused(q, all(2 * -2.4187564849853515625e-4f), x);
    x = fused(q, all(2 * -3.77489497744594108e-8f), x);
    floats z = times(x, x), c = all(2.443315711809948E-005f), s = all(-1.9515295891E-4f);
    c = fused(c, z, all(-1.388731625493765E-003f));
    c = fused(c, z, all(4.166664568298827E-002f));
    c = plus(fused_minus(times(c, z), z, times(z, all(0.5f))), all(1.0f));
    s = fused(s, z, all(8.3321608736E-3f));
    s = fused(s, z, all(-1.6666654611E-1f));
    s = fused(times(s, z), x, x);
    *sine = _mm256_xor_ps(_mm256_blendv_ps(s, c, odd), sine_sign);
    *cosine = _mm256_xor_ps(_mm256_blendv_ps(c, s, odd), cosine_sign);
}

/* -- from words to values ---------------------------------------------------------------------------------------------------

   A fill copies the generator's block, so that vector loads may read a little behind it, and makes CHUNK elements at a time, in
   several passes over a buffer: the processor can have more elements under way in each of them than in one that does it all. */

typedef struct {
    uint32_t words[WORDS + SPARE];
    int64_t next;
} source_t;

static void open_source(source_t *source, const uint32_t *block, int64_t next) {
    memset(source->words + WORDS, 0, SPARE * sizeof(uint32_t));
    memcpy(source->words, block, WORDS * sizeof(uint32_t));
    source->next = next;
}

static void close_source(const source_t *source, uint32_t *block, int64_t *next) {
    memcpy(block, source->words, WORDS * sizeof(uint32_t));
    *next = source->next;
}

AVX2 INLINE ints load_ints(const uint32_t *from) { return _mm256_loadu_si256((const ints *)from); }
AVX2 INLINE void store_ints(uint32_t *to, ints values) { _mm256_storeu_si256((ints *)to, values); }

AVX2 INLINE ints tempered(ints y) {
    y = _mm256_xor_si256(y, _mm256_srli_epi32(y, 11));
    y = _mm256_xor_si256(y, _mm256_and_si256(_mm256_slli_epi32(y, 7), all_ints(0x9d2c5680u)));
    y = _mm256_xor_si256(y, _mm256_and_si256(_mm256_slli_epi32(y, 15), all_ints(0xefc60000u)));
    return _mm256_xor_si256(y, _mm256_srli_epi32(y, 18));
}

/* The low 24 bits of the next `count` words; up to SPARE - 1 more places of `drawn` are overwritten. */
AVX2 static void draw(source_t *source, uint32_t *drawn, int64_t count) {
    while (count > 0) {
        if (source->next == WORDS) {
            twist_inline(source->words);
            source->next = 0;
        }
        int64_t run = count < WORDS - source->next ? count : WORDS - source->next;
        const uint32_t *words = source->words + source->next;
        for (int64_t j = 0; j < run; j += 8)
            store_ints(drawn + j, _mm256_and_si256(tempered(load_ints(words + j)), all_ints(0xffffff)));
        source->next += run;
        drawn += run;
        count -= run;
    }
}

/* The fills come in two kinds and three dtypes. Functions that take one of them are inlined where it is a constant. */
enum { UNIFORM = 0, NORMAL = 1 };
enum { F32 = 0, BF16 = 1, F16 = 2 };

typedef struct {
    int kind, dtype;
    float a, b; /* from and to, or mean and standard deviation */
} fill_t;

/* bfloat16 is the upper half of a float32. Here that is rounded to the nearest one, ties to even; the lower half is arbitrary. */
AVX2 INLINE floats upper_rounded(floats x) {
    ints bits = as_ints(x), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), all_ints(1));
    return as_floats(_mm256_add_epi32(_mm256_add_epi32(bits, odd), all_ints(0x7fff)));
}

/* The nearest values that the dtype can hold. */
AVX2 INLINE floats rounded(int dtype, floats x) {
    if (dtype == BF16) return _mm256_and_ps(upper_rounded(x), as_floats(all_ints(0xffff0000u)));
    if (dtype == F16) return _mm256_cvtph_ps(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    return x;
}

/* Write 16 values, from element `place` of `out`. Of bfloat16 the lower halves are dropped, float16 is rounded here. */
AVX2 INLINE void store16(int dtype, void *out, int64_t place, floats low, floats high) {
    if (dtype == BF16) {
        ints both = _mm256_packus_epi32(_mm256_srli_epi32(as_ints(low), 16), _mm256_srli_epi32(as_ints(high), 16));
        _mm256_storeu_si256((ints *)((uint16_t *)out + place), _mm256_permute4x64_epi64(both, 0xd8)); /* it goes by halves */
    } else if (dtype == F16) {
        _mm_storeu_si128((__m128i *)((uint16_t *)out + place), _mm256_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT));
        _mm_storeu_si128((__m128i *)((uint16_t *)out + place + 8), _mm256_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT));
    } else {
        _mm256_storeu_ps((float *)out + place, low);
        _mm256_storeu_ps((float *)out + place + 8, high);
    }
}

typedef struct {
    floats low, range, highest, lowest; /* the last two are rounded to the dtype */
} uniform_t;

AVX2 INLINE floats uniform8(int dtype, const uint32_t *drawn, const uniform_t *u) {
    floats unit = times(_mm256_cvtepi32_ps(load_ints(drawn)), all(0x1p-24f));
    floats value = rounded(dtype, fused(unit, u->range, u->low));
    return _mm256_blendv_ps(value, u->lowest, _mm256_cmp_ps(value, u->highest, _CMP_EQ_OQ));
}

AVX2 INLINE void make_uniform(int dtype, const uint32_t *drawn, void *out, int64_t count, float from, float to) {
    const uniform_t u = {all(from), all(to - from), rounded(dtype, all(to)), rounded(dtype, all(from))};
    for (int64_t j = 0; j < count; j += GROUP)
        store16(dtype, out, j, uniform8(dtype, drawn + j, &u), uniform8(dtype, drawn + j + 8, &u));
}

/* Replace the first half of every group by the bits of Box-Muller's radius, sqrt(-2 log(1 - u)). */
AVX2 INLINE void find_radii(uint32_t *drawn, int64_t count) {
    for (int64_t j = 0; j < count; j += GROUP) {
        ints rest = _mm256_sub_epi32(all_ints(1u << 24), load_ints(drawn + j));
        store_ints(drawn + j, as_ints(_mm256_sqrt_ps(times(all(-2.0f), log8(rest)))));
    }
}

/* torch writes every NaN of bfloat16 as this one. */
AVX2 INLINE floats one_nan(floats x) { return _mm256_blendv_ps(x, all(__builtin_nanf("")), _mm256_cmp_ps(x, x, _CMP_UNORD_Q)); }

AVX2 INLINE void make_normal(int dtype, uint32_t *drawn, void *out, int64_t count, float mean, float std) {
    const int nans = dtype == BF16 && !(__builtin_isfinite(mean) && __builtin_isfinite(std));
    find_radii(drawn, count);
    for (int64_t j = 0; j < count; j += GROUP) {
        floats radius = as_floats(load_ints(drawn + j)), sine, cosine;
        sincos8(load_ints(drawn + j + 8), &sine, &cosine);
        floats low = fused(times(radius, cosine), all(std), all(mean)), high = fused(times(radius, sine), all(std), all(mean));
        if (nans) low = one_nan(low), high = one_nan(high);
        if (dtype == BF16) low = upper_rounded(low), high = upper_rounded(high);
        store16(dtype, out, j, low, high);
    }
}

AVX2 INLINE void make_dtype(int dtype, const fill_t *fill, uint32_t *drawn, void *out, int64_t count) {
    if (fill->kind == NORMAL)
        make_normal(dtype, drawn, out, count, fill->a, fill->b);
    else
        make_uniform(dtype, drawn, out, count, fill->a, fill->b);
}

/* `count` values, a multiple of 16, from as many integers in [0, 2^24), which are lost. */
AVX2 static void make(const fill_t *fill, uint32_t *drawn, void *out, int64_t count) {
    if (fill->dtype == F32)
        make_dtype(F32, fill, drawn, out, count);
    else if (fill->dtype == BF16)
        make_dtype(BF16, fill, drawn, out, count);
    else
        make_dtype(F16, fill, drawn, out, count);
}

/* -- fills ------------------------------------------------------------------------------------------------------------------ */

static int64_t bytes_of(const fill_t *fill, int64_t elements) { return elements * (fill->dtype == F32 ? 4 : 2); }

/* At most CHUNK values. The last ones, where they are no whole group, come by way of a group of their own. */
static void fill_chunk(source_t *source, const fill_t *fill, char *out, int64_t count) {
    uint32_t drawn[CHUNK + SPARE];
    char group[GROUP * sizeof(float)];
    const int64_t rest = count % GROUP, whole = count - rest;
    draw(source, drawn, count);
    make(fill, drawn, out, whole);
    if (!rest) return;
    for (int64_t j = count; j < whole + GROUP; j++) drawn[j] = 0;
    make(fill, drawn + whole, group, GROUP);
    memcpy(out + bytes_of(fill, whole), group, (size_t)bytes_of(fill, rest));
}

static void fill_run(source_t *source, const fill_t *fill, char *out, int64_t count) {
    for (int64_t done = 0; done < count; done += CHUNK)
        fill_chunk(source, fill, out + bytes_of(fill, done), count - done < CHUNK ? count - done : CHUNK);
}

/* An element as the float that comparisons of its dtype see. */
AVX2 INLINE float value_at(int dtype, const void *out, int64_t place) {
    if (dtype == F32) return ((const float *)out)[place];
    uint32_t bits = ((const uint16_t *)out)[place];
    if (dtype == F16) return _cvtsh_ss((uint16_t)bits);
    float value;
    bits <<= 16;
    memcpy(&value, &bits, sizeof value);
    return value;
}

AVX2 INLINE int is_outside(float value, float low, float high) { return (value < low) | (value > high); }

/* Without a branch: which elements are outside is hard to foresee. */
AVX2 INLINE int64_t find_outside_of(int dtype, const void *out, int64_t count, float low, float high, int32_t *wrong) {
    int64_t found = 0;
    for (int64_t j = 0; j < count; j++) {
        wrong[found] = (int32_t)j;
        found += is_outside(value_at(dtype, out, j), low, high);
    }
    return found;
}

/* Draw the groups that hold elements in `wrong`, and pass over the others; keep those of `wrong` that are outside again. */
AVX2 INLINE int64_t redraw_of(int dtype, source_t *source, const fill_t *fill, char *out, int64_t count, int32_t *wrong,
                              int64_t number, float low, float high) {
    char group[GROUP * sizeof(float)];
    int64_t at = 0, left = 0; /* `at`: the element that the source stands at */
    for (int64_t j = 0; j < number;) {
        const int64_t start = wrong[j] / GROUP * GROUP;
        gp_skip(source->words, &source->next, start - at);
        fill_chunk(source, fill, group, GROUP);
        at = start + GROUP;
        for (; j < number && wrong[j] < at; j++) {
            const int32_t place = wrong[j];
            memcpy(out + bytes_of(fill, place), group + bytes_of(fill, place - start), (size_t)bytes_of(fill, 1));
            wrong[left] = place;
            left += is_outside(value_at(dtype, group, place - start), low, high);
        }
    }
    gp_skip(source->words, &source->next, count - at);
    return left;
}

AVX2 static int64_t find_outside(int dtype, const void *out, int64_t count, float low, float high, int32_t *wrong) {
    if (dtype == F32) return find_outside_of(F32, out, count, low, high, wrong);
    return find_outside_of(dtype == BF16 ? BF16 : F16, out, count, low, high, wrong);
}

AVX2 static int64_t redraw(source_t *source, const fill_t *fill, char *out, int64_t count, int32_t *wrong, int64_t number, float low,
                           float high) {
    if (fill->dtype == F32) return redraw_of(F32, source, fill, out, count, wrong, number, low, high);
    return redraw_of(fill->dtype == BF16 ? BF16 : F16, source, fill, out, count, wrong, number, low, high);
}

#endif /* X86 */

/* Whether this machine can make fills; where it cannot, `gp_rows` does nothing. */
EXPORT int gp_fills(void) {
#if X86
    return has_avx2;
#else
    return 0;
#endif
}

/* `rows` runs of `length` values that torch's uniform_ (kind 0; a and b: from and to) or normal_ (kind 1: mean and standard
   deviation) makes of float32, bfloat16 or float16 (dtype 0, 1, 2), each run `stride` elements after the one before; between two,
   `gap` words are passed over. One row is what torch makes of a contiguous tensor, several are what it leaves in some columns of
   one. Normal values come in groups: length and gap are multiples of 16, and the first word is the first of a group. */
EXPORT void gp_rows(int kind, int dtype, uint32_t *block, int64_t *next, void *out, int64_t rows, int64_t length, int64_t gap,
                    int64_t stride, float a, float b) {
#if X86
    const fill_t fill = {kind, dtype, a, b};
    source_t source;
    if (!has_avx2) return;
    open_source(&source, block, *next);
    for (int64_t row = 0; row < rows; row++) {
        if (row) gp_skip(source.words, &source.next, gap);
        fill_run(&source, &fill, (char *)out + bytes_of(&fill, row * stride), length);
    }
    close_source(&source, block, next);
#else
    (void)kind, (void)dtype, (void)block, (void)next, (void)out, (void)rows, (void)length, (void)gap, (void)stride, (void)a;
    (void)b;
#endif
}

/* The places of the `count` values in `out` that are below `low` or above `high`, in `wrong`, which has room for one more than
   there are; returns their number. */
EXPORT int64_t gp_outside(int dtype, const void *out, int64_t count, float low, float high, int32_t *wrong) {
#if X86
    return has_avx2 ? find_outside(dtype, out, count, low, high, wrong) : 0;
#else
    (void)dtype, (void)out, (void)count, (void)low, (void)high, (void)wrong;
    return 0;
#endif
}

/* One more round of a trunc_normal_: of `count` values (a multiple of 16) that normal_ would draw next, those at the places
   `wrong` (ascending) replace the ones in `out`. Keeps in `wrong` the places whose new values are out of bounds as well, and
   returns their number. The words of all `count` values are consumed. */
EXPORT int64_t gp_redraw(int dtype, uint32_t *block, int64_t *next, void *out, int64_t count, int32_t *wrong, int64_t number,
                         float mean, float std, float low, float high) {
#if X86
    const fill_t fill = {NORMAL, dtype, mean, std};
    source_t source;
    int64_t left;
    if (!has_avx2) return 0;
    open_source(&source, block, *next);
    left = redraw(&source, &fill, out, count, wrong, number, low, high);
    close_source(&source, block, next);
    return left;
#else
    (void)dtype, (void)block, (void)next, (void)out, (void)count, (void)wrong, (void)number, (void)mean, (void)std, (void)low;
    (void)high;
    return 0;
#endif
}
