// Kernels with lists of units, apart from the others, which change more often.
#include "adapter_backward_launch.h"
#include "adapter_forward_launch.h"

namespace mosa {

template int adapter_forward_in<float, true>(const AdapterParams&, const AdapterForward&, void*);
template int adapter_backward_in<float, true>(const AdapterParams&, const AdapterBackward&, const TokenBuffers&,
                                              const AdapterParts&, float*, void*);

}  // namespace mosa
