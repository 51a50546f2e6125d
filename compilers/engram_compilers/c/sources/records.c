#include "platform.h"

#include "records.h"

#include <string.h>

static float from_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static float float32_at(const unsigned char *bytes)
{
    float value;
    memcpy(&value, bytes, sizeof value);
    return value;
}

static uint32_t word_at(const unsigned char *bytes) { return (uint32_t)bytes[0] | (uint32_t)bytes[1] << 8; }

/* A float with few bits of mantissa and exponent; `first_special` is its first magnitude that is not finite. */
static float small_float(uint32_t sign, uint32_t magnitude, int mantissa_bits, int bias, uint32_t first_special)
{
    uint32_t shifted = magnitude << (23 - mantissa_bits);
    float value = 0;
    if (magnitude >= first_special)
        value = from_bits(shifted | 0x7f800000u);
    else if (magnitude >> mantissa_bits)
        value = from_bits(shifted + ((uint32_t)(127 - bias) << 23));
    else /* subnormal: a whole number of the smallest step */
        value = (float)magnitude * from_bits((uint32_t)(128 - bias - mantissa_bits) << 23);
    return sign ? -value : value;
}

static float float16_of(uint32_t bits) { return small_float(bits >> 15, bits & 0x7fff, 10, 15, 0x7c00); }

static float float8_e4m3_of(uint32_t bits) { return small_float(bits >> 7, bits & 0x7f, 3, 7, 0x7f); }

/* E8M0 (OCP MX 1.0): a power of two from 2^-127, the last one NaN. */
static float e8m0_of(uint32_t bits)
{
    if (bits == 0)
        return from_bits(0x00400000u);
    return bits == 255 ? from_bits(0x7fc00000u) : from_bits(bits << 23);
}

static float int4_of(uint32_t half) { return (float)((int)(half ^ 8u) - 8); }

static float scale_at(const engram_record *record, const unsigned char *scales, size_t group)
{
    switch (record->scale) {
    case ENGRAM_SCALE_FLOAT16:
        return float16_of(word_at(scales + 2 * group));
    case ENGRAM_SCALE_FLOAT32:
        return float32_at(scales + 4 * group);
    case ENGRAM_SCALE_E8M0:
        return e8m0_of(scales[group]);
    case ENGRAM_SCALE_NONE:
        break;
    }
    return 1.0f;
}

static void decode_payload(const engram_record *record, const unsigned char *bytes, float *out)
{
    for (size_t i = 0; i < record->columns; i++) {
        switch (record->payload) {
        case ENGRAM_FLOAT32:
            out[i] = float32_at(bytes + 4 * i);
            break;
        case ENGRAM_FLOAT16:
            out[i] = float16_of(word_at(bytes + 2 * i));
            break;
        case ENGRAM_BFLOAT16:
            out[i] = from_bits(word_at(bytes + 2 * i) << 16);
            break;
        case ENGRAM_FLOAT8_E4M3:
            out[i] = float8_e4m3_of(bytes[i]);
            break;
        case ENGRAM_INT8:
            out[i] = (float)(bytes[i] < 128 ? bytes[i] : bytes[i] - 256);
            break;
        case ENGRAM_INT4: /* the low half first */
            out[i] = int4_of(i % 2 ? bytes[i / 2] >> 4 : bytes[i / 2] & 15u);
            break;
        }
    }
}

/* Each product is rounded by itself, payload * scale and then * factor, as the Python runtime does. */
void engram_decode(const engram_record *record, const unsigned char *bytes, float *out)
{
    const unsigned char *scales = bytes + record->payload_bytes;
    decode_payload(record, bytes, out);
    if (record->scale != ENGRAM_SCALE_NONE)
        for (size_t group = 0; group < record->columns / record->scale_columns; group++) {
            float scale = scale_at(record, scales, group);
            for (size_t i = 0; i < record->scale_columns; i++)
                out[group * record->scale_columns + i] *= scale;
        }
    if (record->factor != 1.0f)
        for (size_t i = 0; i < record->columns; i++)
            out[i] *= record->factor;
}
