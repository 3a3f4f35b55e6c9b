/* Frozen weights packed into panels for products (unpack_panels.c). */
#ifndef LORAKEET_UNPACK_PANELS_H
#define LORAKEET_UNPACK_PANELS_H

#include "stored.h"

#define WIDE 3               /* registers of sums side by side */
#define PANEL (WIDE * LANES) /* columns of the result in a panel */

/* Packs terms `from` … `to` − 1 of sixteen rows of a weight (out, in), from `row`, as columns of x·Wᵀ: the w-th sixteen of
   panel[to / 2 − from / 2][WIDE][16 rows][2]. Rows beyond the weight are zeros. */
void pack_rows(const Stored *weight, int64_t row, int64_t from, int64_t to, int64_t w, __m512i *panel);

/* Packs sixteen rows from `row`, the columns of `count` panels from `first`, as columns of g·W: panel n is
   panels[n·size + 0 … 7][WIDE][16 columns][2 rows]. Columns beyond the weight are zeros. */
void pack_columns(const Stored *weight, int64_t row, int64_t first, int64_t count, int64_t size, __m512i *panels);

#endif
