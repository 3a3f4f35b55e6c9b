/* Frozen weights laid out as products take them (unpack_panels.c). */
#ifndef LORAKEET_PANELS_H
#define LORAKEET_PANELS_H

#include "stored.h"

#define WIDE 3               /* registers of sums beside each other */
#define PANEL (WIDE * LANES) /* columns of the result at once */

/* Of a weight (out, in) sixteen rows, from `row` on, of which the terms `from` … `to` − 1, as columns of x·Wᵀ: the w-th sixteen of
   panel[to / 2 − from / 2][WIDE][16 rows][2]; rows that are not there are zeros. */
void lay_rows(const Stored *weight, int64_t row, int64_t from, int64_t to, int64_t w, __m512i *panel);

/* Of sixteen rows, from `row` on, the columns of `count` panels, from `first` on, as columns of g·W: the n-th panel's
   panels[n·size + 0 … 7][WIDE][16 columns][2 rows]; columns that are not there are zeros. */
void lay_columns(const Stored *weight, int64_t row, int64_t first, int64_t count, int64_t size, __m512i *panels);

#endif
