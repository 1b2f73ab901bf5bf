#include "adapter_backward_cluster_launch.h"

namespace mosa {

template int room_for_clusters<__nv_bfloat16>(int, int);
template int adapter_backward_cluster_in<__nv_bfloat16>(const AdapterParams&, const AdapterBackward&,
                                                        const AdapterParts&, const ClusterPlan&, float*, float*, void*);

}  // namespace mosa
