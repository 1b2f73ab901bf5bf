#include "adapter_forward_launch.h"

namespace mosa {

template int adapter_forward_in<float, false>(const AdapterParams&, const AdapterForward&, void*);

}  // namespace mosa
