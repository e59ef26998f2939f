// Eight numbers at a time, in the compiler's own vectors: two registers of them where a CPU has none so wide.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

constexpr std::size_t LANES = 8;
using Vector = float __attribute__((vector_size(4 * LANES)));
using Integers = std::int32_t __attribute__((vector_size(4 * LANES)));

// A number in fp16, as its bits.
struct Half {
    std::uint16_t bits;
};

template <class To, class From>
inline To read(const From *from) {
    To to;
    std::memcpy(&to, from, sizeof to);
    return to;
}

inline Vector load(const float *from) {
    return read<Vector>(from);
}

// GCC takes bytes apart one by one where it is left to it.
inline Vector load(const std::uint8_t *from) {
#if defined(__AVX2__)
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(from))));
#elif defined(__x86_64__)
    const __m128i none = _mm_setzero_si128();
    const __m128i shorts = _mm_unpacklo_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(from)), none);
    const __m128 halves[] = {_mm_cvtepi32_ps(_mm_unpacklo_epi16(shorts, none)), _mm_cvtepi32_ps(_mm_unpackhi_epi16(shorts, none))};
    return read<Vector>(halves);
#elif defined(__aarch64__)
    const uint16x8_t shorts = vmovl_u8(vld1_u8(from));
    const float32x4_t halves[] = {vcvtq_f32_u32(vmovl_u16(vget_low_u16(shorts))), vcvtq_f32_u32(vmovl_high_u16(shorts))};
    return read<Vector>(halves);
#else
    using Bytes = std::uint8_t __attribute__((vector_size(LANES)));
    return __builtin_convertvector(__builtin_convertvector(read<Bytes>(from), Integers), Vector);
#endif
}

inline Vector load(const Half *from) {
#if defined(__F16C__)
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));
#elif defined(__aarch64__)
    using Halves = __fp16 __attribute__((vector_size(2 * LANES)));
    return __builtin_convertvector(read<Halves>(from), Vector);
#else
    using Shorts = std::uint16_t __attribute__((vector_size(2 * LANES)));
    const Integers bits = __builtin_convertvector(read<Shorts>(from), Integers);
    const Integers size = (bits & 0x7fff) << 13, sign = (bits & 0x8000) << 16;
    // The product has fp32's exponent, also of what is less than normal; what is no finite number has an exponent of its own.
    const Integers finite = reinterpret_cast<Integers>(reinterpret_cast<Vector>(size) * 0x1p112f);
    const Integers known = size < (0x7c00 << 13);
    return reinterpret_cast<Vector>((known & finite) | (~known & (size | 0x7f800000)) | sign);
#endif
}

// The first `count` numbers, fewer than a vector has; zeros behind them.
template <class Number>
inline Vector load_some(const Number *from, std::size_t count) {
    Number some[LANES] = {};
    std::memcpy(some, from, count * sizeof *from);
    return load(some);
}

inline void store(float *to, const Vector &vector) {
    std::memcpy(to, &vector, sizeof vector);
}

inline float sum(const Vector &of) {
    return ((of[0] + of[4]) + (of[1] + of[5])) + ((of[2] + of[6]) + (of[3] + of[7]));
}

// The sum of each of four vectors.
inline void sums(const Vector (&of)[4], float (&to)[4]) {
#if defined(__AVX__)
    const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(of[0], of[1]), _mm256_hadd_ps(of[2], of[3]));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
#else
    for (int each = 0; each < 4; ++each)
        to[each] = sum(of[each]);
#endif
}

template <int... FROM>
inline Vector shuffled(const Vector &one, const Vector &other) {
#if defined(__clang__)
    return __builtin_shufflevector(one, other, FROM...);
#else
    return __builtin_shuffle(one, other, Integers{FROM...});
#endif
}

// Rows become columns: pairs, then fours, each within halves of a vector, then the halves.
inline void transpose(Vector (&rows)[LANES]) {
    Vector pairs[LANES], fours[LANES];
    for (std::size_t at = 0; at < LANES; at += 2) {
        pairs[at] = shuffled<0, 8, 1, 9, 4, 12, 5, 13>(rows[at], rows[at + 1]);
        pairs[at + 1] = shuffled<2, 10, 3, 11, 6, 14, 7, 15>(rows[at], rows[at + 1]);
    }
    for (std::size_t at = 0; at < LANES; at += 4)
        for (std::size_t pair = 0; pair < 2; ++pair) {
            fours[at + 2 * pair] = shuffled<0, 1, 8, 9, 4, 5, 12, 13>(pairs[at + pair], pairs[at + 2 + pair]);
            fours[at + 2 * pair + 1] = shuffled<2, 3, 10, 11, 6, 7, 14, 15>(pairs[at + pair], pairs[at + 2 + pair]);
        }
    for (std::size_t at = 0; at < LANES / 2; ++at) {
        rows[at] = shuffled<0, 1, 2, 3, 8, 9, 10, 11>(fours[at], fours[at + 4]);
        rows[at + 4] = shuffled<4, 5, 6, 7, 12, 13, 14, 15>(fours[at], fours[at + 4]);
    }
}

inline Vector greater(const Vector &one, const Vector &other) {
    return one > other ? one : other;
}

// exp of numbers up to 0, within 2e-7 of it; 0 where it is less than fp32's least normal number.
inline Vector exponential(const Vector &of) {
    const Vector least = Vector{} - 87.33654f;
    const Vector power = greater(of, least);
    // e^x = 2^n e^r: adding this number rounds x / ln 2 to n, which then stands in the lowest bits.
    constexpr float ROUNDS = 0x1.8p23f;
    const Vector rounded = power * 1.44269504f + ROUNDS;
    const Vector n = rounded - ROUNDS;
    const Vector r = (power - n * 0.693359375f) + n * 2.12194440e-4f;   // ln 2 in two parts
    Vector series = r * 1.9875691500e-4f + 1.3981999507e-3f;            // as expf of Cephes
    series = series * r + 8.3334519073e-3f;
    series = series * r + 4.1665795894e-2f;
    series = series * r + 1.6666665459e-1f;
    series = series * r + 5.0000001201e-1f;
    series = series * r * r + r + 1.0f;
    const Integers scaled = reinterpret_cast<Integers>(series) + (reinterpret_cast<Integers>(rounded) << 23);
    return reinterpret_cast<Vector>(scaled & (of > least));
}

}  // namespace
