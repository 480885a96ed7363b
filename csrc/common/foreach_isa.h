// Compiles the row kernels named by RK_ROWS once per instruction-set level:
//   #define RK_ROWS "swiglu/rows.h"
//   #include "common/foreach_isa.h"
// math.h and the rows are compiled inside a namespace, so that they may include only files that are made for
// it (lanes.h, walk.h).
#include "common/isa.h"

namespace rk {
namespace base {
#define RK_LANES 4
#include "common/math.h"
#include RK_ROWS
#undef RK_LANES
}  // namespace base
}  // namespace rk

#if RK_MULTI_ISA
  #pragma GCC push_options
  #pragma GCC target("arch=x86-64-v3,prefer-vector-width=256")
namespace rk {
namespace v3 {
  #define RK_LANES 8
  #include "common/math.h"
  #include RK_ROWS
  #undef RK_LANES
}  // namespace v3
}  // namespace rk
  #pragma GCC pop_options

  #ifdef RK_WITHOUT_V4
namespace rk {
namespace v4 = v3;
}
  #else
    #pragma GCC push_options
    #pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
namespace rk {
namespace v4 {
    #define RK_LANES 16
    #include "common/math.h"
    #include RK_ROWS
    #undef RK_LANES
}  // namespace v4
}  // namespace rk
    #pragma GCC pop_options
  #endif
#endif

#undef RK_ROWS
