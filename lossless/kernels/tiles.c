/* Tiles are more state of a thread than systems keep unasked. */

#include "panels.h"

#if defined(TILES)
#include <sys/syscall.h>
#include <unistd.h>

static int granted;

__attribute__((constructor)) static void ask(void) {
    enum { REQUEST = 0x1023, TILE_DATA = 18 }; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA; for all threads, once more is no harm */
    granted = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

int lossless_tiles(void) { return granted ? TILE : 0; }
#else
int lossless_tiles(void) { return 0; }
#endif
