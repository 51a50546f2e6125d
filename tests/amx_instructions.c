/* AMX instructions as functions, for tests that try them one by one; assembly, so that no compiler adds its own. */

#include <stdint.h>

#define CONFIGURE(config) __asm__ volatile("ldtilecfg %0" ::"m"(*(const uint8_t(*)[64])(config)))
#define LOAD(tile, from, stride) \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" tile ::"r"(from), "r"((int64_t)(stride)) : "memory")
#define STORE(tile, to, stride) \
    __asm__ volatile("tilestored %%tmm" tile ", (%0,%1,1)" ::"r"(to), "r"((int64_t)(stride)) : "memory")

#define PRODUCT(instruction)                                                                                        \
    void amx_##instruction(const void *config, const void *a, const void *b, void *c, int64_t a_stride,             \
                           int64_t b_stride, int64_t c_stride) {                                                    \
        CONFIGURE(config);                                                                                          \
        LOAD("0", c, c_stride);                                                                                     \
        LOAD("6", a, a_stride);                                                                                     \
        LOAD("7", b, b_stride);                                                                                     \
        __asm__ volatile(#instruction " %tmm7, %tmm6, %tmm0"); /* AT&T order: b, a, c */                            \
        STORE("0", c, c_stride);                                                                                    \
        __asm__ volatile("tilerelease");                                                                            \
    }

PRODUCT(tdpbssd)
PRODUCT(tdpbsud)
PRODUCT(tdpbusd)
PRODUCT(tdpbuud)

void amx_configure(const void *config) { CONFIGURE(config); }

void amx_configuration(void *config) { __asm__ volatile("sttilecfg %0" : "=m"(*(uint8_t(*)[64])config)); }

void amx_release(void) { __asm__ volatile("tilerelease"); }

/* Copies tile 3, by way of addresses with a scaled index, a displacement and high registers. */
void amx_copy(const uint8_t *from, uint8_t *to, int64_t quarter_stride) {
    register const uint8_t *source __asm__("r13") = from - 0x100;
    register int64_t stride __asm__("r12") = quarter_stride;
    __asm__ volatile("tileloaddt1 0x100(%0,%1,4), %%tmm3" ::"r"(source), "r"(stride) : "memory");
    __asm__ volatile("tilestored %%tmm3, 0x7(%0,%1,4)" ::"r"(to - 7), "r"(quarter_stride) : "memory");
}

/* Stores tile 5 after zeroing it. */
void amx_zeros(void *to, int64_t stride) {
    __asm__ volatile("tilezero %tmm5");
    STORE("5", to, stride);
}

/* tdpbssd with tile 1 as both operands, which an assembler refuses. */
void amx_repeated_operand(void) { __asm__ volatile(".byte 0xc4, 0xe2, 0x73, 0x5e, 0xc1"); }

void amx_other_illegal_instruction(void) { __asm__ volatile("ud2"); }
