#include "adapter_forward_launch.h"

namespace mosa {

template int adapter_forward_in<__half, false>(const AdapterParams&, const AdapterForward&, void*);

}  // namespace mosa
