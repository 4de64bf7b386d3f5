/* All that compiled.py compiles: the cells, each with the loops that it is made of. */
#include "found_backward.h"
#include "found_forward.h"
#include "mixed_cell.h"
