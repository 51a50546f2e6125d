/* What the code relies on, to be included before all else; a compiler that gives something else is refused here. */
#ifndef ENGRAM_PLATFORM_H
#define ENGRAM_PLATFORM_H

#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE /* madvise and MAP_ANONYMOUS beside C11 */
#endif
#ifndef _FILE_OFFSET_BITS
#define _FILE_OFFSET_BITS 64 /* tables beyond 2 GiB on 32-bit systems */
#endif

#include <float.h>
#include <stdint.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "weights and tables are little-endian, this machine is not"
#endif
#if FLT_EVAL_METHOD != 0
#error "floats must be computed as floats: on 32-bit x86 add -msse2 -mfpmath=sse"
#endif

/* Whether tables are mapped. They are read row by row else: a system maps whole neighbourhoods of the rows that are read,
 * which count as memory of the program, and 32-bit addresses are scarce. */
#ifndef ENGRAM_MAP_TABLES
#define ENGRAM_MAP_TABLES 0
#endif

#endif
