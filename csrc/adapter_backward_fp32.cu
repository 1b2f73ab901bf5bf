#include "adapter_backward_launch.h"

namespace mosa {

template int adapter_backward_in<float, false>(const AdapterParams&, const AdapterBackward&, const TokenBuffers&,
                                               const AdapterParts&, float*, void*);

}  // namespace mosa
