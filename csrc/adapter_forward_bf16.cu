#include "adapter_forward_launch.h"

namespace mosa {

template int adapter_forward_in<__nv_bfloat16, false>(const AdapterParams&, const AdapterForward&, void*);

}  // namespace mosa
