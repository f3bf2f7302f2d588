// Loops of nothing but multiply-adds, for the peaks that peak.py measures. Each instruction is there where the compiler
// is told to use it (-march=native). Accumulators are independent, and more of them than an instruction has cycles of
// latency times instructions a cycle; what they hold does not matter.

#if defined(__x86_64__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdint>

#define TWELVE(LINE) \
    LINE(0) LINE(1) LINE(2) LINE(3) LINE(4) LINE(5) LINE(6) LINE(7) LINE(8) LINE(9) LINE(10) LINE(11)
// 12 accumulators of a vector type, 4 rounds an iteration; assembly, or the compiler would leave the work out.
#define DECLARE(I) VECTOR a##I = {};
#define STEP(I) asm volatile(CODE : "+v"(a##I) : "v"(x), "v"(y));
#define LOOP(OPERATIONS)                                                  \
    VECTOR x = {}, y = {};                                                \
    TWELVE(DECLARE)                                                       \
    for (int64_t i = 0; i < rounds; ++i) {                                \
        TWELVE(STEP) TWELVE(STEP) TWELVE(STEP) TWELVE(STEP)               \
    }                                                                     \
    return 48.0 * (OPERATIONS)*rounds;

namespace {

#ifdef __AMX_TILE__
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
};

bool take_tiles() {  // the kernel hands out the tiles' state to a process that asks for it
    constexpr long ask = 0x1023, tile_data = 18;
    if (syscall(SYS_arch_prctl, ask, tile_data) != 0) return false;
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) config.bytes[tile] = 64, config.rows[tile] = 16;
    asm volatile("" : : "r"(&config) : "memory");  // gcc 12 believes that ldtilecfg reads eight bytes
    _tile_loadconfig(&config);
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    _tile_zero(4); _tile_zero(5); _tile_zero(6); _tile_zero(7);
    return true;
}
#endif

double amx_int8([[maybe_unused]] int64_t rounds) {
#ifdef __AMX_INT8__
    if (!take_tiles()) return 0;
    for (int64_t i = 0; i < rounds; ++i) {
        _tile_dpbusd(0, 4, 6); _tile_dpbusd(1, 4, 7); _tile_dpbusd(2, 5, 6); _tile_dpbusd(3, 5, 7);
    }
    _tile_release();
    return 4.0 * 2 * 16 * 16 * 64 * rounds;
#else
    return 0;
#endif
}

double amx_bf16([[maybe_unused]] int64_t rounds) {
#ifdef __AMX_BF16__
    if (!take_tiles()) return 0;
    for (int64_t i = 0; i < rounds; ++i) {
        _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
    }
    _tile_release();
    return 4.0 * 2 * 16 * 16 * 32 * rounds;
#else
    return 0;
#endif
}

double avx512_int8([[maybe_unused]] int64_t rounds) {
#ifdef __AVX512VNNI__
#define VECTOR __m512i
#define CODE "vpdpbusd %2, %1, %0"
    LOOP(2 * 64)
#undef VECTOR
#undef CODE
#else
    return 0;
#endif
}

double avx512_bf16([[maybe_unused]] int64_t rounds) {
#ifdef __AVX512BF16__
#define VECTOR __m512
#define CODE "vdpbf16ps %2, %1, %0"
    LOOP(2 * 32)
#undef VECTOR
#undef CODE
#else
    return 0;
#endif
}

double avx512_float([[maybe_unused]] int64_t rounds) {
#ifdef __AVX512F__
#define VECTOR __m512
#define CODE "vfmadd231ps %2, %1, %0"
    LOOP(2 * 16)
#undef VECTOR
#undef CODE
#else
    return 0;
#endif
}

double avx2_int8([[maybe_unused]] int64_t rounds) {
#if defined(__AVXVNNI__)
#define VECTOR __m256i
#define CODE "%{vex%} vpdpbusd %2, %1, %0"
    LOOP(2 * 32)
#undef VECTOR
#undef CODE
#elif defined(__AVX2__)  // 8 bits to 16, 16 to 32, and the sum
#define VECTOR __m256i
#define CODE "vpmaddubsw %2, %1, %%ymm15; vpmaddwd %2, %%ymm15, %%ymm15; vpaddd %%ymm15, %0, %0"
#undef STEP
#define STEP(I) asm volatile(CODE : "+x"(a##I) : "x"(x), "x"(y) : "xmm15");
    LOOP(2 * 32)
#undef VECTOR
#undef CODE
#else
    return 0;
#endif
}

double avx2_float([[maybe_unused]] int64_t rounds) {
#ifdef __FMA__
#define VECTOR __m256
#define CODE "vfmadd231ps %2, %1, %0"
    LOOP(2 * 8)
#undef VECTOR
#undef CODE
#else
    return 0;
#endif
}

}  // namespace

// Runs a loop of peak.py's table and returns the operations done, two for a multiply-add; 0: not on this processor.
extern "C" double lowbit_peak(int loop, int64_t rounds) {
    static double (*const loops[])(int64_t) = {amx_int8,     avx512_int8, avx2_int8, amx_bf16,
                                               avx512_bf16,  avx512_float, avx2_float};
    return loops[loop](rounds);
}
