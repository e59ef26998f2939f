// Eight numbers at a time, or sixteen with AVX-512, in the compiler's own vectors: two registers where a CPU has none so wide.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__x86_64__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"            // GCC 12 says so of AVX-512's own
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr std::size_t LANES = 16;
#else
constexpr std::size_t LANES = 8;
#endif
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
#if defined(__AVX512F__)
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from))));
#elif defined(__AVX2__)
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
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)));
#elif defined(__F16C__)
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

// Numbers in 4 bits, two to a byte, the first in its lower half.
struct Nibbles {
    const std::uint8_t *bytes;

    Nibbles operator+(std::size_t even) const {
        return {bytes + even / 2};
    }
};

inline Vector load(Nibbles from) {
#if defined(__x86_64__)
    // Bytes of which the upper half becomes one of its own.
#if defined(__AVX512F__)
    const __m128i pairs = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(from.bytes));
#else
    const __m128i pairs = _mm_cvtsi32_si128(read<std::int32_t>(from.bytes));
#endif
    const __m128i lower = _mm_set1_epi8(15);
    const __m128i apart = _mm_unpacklo_epi8(_mm_and_si128(pairs, lower), _mm_and_si128(_mm_srli_epi16(pairs, 4), lower));
    std::uint8_t bytes[16];
    std::memcpy(bytes, &apart, sizeof bytes);
    return load(bytes);
#elif defined(__aarch64__)
    std::uint8_t some[8] = {};
    std::memcpy(some, from.bytes, LANES / 2);
    const uint8x8_t pairs = vld1_u8(some);
    std::uint8_t bytes[8];
    vst1_u8(bytes, vzip1_u8(vand_u8(pairs, vdup_n_u8(15)), vshr_n_u8(pairs, 4)));
    return load(bytes);
#else
    std::uint8_t bytes[LANES];
    for (std::size_t lane = 0; lane < LANES; ++lane)
        bytes[lane] = from.bytes[lane / 2] >> lane % 2 * 4 & 15;
    return load(bytes);
#endif
}

// The first `count` numbers, fewer than a vector has; zeros behind them.
inline Vector load_some(Nibbles from, std::size_t count) {
    std::uint8_t some[LANES / 2] = {};
    std::memcpy(some, from.bytes, (count + 1) / 2);
    return load(Nibbles{some});
}

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
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(of);
#else
    return ((of[0] + of[4]) + (of[1] + of[5])) + ((of[2] + of[6]) + (of[3] + of[7]));
#endif
}

// The sum of each of four vectors.
inline void sums(const Vector (&of)[4], float (&to)[4]) {
#if defined(__AVX__)
    const auto eight = [&](std::size_t each) {
#if defined(__AVX512F__)
        return _mm256_add_ps(_mm512_castps512_ps256(of[each]), _mm512_extractf32x8_ps(of[each], 1));
#else
        return of[each];
#endif
    };
    const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(eight(0), eight(1)), _mm256_hadd_ps(eight(2), eight(3)));
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

// In each four of the result, these of the same four of one (0 to 3) and of the other (4 to 7).
template <int... FROM>
inline Vector in_fours(const Vector &one, const Vector &other) {
    return [&]<std::size_t... LANE>(std::index_sequence<LANE...>) {
        constexpr std::size_t from[] = {FROM...};
        return shuffled<(LANE / 4 * 4 + from[LANE % 4] + (from[LANE % 4] < 4 ? 0 : LANES - 4))...>(one, other);
    }(std::make_index_sequence<LANES>{});
}

// Every second four of one, and then of the other, from this one on.
template <std::size_t FIRST>
inline Vector fours(const Vector &one, const Vector &other) {
    return [&]<std::size_t... LANE>(std::index_sequence<LANE...>) {
        return shuffled<(LANE / 4 * 8 + 4 * FIRST + LANE % 4)...>(one, other);
    }(std::make_index_sequence<LANES>{});
}

// Rows become columns: within fours of rows and of their numbers first, then whole fours change places.
inline void transpose(Vector (&rows)[LANES]) {
    Vector turned[LANES];
    for (std::size_t at = 0; at < LANES; at += 4) {
        const Vector low = in_fours<0, 4, 1, 5>(rows[at], rows[at + 1]), high = in_fours<2, 6, 3, 7>(rows[at], rows[at + 1]);
        const Vector others_low = in_fours<0, 4, 1, 5>(rows[at + 2], rows[at + 3]);
        const Vector others_high = in_fours<2, 6, 3, 7>(rows[at + 2], rows[at + 3]);
        turned[at] = in_fours<0, 1, 4, 5>(low, others_low);
        turned[at + 1] = in_fours<2, 3, 6, 7>(low, others_low);
        turned[at + 2] = in_fours<0, 1, 4, 5>(high, others_high);
        turned[at + 3] = in_fours<2, 3, 6, 7>(high, others_high);
    }
    for (std::size_t at = 0; at < 4; ++at) {
        const Vector even = fours<0>(turned[at], turned[at + 4]), odd = fours<1>(turned[at], turned[at + 4]);
        if constexpr (LANES == 8) {
            rows[at] = even;
            rows[at + 4] = odd;
        } else {
            const Vector others_even = fours<0>(turned[at + LANES / 2], turned[at + LANES / 2 + 4]);
            const Vector others_odd = fours<1>(turned[at + LANES / 2], turned[at + LANES / 2 + 4]);
            rows[at] = fours<0>(even, others_even);
            rows[at + 4] = fours<0>(odd, others_odd);
            rows[at + LANES / 2] = fours<1>(even, others_even);
            rows[at + LANES / 2 + 4] = fours<1>(odd, others_odd);
        }
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
